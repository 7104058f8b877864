"""``make mutants``: seeded faults in the CUDA sources, each of which the host's kernel tests must find.

A fault (``faults.json``) is a line that says something else: a barrier or a wait left out, an index, a bound. Each is
put alone into a copy of ``csrc`` and ``tests/cpp``; the section of ``test_kernels`` that runs the code is compiled and
run by one order of the threads. A fault is found where a check fails, the emulator refuses, or the program
does not end. Faults that change nothing are listed with the reason, and must stay unfound.

    python tests/cpp/mutants.py [NAME ...] [--jobs N] [--list]

Exit code 1 where a fault is not found (or a harmless one is), or where the sources no longer say what a fault changes.
Needs g++ alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 400


@dataclass(frozen=True)
class Fault:
    """What a line says instead: a file under csrc/cuda, and the section of test_kernels that must notice."""

    file: str
    section: str
    says: str  # the first place where the file does
    instead: str
    harmless: str = ""  # why, where no test can find it


def faults() -> dict[str, Fault]:
    """By name, from faults.json."""
    rows = json.loads(Path(__file__).with_name("faults.json").read_text())
    return {row.pop("name"): Fault(**row) for row in rows}


def run(name: str, fault: Fault | None, section: str) -> tuple[str, str]:
    """('found' | 'not found' | 'stale', what was seen) of one fault; of the sources as they are where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        (copy / "tests").mkdir()
        shutil.copytree(ROOT / "tests" / "cpp", copy / "tests" / "cpp")
        if fault is not None:
            source = copy / "csrc" / "cuda" / fault.file
            text = source.read_text()
            if fault.says not in text:
                return "stale", f"{fault.file} no longer says {fault.says!r}"
            source.write_text(text.replace(fault.says, fault.instead, 1))
        program = copy / "test_kernels"
        command = ["g++", "-std=gnu++17", "-O1", "-w", "-DTSYND_ONE_SECTION", f"-DTSYND_SECTION_{section}"]
        command += [f"-I{copy}/tests/cpp", str(copy / "tests/cpp/test_kernels.cpp"), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            return "stale", f"does not compile: {built.stderr[:300]}"
        try:
            done = subprocess.run([program, "1"], capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return "found", "does not end"
        told = (done.stderr or done.stdout).splitlines()
        return ("found" if done.returncode else "not found"), (told[0] if told else f"exit code {done.returncode}")


def main() -> int:
    """Try the faults that are named, or all; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python tests/cpp/mutants.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="faults whose name contains one of these; all where there are none")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    arguments = parser.parse_args()
    chosen = {n: f for n, f in faults().items() if not arguments.names or any(part in n for part in arguments.names)}
    if arguments.list:
        for name, fault in chosen.items():
            print(f"{fault.file}: {name}" + (f" (harmless: {fault.harmless})" if fault.harmless else ""))
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        sections = sorted({fault.section for fault in chosen.values()})
        for section, (result, seen) in zip(sections, pool.map(lambda s: run("", None, s), sections), strict=True):
            if result != "not found":
                print(f"the sources as they are fail {section}: {seen}")
                return 1
        wrong = 0
        tried = pool.map(lambda item: run(item[0], item[1], item[1].section), chosen.items())
        for (name, fault), (result, seen) in zip(chosen.items(), tried, strict=True):
            good = result == ("not found" if fault.harmless else "found")
            wrong += not good
            why = f"harmless: {fault.harmless}" if fault.harmless and good else seen
            print(f"{'' if good else 'WRONG: '}{result}: {name} [{why}]", flush=True)
    harmless = sum(bool(fault.harmless) for fault in chosen.values())
    print(f"{len(chosen)} faults, {len(chosen) - harmless} to be found, {harmless} harmless; {wrong} not as listed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
