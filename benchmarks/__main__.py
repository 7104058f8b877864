"""``python -m benchmarks head [--device] [--dtype] [--shapes] [--seconds] [--json FILE]``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks import head
from benchmarks.harness import describe_machine, print_table, write_json


def main() -> None:
    """Run one suite and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=["head"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=None, choices=list(head.SHAPES))
    parser.add_argument("--seconds", type=float, default=4.0, help="budget per shape")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    shapes = arguments.shapes or (
        ["S1", "S2", "S3", "S4", "S5", "S6"] if arguments.device == "cpu" else ["G1", "G2", "G3"]
    )
    print(describe_machine(arguments.device))
    rows = head.run(shapes, arguments.device, getattr(torch, arguments.dtype), arguments.seconds)
    print_table(rows)
    ours = [row.over_floor for row in rows if row.method == "tsynd head_uncertainty"]
    mean = math.exp(sum(map(math.log, ours)) / len(ours))
    print(f"\nhead_uncertainty over the floor, geometric mean: {mean:.2f}")
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
