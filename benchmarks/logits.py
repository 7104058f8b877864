"""``logits_uncertainty`` against a copy of the same bytes and the ways to do the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.harness import Pair, Row, check, measure_shapes, tolerance
from tsynd.ops import operators as ops
from tsynd.ops import reference

__all__ = ["SHAPES", "run", "summary"]

# B, C, T
SHAPES: dict[str, tuple[int, int, int]] = {
    "L1": (1024, 8, 32),
    "L2": (1024, 2, 32),
    "L3": (16384, 8, 32),
    "L4": (16384, 2, 32),
    "L5": (256, 1000, 16),
    "GL1": (65536, 8, 32),
    "GL2": (65536, 8, 64),
    "GL3": (8192, 1000, 16),
}
FLOOR, OURS = "floor: copy of the logits", "tsynd logits_uncertainty"


def _methods(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    images, classes, samples = shape
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, images, classes, generator=generator).to(device, dtype)
    target = torch.empty_like(logits)
    methods: dict[str, Callable[[], Pair]] = {
        OURS: lambda: ops.logits_uncertainty(logits),
        "plain torch, analytic": lambda: reference.logits_uncertainty(logits),
        "plain torch, autograd": lambda: peers.logits_autograd(logits),
    }
    exact = reference.logits_uncertainty(logits.double())
    for name, run in methods.items():
        check(name, run(), exact, tolerance(dtype))
    return {FLOOR: lambda: target.copy_(logits), **methods}


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    return measure_shapes("logits", SHAPES, shapes, _methods, floor=FLOOR, device=device, dtype=dtype, seconds=seconds)


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    ours = {row.shape.split()[0]: row.over_floor for row in rows if row.method == OURS}
    return ["logits_uncertainty over a copy: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ours.items())]
