"""``head_uncertainty`` against its floor (two bare matrix products) and every plain-torch way to do the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Row, check, measure_shapes, tolerance
from tsynd.ops import operators as ops
from tsynd.ops import reference

__all__ = ["SHAPES", "inputs", "run", "summary"]

# B, D, C, T
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "S1": (1024, 512, 8, 32),
    "S2": (1024, 512, 2, 32),
    "S3": (4096, 512, 8, 20),
    "S4": (1024, 2048, 8, 64),
    "S5": (256, 1024, 1000, 16),
    "S6": (64, 512, 8, 32),
    "G1": (65536, 512, 8, 32),
    "G2": (65536, 2048, 8, 64),
    "G3": (8192, 1024, 1000, 16),
}
DROP = 0.5
COMPILE = os.environ.get("TSYND_BENCH_COMPILE") == "1"  # on a CPU too: half a minute more a shape
FLOOR, OURS = "floor: two bare products", "tsynd head_uncertainty"
LOOP, COMPILED = "T heads, loop", "T heads, batched, compiled (max-autotune)"


def inputs(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, D], a classifier's sampled heads [T, C, D], and something [B, T·C] to multiply back with."""
    images, units, classes, samples = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, units, generator=generator).relu().to(device, dtype)
    weight = (torch.randn(classes, units, generator=generator) / math.sqrt(units)).to(device, dtype)
    mask = ops.dropout_mask(units, DROP, samples, 0, 0, torch.zeros(1, dtype=torch.int64, device=device))
    heads = (weight * mask / (1 - DROP)).to(dtype)
    return features, heads, torch.randn(images, samples * classes, generator=generator).to(device, dtype)


def _methods(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    features, heads, slope = inputs(shape, device, dtype)
    flat = heads.flatten(0, 1)
    shared: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        OURS: lambda: ops.head_uncertainty(features, heads),
        "shared masks, analytic": lambda: peers.shared_analytic(features, heads),
        "shared masks, autograd": lambda: peers.shared_autograd(features, heads),
        "T heads, batched": lambda: peers.batched_passes(features, heads),
        LOOP: lambda: peers.pass_loop(features, heads),
    }
    exact = reference.head_uncertainty(features.double(), heads.double())
    for name, run in shared.items():
        check(name, run(), exact, tolerance(dtype))
    methods: dict[str, Callable[[], object]] = {
        FLOOR: lambda: (features @ flat.t(), slope @ flat),
        **shared,
    }
    if COMPILE or device.startswith("cuda"):
        compiled = torch.compile(peers.shared_analytic, mode="max-autotune-no-cudagraphs", dynamic=False)
        batched = torch.compile(peers.batched_analytic, mode="max-autotune-no-cudagraphs", dynamic=False)
        methods["shared masks, compiled (max-autotune)"] = lambda: compiled(features, heads)
        methods[COMPILED] = lambda: batched(features, heads)
    if device.startswith("cuda"):
        target = torch.empty_like(features)
        methods["device copy of the features"] = lambda: target.copy_(features)
    methods |= peers.laplace_samples(features, heads)
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    return measure_shapes("head", SHAPES, shapes, _methods, floor=FLOOR, device=device, dtype=dtype, seconds=seconds)


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    ours = [row for row in rows if row.method == OURS]
    best = {row.shape: math.inf for row in ours}
    for row in rows:
        if row.method not in (OURS, FLOOR) and "value only" not in row.method and "copy" not in row.method:
            best[row.shape] = min(best[row.shape], row.median_ms)
    mean = math.exp(sum(math.log(row.over_floor) for row in ours) / len(ours))
    gains = ", ".join(f"{row.shape.split()[0]} {best[row.shape] / row.median_ms:.2f}" for row in ours)
    times = {(row.shape, row.method): row.median_ms for row in rows}

    def told(row: Row) -> str:
        """A shape in one line: over the bare products, and how many times as fast as what people write."""
        parts = [f"{row.shape.split()[0]} on {row.device}, {row.dtype}: {row.over_floor:.2f} of two bare products"]
        for name, method in (("torch.compile of the batched T heads", COMPILED), ("their loop", LOOP)):
            if (row.shape, method) in times:
                parts.append(f"{times[row.shape, method] / row.median_ms:.1f} times as fast as {name}")
        return ", ".join(parts)

    return [
        f"head_uncertainty over the floor, geometric mean: {mean:.2f}",
        f"the fastest torch variant over head_uncertainty: {gains}",
        *(told(row) for row in ours),
    ]
