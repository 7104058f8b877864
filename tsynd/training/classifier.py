"""Training of classifiers, with extra images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, check_task
from tsynd.evaluation.evaluate import evaluate
from tsynd.models.classifier import as_classifier
from tsynd.models.features import KeptFeatures
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.training.extra_images import (
    Augmentation,
    ExtraFunction,
    ExtraImages,
    as_augmentation,
    as_parts,
    image_losses,
)
from tsynd.training.loop import Checkpoint, FitReport, _check_settings, _Loop
from tsynd.utils.errors import InputError
from tsynd.utils.timing import clock

__all__ = ["fit_classifier"]


def _class_weights(labels: Tensor, task: str, classes: int) -> Tensor:
    """Weights [C] that give classes, or labels' positives, equal say; absent ones weigh 1."""
    if task == "multiclass":
        counts = torch.bincount(labels, minlength=classes).float()
        present = int((counts > 0).sum())
        return torch.where(counts > 0, len(labels) / (present * counts.clamp_min(1)), torch.ones(classes))
    positive = labels.sum(0)
    # Capped: one positive among thousands would otherwise be the whole loss.
    ratio = ((len(labels) - positive) / positive.clamp_min(1)).clamp(0.05, 20)
    return torch.where((positive > 0) & (positive < len(labels)), ratio, torch.ones(classes))


def _with_extra(loop: _Loop, count: int, extra_rows: Tensor | None) -> tuple[Tensor, int, int]:
    """This process's rows of the whole batch of real and then extra images, its size, and the extra ones' number."""
    made = int(loop.total(count))
    if loop.ranks == 1:
        return torch.arange(loop.batch_size + made), loop.batch_size + made, made
    if extra_rows is None:
        counts = torch.zeros(loop.ranks, dtype=torch.int64, device=loop.device)
        counts[loop.rank] = count
        torch.distributed.all_reduce(counts)
        own = [len(range(rank, loop.batch_size, loop.ranks)) for rank in range(loop.ranks)]
        extra_rows = int(counts[: loop.rank].sum()) + torch.arange(count)
        if counts.tolist() == own:  # one for each, taken to be in the same order
            extra_rows = loop.rows
    return torch.cat([loop.rows, loop.batch_size + extra_rows]), loop.batch_size + made, made


class _Images:
    """All training images a few at a time, as often as they are asked for."""

    def __init__(self, batches: LabelledBatches, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batches.at(part).images.to(self.device) for part in self.batches.chunks(256))


class _FrozenEncoder:
    """What is trained of a classifier whose encoder is frozen, its head, and what the head sees of images."""

    def __init__(self, classifier: PretrainedClassifier, batches: LabelledBatches, loop: _Loop) -> None:
        classifier.to(loop.device)
        self.kept = KeptFeatures(classifier, classifier.features_folder)
        parts = [self.kept(batches.at(part).images.to(loop.device)) for part in batches.chunks(64)]
        self.real = torch.cat(parts)

    def __call__(self, ids: Tensor, parts: list[ExtraImages], repeated: bool) -> Tensor:
        """Features of the step's real images, then of the extra ones."""
        real = self.real[ids]
        extra = [self.kept(part.images.detach().to(real), repeated) for part in parts if len(part.images)]
        return torch.cat([real, *extra])


def _check_part(part: ExtraImages, real: Tensor) -> None:
    if part.images.shape[1:] != real.shape[1:] or len(part.images) != len(part.labels):
        raise InputError(
            f"augmentation: gave images {list(part.images.shape)} with {len(part.labels)} labels,"
            f" wanted [M, {', '.join(map(str, real.shape[1:]))}] with M labels"
        )
    sources = part.made_of()
    if part.loss == "consistency" and (len(sources) != len(part.images) or int(sources.amax()) >= len(real)):
        raise InputError(
            f"augmentation: gave {len(part.images)} images of {len(sources)} sources, wanted one below {len(real)} each"
        )


