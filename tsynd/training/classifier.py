"""Training of classifiers, with extra images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.dataset import LabelledBatches, check_task
from tsynd.evaluation.evaluate import evaluate
from tsynd.models.classifier import as_classifier
from tsynd.training.loop import Augmentation, Checkpoint, FitReport, _check_settings, _Loop
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
    augmentation: Augmentation | None = None,
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
    statistics that it also stores for test time, and one large pass is faster than two.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; it is moved to the device and left in eval
            mode.
        data: labelled images, as ``LabelledBatches`` reads them.
        task: "multiclass" (labels int64 [N]) or "multilabel" (labels 0/1 [N, K]).
        balanced: weigh the loss so that every class (every label's positives) counts the same.
        augmentation: called with the classifier and each step's real batch after the warm-up; it may change
            the classifier's mode, and what it returns is not differentiated. Where it has them, its
            ``prepare(batches of all training images)`` is called before training and ``set_progress(fraction)``
            before each call, from 0 at the first to 1 at the last augmented step. Over several processes each
            gives its own images; ``set_rows(rows of the whole batch, its size)`` is called before each call then,
            and says which rows will be given.
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
    loop = _Loop(classifier, batches, device, settings)
    with torch.no_grad():
        shape = list(classifier.eval()(batches.first.to(loop.device)).shape)
    if len(shape) != 2:
        raise InputError(f"classifier: one image gave logits {shape}, wanted [1, K]")
    everything = batches.labels(shape[1])
    weights = _class_weights(everything, task, shape[1]) if balanced else torch.ones(shape[1])
    weights = weights.to(loop.device)
    start_at = math.ceil(warmup_fraction * iterations)
    spent = 0.0
    stateful = augmentation if hasattr(augmentation, "load_state_dict") else None
    tell_progress, tell_rows = getattr(augmentation, "set_progress", None), getattr(augmentation, "set_rows", None)
    prepare = getattr(augmentation, "prepare", None)
    if prepare is not None:
        prepare(batches.at(part).images.to(loop.device) for part in batches.chunks(256))

    def compute_loss(engine: nn.Module, step: int, images: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal spent
        assert labels is not None  # batches.labels has seen them
        share = torch.full([len(images)], 1 / loop.batch_size, device=loop.device)
        rows, total = loop.rows, loop.batch_size
        if augmentation is not None and step >= start_at:
            start = clock(loop.device)
            if tell_progress is not None:
                tell_progress((step - start_at) / max(iterations - 1 - start_at, 1))
            extra_rows = tell_rows(rows, total) if loop.ranks > 1 and tell_rows is not None else None
            extra, extra_labels = augmentation(classifier, images, labels)
            spent += clock(loop.device) - start
            classifier.train()
            if extra.shape[1:] != images.shape[1:] or len(extra) != len(extra_labels):
                raise InputError(
                    f"augmentation: gave images {list(extra.shape)} with {len(extra_labels)} labels,"
                    f" wanted [M, {', '.join(map(str, images.shape[1:]))}] with M labels"
                )
            images = torch.cat([images, extra.detach().to(images)])
            labels = torch.cat([labels, extra_labels.to(labels)])
            rows, total, made = _with_extra(loop, len(extra), extra_rows)
            extra_share = augmentation_weight / max(made, 1)
            share = torch.cat([share, torch.full([len(extra)], extra_share, device=loop.device)])
        with loop.over_all(rows, total), loop.autocast():
            logits = engine(images).float()
        if task == "multiclass":
            each = functional.cross_entropy(logits, labels.long(), weight=weights, reduction="none")
        else:
            truth = labels.float()
            each = functional.binary_cross_entropy_with_logits(
                logits, truth, pos_weight=weights, reduction="none"
            ).mean(1)
        return (each * share).sum()

    classifier.train()
    try:
        losses, seconds = loop.run(compute_loss, "classifier", progress, checkpoint, stateful)
    finally:
        classifier.eval()
    validation = evaluate(classifier, val, task=task, conditions=("clean",))["clean"] if val is not None else {}
    return FitReport(losses, iterations, seconds, min(spent / seconds, 1.0), validation)
