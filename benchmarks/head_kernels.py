"""``head_uncertainty`` by each of its CUDA kernels (``TSYND_CUDA_HEAD``), interleaved, against two bare products."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.harness import Row, check, measure_shapes, tolerance
from benchmarks.head import FLOOR, SHAPES, inputs
from tsynd.ops import operators as ops
from tsynd.ops import reference

__all__ = ["KERNELS", "SHAPES", "chosen", "run", "summary"]

KERNELS = ("fused", "wgmma", "rows")


@contextmanager
def chosen(kernel: str) -> Iterator[None]:
    """Let head_uncertainty take at best this kernel; the operator reads the variable at every call."""
    before = os.environ.get("TSYND_CUDA_HEAD")
    os.environ["TSYND_CUDA_HEAD"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["TSYND_CUDA_HEAD"]
        else:
            os.environ["TSYND_CUDA_HEAD"] = before


def _methods(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    features, heads, slope = inputs(shape, device, dtype)
    flat = heads.flatten(0, 1)
    exact = reference.head_uncertainty(features.double(), heads.double())

    def by(kernel: str) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            with chosen(kernel):
                return ops.head_uncertainty(features, heads)

        return call

    methods: dict[str, Callable[[], object]] = {FLOOR: lambda: (features @ flat.t(), slope @ flat)}
    for kernel in KERNELS:
        check(kernel, by(kernel)(), exact, tolerance(dtype))
        methods[f"tsynd head_uncertainty, {kernel}"] = by(kernel)
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    return measure_shapes(
        "head_kernels", SHAPES, shapes, _methods, floor=FLOOR, device=device, dtype=dtype, seconds=seconds
    )


def summary(rows: list[Row]) -> list[str]:
    """Each kernel's time over the floor."""
    return [f"{row.shape}: {row.method} {row.over_floor:.2f}" for row in rows if row.method != FLOOR]
