"""``make gpu-check OUT=DIR``: tests, sanitizer and benchmarks on a machine with a GPU, into one report.

Needs torch with CUDA, numpy and pytest; what else is there is used, what is missing is said in the report. Every step
is bounded, so that with its build the whole takes less than eight minutes and a step that hangs costs no other.
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

from benchmarks.harness import describe_machine

__all__ = ["Step", "main"]


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


def _steps(parts: Path, device: str) -> list[Step]:
    python = sys.executable
    steps = [
        Step("GPU tests", [python, "-m", "pytest", "-x", "tests/gpu", "-rs", "-k", "not wgmma"], 120),
        # a kernel that no default takes: in a process of its own, so that its failure is its own
        Step("GPU tests of wgmma_head", [python, "-m", "pytest", "-x", "tests/gpu", "-rs", "-k", "wgmma"], 60),
        Step("operator tests on every device", [python, "-m", "pytest", "tests/ops/test_operators.py"], 180),
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
        few = ["tests/gpu", "-k", "(test_head or test_dropout_head) and (130 or 33) and multiclass or own_stream"]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-m", "pytest", "-x", *few]
        steps.append(Step(f"compute-sanitizer {tool}", command, 80))
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


def _report(steps: list[Step], device: str) -> str:
    lines = ["# GPU check", "", describe_machine(device), "", "| step | result | s | |", "|---|---|---|---|"]
    for step in steps:
        result = "not run" if step.passed is None else "passed" if step.passed else "**failed**"
        lines.append(f"| {step.name} | {result} | {step.seconds:.0f} | {step.note} |")
    for step in steps:
        if step.name.startswith("benchmark") and step.passed:
            lines += ["", f"## {step.name}", "", *step.output.splitlines()]
        elif step.passed is False:
            lines += ["", f"## {step.name}: end of the log", "", "```", *step.output.splitlines()[-60:], "```"]
    return "\n".join(lines) + "\n"


def _write(out: Path, steps: list[Step], parts: Path, device: str) -> None:
    """The report, the steps, all output in one file and all measured rows in one."""
    (out / "gpu-check.md").write_text(_report(steps, device))
    told = [{key: value for key, value in asdict(step).items() if key != "output"} for step in steps]
    (out / "gpu-check.json").write_text(json.dumps(told, indent=1) + "\n")
    (out / "gpu-check.log").write_text("".join(f"=== {step.name}\n{step.output}\n" for step in steps))
    rows = [row for path in sorted(parts.glob("*.json")) for row in json.loads(path.read_text())]
    (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> int:
    """Run all steps; exit code 1 if one failed, 2 if there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the report, all output and the raw rows")
    parser.add_argument("--device", default="cuda", help="cpu tries the check itself out")
    parser.add_argument("--seconds", type=float, default=370, help="budget for all steps")
    parser.add_argument("--only", default="", help="run steps whose name contains this")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)
        steps = [step for step in _steps(parts, arguments.device) if arguments.only in step.name]
        for step in steps:
            _run(step, parts / "output.log", end - time.perf_counter())
            print(f"{step.name}: {step.passed} in {step.seconds:.0f} s {step.note}", flush=True)
            _write(out, steps, parts, arguments.device)
    return int(any(step.passed is False for step in steps))


if __name__ == "__main__":
    sys.exit(main())
