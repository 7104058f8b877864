"""Targeted augmentation: synthesis inside a training loop, against the classifier as it is at that step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.checks import check_images, check_labels
from tsynd.models.autoencoder import as_autoencoder, check_autoencoder, check_pixel_range
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import AscentSettings, ascend_latents, label_probability
from tsynd.synthesis.latent_prior import LatentPrior, fit_latent_prior
from tsynd.synthesis.objectives import LabelLoss, Measure, PlausibleGoal, Uncertainty
from tsynd.utils.device import place
from tsynd.utils.errors import InputError, check_choice
from tsynd.utils.timing import clock

__all__ = ["DIRECTIONS", "TargetedAugmentation"]

DIRECTIONS = ("uncertainty", "loss", "random", "reconstruction")

_MOST_FITTED = 2000  # latents behind the prior: its cost grows with the cube of their number


class TargetedAugmentation:
    """Callable ``(classifier, images, labels) -> (images*, labels)`` for :func:`tsynd.fit_classifier` or any loop.

    Each call takes fresh posterior samples of the classifier as it is, moves the latents of (part of) the batch and
    decodes them; the labels are the sources'. Modes, ``requires_grad`` and the global random state are as before
    afterwards. What call n returns depends on the arguments, the weights, ``seed`` and n alone.

    The directions other than ``uncertainty`` are its controls: equal in everything but where the latents go.

    Args:
        autoencoder: anything :func:`tsynd.as_autoencoder` takes, with ``latent_std`` measured by
            :func:`tsynd.fit_autoencoder`, or see ``latent_std``.
        direction: where the latents go:
            ``uncertainty``: up the posterior's disagreement, to the best iterate (TSynD, Niemeijer et al. 2024,
            arXiv 2406.17473);
            ``loss``: in the same way up the label's cross-entropy under the posterior's mean prediction;
            ``random``: in a uniform direction to exactly the radius (rule ``linf``: to a uniform corner of the
            box), without any gradient;
            ``reconstruction``: nowhere, decode(encode(x)).
        objective: ``mutual_information`` or ``entropy``, for ``uncertainty``.
        task: ``multiclass`` or ``multilabel``.
        samples: T, posterior samples per call.
        masks: ``shared`` or ``independent``.
        steps: K, ascent steps.
        radius: see :class:`tsynd.AscentSettings`; a pair goes linearly from the first to the second while
            :meth:`set_progress` goes from 0 to 1.
        step_size: see :class:`tsynd.AscentSettings`; None follows the radius.
        rule: ``l2`` or ``linf``.
        label_consistency: see :class:`tsynd.AscentSettings`; a random image below it is replaced by the
            reconstruction.
        ratio: extra images per real image of the batch, in (0, 1]; the batch's first are taken.
        every: only calls 0, n, 2n, ... give images, the others none.
        typicality: weight of the penalty on implausible latents, in nats of uncertainty per nat of log-density lost
            per coordinate (:class:`tsynd.synthesis.latent_prior.LatentPrior`), 0 or more. It needs :meth:`prepare`,
            which ``fit_classifier`` calls.
        latent_std: standard deviation of the latents; None takes the autoencoder's.
        seed: of the posterior samples and random directions; call n uses seed + n.

    Attributes:
        calls: number of calls so far.
        seconds: wall time spent in them.
        images_made: number of images they gave.
        progress: what :meth:`set_progress` was last told.
        prior: the distribution of the training images' latents, None until :meth:`prepare`; may be assigned.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        autoencoder: Any,
        *,
        direction: str = "uncertainty",
        objective: str = "mutual_information",
        task: str = "multiclass",
        samples: int = 32,
        masks: str = "shared",
        steps: int = 3,
        radius: float | tuple[float, float] = 0.5,
        step_size: float | None = None,
        rule: str = "l2",
        label_consistency: float | None = None,
        ratio: float = 1.0,
        every: int = 1,
        typicality: float = 0.0,
        latent_std: float | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("direction", direction, DIRECTIONS)
        check_choice("masks", masks, ("shared", "independent"))
        self.radius = _radius_pair(radius)
        self.settings = AscentSettings(objective, task, steps, self.radius[0], step_size, rule, label_consistency)
        for name, value, least in (("samples", samples, 1), ("every", every, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if not 0 < ratio <= 1:
            raise InputError(f"ratio: got {ratio!r}, wanted a number above 0 and at most 1")
        _check_typicality(direction, typicality)
        self.autoencoder = as_autoencoder(autoencoder)
        known = getattr(self.autoencoder, "latent_std", math.nan) if latent_std is None else latent_std
        self.latent_std = float(known)
        if not (math.isfinite(self.latent_std) and self.latent_std > 0):
            raise InputError(
                f"latent_std: got {self.latent_std}, wanted a number above 0; fit the autoencoder with "
                "tsynd.fit_autoencoder or give it"
            )
        self.direction, self.samples, self.masks, self.seed = direction, samples, masks, seed
        self.ratio, self.every, self.typicality = ratio, every, typicality
        self.calls = self.images_made = 0
        self.seconds = self.progress = 0.0
        self.prior: LatentPrior | None = None
        self._posterior: MCDropout | None = None
        self._checked = False
        self._rows: tuple[Tensor, int] | None = None

    def set_progress(self, fraction: float) -> None:
        """Tell how much of the augmented part of the training is done; ``fit_classifier`` does before each call.

        Args:
            fraction: 0 at the first augmented step, 1 at the last.

        Raises:
            InputError: a fraction outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise InputError(f"fraction: got {fraction!r}, wanted a number in [0, 1]")
        self.progress = float(fraction)

    def set_rows(self, rows: Tensor, total: int) -> Tensor:
        """Tell that the next call's images are these rows of a batch over several processes.

        Posterior samples and random directions are then addressed by the row.

        Args:
            rows: int64 [B], ascending.
            total: images of the whole batch.

        Returns:
            The rows that the next call will give images of.
        """
        self._rows = rows.cpu(), total
        if self.calls % self.every:
            return rows[:0]
        return rows[rows < math.ceil(self.ratio * total)]

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on besides the arguments, for a resumed training."""
        return {"calls": self.calls, "images_made": self.images_made, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.calls, self.images_made = int(state["calls"]), int(state["images_made"])
        self.seconds = float(state["seconds"])

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Fit the distribution of latents that ``typicality`` needs; nothing is done where it does not.

        Args:
            batches: the training images [b, C, H, W] in [0, 1]; from the 2001st image on they are not read.

        Raises:
            InputError: fewer than two images, or latents without variance.
        """
        if self.typicality == 0 or self.prior is not None:
            return
        latents: list[Tensor] = []
        count = 0
        with torch.no_grad(), frozen(*self._modules()):
            for images in batches:
                place(images.device, self.autoencoder)
                latents.append(self.autoencoder.encode(images).float().cpu())
                count += len(images)
                if count >= _MOST_FITTED:
                    break
        self.prior = fit_latent_prior([torch.cat(latents)[:_MOST_FITTED]] if latents else [])

    def __call__(self, classifier: nn.Module | Posterior, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images for the first ``ratio`` of the batch.

        Args:
            classifier: in any mode, with active dropout, or a posterior; only its device matters to a ``random`` or
                ``reconstruction`` without ``label_consistency``.
            images: [B, C, H, W] in [0, 1].
            labels: [B] or [B, L].

        Returns:
            images [M, C, H, W] in [0, 1] without gradient, and their labels; M = ceil(ratio * B), or 0 where
            ``every`` passes the call over.

        Raises:
            InputError: at the first call, models, images or labels that do not fit.
        """
        call, self.calls = self.calls, self.calls + 1
        (rows, total), self._rows = self._rows or (torch.arange(len(images)), len(images)), None
        rows = rows[rows < math.ceil(self.ratio * total)]
        if call % self.every or not len(rows):
            return images[:0].detach(), labels[:0]
        start = clock(images.device)
        count = len(rows)
        images, labels = images[:count].detach(), labels[:count]
        posterior = self._posterior_of(classifier)
        if isinstance(posterior, MCDropout):
            posterior.seed = self.seed + call
        place(images.device, self.autoencoder)
        with ExitStack() as stack:
            stack.enter_context(frozen(*self._modules()))
            if posterior is not None:
                stack.enter_context(posterior.frozen())
                stack.enter_context(posterior.folded())
            self._check(posterior, images, labels)
            with torch.no_grad():
                source = self.autoencoder.encode(images).float()
            rows = rows.to(source.device)
            if posterior is None:
                made = self._move(source, call, rows)
            else:
                made = self._images(posterior, source, labels, call, rows)
        self.images_made += count
        self.seconds += clock(images.device) - start
        return made, labels

    def _images(self, posterior: Posterior, source: Tensor, labels: Tensor, call: int, ids: Tensor) -> Tensor:
        settings, task = self._settings(), self.settings.task
        if task == "multiclass":
            labels = labels.long().reshape(len(source))
        if self.direction == "random" and settings.label_consistency is not None:
            made = self._move(source, call, ids)
            kept = label_probability(posterior, made, labels, ids, task) >= settings.label_consistency
            return torch.where(kept[:, None, None, None], made, self._decode(source))
        measure: Measure
        if self.direction == "loss":
            measure = LabelLoss(posterior, labels, task)
        else:
            measure = Uncertainty(posterior, settings.objective, task)
        goal = PlausibleGoal(measure, source, self._prior_at(source.device), self.typicality)
        decode = self.autoencoder.decode
        return ascend_latents(posterior, decode, source, ids, settings, self.latent_std, labels, goal).images

    def _move(self, source: Tensor, call: int, ids: Tensor) -> Tensor:
        """``random`` and ``reconstruction``."""
        if self.direction == "reconstruction":
            return self._decode(source)
        _, radius = self._settings().lengths(self.latent_std, source[0].numel())
        return self._decode(source + radius * _directions(source, ids.tolist(), self.seed + call, self.settings.rule))

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(latents).clamp(0, 1)

    def _settings(self) -> AscentSettings:
        start, end = self.radius
        return replace(self.settings, radius=start + (end - start) * self.progress)

    def _modules(self) -> tuple[nn.Module, ...]:
        return (self.autoencoder,) if isinstance(self.autoencoder, nn.Module) else ()

    def _prior_at(self, device: torch.device) -> LatentPrior | None:
        if self.prior is not None and self.prior.mean.device != device:
            self.prior = self.prior.to(device)
        return self.prior

    def _posterior_of(self, classifier: nn.Module | Posterior) -> Posterior | None:
        """The classifier's posterior, traced once, it follows the weights; None where no prediction is needed."""
        random = self.direction == "random" and self.settings.label_consistency is None
        if random or self.direction == "reconstruction":
            return None
        if isinstance(classifier, Posterior):
            return classifier
        if self._posterior is None or self._posterior.classifier is not classifier:
            self._posterior = MCDropout(classifier, self.samples, self.masks, self.seed)
        return self._posterior

    def _check(self, posterior: Posterior | None, images: Tensor, labels: Tensor) -> None:
        """Once, with everything in eval mode: do the models and the first batch fit?"""
        if self._checked:
            return
        check_autoencoder(self.autoencoder, check_images(images))
        check_pixel_range(self.autoencoder, images)
        classes = None
        if posterior is not None:
            with torch.no_grad():
                classes = posterior.logits(images[:1]).shape[-1]
        check_labels(labels, len(images), self.settings.task, classes)
        if self.typicality > 0 and self.prior is None:
            raise InputError(
                "typicality: got a weight but no distribution of latents, wanted prepare(batches of training images) "
                "before the first call"
            )
        self._checked = True


def _radius_pair(radius: float | Sequence[float]) -> tuple[float, float]:
    ends = tuple(radius) if isinstance(radius, (tuple, list)) else (radius, radius)
    numbers = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
    if not (numbers and all(math.isfinite(end) and end > 0 for end in ends)):
        raise InputError(f"radius: got {radius!r}, wanted a number above 0 or a pair (start, end) of them")
    return float(ends[0]), float(ends[1])


def _check_typicality(direction: str, typicality: float) -> None:
    if not (math.isfinite(typicality) and typicality >= 0):
        raise InputError(f"typicality: got {typicality!r}, wanted a finite number of 0 or more")
    if typicality > 0 and direction not in ("uncertainty", "loss"):
        raise InputError(f"typicality: got {typicality!r} with direction {direction!r}, which climbs nothing; wanted 0")


def _directions(like: Tensor, positions: Sequence[int], seed: int, rule: str) -> Tensor:
    """One uniform direction per image of a batch [B, ...], addressed by (seed, position): its length is 1.

    Drawn on the CPU, so that a batch's make-up and the device do not matter.
    """
    generator = torch.Generator()
    rows = []
    for position in positions:
        # torch's CPU engine uses 32 bits of its seed; the odd constant keeps the streams of two seeds apart
        generator.manual_seed((seed * 0x9E3779B1 + position) & 0xFFFFFFFF)
        rows.append(torch.randn(like[0].numel(), generator=generator))
    normal = torch.stack(rows)
    unit = normal.sign() if rule == "linf" else normal / normal.norm(dim=1, keepdim=True)
    return unit.reshape(like.shape).to(like)
