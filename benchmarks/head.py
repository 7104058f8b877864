"""``head_uncertainty`` against its floor (two bare matrix products) and every plain-torch way to do the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Row, measure
from tsynd import ops, reference

__all__ = ["SHAPES", "run"]

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


def _check(name: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float) -> None:
    for part, a, b in zip(("value", "gradient"), got, wanted, strict=True):
        error = float((a.double() - b).abs().max() / b.abs().max())
        if not error <= tolerance:
            raise SystemExit(f"{name}: {part} is off by {error:.1e} (relative to the largest), not timed")


def _methods(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    images, units, classes, samples = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, units, generator=generator).relu().to(device, dtype)
    weight = (torch.randn(classes, units, generator=generator) / math.sqrt(units)).to(device, dtype)
    mask = ops.dropout_mask(units, DROP, samples, 0, 0, torch.zeros(1, dtype=torch.int64, device=device))
    heads = (weight * mask / (1 - DROP)).to(dtype)  # [T, C, D]
    flat = heads.reshape(samples * classes, units)
    slope = torch.randn(images, samples * classes, generator=generator).to(device, dtype)
    ids = torch.arange(images, device=device)

    shared: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "tsynd head_uncertainty": lambda: ops.head_uncertainty(features, heads),
        "shared masks, analytic": lambda: peers.shared_analytic(features, heads),
        "shared masks, autograd": lambda: peers.shared_autograd(features, heads),
        "T heads, batched": lambda: peers.batched_passes(features, heads),
        "T heads, loop": lambda: peers.pass_loop(features, heads),
    }
    exact = reference.head_uncertainty(features.double(), heads.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for name, run in shared.items():
        _check(name, run(), exact, tolerance)
    some = slice(0, min(images, 64))
    _check(
        "tsynd dropout_head_uncertainty",
        ops.dropout_head_uncertainty(features[some], weight, None, DROP, samples, 0, 0, ids[some]),
        reference.dropout_head_uncertainty(
            features[some].double(), weight.double(), None, DROP, samples, 0, 0, ids[some]
        ),
        tolerance,
    )
    methods: dict[str, Callable[[], object]] = {
        "floor: two bare products": lambda: (features @ flat.t(), slope @ flat),
        **shared,
        "tsynd dropout_head_uncertainty": lambda: ops.dropout_head_uncertainty(
            features, weight, None, DROP, samples, 0, 0, ids
        ),
        "T dropout passes, loop": lambda: peers.independent_loop(features, weight, DROP, samples),
    }
    if device.startswith("cuda"):
        compiled = torch.compile(peers.shared_analytic, mode="max-autotune-no-cudagraphs", dynamic=False)
        batched = torch.compile(peers.batched_analytic, mode="max-autotune-no-cudagraphs", dynamic=False)
        target = torch.empty_like(features)
        methods["shared masks, compiled (max-autotune)"] = lambda: compiled(features, heads)
        methods["T heads, batched, compiled (max-autotune)"] = lambda: batched(features, heads)
        methods["device copy of the features"] = lambda: target.copy_(features)
    if images * samples * units * 4 <= 4 << 30:
        methods["T dropout passes, batched"] = lambda: peers.independent_batched(features, weight, DROP, samples)
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    rows: list[Row] = []
    for name in shapes:
        label = f"{name} {'·'.join(map(str, SHAPES[name]))}"
        rows += measure(
            "head",
            label,
            _methods(SHAPES[name], device, dtype),
            floor="floor: two bare products",
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            seconds=seconds,
        )
    return rows
