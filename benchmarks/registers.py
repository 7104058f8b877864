"""``python -m benchmarks.registers``: registers, spills and stack of every CUDA kernel, and a gate on what is compiled.

Compiles each file under ``csrc/cuda`` for each architecture; needs nvcc, no GPU. Prints a table. The gate fails
on spilled registers, a stack frame, more registers than a thread can have, ``wgmma`` products that ptxas makes wait for
one another, and, where ``cuobjdump`` is there (``--cuobjdump PATH``), a ``wgmma_head`` without its HGMMA instructions.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["gate", "main", "parse", "products"]

_MOST_REGISTERS = 255
_LEAST_PRODUCTS = 12  # HGMMA of wgmma_head: 4 of 16 units in the first product, 8 or 16 of 16 columns in the second

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_SERIALISED = re.compile(r"\(C75\d\d\)[^\n]*")


def parse(text: str) -> list[dict[str, str]]:
    """The kernels that ``ptxas -v`` named, with registers, stack and spills."""
    return [match.groupdict() for match in _ENTRY.finditer(text)]


def _readable(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return text.split("(")[0].replace("void ", "").replace("tsynd::", "").strip()


def products(sass: str) -> dict[str, int]:
    """How many HGMMA instructions each function of a disassembly has."""
    out: dict[str, int] = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        out[part.split()[0]] = len(re.findall(r"\bHGMMA\.", part))
    return out


def gate(kernels: list[dict[str, str]], said: str, sass: str | None = None) -> list[str]:
    """What is wrong with compiled kernels: those that :func:`parse` found, ptxas' words, and their disassembly."""
    wrong = [text.strip() for text in _SERIALISED.findall(said)]
    for kernel in kernels:
        where = f"{_readable(kernel['name'])} for {kernel['architecture']}"
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        if spilled:
            wrong.append(f"{where} spills {spilled} bytes")
        if int(kernel["stack"]):
            wrong.append(f"{where} has a stack of {kernel['stack']} bytes")
        if int(kernel["registers"]) > _MOST_REGISTERS:
            wrong.append(f"{where} takes {kernel['registers']} registers")
    for name, count in ({} if sass is None else products(sass)).items():
        if "wgmma_head" in name and count < _LEAST_PRODUCTS:
            wrong.append(f"{_readable(name)} has {count} HGMMA instructions, wanted at least {_LEAST_PRODUCTS}")
    return wrong


def _compile(source: Path, architecture: str, cuobjdump: str | None) -> tuple[str, str | None]:
    """What ptxas says, and the disassembly where there is something to make it with."""
    root = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{root}", f"-I{root}/torch/csrc/api/include"]
        done = subprocess.run([*command, "-o", f"{folder}/out", str(source)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        if cuobjdump is None:
            return done.stderr, None
        dumped = subprocess.run([cuobjdump, "-sass", f"{folder}/out"], capture_output=True, text=True, check=True)
    return done.stderr, dumped.stdout


def main() -> int:
    """Print the table; exit code 1 if the gate found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registers", description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["80", "90a"])
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump"), help="the disassembler, for HGMMA")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, str]]] = {}
    wrong: list[str] = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        for architecture in arguments.architectures:
            dump = arguments.cuobjdump if architecture == "90a" else None
            said, sass = _compile(source, architecture, dump)
            kernels = parse(said)
            wrong += gate(kernels, said, sass)
            for kernel in kernels:
                found.setdefault(_readable(kernel["name"]), {})[architecture] = kernel
    print("| kernel | " + " | ".join(f"registers sm_{a}" for a in arguments.architectures) + " | spilled bytes |")
    print("|---|" + "---|" * (len(arguments.architectures) + 1))
    for name, by in sorted(found.items()):
        spills = sum(int(k["stores"]) + int(k["loads"]) for k in by.values())
        registers = " | ".join(by[a]["registers"] if a in by else "–" for a in arguments.architectures)
        print(f"| `{name}` | {registers} | {spills} |")
    if arguments.cuobjdump is None:
        print("no cuobjdump: HGMMA instructions were not counted", file=sys.stderr)
    print("".join(f"{line}\n" for line in wrong), file=sys.stderr, end="")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
