"""The ascent itself: one batch of latents moved uphill, as a rule on the posterior's uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, TypedDict

import torch
from torch import Tensor

from tsynd.ops import operators as ops
from tsynd.ops.reference import OBJECTIVES, RULES, TASKS
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.objectives import EXPECTED, Measure, measure_of
from tsynd.utils.errors import InputError, check_choice, check_whole
from tsynd.utils.settings import override

__all__ = [
    "Ascent",
    "AscentOptions",
    "AscentSettings",
    "Status",
    "ascend_latents",
    "ascent_settings",
    "label_probability",
]


class Status(IntEnum):
    """How the ascent of one image ended."""

    RAISED = 0
    """A latent of higher value (as a rule the uncertainty) than the source's was found."""
    UNCHANGED = 1
    """No step raised the value; the image is the reconstruction."""
    NON_FINITE = 2
    """A value or gradient was not finite; the image is the best one before that."""
    LABEL_LIMIT = 3
    """A step left the region where the source label keeps its wanted probability; best image before that."""


@dataclass(frozen=True)
class AscentSettings:
    """What an ascent maximises, under which posterior samples, and how far it goes.

    Attributes:
        objective: ``mutual_information``, ``entropy`` or ``expected_information`` (about target images).
        task: ``multiclass`` or ``multilabel``.
        steps: K, ascent steps, at least 1.
        radius: of the ball around the source latent, times latent standard deviation times sqrt(dimension)
            (rule ``l2``) or times latent standard deviation (rule ``linf``).
        step_size: length of one step in the unit of the radius; None is 2.5 * radius / steps.
        rule: ``l2`` (normalised gradient) or ``linf`` (its sign).
        label_consistency: least mean probability that the source label must keep; None for no limit.
        samples: T, posterior samples, at least 1.
        masks: ``shared`` or ``independent`` dropout masks, see :class:`tsynd.MCDropout`.
        latent_std: standard deviation of the latents; None takes the autoencoder's own or measures it.

    Raises:
        InputError: a value out of range.
    """

    objective: str = "mutual_information"
    task: str = "multiclass"
    steps: int = 5
    radius: float = 0.5
    step_size: float | None = None
    rule: str = "l2"
    label_consistency: float | None = None
    samples: int = 32
    masks: str = "shared"
    latent_std: float | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, (*OBJECTIVES, EXPECTED))
        check_choice("task", self.task, TASKS)
        check_choice("rule", self.rule, RULES)
        check_choice("masks", self.masks, ("shared", "independent"))
        if self.objective == EXPECTED and self.masks != "shared":
            raise InputError(f"objective: got {EXPECTED!r} with masks {self.masks!r}, wanted 'shared' masks")
        check_whole("steps", self.steps)
        check_whole("samples", self.samples)
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError(f"radius: got {self.radius!r}, wanted a number above 0")
        for name in ("step_size", "latent_std"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}: got {value!r}, wanted a number above 0, or None")
        if self.label_consistency is not None and not 0 < self.label_consistency < 1:
            raise InputError(f"label_consistency: got {self.label_consistency!r}, wanted a number between 0 and 1")

    def options(self) -> dict[str, Any]:
        """The fields of an :class:`AscentSettings` as keywords, also where this is more than one."""
        return {field.name: getattr(self, field.name) for field in fields(AscentSettings)}

    def lengths(self, latent_std: float, dimension: int) -> tuple[float, float]:
        """Step and radius in latent units."""
        unit = latent_std * (math.sqrt(dimension) if self.rule == "l2" else 1.0)
        step = 2.5 * self.radius / self.steps if self.step_size is None else self.step_size
        return step * unit, self.radius * unit


class AscentOptions(TypedDict, total=False):
    """The fields of :class:`AscentSettings` as keywords."""

    objective: str
    task: str
    steps: int
    radius: float
    step_size: float | None
    rule: str
    label_consistency: float | None
    samples: int
    masks: str
    latent_std: float | None


def ascent_settings(settings: AscentSettings | None, options: AscentOptions | Mapping[str, Any]) -> AscentSettings:
    """The settings (None: the defaults) with other values for the fields that ``options`` name.

    Raises:
        InputError: an option of another name, or a value out of range.
    """
    return override(settings or AscentSettings(), options, "the ascent")


