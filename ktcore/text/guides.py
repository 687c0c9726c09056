"""Answers of a given form: a JSON schema, a regular expression or a grammar decides which tokens may come next."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcore.errors import RequestError
from ktcore.text.json_schema import without_idle_words
from ktcore.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# Left free, a model can fill its whole answer with spaces between two tokens of JSON.
_JSON = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,20}"}}
# Control tokens that structure an answer, which a form may demand by their spelling.
_MARK = re.compile(rb"think|tool|arg_|python_tag", re.IGNORECASE)


@dataclass(frozen=True)
class Thought:
    """What a reasoning model says before the answer proper, which no form binds.

    Attributes:
        begin, end: the marks around it.
        begun: the prompt holds `begin` already, so that `end` must come.
        lead: what opens the answer proper, thoughts or none.
    """

    begin: str
    end: str
    begun: bool
    lead: str = ""


class Structures:
    """Makes forms for the answers of one model, by the llguidance library.

    Args:
        vocab: width of the model's logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None

    def json(self, schema: Mapping[str, Any], thought: Thought | None = None, calls: str | None = None) -> Structure:
        """JSON that a schema describes.

        Args:
            calls: a grammar in Lark's syntax; what it describes may be said in place of the form.

        Raises:
            RequestError: the schema is invalid or uses what cannot be enforced, or llguidance is not installed.
        """
        return self._compile({"json_schema": {**without_idle_words(schema), **_JSON}}, thought, calls, True)

    def regex(self, pattern: str, thought: Thought | None = None, calls: str | None = None) -> Structure:
        """Text that a regular expression matches as a whole (Rust's syntax: no look-around, no references).

        Raises:
            RequestError: as `json` does.
        """
        made = json.loads(_through(lambda library: library.LLMatcher.grammar_from_regex(pattern)))
        return self._compile({"lark_grammar": made["grammars"][0]["lark_grammar"]}, thought, calls)

    def grammar(self, source: str, thought: Thought | None = None, calls: str | None = None) -> Structure:
        """Text of a context-free grammar, in Lark's syntax or llama.cpp's GBNF.

        Raises:
            RequestError: as `json` does.
        """
        return self.lark(_through(lambda library: library.grammar_from("grammar", source)), thought, calls)

    def lark(self, source: str, thought: Thought | None = None, calls: str | None = None) -> Structure:
        """Text of a grammar in Lark's syntax, with llguidance's `%json` in it.

        Raises:
            RequestError: as `json` does.
        """
        return self._compile({"lark_grammar": source}, thought, calls)

    def _compile(
        self, body: Mapping[str, Any], thought: Thought | None, calls: str | None, is_json: bool = False
    ) -> Structure:
        parts = [{"lark_grammar": _opening(thought, calls is not None, is_json)}, {"name": "body", **body}]
        if calls is not None:
            parts.append({"name": "calls", "lark_grammar": calls})

        def make(library: Any) -> llguidance.LLMatcher:
            made: llguidance.LLMatcher = library.LLMatcher(
                self._tokens(library), json.dumps({"grammars": parts}), log_level=0
            )
            return made

        matcher = _through(make)
        if matcher.is_error():
            raise RequestError(f"cannot be used: {_told(matcher)}")
        return Structure(matcher, self._blank if is_json else None)

    @functools.cached_property
    def _blank(self) -> np.ndarray[Any, Any]:
        """Which tokens add nothing to JSON: white space, and the ends of answers; bits as llguidance packs them."""
        tokenizer = self._tokenizer
        ends = tokenizer.stop_ids
        blank = [i in ends or not tokenizer.token_bytes(i).strip(b" \n\r\t") for i in range(self._vocab)]
        return np.packbits(np.array(blank, dtype=bool), bitorder="little")

    def _tokens(self, library: Any) -> llguidance.LLTokenizer:
        with self._lock:
            if self._made is None:
                words = _Vocabulary(self._tokenizer, self._vocab)
                wrapped = library.TokenizerWrapper(words)
                self._made = library.LLTokenizer(wrapped, n_vocab=self._vocab, eos_token=words.ends)
            return self._made


