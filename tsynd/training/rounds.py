"""Offline rounds: synthesise from the whole training set, append, continue the training; several times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches
from tsynd.models.autoencoder import Autoencoder, as_autoencoder, check_autoencoder
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import frozen
from tsynd.synthesis.api import synthesize
from tsynd.synthesis.ascent import AscentSettings
from tsynd.synthesis.result import SynthesisResult
from tsynd.training.classifier import fit_classifier
from tsynd.training.loop import FitReport
from tsynd.utils.errors import InputError

__all__ = ["RoundsReport", "fit_rounds"]


@dataclass(frozen=True)
class RoundsReport:
    """What :func:`fit_rounds` did.

    Attributes:
        fit: the training, see :class:`tsynd.training.loop.FitReport`; its ``augmentation_share`` is the synthesis's.
        results: one per round, in order: the images that it appended.
    """

    fit: FitReport
    results: tuple[SynthesisResult, ...]


class _GrowingSet:
    """An augmentation that draws from the images synthesised so far and adds to them when a round begins."""

    def __init__(
        self, autoencoder: Autoencoder, batches: LabelledBatches, rounds: int, options: dict[str, Any]
    ) -> None:
        self.autoencoder, self.batches, self.rounds, self.options = autoencoder, batches, rounds, options
        self.results: list[SynthesisResult] = []
        self.progress = 0.0

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Refuse an autoencoder that does not fit before the training begins."""
        first = next(iter(batches))
        modules = (self.autoencoder,) if isinstance(self.autoencoder, nn.Module) else ()
        for module in modules:
            module.to(first.device)
        with frozen(*modules):
            check_autoencoder(self.autoencoder, first)

    def set_progress(self, fraction: float) -> None:
        """Take the part of the augmented training that is done."""
        self.progress = fraction

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As many synthetic images as real ones, drawn with replacement."""
        # the small term: a fraction such as 49 * (1 / 49) must not fall below its whole number
        if len(self.results) < min(self.rounds, math.floor(self.progress * self.rounds + 1e-9) + 1):
            self.results.append(self._round(classifier))
        size = len(self.results[0])
        draw = torch.randint(size * len(self.results), (len(images),))
        chosen = [(self.results[index // size], index % size) for index in draw.tolist()]
        own = [result.labels[row] for result, row in chosen if result.labels is not None]
        return torch.stack([result.images[row] for result, row in chosen]), torch.stack(own)

    def _round(self, classifier: nn.Module) -> SynthesisResult:
        parts = [self.batches.at(part) for part in self.batches.chunks(256)]
        images = torch.cat([part.images for part in parts])
        labels = torch.cat([part.labels for part in parts if part.labels is not None])
        options = self.options | {"seed": self.options["seed"] + len(self.results)}
        return synthesize(self.autoencoder, classifier, images, labels, progress=False, **options)


def fit_rounds(
    classifier: nn.Module,
    data: Any,
    autoencoder: Any,
    *,
    rounds: int = 3,
    objective: str = "mutual_information",
    task: str = "multiclass",
    samples: int = 32,
    masks: str = "shared",
    steps: int = 3,
    radius: float = 0.5,
    step_size: float | None = None,
    rule: str = "l2",
    label_consistency: float | None = None,
    latent_std: float | None = None,
    iterations: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    balanced: bool = True,
    augmentation_weight: float = 1.0,
    warmup_fraction: float = 0.3,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool = True,
    val: Any = None,
) -> RoundsReport:
    """Train a classifier, in place, on real images and on sets synthesised against it in rounds.

    After the warm-up and then at equal distances, all training images are turned into targeted ones against the
    classifier as it is (:func:`tsynd.synthesize`) and appended, with their sources' labels, to the synthetic set;
    every step from then on sees a batch of real and an equal batch of synthetic images. It is one run of
    ``iterations`` optimiser steps with one learning-rate schedule, the same as online augmentation has.

    Args:
        classifier: as in :func:`tsynd.fit_classifier`, with active dropout.
        data: labelled images, as ``LabelledBatches`` reads them; a synthetic copy per round stays in memory.
        autoencoder: anything :func:`tsynd.as_autoencoder` takes.
        rounds: R, at least 1 and at most the steps after the warm-up.
        objective: as in :func:`tsynd.synthesize`, like all that follow until `iterations`.
        task: "multiclass" or "multilabel".
        samples: T; round r uses the posterior samples of seed + r.
        masks: "shared" or "independent".
        steps: K, ascent steps.
        radius: of the ball.
        step_size: 2.5 · radius / K when None.
        rule: "l2" or "linf".
        label_consistency: least mean probability of the label.
        latent_std: the unit of the radius.
        iterations: optimiser steps; like all that follow as in :func:`tsynd.fit_classifier`.
        batch_size: real images per step.
        learning_rate: peak of a cosine schedule.
        weight_decay: of AdamW.
        balanced: weigh the classes equally.
        augmentation_weight: λ.
        warmup_fraction: part of the iterations before the first round.
        seed: of batches, dropout and posterior samples.
        device: Accelerate's choice by default.
        precision: "float32" or "bfloat16".
        progress: show a bar.
        val: labelled images, scored once after training.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    AscentSettings(objective, task, steps, radius, step_size, rule, label_consistency)
    MCDropout(classifier, samples, masks)  # refuses a classifier without dropout now, not after the warm-up
    if latent_std is not None and not (math.isfinite(latent_std) and latent_std > 0):
        raise InputError(f"latent_std: got {latent_std!r}, wanted a number above 0, or None")
    if not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds: got {rounds!r}, wanted an integer of at least 1")
    if isinstance(iterations, int) and 0 <= warmup_fraction <= 1:
        left = iterations - math.ceil(warmup_fraction * iterations)
        if rounds > left:
            raise InputError(f"rounds: got {rounds}, wanted at most the {left} steps after the warm-up")
    options = {
        "objective": objective,
        "task": task,
        "samples": samples,
        "masks": masks,
        "steps": steps,
        "radius": radius,
        "step_size": step_size,
        "rule": rule,
        "label_consistency": label_consistency,
        "latent_std": latent_std,
        "seed": seed,
    }
    growing = _GrowingSet(
        as_autoencoder(autoencoder), LabelledBatches(data, task=task, name="data", by_index=True), rounds, options
    )
    report = fit_classifier(
        classifier,
        data,
        task=task,
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        balanced=balanced,
        augmentation=growing,
        augmentation_weight=augmentation_weight,
        warmup_fraction=warmup_fraction,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
        val=val,
    )
    return RoundsReport(report, tuple(growing.results))
