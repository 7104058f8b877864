"""Which CUDA kernels serve which shapes: the launchers' own decisions, for people."""

from __future__ import annotations

from typing import Any

import torch

from tsynd.ops import registration
from tsynd.utils.errors import InputError

__all__ = ["SHAPES", "describe_plans"]

# images, units, classes, samples: the benchmarks' shapes for a GPU, and a newcomer's
SHAPES = {
    "G1": (65536, 512, 8, 32),
    "G2": (65536, 2048, 8, 64),
    "G3": (8192, 1024, 1000, 16),
    "small": (64, 128, 2, 32),
}
# of a device that is not here: shared memory of a block, multiprocessors, compute capability
_KNOWN = {"H100 or H200 (not here)": (227 * 1024, 132, 90), "A100 (not here)": (163 * 1024, 108, 80)}


def _devices() -> dict[str, tuple[int, int, int]]:
    from tsynd.ops import _C  # type: ignore[attr-defined]

    found = {}
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
        # as the launchers see it: only a build with sm_90a kernels asks
        capability = 10 * properties.major + properties.minor if "90a" in _C.build_info()["cuda_architectures"] else 0
        found[properties.name] = (int(shared), int(properties.multi_processor_count), capability)
    return found or _KNOWN


def _text(plan: dict[str, Any]) -> str:
    rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plan.items() if key != "kernel" and value)
    return f"{plan['kernel']}: {rest}" if rest else str(plan["kernel"])


def describe_plans() -> list[tuple[str, str, str, str]]:
    """Rows (device, shape, operator, plan) for every GPU here, or for known ones where there is none.

    What ``head_uncertainty`` takes follows ``TSYND_CUDA_HEAD``; what it would take at ``wgmma`` has a row of its own
    where that differs.

    Raises:
        InputError: the compiled extension did not load, so there are no plans; or ``TSYND_CUDA_HEAD`` names no kernel.
    """
    if not registration.compiled:
        raise InputError("plan: the compiled extension did not load, wanted it: plain torch has no plans")
    from tsynd.ops import _C  # type: ignore[attr-defined]

    rows = []
    for device, limits in _devices().items():
        for name, (images, units, classes, samples) in SHAPES.items():
            shape = f"{name} B {images} D {units} C {classes} T {samples}"
            for narrow in (True, False):
                kind = "bfloat16" if narrow else "float32"
                size = (images, units, classes, samples, "multiclass", narrow, *limits)
                try:
                    head = _C.plan_head(*size)
                except ValueError as error:
                    raise InputError(str(error)) from None
                rows.append((device, shape, f"head_uncertainty {kind}", _text(head)))
                best = _C.plan_head(*size, best="wgmma")
                if best != head:
                    rows.append((device, shape, f"  with TSYND_CUDA_HEAD=wgmma {kind}", _text(best)))
                dropout = _C.plan_dropout_head(units, classes, samples, narrow, *limits[:2])
                rows.append((device, shape, f"dropout_head_uncertainty {kind}", _text(dropout)))
            logits = _C.plan_logits(samples, classes, "multiclass", *limits[:2])
            rows.append((device, shape, "logits_uncertainty", _text(logits)))
    return rows