class Structure:
    """A form, ready for any number of answers."""

    def __init__(self, matcher: llguidance.LLMatcher, blank: np.ndarray[Any, Any] | None = None) -> None:
        self._matcher = matcher
        self._blank = blank

    def begin(self) -> Guide:
        """What guides one answer."""
        return Guide(self._matcher.deep_copy(), self._blank)


class Guide:
    """How far one answer has come in its form.

    Args:
        blank: tokens that need not be waited for once the form is complete, packed bits; None: all are.
    """

    def __init__(self, matcher: llguidance.LLMatcher, blank: np.ndarray[Any, Any] | None = None) -> None:
        self._matcher = matcher
        self._blank = blank

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits float32 [vocab] with minus infinity for every token that the form forbids here.

        Raises:
            RequestError: the form has become too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, count=logits.shape[-1], bitorder="little").view(bool))
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> bool:
        """Note the token that was drawn; True when the form is complete and nothing can follow.

        Raises:
            RequestError: as `allowed` does.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped()) or self._only_blanks_follow()

    def _only_blanks_follow(self) -> bool:
        """The token that ends JSON may bring white space along, but no further one is asked for."""
        if self._blank is None or not self._matcher.is_accepting():
            return False
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(self._blank)]
        return not (bits & ~self._blank[: len(bits)]).any()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the answer's form cannot be followed further: {_told(self._matcher)}")


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self.ends = sorted(i for i in tokenizer.stop_ids if i < vocab) or [vocab - 1]
        self.eos_token_id = self.ends[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab)]
        self.special_token_ids = sorted({*self.ends, *filter(self._special, range(vocab))})

    def _special(self, token: int) -> bool:
        return self._tokenizer.is_control(token) and not _MARK.search(self.tokens[token])

    def __call__(self, text: str) -> list[int]:
        # fails for bytes, by which llguidance learns that it has to give texts
        return self._tokenizer.encode(text, add_special=False)


def _opening(thought: Thought | None, calls: bool, is_json: bool) -> str:
    """The grammar around the answer proper."""
    lead = json.dumps(thought.lead) if thought is not None and thought.lead else ""
    body = f"{lead} @body" + (r" /[ \n\t]{0,4}/" if is_json else "")
    if calls:
        # whether to call is the model's choice: it is left its own tokens, not made to spell the shortest ones
        body = f'({body} | @calls)\n%llguidance {{"no_forcing": true}}'
    if thought is None:
        return f"start: {body}"
    end = re.escape(thought.end).replace("/", r"\/")
    begin = "" if thought.begun else f"/[ \\n]{{0,4}}/ {json.dumps(thought.begin)} "
    optional = "" if thought.begun else "?"
    gap = r"/[ \n]{0,4}/"
    return f"start: thought{optional} {body}\nthought: {begin}rest {gap}\nrest[lazy]: /(.|\\n)*{end}/\n"


def _told(matcher: llguidance.LLMatcher) -> str:
    """What is wrong, without the library's state and without the whole grammar."""
    told = re.split(r"\n<state>|\n +1 \|", matcher.get_error())[0].strip()
    if "coerce_one_of" in told:  # an option of the library's, which no request can set
        return "oneOf is followed only where no value can fit two of its branches; write anyOf where that is meant"
    return told


def _through(call: Callable[[Any], Any]) -> Any:
    """The result of a call into the library, which is optional."""
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "answers of a given form need the package llguidance, which is not installed",
            "pip install 'ktcore[server]'",
        ) from error
    try:
        return call(llguidance)
    except Exception as error:  # text that is no Unicode, nesting beyond the parser's depth, a malformed grammar
        raise RequestError(f"cannot be used: {error}") from error
