"""How a long synthesis goes faster: channels-last weights, copies beside the work, the ascent as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from tsynd.synthesis.ascent import Ascent

__all__ = ["GraphedAscent", "fetch", "send"]

Climb = Callable[[Tensor, Tensor, Tensor | None], Ascent]
"""(source latents [B, ...], sample ids [B], labels or None) -> the ascent of that batch."""


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

    The ascent must not depend on anything but its three arguments that changes between batches.

    Args:
        climb: the ascent to capture.
    """

    def __init__(self, climb: Climb) -> None:
        self._climb = climb
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Ascent]] = {}

    def __call__(self, source: Tensor, sample_ids: Tensor, labels: Tensor | None) -> Ascent:
        """The ascent of one batch; its tensors are overwritten by the next call."""
        given = [x for x in (source, sample_ids, labels) if x is not None]
        key = tuple((x.shape, x.dtype) for x in given)
        if key not in self._graphs:
            self._graphs[key] = self._capture(given)
        graph, own, result = self._graphs[key]
        for mine, x in zip(own, given, strict=True):
            mine.copy_(x)
        graph.replay()
        return result

    def _capture(self, given: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Ascent]:
        own = [x.clone() for x in given]
        arguments = (own[0], own[1], own[2] if len(own) > 2 else None)
        # what compiles, tunes or is cached at the first call does so here, outside the capture
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._climb(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._climb(*arguments)
        return graph, own, result
