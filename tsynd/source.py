"""Images, labels and sample ids from whatever a caller has: tensors, arrays, Datasets, DataLoaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.checks import as_tensor, check_images, check_labels
from tsynd.errors import InputError

__all__ = ["Batch", "ImageSource"]


@dataclass(frozen=True)
class Batch:
    """Images [B, C, H, W] or [B, C, D, H, W] in [0, 1], their labels if any, and their ids [B]."""

    images: Tensor
    labels: Tensor | None
    sample_ids: Tensor

    def padded(self, count: int) -> Batch:
        """The last image repeated until there are ``count``."""
        index = torch.arange(count).clamp_max(len(self.images) - 1)
        labels = None if self.labels is None else self.labels[index]
        return Batch(self.images[index], labels, self.sample_ids[index])


class ImageSource:
    """Images, labels and sample ids from whatever the caller has; tensors are checked whole, items one by one."""

    def __init__(self, images: Any, labels: Any, sample_ids: Any, task: str) -> None:
        self._task = task
        self._images: Tensor | None = None
        self._items: Any = None
        self._labels: Tensor | None = None
        if isinstance(images, (Tensor, np.ndarray)):
            pixels = as_tensor(images, "images")
            # eight-bit pixels wait as they are: as float they would take four times the memory
            waits = pixels.dtype == torch.uint8 and pixels.ndim in (4, 5)
            self._images = pixels if waits else check_images(pixels)
            self.first = check_images(self._images[:1])
            self.count: int = len(self._images)
        else:
            self._items = images
            self.count = self._length(images)
            self.first = next(iter(self._from_items(1, probe=True))).images[:1]
        if labels is not None:
            self._labels = check_labels(labels, self.count, task)
        ids = torch.arange(self.count) if sample_ids is None else torch.as_tensor(sample_ids)
        if ids.shape != (self.count,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(
                f"sample_ids: got {ids.dtype} {list(ids.shape)}, wanted one integer for each of {self.count} images"
            )
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
            raise InputError(f"sample_ids: got {int(ids.min())} .. {int(ids.max())}, wanted 0 .. 2^32 - 1")
        self._ids = ids.long()

    @staticmethod
    def _length(images: Any) -> int:
        kind = type(images).__name__
        if (
            isinstance(images, (str, bytes, dict, Path))
            or not hasattr(images, "__len__")
            or not (hasattr(images, "__getitem__") or hasattr(images, "__iter__"))
        ):
            raise InputError(f"images: got {kind}, wanted a tensor, an array, a Dataset or a DataLoader with a length")
        loader = isinstance(images, torch.utils.data.DataLoader)
        count = len(images.dataset) if loader else len(images)
        if loader and images.drop_last and images.batch_size:
            count -= count % images.batch_size
        if count == 0:
            raise InputError(f"images: got an empty {kind}, wanted at least one image")
        return count

    def check_labels(self, classes: int, needed: bool) -> None:
        """Labels against the classifier's classes, before work starts."""
        if self._labels is not None:
            check_labels(self._labels, self.count, self._task, classes)
        elif needed and self._images is not None:
            raise InputError("labels: got None, wanted the images' labels, which label_consistency needs")

    def batches(self, size: int) -> Iterator[Batch]:
        """All images in order, at most ``size`` at once."""
        if self._images is None:
            yield from self._from_items(size)
            return
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            labels = None if self._labels is None else self._labels[part]
            yield Batch(check_images(self._images[part]), labels, self._ids[part])

    def _from_items(self, size: int, probe: bool = False) -> Iterator[Batch]:
        """Items of a Dataset or DataLoader, gathered into batches of ``size``."""
        loader = self._items
        if not isinstance(loader, torch.utils.data.DataLoader):
            loader = torch.utils.data.DataLoader(loader, batch_size=size)
        read = given = 0
        waiting: list[tuple[Tensor, Tensor | None]] = []
        for item in loader:
            images, labels = (item[0], item[1]) if isinstance(item, (tuple, list)) else (item, None)
            try:
                images = check_images(images)
                labels = None if labels is None else check_labels(labels, len(images), self._task)
            except InputError as error:
                raise InputError(f"images {read} .. {read + len(images) - 1}: {error}") from None
            if probe:
                yield Batch(images, labels, torch.zeros(len(images), dtype=torch.int64))
                return
            read += len(images)
            waiting.append((images, labels))
            while read - given >= size:
                batch, waiting = self._take(waiting, given, size)
                given += size
                yield batch
        if read > given:
            yield self._take(waiting, given, read - given)[0]

    def _take(
        self, waiting: list[tuple[Tensor, Tensor | None]], start: int, count: int
    ) -> tuple[Batch, list[tuple[Tensor, Tensor | None]]]:
        """A batch of the first ``count`` waiting images, and what still waits."""
        images = torch.cat([x for x, _ in waiting])
        own = [y for _, y in waiting if y is not None]
        labels = torch.cat(own) if own else None
        rest = [(images[count:], None if labels is None else labels[count:])]
        if self._labels is not None:
            chosen: Tensor | None = self._labels[start : start + count]
        else:
            chosen = None if labels is None else labels[:count]
        return Batch(images[:count], chosen, self._ids[start : start + count]), rest
