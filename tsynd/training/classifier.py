"""Training of classifiers, with extra images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, check_task
from tsynd.evaluation.evaluate import Metric, evaluate
from tsynd.models.classifier import as_classifier, take_logits
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
from tsynd.training.loop import Checkpoint, FitReport, Track, TrainingSettings, _Loop
from tsynd.utils.errors import InputError
from tsynd.utils.settings import override
from tsynd.utils.timing import clock

__all__ = ["ClassifierSettings", "fit_classifier"]


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


Transform: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ClassifierSettings(TrainingSettings):
    """How a classifier is trained; see :class:`tsynd.training.loop.TrainingSettings` for the rest.

    Attributes:
        balanced: weigh the loss so that every class (every label's positives) counts the same.
        augmentation_weight: λ, of the extra images' loss, 0 or more.
        warmup_fraction: part of the iterations before the augmentation is used, in [0, 1].
    """

    balanced: bool = True
    augmentation_weight: float = 1.0
    warmup_fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_fraction > 1:
            raise InputError(f"warmup_fraction: got {self.warmup_fraction}, wanted a number in [0, 1]")


class _Images:
    """All training images a few at a time, as often as they are asked for."""

    def __init__(self, batches: LabelledBatches, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batches.at(part).images.to(self.device) for part in self.batches.chunks(256))


class _FrozenEncoder:
    """What is trained of a classifier whose encoder is frozen, its head, and what the head sees of images."""

    def __init__(self, classifier: PretrainedClassifier, images: _Images | None, repeated: bool) -> None:
        self.kept, self.repeated = KeptFeatures(classifier, classifier.features_folder), repeated
        self.real = None if images is None else torch.cat([self.kept(part) for part in images])

    def __call__(self, ids: Tensor, images: Tensor, extra: list[Tensor]) -> Tensor:
        """Features of the step's real images, which are looked up where they are always the same; then of the extra."""
        real = self.kept(images, keep=False) if self.real is None else self.real[ids]
        return torch.cat([real, *(self.kept(part, self.repeated) for part in extra if len(part))])


def _transformed(transform: Transform, images: Tensor, labels: Tensor, loop: _Loop) -> tuple[Tensor, Tensor]:
    with loop.over_all(loop.rows, loop.batch_size), torch.no_grad():
        made = transform(images, labels)
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and len(made[0]) == len(made[1]) == len(images)):
        raise InputError(f"transform: gave {type(made).__name__}, wanted as many images and their labels")
    return made[0].to(images), made[1].to(labels.device)


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
    settings: ClassifierSettings | None = None,
    *,
    task: str = "multiclass",
    augmentation: Augmentation | ExtraFunction | None = None,
    transform: Transform | None = None,
    val: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    track: Track | None = None,
    **training: Any,
) -> FitReport:
    """Train a classifier, in place, with CE(x, y) + λ·CE(x*, y*) (binary CE per label for multilabel).

    Real and extra images go through the classifier in one batch: batch norm then normalises both with the
    statistics that it also stores for test time, and one large pass is faster than two. Where the encoder of a
    pretrained classifier is frozen, the head alone is trained, on features that are computed once for each image.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; it is moved to the device and left in eval
            mode.
        data: labelled images, as ``LabelledBatches`` reads them.
        settings: see :class:`ClassifierSettings`.
        task: "multiclass" (labels int64 [N]) or "multilabel" (labels 0/1 [N, K]).
        augmentation: asked for extra images with the classifier and each step's real batch after the warm-up, see
            :class:`tsynd.Augmentation`; a plain callable will do. What it gives is not differentiated and is learnt
            by the loss that it names. Over several processes each gives its own images.
        transform: what is done to every batch of real images before all else, as (images, labels) → (images, labels) on
            the training's device: flips and turns, or what mixes images and gives probabilities [B, K] for labels
            (MixUp, CutMix).
        val: labelled images, scored once after training.
        metrics: name → (probabilities [N, K], labels) → number, reported beside the scores on ``val``.
        device: Accelerate's choice by default.
        progress: show a bar.
        checkpoint: as in :func:`fit_autoencoder`.
        track: as in :func:`fit_autoencoder`.
        **training: fields of the settings, instead of those given there, as ``iterations=500``.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    check_task(task)
    settings = override(settings or ClassifierSettings(), training, "the training")
    iterations = settings.iterations
    if metrics and val is None:
        raise InputError(f"metrics: got {', '.join(metrics)} without val, wanted labelled images to measure them on")
    batches, classifier = LabelledBatches(data, task=task, name="data", by_index=True), as_classifier(classifier)
    frozen = isinstance(classifier, PretrainedClassifier) and classifier.frozen
    trained = classifier.get_submodule("head") if frozen else classifier
    loop = _Loop(trained, batches, device, settings, track)
    classifier.to(loop.device)
    with torch.no_grad():
        shape = list(take_logits(classifier.eval()(batches.first.to(loop.device))).shape)
    if len(shape) != 2:
        raise InputError(f"classifier: one image gave logits {shape}, wanted [1, K]")
    everything = batches.labels(shape[1])
    weights = _class_weights(everything, task, shape[1]) if settings.balanced else torch.ones(shape[1])
    weights = weights.to(loop.device)
    start_at = math.ceil(settings.warmup_fraction * iterations)
    spent = 0.0
    extra_images = None if augmentation is None else as_augmentation(augmentation)
    if extra_images is not None:
        extra_images.check(classifier, iterations - start_at)
        extra_images.prepare(_Images(batches, loop.device))
    changes = (transform, getattr(extra_images, "transform", None))
    transforms: list[Transform] = [change for change in changes if change is not None]
    encoder = None
    if isinstance(classifier, PretrainedClassifier) and classifier.frozen:
        same = None if transforms else _Images(batches, loop.device)
        encoder = _FrozenEncoder(classifier, same, bool(getattr(extra_images, "repeats", False)))

    def compute_loss(engine: nn.Module, step: int, ids: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal spent
        assert labels is not None  # batches.labels has seen them
        for change in transforms:
            images, labels = _transformed(change, images, labels, loop)
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
                own = settings.augmentation_weight * part.weight / max(made, 1)
                share.append(torch.full([len(part.images)], own, device=loop.device))
        with loop.over_all(rows, total), loop.autocast():
            given = torch.cat(everything) if encoder is None else encoder(ids, images, everything[1:])
            logits = take_logits(engine(given)).float()
        each = [image_losses(logits[:count], labels, task=task, weights=weights)]
        for part, answers in zip(parts, torch.split(logits[count:], [len(part.images) for part in parts]), strict=True):
            truth = part.labels.to(loop.device)
            clean = logits[:count][part.made_of()] if part.loss == "consistency" else None
            each.append(image_losses(answers, truth, part.loss, task=task, weights=weights, clean=clean))
        return (torch.cat(each) * torch.cat(share)).sum()

    classifier.train()
    try:
        losses, seconds = loop.run(compute_loss, "classifier", progress, checkpoint, extra_images)
    finally:
        classifier.eval()
        if encoder is not None and loop.rank == 0:
            encoder.kept.save()
    validation = {}
    if val is not None:
        validation = evaluate(classifier, val, task=task, conditions=("clean",), metrics=metrics)["clean"]
        loop.track({f"val/{name}": value for name, value in validation.items()}, iterations)
    loop.stop_tracking()
    return FitReport(losses, iterations, seconds, min(spent / seconds, 1.0), validation)
