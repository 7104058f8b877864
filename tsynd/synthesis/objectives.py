"""What an ascent climbs: a measure of the decoded images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tsynd.data.dataset import parts
from tsynd.ops import operators as ops
from tsynd.posteriors.posterior import Posterior
from tsynd.utils.errors import InputError

__all__ = [
    "EXPECTED",
    "ExpectedInformation",
    "LabelLoss",
    "Measure",
    "Uncertainty",
    "check_targets",
    "measure_of",
]


EXPECTED = "expected_information"


class Measure(Protocol):
    """What an ascent climbs."""

    def __call__(self, images: Tensor, sample_ids: Tensor, /) -> Tensor:
        """The value [B] in nats of images [B, C, H, W] with their ids [B], differentiable."""


@dataclass(frozen=True)
class Uncertainty:
    """The posterior's uncertainty.

    Attributes:
        posterior: gives the samples.
        objective: ``mutual_information`` or ``entropy``.
        task: ``multiclass`` or ``multilabel``.
    """

    posterior: Posterior
    objective: str
    task: str

    def __call__(self, images: Tensor, sample_ids: Tensor) -> Tensor:
        """Uncertainty [B] in nats."""
        return self.posterior.uncertainty(images, sample_ids, self.objective, self.task)


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy of the source label under the posterior's mean prediction.

    Attributes:
        posterior: gives the samples.
        labels: int64 [B], or 0/1 [B, L] for multilabel (the sum over labels).
        task: ``multiclass`` or ``multilabel``.
    """

    posterior: Posterior
    labels: Tensor
    task: str

    def __call__(self, images: Tensor, sample_ids: Tensor) -> Tensor:
        """-log p(label | image) [B] in nats."""
        logits = self.posterior.logits(images, sample_ids).float()
        if self.task == "multiclass":
            index = self.labels[None, :, None].expand(len(logits), -1, 1)
            logp = logits.log_softmax(-1).gather(2, index)
        else:
            logp = functional.logsigmoid(torch.where(self.labels > 0.5, logits, -logits))
        loss = math.log(len(logits)) - logp.logsumexp(0)
        return loss.sum(-1)


@dataclass(frozen=True)
class ExpectedInformation:
    """What the image's class would tell about those of target images (EPIG, Bickford Smith et al. 2023).

    Attributes:
        posterior: gives the samples, shared by all images.
        targets: [T, M, C], the target images' logits under the same samples.
        task: ``multiclass`` or ``multilabel``.
    """

    posterior: Posterior
    targets: Tensor
    task: str

    def __call__(self, images: Tensor, sample_ids: Tensor) -> Tensor:
        """Expected information [B] in nats."""
        logits = self.posterior.logits(images, sample_ids)
        return ops.expected_information(logits, self.targets.to(logits.dtype), self.task)[0]


def check_targets(objective: str, targets: Tensor | None) -> None:
    """Raise :class:`InputError` unless there are targets for ``expected_information``, and for it alone."""
    if (objective == EXPECTED) != (targets is not None):
        given = "none" if targets is None else "images"
        raise InputError(f"targets: got {given} with objective {objective!r}, wanted images for {EXPECTED!r} alone")


def measure_of(posterior: Posterior, objective: str, task: str, targets: Tensor | None = None) -> Measure:
    """The measure that an objective names; to be used while the posterior is frozen.

    Args:
        posterior: gives the samples.
        objective: ``mutual_information``, ``entropy`` or ``expected_information``.
        task: ``multiclass`` or ``multilabel``.
        targets: [M, C, H, W] in [0, 1] on the posterior's device, for ``expected_information``.

    Raises:
        InputError: ``expected_information`` without targets, or targets with another objective.
    """
    check_targets(objective, targets)
    if targets is None:
        return Uncertainty(posterior, objective, task)
    if getattr(posterior, "masks", "shared") != "shared":  # image and target must be seen by the same samples
        raise InputError(f"objective: got {EXPECTED!r} with masks 'independent', wanted 'shared' masks")
    with torch.no_grad():
        logits = [posterior.logits(part) for part in parts(targets)]
    return ExpectedInformation(posterior, torch.cat(logits, 1), task)
