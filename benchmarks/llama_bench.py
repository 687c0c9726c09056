"""Runs a llama-bench binary, llama.cpp's or ik_llama.cpp's, and reads prefill and decode speed from its JSON.

Decode is measured behind the prompt, as `ktcore bench` does: llama.cpp's binary calls that a depth, ik_llama.cpp's -gp.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

FLAGS = {
    "llama.cpp": [],
    # its quickest on a CPU, as its documentation has it: repacking while loading, flash attention, fused experts
    "ik_llama.cpp": ["-rtr", "1", "-fa", "1", "-fmoe", "1"],
}


class PeerError(Exception):
    """A peer failed, or printed something else than its figures."""


def commands(
    peer: str, binary: Path, model: Path, prompt: int, new: int, threads: int, repeats: int
) -> list[list[str]]:
    """The command lines that measure both phases, prefill first.

    Args:
        peer: a key of `FLAGS`.
        repeats: measurements of each phase, behind a warm-up.
    """
    same = [str(binary), "-m", str(model), "-t", str(threads), "-r", str(repeats), "-o", "json", *FLAGS[peer]]
    prefill = [*same, "-p", str(prompt), "-n", "0"]
    if peer == "ik_llama.cpp":
        return [[*prefill, "-gp", f"{prompt},{new}"]]
    return [prefill, [*same, "-p", "0", "-n", str(new), "-d", str(prompt)]]


def measure(calls: list[list[str]]) -> dict[str, float]:
    """Runs `commands`; prefill_tok_s and decode_tok_s, medians of what was measured.

    Raises:
        PeerError: a command failed, or a phase is missing in what they print.
    """
    found: dict[str, float] = {}
    for call in calls:
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        except OSError as error:
            raise PeerError(f"{call[0]}: {error}") from error
        if done.returncode:
            raise PeerError(f"{' '.join(call)} ended with {done.returncode}:\n{done.stderr}")
        found |= figures(done.stdout)
    missing = {"prefill_tok_s", "decode_tok_s"} - found.keys()
    if missing:
        raise PeerError(f"{calls[0][0]} printed no {', '.join(sorted(missing))}")
    return found


def figures(printed: str) -> dict[str, float]:
    """Tokens a second of the tests in llama-bench's JSON: those that generate are decode, the others prefill.

    ik_llama.cpp prints what it does to a model's tensors between the brackets, so each test is read on its own.

    Raises:
        PeerError: a test that lacks its figures, or no test at all.
    """
    found: dict[str, float] = {}
    at = printed.find("{")
    try:
        while at >= 0:
            test, end = json.JSONDecoder().raw_decode(printed, at)
            phase = "decode_tok_s" if test["n_gen"] else "prefill_tok_s"
            found[phase] = statistics.median(test["samples_ts"])
            at = printed.find("{", end)
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"no JSON of llama-bench: {printed[:200]!r}") from error
    if not found:
        raise PeerError(f"no JSON of llama-bench: {printed[:200]!r}")
    return found
