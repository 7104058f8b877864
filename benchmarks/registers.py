"""``python -m benchmarks.registers``: registers, spills and shared memory of every CUDA kernel, as ptxas tells.

Compiles each file under ``csrc/cuda`` for each architecture; needs nvcc, no GPU. Prints a Markdown table. What ptxas
says of ``wgmma`` products that it makes wait for one another goes to standard error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["main", "parse"]

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


def _compile(source: Path, architecture: str) -> str:
    root = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{root}", f"-I{root}/torch/csrc/api/include"]
        done = subprocess.run([*command, "-o", f"{folder}/out", str(source)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def main() -> int:
    """Print the table; exit code 1 if a kernel spills or its products are serialised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registers", description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=["80", "90a"])
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, str]]] = {}
    serialised: list[str] = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        for architecture in arguments.architectures:
            said = _compile(source, architecture)
            serialised += _SERIALISED.findall(said)
            for kernel in parse(said):
                found.setdefault(_readable(kernel["name"]), {})[architecture] = kernel
    print("| kernel | " + " | ".join(f"registers sm_{a}" for a in arguments.architectures) + " | spilled bytes |")
    print("|---|" + "---|" * (len(arguments.architectures) + 1))
    spilled = 0
    for name, by in sorted(found.items()):
        spills = sum(int(k["stores"]) + int(k["loads"]) for k in by.values())
        spilled += spills
        registers = " | ".join(by[a]["registers"] if a in by else "–" for a in arguments.architectures)
        print(f"| `{name}` | {registers} | {spills} |")
    print("\n".join(serialised), file=sys.stderr, end="")
    return int(spilled > 0 or bool(serialised))


if __name__ == "__main__":
    sys.exit(main())
