"""No instruction outside the units that are chosen by what the CPU has: read from the built module's disassembly."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ktcore_cpu import _native

from .opcodes import features

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs x86-64 and binutils"
)

AVX2 = {"sse4", "avx", "fma", "f16c"}
AVX512 = AVX2 | {"avx512"}
Found = dict[str, dict[str, str]]
ALLOWED = {  # namespace ktcore::isa_NAME: what its functions may use; all other code: nothing beyond SSE2
    "avx2": AVX2,
    "avx_vnni": AVX2 | {"avx_vnni"},
    "avx_vnni_emulated": AVX2,
    "avx512": AVX512,
    "avx512_vnni": AVX512 | {"vnni"},
    "avx512_bf16": AVX512 | {"vnni", "bf16", "vbmi", "gfni"},
    "amx": AVX512 | {"vnni", "bf16", "vbmi", "gfni", "amx"},
    "amx_emulated": AVX2,
}


def unit_of(symbol: str) -> str:
    """The unit that a mangled name belongs to, clones and inner functions too."""
    match = re.search(r"N6ktcore(\d+)(isa_\w+)", symbol)
    if match is None:
        return "baseline"
    name, rest = match[2][: int(match[1])], match[2][int(match[1]) :]
    inside = re.match(r"L?\d", rest)  # another name follows: it was a namespace
    return name.removeprefix("isa_") if inside else "baseline"


def violations(found: Found, allowed: dict[str, set[str]]) -> list[str]:
    """Functions that need what their unit may not use."""
    return [
        f"{symbol} (unit {unit_of(symbol)}) uses {what}: {text}"
        for symbol, needs in found.items()
        for what, text in needs.items()
        if what not in allowed.get(unit_of(symbol), set())
    ]


@pytest.fixture(scope="module")
def module() -> Found:
    return features(Path(_native.__file__))


def test_the_module_keeps_its_symbols(module: Found) -> None:
    """Without them nothing below would look at anything."""
    units = {unit_of(symbol) for symbol in module}
    assert units == {"baseline", "scalar", *ALLOWED}


def test_no_unit_uses_an_instruction_that_it_is_not_chosen_for(module: Found) -> None:
    assert violations(module, ALLOWED) == []


@pytest.mark.parametrize(
    ("unit", "instructions"),
    [
        ("avx2", {"avx", "fma", "f16c"}),
        ("avx_vnni", {"avx", "avx_vnni"}),
        ("avx512", {"avx512"}),
        ("avx512_vnni", {"avx512", "vnni"}),
        ("amx", {"avx512", "amx"}),
    ],
)
def test_units_do_hold_their_instructions(module: Found, unit: str, instructions: set[str]) -> None:
    """What the test above finds nothing of is really looked for."""
    assert instructions <= {what for symbol, needs in module.items() if unit_of(symbol) == unit for what in needs}


SOURCE = """
#include <immintrin.h>
namespace ktcore {
namespace isa_avx2 { __m256 twice(__m256 x) { return _mm256_add_ps(x, x); } }
namespace isa_avx512 { __m512 twice(__m512 x) { return _mm512_add_ps(x, x); } }
namespace isa_new { __m512i dot(__m512i a, __m512i b) { return _mm512_dpbusd_epi32(a, b, b); } }
namespace isa_vex { __m256i dot(__m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(a, b, b); } }
namespace isa_tiles { void zero() { _tile_zero(0); } }
int masked(__m512i a, __m512i b) { return _mm512_cmpeq_epi32_mask(a, b); }
float plain(float x) { return x + x; }
}
"""


def test_instructions_in_the_wrong_place_are_found(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source, built = tmp_path / "probe.cpp", tmp_path / "probe.o"
    source.write_text(SOURCE)
    flags = ["-mavx512f", "-mavx512vnni", "-mavxvnni", "-mamx-tile"]
    subprocess.run([compiler, "-O2", *flags, "-c", str(source), "-o", str(built)], check=True)
    found = features(built)
    text = "\n".join(violations(found, {"avx2": AVX2, "avx512": AVX2}))
    assert "isa_avx2" not in text
    assert re.search(r"isa_avx512.* uses avx512: vaddps zmm", text)
    assert re.search(r"isa_new.* uses vnni: vpdpbusd", text)
    assert re.search(r"isa_vex.* uses avx_vnni: .*vpdpbusd ymm", text)
    assert re.search(r"isa_tiles.* uses amx: tilezero", text)
    assert re.search(r"masked.* uses avx512: ", text)
    assert re.search(r"plain.* uses avx: ", text)
    assert violations(found, dict.fromkeys(("avx2", "avx512", "new"), AVX512 | {"vnni"})) != []
