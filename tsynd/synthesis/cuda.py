"""How a long synthesis goes faster: channels-last weights, copies beside the work, the ascent as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from tsynd.synthesis.ascent import Ascent

__all__ = ["Climb", "GraphedAscent", "fetch", "send"]

Climb = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Ascent]
"""(source latents [B, ...], sample ids [B], labels or None, latents to jump to or None) -> the batch's ascent."""


def send(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU through pinned memory, without waiting for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def fetch(source: Tensor, climbed: Ascent) -> Callable[[], tuple[Tensor, Ascent]]:
    """Begin to copy a batch's results to the CPU; calling what is returned waits for them.

    The results may be overwritten by work that is queued later on the same stream.
    """
    if not source.is_cuda:
        return lambda: (source, climbed)
    names = [field.name for field in fields(Ascent)]
    given = [source, *(getattr(climbed, name) for name in names)]
    hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in given]
    for host, x in zip(hosts, given, strict=True):
        host.copy_(x, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> tuple[Tensor, Ascent]:
        done.synchronize()
        first, *rest = (host.clone() for host in hosts)  # pinned memory goes back to its pool
        return first, Ascent(**dict(zip(names, rest, strict=True)))

    return wait


class GraphedAscent:
    """Runs an ascent as a CUDA graph, captured at the first batch of each shape and replayed for the others.

    The ascent must not depend on anything but its arguments that changes between batches.

    Args:
        climb: the ascent to capture.
    """

    def __init__(self, climb: Climb) -> None:
        self._climb = climb
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Ascent]] = {}

    def __call__(self, source: Tensor, sample_ids: Tensor, labels: Tensor | None, jump: Tensor | None) -> Ascent:
        """The ascent of one batch; its tensors are overwritten by the next call."""
        given = (source, sample_ids, labels, jump)
        key = tuple(None if x is None else (x.shape, x.dtype) for x in given)
        if key not in self._graphs:
            self._graphs[key] = self._capture(given)
        graph, own, result = self._graphs[key]
        for mine, x in zip(own, given, strict=True):
            if mine is not None and x is not None:
                mine.copy_(x)
        graph.replay()
        return result

    def _capture(
        self, given: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Ascent]:
        source, ids, labels, jump = given
        names, jumps = (None if x is None else x.clone() for x in (labels, jump))
        own = source.clone(), ids.clone(), names, jumps
        # what compiles, tunes or is cached at the first call does so here, outside the capture
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._climb(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._climb(*own)
        return graph, own, result
