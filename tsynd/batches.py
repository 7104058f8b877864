"""One way to read all kinds of labelled images by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsynd.errors import InputError

__all__ = ["Batches", "at_once", "check_task", "parts"]

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
