"""Wall time that includes what a GPU still has to do, and where a job spends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

__all__ = ["Phases", "clock"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def clock(device: torch.device) -> float:
    """Seconds since some start, read when all work given to ``device`` so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Phases:
    """Seconds by phase of a job; each second counts once, in the innermost phase it falls into.

    Measuring waits for a GPU at both ends of every phase.

    Attributes:
        seconds: by name, in the order of the phases' first ends.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = 0.0  # of phases that have ended within the current one

    @contextmanager
    def __call__(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Count what happens inside the block under ``name``."""
        device = device or torch.device("cpu")
        before, self._inside = self._inside, 0.0
        start = clock(device)
        try:
            yield
        finally:
            whole = clock(device) - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inside
            self._inside = before + whole

    def timed(self, name: str, function: Callable[_P, _R], device: torch.device) -> Callable[_P, _R]:
        """The function, its calls counted under ``name``."""

        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with self(name, device):
                return function(*args, **kwargs)

        return call

    def rounded(self) -> dict[str, float]:
        """The seconds to the millisecond."""
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}
