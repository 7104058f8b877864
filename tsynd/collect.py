"""Results of a synthesis written in place, so that memory beyond them does not grow with the number of images."""

from __future__ import annotations

import torch
from torch import Tensor

from tsynd.ascent import Ascent
from tsynd.source import Batch

__all__ = ["Collector"]


class Collector:
    """Arrays for ``count`` images, allocated at the first batch and filled batch by batch.

    Args:
        count: N, images in all.

    Attributes:
        filled: images so far.
    """

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._arrays: dict[str, Tensor] = {}

    def add(self, batch: Batch, source: Tensor, climbed: Ascent) -> None:
        """Keep a batch's results (tensors on the CPU), which follow those of the batches before.

        Args:
            batch: where they come from.
            source: [B, ...], encoded images.
            climbed: its ascent.
        """
        rows = {
            "images": climbed.images.float(),
            "latents": climbed.latents,
            "source_latents": source,
            "initial_uncertainty": climbed.trajectory[0],
            "uncertainty": climbed.uncertainty,
            "trajectory": climbed.trajectory.t(),
            "status": climbed.status,
            "sample_ids": batch.sample_ids,
        }
        if batch.labels is not None:
            rows["labels"] = batch.labels
        for name, row in rows.items():
            if name not in self._arrays:
                self._arrays[name] = torch.empty((self.count, *row.shape[1:]), dtype=row.dtype)
            self._arrays[name][self.filled : self.filled + len(row)] = row
        self.filled += len(batch.images)

    def arrays(self) -> dict[str, Tensor | None]:
        """The fields of a :class:`tsynd.SynthesisResult`."""
        return {"labels": None, **{name: array[: self.filled] for name, array in self._arrays.items()}}
