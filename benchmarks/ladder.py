"""The rungs that ``make gpu-check`` climbs first: tiny kernels with known answers (tests/gpu/bring_up.cu).

Each rung is a process of its own, so that a fault ends with it; the first that fails is named with what it means, and
the others are climbed all the same.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SOURCE", "Rung", "build", "climb", "lines", "rungs"]

SOURCE = Path(__file__).parents[1] / "tests" / "gpu" / "bring_up.cu"
_SKIPPED = 77
_LIMIT_S = 25.0  # of a rung: the kernels' own clock ends a wait after twenty


@dataclass
class Rung:
    """One rung, what its failure means, and how it ended."""

    name: str
    meaning: str
    result: str = "not run"  # or: holds, skipped, FAILS
    note: str = ""
    seconds: float = 0.0


def build(folder: Path, architecture: str) -> Path:
    """Compile the ladder for ``80``, ``90a`` and so on; Hopper's rungs are compiled for ``90a`` alone.

    Raises:
        RuntimeError: there is no nvcc, or it refuses the source; with its output.
    """
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    program = folder / f"bring_up_{architecture}"
    command = [nvcc, "-std=c++17", "-O2", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-o", str(program)]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(SOURCE)]
    command += ["-DTSYND_SM90A"] if architecture == "90a" else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"nvcc: {error}") from None
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return program


def rungs(program: Path) -> list[Rung]:
    """The ladder's rungs, lowest first; needs no GPU."""
    told = subprocess.run([program, "--list"], capture_output=True, text=True, check=True, timeout=60).stdout
    return [Rung(name, meaning) for name, _, meaning in (line.partition("\t") for line in told.splitlines())]


def climb(program: Path, ladder: list[Rung], seconds: float) -> None:
    """Climb every rung, failed ones below or not, until the time is up."""
    end = time.perf_counter() + seconds
    for rung in ladder:
        start = time.perf_counter()
        limit = min(_LIMIT_S, end - start)
        if limit < 1:
            rung.note = "no time was left"
            continue
        try:
            done = subprocess.run([program, rung.name], capture_output=True, text=True, timeout=limit)
            rung.result = {0: "holds", _SKIPPED: "skipped"}.get(done.returncode, "FAILS")
            rung.note = " ".join((done.stdout + done.stderr).split())[:300]
            if rung.result == "FAILS" and not rung.note:
                rung.note = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            rung.result, rung.note = "FAILS", f"stopped after {limit:.0f} s"
        rung.seconds = time.perf_counter() - start


def lines(ladder: list[Rung]) -> list[str]:
    """A Markdown table of the climb, the first failure with its meaning before it."""
    failed = [rung for rung in ladder if rung.result == "FAILS"]
    out = []
    if failed:
        out += [f"**The first rung that fails is `{failed[0].name}`: {failed[0].meaning}.**", ""]
    out += ["| rung | result | s | |", "|---|---|---|---|"]
    for rung in ladder:
        note = rung.note or (rung.meaning if rung.result == "FAILS" else "")
        out.append(f"| {rung.name} | {rung.result} | {rung.seconds:.1f} | {note} |")
    return out