@dataclass(frozen=True)
class Ascent:
    """Result for one batch; tensors on the batch's device.

    Attributes:
        images: [B, C, H, W] in [0, 1], decoded best iterates.
        latents: [B, ...], best iterates.
        uncertainty: [B], of the best iterates, under the samples climbed on (or of another measure).
        trajectory: [steps + 1, B], the same at every iterate; row 0 is the reconstruction's.
        status: [B] int8, see :class:`Status`.
    """

    images: Tensor
    latents: Tensor
    uncertainty: Tensor
    trajectory: Tensor
    status: Tensor

    def first(self, count: int) -> Ascent:
        """The first ``count`` images' part."""
        return Ascent(
            self.images[:count],
            self.latents[:count],
            self.uncertainty[:count],
            self.trajectory[:, :count],
            self.status[:count],
        )


def label_probability(posterior: Posterior, images: Tensor, labels: Tensor, ids: Tensor, task: str) -> Tensor:
    """Mean probability [B] of the source label; for several labels, of the least certain one."""
    with torch.no_grad():
        p = posterior.probabilities(images, ids, task)
    if task == "multiclass":
        return p.gather(1, labels[:, None]).squeeze(1)
    return torch.where(labels > 0.5, p, 1.0 - p).amin(1)


def ascend_latents(
    posterior: Posterior,
    decode: Callable[[Tensor], Tensor],
    source: Tensor,
    sample_ids: Tensor,
    settings: AscentSettings,
    latent_std: float,
    labels: Tensor | None = None,
    measure: Measure | None = None,
    jump: Tensor | None = None,
) -> Ascent:
    """Projected gradient ascent over latents, each image by itself.

    The posterior samples stay the same over all steps, so the measure is deterministic; the best iterate is kept. Call
    it inside ``posterior.frozen()``.

    Args:
        posterior: gives the uncertainty.
        decode: latents [B, ...] -> images [B, C, H, W]; what leaves [0, 1] is clamped.
        source: [B, ...], encoded images: the balls' centres.
        sample_ids: [B] int64, the images' global indices.
        settings: see :class:`AscentSettings`.
        latent_std: standard deviation of the latents.
        labels: [B] or [B, L], needed for ``label_consistency``.
        measure: what to climb; None is the uncertainty that the settings name.
        jump: [B, ...] latents in the balls, where the first of the steps leads instead of along the gradient.
    """
    if measure is None:
        measure = measure_of(posterior, settings.objective, settings.task)
    step, radius = settings.lengths(latent_std, source[0].numel())
    latents = source.clone()
    best_latents = best_images = best = torch.empty(0)
    count = source.shape[0]  # not len(): an export keeps the batch size open
    climbing = torch.ones(count, dtype=torch.bool, device=source.device)
    # int32 until the end: an exported file chooses between statuses, which older runtimes cannot for int8
    status = torch.full((count,), int(Status.UNCHANGED), dtype=torch.int32, device=source.device)
    per_latent = [-1] + [1] * (source.dim() - 1)
    trajectory = []
    for k in range(settings.steps + 1):
        last = k == settings.steps
        with torch.set_grad_enabled(not last):
            leaf = latents.detach().requires_grad_(not last)
            images = decode(leaf).clamp(0, 1)
            value = measure(images, sample_ids)
            gradient = None if last else torch.autograd.grad(value.sum(), leaf)[0]
        images, value = images.detach(), value.detach()
        trajectory.append(value)
        sound = value.isfinite()
        if gradient is not None:
            sound = sound & gradient.flatten(1).isfinite().all(1)
        status = status.masked_fill(climbing & ~sound, int(Status.NON_FINITE))
        climbing = climbing & sound
        if settings.label_consistency is not None and labels is not None and k > 0:
            kept = label_probability(posterior, images, labels, sample_ids, settings.task)
            lost = climbing & (kept < settings.label_consistency)
            status = status.masked_fill(lost, int(Status.LABEL_LIMIT))
            climbing = climbing & ~lost
        if k == 0:
            best, best_latents, best_images = value, latents, images
        else:
            better = climbing & (value > best)
            best = torch.where(better, value, best)
            best_images = torch.where(better.reshape([-1] + [1] * (images.dim() - 1)), images, best_images)
            best_latents = torch.where(better.reshape(per_latent), latents, best_latents)
        if gradient is not None:
            latents = latents.clone()
            if k == 0 and jump is not None:
                latents = torch.where(climbing.reshape(per_latent), jump, latents)
                continue
            still = torch.where(climbing.reshape(per_latent), gradient, 0.0)
            ops.ascend_(latents, still, source, step, radius, settings.rule)
    status = status.masked_fill((status == int(Status.UNCHANGED)) & (best > trajectory[0]), int(Status.RAISED))
    return Ascent(best_images, best_latents, best, torch.stack(trajectory), status.to(torch.int8))
