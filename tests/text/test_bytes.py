"""Bytes of tokens and text from them: exact for odd bytes, whole or one token at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from ktcore.errors import TokenizerError
from ktcore.text.bytes import TokenBytes, Utf8Stream, join
from ktcore.text.tokenizer import Tokenizer

from .test_tokenizer import PRE, SPM, build, metadata, spm_metadata

KINDS = {"byte level": metadata, "sentencepiece": spm_metadata}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return build(KINDS[request.param]())


def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens of one byte each, by byte."""
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    if tokenizer.token_id("<0x41>") is not None:
        ids |= {bytes((byte,)): tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in range(256)}
    return [ids[bytes((byte,))] for byte in range(256)]


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(i) for i in single_bytes(tokenizer)] == [bytes((byte,)) for byte in range(256)]


@given(data=st.binary(max_size=40))
def test_odd_bytes_become_what_python_makes_of_them(tokenizer: Tokenizer, data: bytes) -> None:
    by_byte = single_bytes(tokenizer)
    ids = [by_byte[byte] for byte in data]
    assert b"".join(map(tokenizer.token_bytes, ids)) == data
    assert tokenizer.decode([by_byte[65], *ids]) == "A" + data.decode(errors="replace")


@given(ids=st.lists(st.integers(-2, 1510), max_size=60), skip=st.booleans())
def test_pieces_make_up_exactly_the_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = tokenizer.stream_decoder(skip_special=skip)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


@given(ids=st.lists(st.integers(0, 1500), max_size=40))
def test_valid_text_is_the_backends(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [i for i in ids if i < tokenizer.vocab_size]
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=False)
    ours = tokenizer.decode(ids, skip_special=False)
    # for byte tokens that are no text the SentencePiece decoder gives one U+FFFD a byte, valid ones among them too
    assert ours == theirs or "\ufffd" in theirs


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    by_byte = single_bytes(tokenizer)
    stream = tokenizer.stream_decoder()
    assert [stream.push(by_byte[byte]) for byte in "a漢😀".encode()] == ["a", "", "", "漢", "", "", "", "😀"]
    assert [stream.push(by_byte[byte]) for byte in b"\xe6\xbcA"] == ["", "", "\ufffdA"]


@pytest.mark.parametrize("pieces", [["  a"], [" ", " a"], ["", " ", " ", "a"], [" "], ["a "], []])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_leading_spaces_go_however_they_are_cut(pieces: list[str], leading: int) -> None:
    stream = Utf8Stream(leading)
    text = "".join(stream.push(piece.encode()) for piece in pieces) + stream.push(b"", final=True)
    whole = "".join(pieces)
    expected = whole[min(leading, len(whole) - len(whole.lstrip(" "))) :]
    assert text == expected == join([piece.encode() for piece in pieces], leading)


def test_added_tokens_stand_for_their_spelling() -> None:
    # é is a letter of the byte alphabet, where it means another byte
    entries = metadata(tokens=[*PRE["tokens"], "<é>"], token_type=[*PRE["token_type"], 4])
    assert build(entries).decode(build(entries).encode("a<é>b")) == "a<é>b"


def test_metaspace_is_sentencepiece() -> None:
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(SPM["tokens"])}, merges=[]))
    backend.decoder = decoders.Metaspace()
    known = TokenBytes(backend, "x")
    a = SPM["tokens"].index("▁")
    assert (known(a), known.leading_spaces) == (b" ", 1)


@pytest.mark.parametrize(
    ("decoder", "token"),
    [
        (decoders.ByteLevel(), "a漢Ġ"),  # a letter that stands for no byte: the token is its own spelling
        (decoders.ByteLevel(), "aĠé"),
        (decoders.Replace("▁", " "), "<0x41>"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]), "<0x41>"),
        (decoders.Sequence([decoders.ByteFallback()]), "<0x41>"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]), "▁<0x41"),
    ],
)
def test_odd_spellings_are_read_as_the_library_reads_them(decoder: decoders.Decoder, token: str) -> None:
    backend = Backend(BPE(vocab={token: 0}, merges=[]))
    backend.decoder = decoder
    assert TokenBytes(backend, "folder")(0).decode(errors="replace") == backend.decode([0])


@pytest.mark.parametrize("decoder", [decoders.Strip(" ", 0, 1), decoders.Strip("_", 1, 0)])
def test_what_is_stripped_elsewhere_than_before_the_text_is_refused(decoder: decoders.Decoder) -> None:
    backend = Backend(BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("_", " "), decoder])
    with pytest.raises(TokenizerError, match="decodes by Strip, which is not supported"):
        TokenBytes(backend, "folder")


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC()])
def test_other_decoders_are_refused_by_name(decoder: decoders.Decoder | None) -> None:
    backend = Backend(BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(TokenizerError, match=r"folder: its tokenizer decodes by (nothing|WordPiece|BPEDecoder|CTC)"):
        TokenBytes(backend, "folder")
