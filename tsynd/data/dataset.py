"""Images, labels and sample ids from whatever a caller has: tensors, arrays, Datasets, DataLoaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.data.checks import as_tensor, check_images, check_labels, shape_of, unit_pixels
from tsynd.utils.errors import InputError

__all__ = ["Batch", "Batches", "DataSource", "ImageSource", "LabelledImages", "at_once", "check_task", "parts"]


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


@dataclass(frozen=True, eq=False)
class LabelledImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels; a map-style `Dataset` kept in memory.

    Attributes:
        images: [N, C, H, W] or, for volumes, [N, C, D, H, W], uint8 or float in [0, 1].
        labels: int64 [N] (multiclass) or float32 [N, L] of 0 and 1 (multilabel).

    Raises:
        InputError: the shapes or the dtype are others than these.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        x = self.images
        if x.ndim not in (4, 5) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(f"images: {shape_of(x)} {x.dtype}; wanted [N, C, H, W] or [N, C, D, H, W], uint8 or float")
        if len(x) != len(self.labels):
            raise InputError(f"labels: {len(self.labels)} for {len(x)} images; wanted one each")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, float32 [C, H, W] or [C, D, H, W] in [0, 1], and its label."""
        return unit_pixels(self.images[index]), self.labels[index]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images at int64 `indices` [n] as float32 [n, C, ...] in [0, 1], and their labels."""
        return unit_pixels(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor) -> LabelledImages:
        """A copy of the images and labels at int64 `indices` [n], in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])

    def pixels(self) -> Tensor:
        """All images as float32 [N, C, ...] in [0, 1]."""
        return unit_pixels(self.images)


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set in its splits.

    Attributes:
        name: what it was loaded from, for reports.
        task: "multiclass" or "multilabel".
        class_names: one per class (multiclass) or label (multilabel).
        train: the labelled training images, `train_size` of them or all.
        unlabelled: the whole training split; its labels are not to be used in training.
        val: validation images.
        test: test images.
        train_indices: int64, the positions of `train` in `unlabelled`, ascending.
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    train: LabelledImages
    unlabelled: LabelledImages
    val: LabelledImages
    test: LabelledImages
    train_indices: Tensor

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, depth, height, width) of volumes."""
        return tuple(self.train.images.shape[1:])

    @property
    def spatial_dims(self) -> int:
        """2 for pictures, 3 for volumes."""
        return len(self.image_shape) - 1

    @property
    def channels(self) -> int:
        """Channels of an image, 1 or 3."""
        return self.image_shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes (multiclass) or labels (multilabel)."""
        return len(self.class_names)


_VALUES = 2**23  # of float images that go through a network at once, which holds tens of times as many


def check_task(task: str) -> None:
    """Refuse an unknown task.

    Raises:
        InputError: neither "multiclass" nor "multilabel".
    """
    if task not in ("multiclass", "multilabel"):
        raise InputError(f"task: got {task!r}, wanted 'multiclass' or 'multilabel'")


def at_once(values: int, most: int = 256) -> int:
    """How many images of so many values each go through a network at once: at most ``most``, fewer large ones."""
    return max(1, min(most, _VALUES // values))


def parts(images: Tensor, most: int = 256) -> tuple[Tensor, ...]:
    """All images [N, ...] in order, as many at a time as :func:`at_once` says."""
    return torch.split(images, at_once(images[:1].numel() or 1, most))


class Batches:
    """One way to read all kinds of data by index.

    Args:
        data: a tensor of images, a pair (images, labels), or anything with ``__len__`` and
            ``__getitem__(i) → image or (image, label)``; its ``batch(indices)`` is used where it has one.
            Images are uint8, or float in [0, 1].
        name: the argument's name in error messages.

    Raises:
        InputError: data that cannot be read this way, or none at all.
    """

    def __init__(self, data: Any, name: str = "data") -> None:
        if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            if len(data[0]) != len(data[1]):
                raise InputError(f"{name}: {len(data[0])} images but {len(data[1])} labels")
        elif not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise InputError(
                f"{name}: got {type(data).__name__}, wanted a pair of tensors (images, labels) or a Dataset"
                " with __len__ and __getitem__"
            )
        self._data = data
        self.name = name
        self.count = len(data[0]) if isinstance(data, (tuple, list)) else len(data)
        self._values = 1
        if self.count == 0:
            raise InputError(f"{name}: holds no images")
        image = self(torch.tensor([0]))[0]
        if image.ndim not in (4, 5):
            raise InputError(f"{name}: an image has shape {list(image.shape[1:])}, wanted [C, H, W] or [C, D, H, W]")
        self._values = image.numel()
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise InputError(f"{name}: the first image holds values in [{low:.4g}, {high:.4g}], wanted [0, 1]")

    def __len__(self) -> int:
        return self.count

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, C, ...], float32 in [0, 1], and labels (None if there are none) at ``indices`` [B]."""
        data, labels = self._data, None
        if isinstance(data, Tensor):
            images = data[indices]
        elif isinstance(data, (tuple, list)):
            images, labels = data[0][indices], data[1][indices]
        elif hasattr(data, "batch"):
            images, labels = data.batch(indices)
        else:
            items = [data[int(index)] for index in indices]
            if isinstance(items[0], (tuple, list)):
                labels = torch.stack([torch.as_tensor(item[1]) for item in items])
                items = [item[0] for item in items]
            images = torch.stack([torch.as_tensor(item) for item in items])
        return (images.float() / 255 if images.dtype == torch.uint8 else images.float()), labels

    def chunks(self, most: int) -> tuple[Tensor, ...]:
        """All indices in order, as many at a time as :func:`at_once` says."""
        return torch.split(torch.arange(self.count), at_once(self._values, most))

    def labels(self, task: str, classes: int) -> Tensor:
        """All labels, int64 [N] in [0, classes) (multiclass) or float32 [N, classes] of 0 and 1 (multilabel).

        Raises:
            InputError: labels that are missing, or do not fit the task or the number of classes.
        """
        own = getattr(self._data, "labels", None)
        if isinstance(own, Tensor):
            labels = own.cpu()
        else:
            parts = [self(indices)[1] for indices in self.chunks(256)]
            if any(part is None for part in parts):
                raise InputError(f"{self.name}: has images but no labels")
            labels = torch.cat([part for part in parts if part is not None])
        shape, name = list(labels.shape), self.name
        if task == "multiclass":
            if labels.ndim != 1 or labels.is_floating_point():
                raise InputError(f"{name}: labels are {labels.dtype} {shape}, wanted integers [N] for multiclass")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                raise InputError(
                    f"{name}: labels lie in [{low}, {high}] but the classifier gives {classes} logits,"
                    f" wanted labels in [0, {classes - 1}]"
                )
            return labels.long()
        if labels.ndim != 2 or labels.shape[1] != classes:
            raise InputError(f"{name}: labels have shape {shape}, wanted [N, {classes}] for multilabel")
        labels = labels.float()
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise InputError(f"{name}: multilabel labels hold other values than 0 and 1")
        return labels
