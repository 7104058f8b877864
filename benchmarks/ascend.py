"""``ascend_`` against a copy of as many bytes as it reads and writes, and against the same step in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Row, check, measure_shapes, tolerance
from tsynd.ops import operators as ops
from tsynd.ops import reference

__all__ = ["SHAPES", "run", "summary"]

# images, values of a latent: 8 x 7 x 7 and 4 x 32 x 32 and 4 x 64 x 64 are usual
SHAPES: dict[str, tuple[int, int]] = {
    "A1": (336, 392),
    "A2": (1024, 4096),
    "A3": (4096, 4096),
    "A4": (64, 16384),
    "GA1": (65536, 4096),
    "GA2": (4096, 16384),
}
FLOOR = "floor: copy of as many bytes"
STEP, RADIUS = 0.01, 20.0


def _methods(shape: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    origin, offset, gradient = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(3))
    latents = origin + 0.01 * offset
    rules: dict[str, Callable[[Tensor, str], object]] = {
        "tsynd ascend_": lambda z, rule: ops.ascend_(z, gradient, origin, STEP, RADIUS, rule),
        "plain torch": lambda z, rule: peers.ascend(z, gradient, origin, STEP, RADIUS, rule),
    }
    # three arrays are read and one is written: a copy of two arrays' size moves as much
    source, target = (torch.zeros(2 * latents.numel(), device=device, dtype=dtype) for _ in range(2))
    methods: dict[str, Callable[[], object]] = {FLOOR: lambda: target.copy_(source)}
    for rule in reference.RULES:
        exact = latents.double()
        reference.ascend_(exact, gradient.double(), origin.double(), STEP, RADIUS, rule)
        for name, run in rules.items():
            given = latents.clone()
            run(given, rule)
            check(name, (given,), (exact,), tolerance(dtype))
            methods[f"{name}, {rule}"] = lambda run=run, rule=rule: run(latents, rule)  # type: ignore[misc]
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    return measure_shapes("ascend", SHAPES, shapes, _methods, floor=FLOOR, device=device, dtype=dtype, seconds=seconds)


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    lines = []
    for rule in reference.RULES:
        ours = {row.shape.split()[0]: row.over_floor for row in rows if row.method == f"tsynd ascend_, {rule}"}
        lines.append(f"ascend_ ({rule}) over a copy: " + ", ".join(f"{name} {r:.2f}" for name, r in ours.items()))
    return lines
