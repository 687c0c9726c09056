"""Which instruction sets the functions of a built library use, read from its disassembly."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SYMBOL = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_LINE = re.compile(r"^\s*[0-9a-f]+:\t([0-9a-f ]+)\t(?:\{vex\d?\} )?(\S+)\s*(.*)$")
_PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}

# EVEX instructions that need more than F, BW, DQ and VL; whatever else is EVEX counts as those.
_EVEX = {
    "vnni": r"vpdp(busd|wssd)s?",
    "bf16": r"vdpbf16ps|vcvtne2?ps2bf16",
    "vbmi": r"vperm(b|i2b|t2b)|vpmultishiftqb|vp(compress|expand)[bw]|vpsh[lr]dv?[wdq]",
    "ifma": r"vpmadd52[lh]uq",
    "popcount": r"vpopcnt[bwdq]|vpshufbitqmb",
    "fp16": r"v(?!cvt(ph2psx?|ps2phx?)).*[ps]h",
    "gfni": r"vgf2p8.*",
    "crypto": r"vaes.*|vpclmul.*",
}
_VEX = {
    "amx": r"tile.*|ldtilecfg|sttilecfg|tdp.*|tcmm.*",
    "avx512": r"k(mov|and|andn|or|xor|xnor|not|shift|test|ortest|add|unpck).*",
    "fma": r"vfn?m(add|sub).*",
    "f16c": r"vcvtph2ps|vcvtps2ph",
    "avx_vnni": r"vpdp.*",
    "bmi": r"andn|bextr|bls.*|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx",
    "gfni": r"vgf2p8.*",
    "crypto": r"vaes.*|vpclmul.*",
}
_LEGACY = {  # beyond SSE2, which every x86-64 CPU has
    "sse4": r"pshufb|phadd.*|phsub.*|pabs[bwd]|palignr|pmaddubsw|pmulhrsw|psign.|pblend.*|blendv?p.|ptest|pmov[sz]x.*|"
    r"pmul(dq|ld)|p(ext|ins)r[bdq]|round[sp].|dpp.|insertps|extractps|pcmp(eq|gt)q|packusdw|p(min|max)(s[bd]|u[wd])|"
    r"mpsadbw|crc32.*|popcnt|h(add|sub)p.|addsubp.|mov(dd|shd|sld)up|lddqu|movbe",
}


def feature(code: list[int], mnemonic: str) -> str | None:
    """The instruction set that one instruction needs; None: every x86-64 CPU has it."""
    at = next((i for i, byte in enumerate(code) if byte not in _PREFIXES), 0)
    first = code[at]
    if first == 0x62:
        return _named(_EVEX, mnemonic) or "avx512"
    if first in (0xC4, 0xC5):
        return _named(_VEX, mnemonic) or "avx"
    return _named(_LEGACY, mnemonic)


def features(library: Path) -> dict[str, dict[str, str]]:
    """Of each function (mangled) the features it needs, each with the first instruction that does."""
    found: dict[str, dict[str, str]] = {}
    for name, code, mnemonic, text in _instructions(library):
        needs = found.setdefault(name, {})
        what = feature(code, mnemonic)
        if what is not None:
            needs.setdefault(what, text)
    return found


def _named(table: dict[str, str], mnemonic: str) -> str | None:
    return next((name for name, pattern in table.items() if re.fullmatch(pattern, mnemonic)), None)


def _instructions(library: Path) -> Iterator[tuple[str, list[int], str, str]]:
    # --insn-width: the bytes of one instruction on one line
    command = ["objdump", "-d", "-M", "intel", "--insn-width=16", str(library)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = ""
    for line in out.splitlines():
        if symbol := _SYMBOL.match(line):
            name = symbol[1]
        elif (parts := _LINE.match(line)) and not parts[2].startswith("("):
            code = [int(byte, 16) for byte in parts[1].split()]
            yield name, code, parts[2], f"{parts[2]} {parts[3]}".strip()