def fit_classifier(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    iterations: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    balanced: bool = True,
    augmentation: Augmentation | ExtraFunction | None = None,
    augmentation_weight: float = 1.0,
    warmup_fraction: float = 0.3,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool = True,
    val: Any = None,
    checkpoint: Checkpoint | None = None,
) -> FitReport:
    """Train a classifier, in place, with CE(x, y) + λ·CE(x*, y*) (binary CE per label for multilabel).

    Real and extra images go through the classifier in one batch: batch norm then normalises both with the
    statistics that it also stores for test time, and one large pass is faster than two. Where the encoder of a
    pretrained classifier is frozen, the head alone is trained, on features that are computed once for each image.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; it is moved to the device and left in eval
            mode.
        data: labelled images, as ``LabelledBatches`` reads them.
        task: "multiclass" (labels int64 [N]) or "multilabel" (labels 0/1 [N, K]).
        balanced: weigh the loss so that every class (every label's positives) counts the same.
        augmentation: asked for extra images with the classifier and each step's real batch after the warm-up, see
            :class:`tsynd.Augmentation`; a plain callable will do. What it gives is not differentiated and is learnt
            by the loss that it names. Over several processes each gives its own images.
        augmentation_weight: λ.
        warmup_fraction: part of the iterations before the augmentation is used, in [0, 1].
        val: labelled images, scored once after training.
        iterations: optimiser steps.
        batch_size: real images per step over all processes.
        learning_rate: peak of a cosine schedule (AdamW).
        weight_decay: of AdamW.
        seed: of the batch order and dropout; the global random state is left as it was.
        device: Accelerate's choice by default.
        precision: "float32" or "bfloat16" (autocast; weights stay float32).
        progress: show a bar.
        checkpoint: as in :func:`fit_autoencoder`.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    check_task(task)
    settings: dict[str, Any] = dict(iterations=iterations, batch_size=batch_size, learning_rate=learning_rate)
    settings |= dict(weight_decay=weight_decay, seed=seed, precision=precision)
    _check_settings(settings | {"augmentation_weight": augmentation_weight, "warmup_fraction": warmup_fraction})
    if warmup_fraction > 1:
        raise InputError(f"warmup_fraction: got {warmup_fraction}, wanted a number in [0, 1]")
    batches, classifier = LabelledBatches(data, task=task, name="data", by_index=True), as_classifier(classifier)
    frozen = isinstance(classifier, PretrainedClassifier) and classifier.frozen
    loop = _Loop(classifier.head if frozen else classifier, batches, device, settings)  # type: ignore[arg-type]
    classifier.to(loop.device)
    with torch.no_grad():
        shape = list(classifier.eval()(batches.first.to(loop.device)).shape)
    if len(shape) != 2:
        raise InputError(f"classifier: one image gave logits {shape}, wanted [1, K]")
    everything = batches.labels(shape[1])
    weights = _class_weights(everything, task, shape[1]) if balanced else torch.ones(shape[1])
    weights = weights.to(loop.device)
    start_at = math.ceil(warmup_fraction * iterations)
    spent = 0.0
    extra_images = None if augmentation is None else as_augmentation(augmentation)
    if extra_images is not None:
        extra_images.check(classifier, iterations - start_at)
        extra_images.prepare(_Images(batches, loop.device))
    repeated = bool(getattr(extra_images, "repeats", False))
    encoder = (
        _FrozenEncoder(classifier, batches, loop) if isinstance(classifier, PretrainedClassifier) and frozen else None
    )

    def compute_loss(engine: nn.Module, step: int, ids: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal spent
        assert labels is not None  # batches.labels has seen them
        count, everything = len(images), [images]
        share = [torch.full([count], 1 / loop.batch_size, device=loop.device)]
        rows, total, parts = loop.rows, loop.batch_size, []
        if extra_images is not None and step >= start_at:
            start = clock(loop.device)
            extra_images.set_progress((step - start_at) / max(iterations - 1 - start_at, 1))
            extra_images.set_ids(ids)
            extra_rows = extra_images.set_rows(rows, total) if loop.ranks > 1 else None
            parts = as_parts(extra_images(classifier, images, labels))
            spent += clock(loop.device) - start
            classifier.train()
            for part in parts:
                _check_part(part, images)
            everything += [part.images.detach().to(images) for part in parts]
            rows, total, made = _with_extra(loop, sum(len(part.images) for part in parts), extra_rows)
            for part in parts:
                own = augmentation_weight * part.weight / max(made, 1)
                share.append(torch.full([len(part.images)], own, device=loop.device))
        with loop.over_all(rows, total), loop.autocast():
            given = torch.cat(everything) if encoder is None else encoder(ids, parts, repeated)
            logits = engine(given).float()
        each = [image_losses(logits[:count], labels, task=task, weights=weights)]
        for part, own in zip(parts, logits[count:].split([len(part.images) for part in parts]), strict=True):
            truth = part.labels.to(loop.device)
            clean = logits[:count][part.made_of()] if part.loss == "consistency" else None
            each.append(image_losses(own, truth, part.loss, task=task, weights=weights, clean=clean))
        return (torch.cat(each) * torch.cat(share)).sum()

    classifier.train()
    try:
        losses, seconds = loop.run(compute_loss, "classifier", progress, checkpoint, extra_images)
    finally:
        classifier.eval()
        if encoder is not None and loop.rank == 0:
            encoder.kept.save()
    validation = evaluate(classifier, val, task=task, conditions=("clean",))["clean"] if val is not None else {}
    return FitReport(losses, iterations, seconds, min(spent / seconds, 1.0), validation)
