"""``python -m benchmarks {head,logits,...,all} [--device] [--dtype] [--shapes] [--seconds] [--json] [--docs]``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.document import update
from benchmarks.harness import describe_machine, print_table, read_json, write_json

# a suite a module with SHAPES, run(shapes, device, dtype, seconds) and summary(rows); shapes for a GPU begin with G
SUITES = ("head", "logits", "dropout", "ascend", "synthesis", "train", "posteriors", "export", "pretrained")
ON_REQUEST = ("head_kernels",)  # not part of all: what a GPU has a choice of


def _shapes(module: Any, device: str) -> list[str]:
    gpu = not device.startswith("cpu")
    own = [name for name in module.SHAPES if name.startswith("G") == gpu]
    return own or list(module.SHAPES)


def main() -> None:
    """Run suites, print their tables and summaries."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, *ON_REQUEST, "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=None, help="names of the suite's shapes; all of the device's")
    parser.add_argument("--seconds", type=float, default=4.0, help="budget per shape")
    parser.add_argument("--json", type=Path, default=None, help="write the rows there, beside those of other suites")
    parser.add_argument("--docs", type=Path, default=None, help="put tables and plot into this Markdown page")
    arguments = parser.parse_args()
    if arguments.docs is not None and not arguments.docs.exists():
        parser.error(f"argument --docs: {arguments.docs} does not exist, wanted a page to put the tables into")
    names = SUITES if arguments.suite == "all" else (arguments.suite,)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    for name, module in modules.items():
        unknown = [shape for shape in arguments.shapes or [] if shape not in module.SHAPES]
        if unknown:
            parser.error(f"argument --shapes: {name} has no {unknown[0]!r}, wanted some of {', '.join(module.SHAPES)}")
    print(describe_machine(arguments.device), flush=True)
    for name, module in modules.items():
        shapes = arguments.shapes or _shapes(module, arguments.device)
        made = module.run(shapes, arguments.device, getattr(torch, arguments.dtype), arguments.seconds)
        print(f"\n{name}\n")
        print_table(made)
        print("\n" + "\n".join(module.summary(made)), flush=True)
        if arguments.json:  # after every suite: what a later one breaks off is not lost
            kept = read_json(arguments.json) if arguments.json.exists() else []
            write_json([row for row in kept if row.suite != name] + made, arguments.json)
        if arguments.docs:
            update(arguments.docs, name, made, module.summary(made))


if __name__ == "__main__":
    main()
