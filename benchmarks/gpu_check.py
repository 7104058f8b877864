"""``make gpu-check OUT=DIR``: a ladder, tests, sanitizer and benchmarks on a machine with a GPU, into one report.

First the ladder (:mod:`benchmarks.ladder`), under a minute: tiny kernels with known answers, then each operator at its
smallest shape. Then the plans' edges, the sanitizer, the tables. Nothing that fails stops what comes after it.

Needs torch with CUDA, numpy and pytest; what else is there is used, what is missing is said in the report. Every step
is bounded, so that with its build the whole takes less than ten minutes and a step that hangs costs no other. Without
OUT nothing is run: the ladder is compiled for every architecture, and rungs and steps are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import ladder
from benchmarks.harness import describe_machine

__all__ = ["OPERATORS", "SANITIZED", "Step", "main"]

OPERATORS = (
    *("logits_uncertainty", "head_uncertainty", "dropout_head_uncertainty", "expected_information", "dropout_mask"),
    *("dropout_expand", "dropout_gather", "ascend_"),
)
_LADDER_S = 60.0


@dataclass
class Step:
    """One command of the check and how it ended."""

    name: str
    command: list[str]
    limit_s: int
    passed: bool | None = None  # None: not run
    seconds: float = 0.0
    note: str = ""
    output: str = field(default="", repr=False)


# what the sanitizer's tools watch, by what the step's name adds
SANITIZED = {
    "": "not wgmma and ((test_head or test_dropout_head) and (130 or 33) and multiclass or own_stream"
    " or test_expected_information and 130)",
    " of wgmma_head": "wgmma and ((130 or 300) and mutual_information or own_stream)",
}


def _steps(parts: Path, device: str) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-rs"]
    steps = []
    if device != "cpu":  # an operator a process: the fault of one is its own
        for name in OPERATORS:
            smallest = [*pytest, "tests/gpu/test_cuda.py", "-k", f"test_smallest[{name}-"]
            steps.append(Step(f"smallest shape of {name}", smallest, 20))
    steps += [
        Step("GPU tests", [*pytest, "--maxfail", "10", "tests/gpu", "-k", "not wgmma"], 120),
        # a kernel that no default takes: in a process of its own, so that its failure is its own
        Step("GPU tests of wgmma_head", [*pytest, "--maxfail", "10", "tests/gpu", "-k", "wgmma"], 60),
        Step("operator tests on every device", [*pytest, "--maxfail", "10", "tests/ops/test_operators.py"], 180),
    ]
    # a step a shape: what one of them costs to compile and measure is not lost with another
    shapes = [("bfloat16", "G1"), ("bfloat16", "G2"), ("bfloat16", "G3"), ("float32", "G1")]
    for dtype, shape in [("bfloat16", "S1"), ("float32", "S1")] if device == "cpu" else shapes:
        rows = str(parts / f"{dtype}-{shape}.json")
        command = [python, "-m", "benchmarks", "head", "--device", device, "--dtype", dtype, "--shapes", shape]
        steps.append(Step(f"benchmark head {dtype} {shape}", [*command, "--seconds", "3", "--json", rows], 80))
    if device != "cpu":
        for shape in ("G1", "G2"):
            rows = str(parts / f"kernels-{shape}.json")
            command = [python, "-m", "benchmarks", "head_kernels", "--device", device, "--dtype", "bfloat16"]
            command += ["--shapes", shape, "--seconds", "2", "--json", rows]
            steps.append(Step(f"benchmark head kernels bfloat16 {shape}", command, 40))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        for what, which in SANITIZED.items():
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-x", "tests/gpu", "-k", which]
            steps.append(Step(f"compute-sanitizer {tool}{what}", command, 80))
    return steps


def _run(step: Step, log: Path, left: float) -> None:
    """Run a step with its output in ``log``, as far as it came."""
    if "compute-sanitizer" in step.name and not Path(step.command[0]).exists():
        step.note = "compute-sanitizer is not installed"
        return
    if step.name.startswith("operator tests") and importlib.util.find_spec("hypothesis") is None:
        step.note = "hypothesis is not installed"
        return
    limit = min(step.limit_s, left)
    if limit < 5:
        step.note = "no time was left"
        return
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                step.command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=dict(os.environ), check=False
            ).returncode
            step.passed = code == 0
            step.note = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            step.passed, step.note = False, f"stopped after {limit:.0f} s"
    step.seconds = time.perf_counter() - start
    step.output = log.read_text(encoding="utf-8", errors="replace")
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)[^\n]*", step.output)
    step.note = "; ".join(filter(None, [step.note, counts[-1] if counts else ""]))


def _report(steps: list[Step], climbed: list[ladder.Rung], device: str) -> str:
    lines = ["# GPU check", "", describe_machine(device), ""]
    if climbed:
        lines += ["## Ladder", "", *ladder.lines(climbed), ""]
    lines += ["## Steps", "", "| step | result | s | |", "|---|---|---|---|"]
    for step in steps:
        result = "not run" if step.passed is None else "passed" if step.passed else "**failed**"
        lines.append(f"| {step.name} | {result} | {step.seconds:.0f} | {step.note} |")
    for step in steps:
        if step.name.startswith("benchmark") and step.passed:
            lines += ["", f"## {step.name}", "", *step.output.splitlines()]
        elif step.passed is False:
            lines += ["", f"## {step.name}: end of the log", "", "```", *step.output.splitlines()[-60:], "```"]
    return "\n".join(lines) + "\n"


def _write(out: Path, steps: list[Step], climbed: list[ladder.Rung], parts: Path, device: str) -> None:
    """The report, the steps, all output in one file and all measured rows in one."""
    (out / "gpu-check.md").write_text(_report(steps, climbed, device))
    (out / "ladder.json").write_text(json.dumps([asdict(rung) for rung in climbed], indent=1) + "\n")
    told = [{key: value for key, value in asdict(step).items() if key != "output"} for step in steps]
    (out / "gpu-check.json").write_text(json.dumps(told, indent=1) + "\n")
    (out / "gpu-check.log").write_text("".join(f"=== {step.name}\n{step.output}\n" for step in steps))
    rows = [row for path in sorted(parts.glob("*.json")) for row in json.loads(path.read_text())]
    (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


def _climb(folder: Path) -> list[ladder.Rung]:
    """Build the ladder for the GPU that is there and climb it; a ladder of one failed rung where it does not build."""
    major, minor = torch.cuda.get_device_capability()
    try:
        program = ladder.build(folder, "90a" if (major, minor) == (9, 0) else f"{major}{minor}")
    except RuntimeError as error:
        return [ladder.Rung("build", "nvcc is missing or refuses the ladder", "FAILS", str(error)[-300:])]
    climbed = ladder.rungs(program)
    ladder.climb(program, climbed, _LADDER_S)
    return climbed


def _dry_run(folder: Path, device: str) -> int:
    """Compile every rung for every architecture, print them and the steps, run none."""
    failed = False
    named: list[ladder.Rung] = []
    for architecture in ("80", "90a"):
        try:
            named = ladder.rungs(ladder.build(folder, architecture))
            print(f"ladder for sm_{architecture}: compiled", flush=True)
        except RuntimeError as error:
            failed = True
            print(f"ladder for sm_{architecture}: does not compile\n{error}", flush=True)
    for rung in named:
        print(f"rung {rung.name}: not run (fails where: {rung.meaning})")
    for step in _steps(folder, device):
        print(f"step {step.name}: not run (at most {step.limit_s} s): {' '.join(step.command[1:])}")
    print("dry run: nothing was run; say where to for a check: make gpu-check OUT=DIR")
    return int(failed)


def main() -> int:
    """Run all steps; exit code 1 if one failed, 2 if there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="folder of the report, all output and the raw rows")
    parser.add_argument("--device", default="cuda", help="cpu tries the check itself out")
    parser.add_argument("--seconds", type=float, default=420, help="budget for all steps after the ladder")
    parser.add_argument("--only", default="", help="run steps whose name contains this; 'ladder': the rungs alone")
    arguments = parser.parse_args()
    if arguments.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _dry_run(Path(folder), arguments.device)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)
        climbed: list[ladder.Rung] = []
        if arguments.device != "cpu" and arguments.only in ("", "ladder"):
            climbed = _climb(parts)
            print("\n".join(ladder.lines(climbed)), flush=True)
        end = time.perf_counter() + arguments.seconds
        steps = [step for step in _steps(parts, arguments.device) if arguments.only in step.name]
        _write(out, steps, climbed, parts, arguments.device)
        for step in steps:
            _run(step, parts / "output.log", end - time.perf_counter())
            print(f"{step.name}: {step.passed} in {step.seconds:.0f} s {step.note}", flush=True)
            _write(out, steps, climbed, parts, arguments.device)
    return int(any(step.passed is False for step in steps) or any(rung.result == "FAILS" for rung in climbed))


if __name__ == "__main__":
    sys.exit(main())
