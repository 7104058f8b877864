"""Scores of a classifier on clean and on disturbed images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.checks import resolve_device
from tsynd.errors import InputError, require

__all__ = ["CONDITIONS", "Batches", "Condition", "evaluate", "gaussian_noise", "rotation", "scores"]

Condition: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""(images [B, C, H, W] in [0, 1], their indices [B], seed) → images of the same shape in [0, 1]."""


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
        if self.count == 0:
            raise InputError(f"{name}: holds no images")
        image = self(torch.tensor([0]))[0]
        if image.ndim != 4:
            raise InputError(f"{name}: an image has shape {list(image.shape[1:])}, wanted [C, H, W]")
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise InputError(f"{name}: the first image holds values in [{low:.4g}, {high:.4g}], wanted [0, 1]")

    def __len__(self) -> int:
        return self.count

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, C, H, W], float32 in [0, 1], and labels (None if there are none) at ``indices`` [B]."""
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

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        """All indices in order, ``size`` at a time."""
        return torch.split(torch.arange(self.count), size)

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


def _generators(indices: Tensor, seed: int) -> Iterator[torch.Generator]:
    """One random stream per image, addressed by (seed, index): a batch's make-up cannot matter."""
    generator = torch.Generator()
    for index in indices.tolist():
        # torch's CPU engine uses 32 bits of its seed; the odd constant keeps streams of two seeds apart.
        yield generator.manual_seed((seed * 0x9E3779B1 + index) & 0xFFFFFFFF)


def gaussian_noise(images: Tensor, indices: Tensor, seed: int, *, sigma: float = 0.05) -> Tensor:
    """Add Gaussian noise and clip to [0, 1].

    Args:
        images: [B, C, H, W] in [0, 1].
        indices: [B], the images' numbers in their data set; with ``seed`` they fix the noise.
        seed: any integer.
        sigma: standard deviation, in units of the intensity range.
    """
    shape = images.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in _generators(indices, seed)])
    return (images + sigma * noise.to(images)).clamp(0, 1)


def rotation(images: Tensor, indices: Tensor, seed: int, *, degrees: float = 15.0) -> Tensor:
    """Rotate each image about its centre by its own angle, uniform in ±``degrees``.

    Corners that come into view repeat the border: the test is the turn, not black triangles.

    Args:
        images: [B, C, H, W] in [0, 1].
        indices: [B], the images' numbers in their data set; with ``seed`` they fix the angle.
        seed: any integer.
        degrees: largest angle.
    """
    rotate = require("kornia.geometry.transform", "train").rotate
    turns = torch.stack([torch.rand((), generator=generator) for generator in _generators(indices, seed)])
    angles = ((2 * turns - 1) * degrees).to(images)
    rotated: Tensor = rotate(images, angles, mode="bilinear", padding_mode="border")
    return rotated.clamp(0, 1)


def _clean(images: Tensor, indices: Tensor, seed: int) -> Tensor:
    return images


CONDITIONS: Mapping[str, Condition] = {"clean": _clean, "noise": gaussian_noise, "rotation": rotation}
"""Name → disturbance. ``functools.partial(gaussian_noise, sigma=0.2)`` makes another severity."""


def scores(logits: Tensor, labels: Tensor, task: str = "multiclass") -> dict[str, float]:
    """Balanced accuracy, accuracy and area under the ROC curve.

    Multiclass: balanced accuracy is the mean recall and ``auroc`` the mean one-vs-rest area over the classes
    that occur. Multilabel: balanced accuracy is the mean over labels of (sensitivity + specificity) / 2 at
    probability 0.5, accuracy the share of right 0/1 answers, ``auroc`` the mean area over the labels; labels
    with one value only are left out. A score that is defined nowhere is NaN.

    Args:
        logits: [N, C].
        labels: int64 [N], or 0/1 [N, C] for multilabel.
        task: "multiclass" or "multilabel".
    """
    metrics = require("torchmetrics.functional.classification", "train")
    logits, count = logits.float(), logits.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of absent classes, which are left out below
        if task == "multiclass":
            present = torch.bincount(labels, minlength=count) > 0
            judged = present & (present.sum() > 1)  # an area needs images outside the class too
            recalls = metrics.multiclass_accuracy(logits, labels, num_classes=count, average=None)
            areas = metrics.multiclass_auroc(logits.softmax(1), labels, num_classes=count, average=None)
            accuracy = metrics.multiclass_accuracy(logits, labels, num_classes=count, average="micro")
        else:
            truth, chances = labels.long(), logits.sigmoid()
            present = judged = truth.amin(0) != truth.amax(0)
            recalls = metrics.multilabel_recall(chances, truth, num_labels=count, average=None)
            recalls = (recalls + metrics.multilabel_specificity(chances, truth, count, average=None)) / 2
            areas = metrics.multilabel_auroc(chances, truth, num_labels=count, average=None)
            accuracy = metrics.multilabel_accuracy(chances, truth, num_labels=count, average="micro")
    return {
        "balanced_accuracy": float(recalls.reshape(-1)[present].mean()),
        "accuracy": float(accuracy),
        "auroc": float(areas.reshape(-1)[judged].mean()) if bool(judged.any()) else math.nan,
    }


def check_task(task: str) -> None:
    """Refuse an unknown task.

    Raises:
        InputError: neither "multiclass" nor "multilabel".
    """
    if task not in ("multiclass", "multilabel"):
        raise InputError(f"task: got {task!r}, wanted 'multiclass' or 'multilabel'")


def evaluate(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    conditions: Sequence[str] | Mapping[str, Condition] = ("clean", "noise", "rotation"),
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Score a deterministic classifier (eval mode, no dropout) on disturbed copies of ``data``.

    The disturbance of an image depends on ``seed`` and its index alone, not on the batch size.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; its modes are restored.
        data: labelled images, as :class:`Batches` reads them.
        task: "multiclass" or "multilabel".
        conditions: names from ``CONDITIONS``, or a mapping name → function.
        seed: fixes the disturbances.
        batch_size: images at a time.
        device: where to run; the classifier's own device by default, and it is moved if another is named.

    Returns:
        condition → {"balanced_accuracy", "accuracy", "auroc"}, see :func:`scores`.

    Raises:
        InputError: an unknown task or condition, or data that do not fit the classifier.
    """
    check_task(task)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: got {batch_size!r}, wanted an integer of 1 or more")
    unknown = [] if isinstance(conditions, Mapping) else [name for name in conditions if name not in CONDITIONS]
    if unknown:
        raise InputError(f"conditions: got {', '.join(map(repr, unknown))}, wanted some of {', '.join(CONDITIONS)}")
    chosen = conditions if isinstance(conditions, Mapping) else {name: CONDITIONS[name] for name in conditions}
    batches = Batches(data)
    first = next(iter(classifier.parameters()), None)
    target = resolve_device(device) if device is not None else (first.device if first is not None else "cpu")
    modes = {module: module.training for module in classifier.modules()}
    classifier.to(target).eval()
    results = {}
    try:
        with torch.no_grad():
            classes = classifier(batches(torch.tensor([0]))[0].to(target)).shape[1]
            labels = batches.labels(task, classes)
            for name, disturb in chosen.items():
                logits = [
                    classifier(disturb(batches(indices)[0].to(target), indices, seed)).cpu()
                    for indices in batches.chunks(batch_size)
                ]
                results[name] = scores(torch.cat(logits), labels.cpu(), task)
    finally:
        for module, training in modes.items():
            module.training = training
    return results
