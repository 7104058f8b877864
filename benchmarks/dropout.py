"""``dropout_head_uncertainty``: a mask per image and pass, against T passes of nn.Dropout and against baal."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.harness import Row, check, measure_shapes, tolerance
from benchmarks.head import DROP, FLOOR, SHAPES
from tsynd.ops import operators as ops
from tsynd.ops import reference

__all__ = ["SHAPES", "run", "summary"]

OURS, LOOP = "tsynd dropout_head_uncertainty", "T dropout passes, loop"


def _methods(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    images, units, classes, samples = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, units, generator=generator).relu().to(device, dtype)
    weight = (torch.randn(classes, units, generator=generator) / math.sqrt(units)).to(device, dtype)
    flat = weight.repeat(samples, 1)
    slope = torch.randn(images, samples * classes, generator=generator).to(device, dtype)
    ids = torch.arange(images, device=device)
    some = slice(0, min(images, 64))
    check(
        OURS,
        ops.dropout_head_uncertainty(features[some], weight, None, DROP, samples, 0, 0, ids[some]),
        reference.dropout_head_uncertainty(
            features[some].double(), weight.double(), None, DROP, samples, 0, 0, ids[some]
        ),
        tolerance(dtype),
    )
    methods: dict[str, Callable[[], object]] = {
        FLOOR: lambda: (features @ flat.t(), slope @ flat),
        OURS: lambda: ops.dropout_head_uncertainty(features, weight, None, DROP, samples, 0, 0, ids),
        LOOP: lambda: peers.independent_loop(features, weight, DROP, samples),
    }
    if images * samples * units * 4 <= 4 << 30:
        methods["T dropout passes, batched"] = lambda: peers.independent_batched(features, weight, DROP, samples)
    methods |= peers.baal_passes(features, weight, DROP, samples)
    value = ops.dropout_head_uncertainty(features, weight, None, DROP, samples, 0, 0, ids)[0]
    for name, run in methods.items():
        if name not in (FLOOR, OURS):  # masks of their own: the same law, so the same mean
            peers.check_law(name, run(), value)
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`benchmarks.head.SHAPES`."""
    return measure_shapes("dropout", SHAPES, shapes, _methods, floor=FLOOR, device=device, dtype=dtype, seconds=seconds)


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    time = {(row.shape.split()[0], row.method): row.median_ms for row in rows}
    gains = ", ".join(f"{shape} {time[shape, LOOP] / ours:.0f}" for (shape, m), ours in time.items() if m == OURS)
    return [f"the loop of T passes over dropout_head_uncertainty: {gains}"]
