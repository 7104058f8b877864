"""Wall time that includes what a GPU still has to do."""

from __future__ import annotations

import time

import torch

__all__ = ["clock"]


def clock(device: torch.device) -> float:
    """Seconds since some start, read when all work given to ``device`` so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
