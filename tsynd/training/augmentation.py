"""Targeted augmentation: synthesis inside a training loop, against the classifier as it is at that step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.checks import check_images
from tsynd.models.autoencoder import autoencoder_of, check_autoencoder, check_pixel_range
from tsynd.ops import operators as ops
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import AscentSettings, ascend_latents, ascent_settings, label_probability
from tsynd.synthesis.objectives import EXPECTED, LabelLoss, Measure, measure_of
from tsynd.training.extra_images import BatchAugmentation, PerImage, check_extra_labels, most_likely
from tsynd.utils.device import place
from tsynd.utils.draws import random_directions
from tsynd.utils.errors import InputError, check_choice

__all__ = ["DIRECTIONS", "TargetedAugmentation"]

DIRECTIONS = ("uncertainty", "loss", "random", "reconstruction")
_CLIMBING = ("uncertainty", "loss")

_MOST_TARGETS = 512  # training images kept as targets
_TARGETS = 32  # of them in one call


class TargetedAugmentation(BatchAugmentation):
    """Callable ``(classifier, images, labels) -> (images*, labels)`` for :func:`tsynd.fit_classifier` or any loop.

    Each call takes fresh posterior samples of the classifier as it is, moves the latents of (part of) the batch and
    decodes them; the labels are the sources'. Modes, ``requires_grad`` and the global random state are as before
    afterwards. What call n returns depends on the arguments, the weights, ``seed`` and n alone (with ``persistent``,
    also on what is kept).

    The directions other than ``uncertainty`` are its controls: equal in everything but where the latents go.

    Args:
        autoencoder: anything :func:`tsynd.as_autoencoder` takes, with ``latent_std`` measured by
            :func:`tsynd.fit_autoencoder`, or see the settings' ``latent_std``.
        settings: of the ascent, see :class:`tsynd.AscentSettings`; None takes three steps.
        direction: where the latents go:
            ``uncertainty``: up the posterior's disagreement, to the best iterate (TSynD, Niemeijer et al. 2024,
            arXiv 2406.17473);
            ``loss``: in the same way up the label's cross-entropy under the posterior's mean prediction;
            ``random``: in a uniform direction to exactly the radius (rule ``linf``: to a uniform corner of the
            box), without any gradient;
            ``reconstruction``: nowhere, decode(encode(x)).
        residual: share in [0, 1] of what the autoencoder loses, x - decode(encode(x)), that is added to every image.
        targets: [M, C, H, W] in [0, 1], images for the objective ``expected_information``; None takes up to 512 of the
            training images. 32 of them are drawn for each call.
        persistent: the cheap mode: an image's ascent begins where its last one ended, so that one step a visit
            (``steps=1``) is enough, and ends at the last iterate; a step is half the radius unless ``step_size``
            says otherwise. For the directions that climb.
        ratio: extra images per real image of the batch, in (0, 1]; the batch's first are taken.
        every: only calls 0, n, 2n, ... give images, the others none.
        seed: of the posterior samples and whatever else is drawn; call n uses seed + n.
        **ascent: fields of :class:`tsynd.AscentSettings` that go before ``settings``. A ``radius`` may be a pair: it
            goes linearly from the first to the second while :meth:`set_progress` goes from 0 to 1. A random image
            below ``label_consistency``, or one that ends at its last iterate, is replaced by the reconstruction.

    Attributes:
        calls: number of calls so far.
        seconds: wall time spent in them.
        images_made: number of images they gave.
        progress: what :meth:`set_progress` was last told.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        autoencoder: Any,
        settings: AscentSettings | None = None,
        *,
        direction: str = "uncertainty",
        residual: float = 0.0,
        targets: Tensor | None = None,
        persistent: bool = False,
        ratio: float = 1.0,
        every: int = 1,
        seed: int = 0,
        **ascent: Any,
    ) -> None:
        super().__init__(ratio, every, seed)
        check_choice("direction", direction, DIRECTIONS)
        options = dict(ascent)
        self.radius = _radius_pair(options.pop("radius", (settings or AscentSettings()).radius))
        self.settings = ascent_settings(settings or AscentSettings(steps=3), options | {"radius": self.radius[0]})
        self.expected = direction == "uncertainty" and self.settings.objective == EXPECTED
        self.direction, self.residual, self.persistent, self.targets = direction, residual, persistent, targets
        self._check_options()
        self.autoencoder = autoencoder_of(autoencoder)
        own = self.settings.latent_std
        self.latent_std = float(getattr(self.autoencoder, "latent_std", math.nan) if own is None else own)
        if not (math.isfinite(self.latent_std) and self.latent_std > 0):
            raise InputError(
                f"latent_std: got {self.latent_std}, wanted a number above 0; fit the autoencoder with "
                "tsynd.fit_autoencoder or give it"
            )
        self._posterior: MCDropout | None = None
        self._checked = self._fits = False
        self._kept = PerImage()  # offsets of latents

    def _check_options(self) -> None:
        if not (isinstance(self.residual, (int, float)) and 0 <= self.residual <= 1):
            raise InputError(f"residual: got {self.residual!r}, wanted a number in [0, 1]")
        if self.persistent and self.direction not in _CLIMBING:
            raise InputError(
                f"persistent: got True with direction {self.direction!r}, which climbs nothing; wanted False"
            )
        if self.targets is not None:
            if not self.expected:
                raise InputError("targets: got images, wanted them with objective 'expected_information' alone")
            self.targets = check_images(self.targets)

    def check(self, classifier: nn.Module | Posterior, steps: int) -> None:
        """See :meth:`Augmentation.check`; here: does the classifier have a posterior?"""
        self._posterior_of(classifier)

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on besides the arguments, for a resumed training."""
        return {**super().state_dict(), "kept": self._kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        super().load_state_dict(state)
        self._kept.load_state_dict(state["kept"])

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Refuse an autoencoder that does not fit, and keep targets where they are wanted and not given.

        Args:
            batches: the training images [b, C, H, W] in [0, 1]; the first, or as many as become targets, are read.

        Raises:
            InputError: the autoencoder does not fit the images.
        """
        batches = iter(batches)
        first = next(batches)
        place(first.device, self.autoencoder)
        with frozen(*self._modules()):
            self._check_autoencoder(first)
        if self.expected and self.targets is None:
            self.targets = torch.cat([images.cpu() for images in _first(chain([first], batches), _MOST_TARGETS)])

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
        return self.give(classifier, images, labels)

    def make(self, classifier: nn.Module | Posterior, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`BatchAugmentation.make`."""
        posterior = self._posterior_of(classifier)
        if isinstance(posterior, MCDropout):
            posterior.seed = self.seed + self.calls
        place(images.device, self.autoencoder)
        with ExitStack() as stack:
            stack.enter_context(frozen(*self._modules()))
            if posterior is not None:
                stack.enter_context(posterior.frozen())
                stack.enter_context(posterior.folded())
            self._check(posterior, images, labels)
            with torch.no_grad():
                source = self.autoencoder.encode(images).float()
                decode = self._decoder(images, source)
            ids = rows.to(source.device)
            if posterior is None:
                return self._move(decode, source, ids)
            if self.settings.task == "multiclass":
                labels = most_likely(labels)
            if self.direction not in _CLIMBING:
                return self._kept_labels(posterior, decode, source, labels, ids, self._move(decode, source, ids))
            measure = self._measure(posterior, labels)
            if self.persistent:
                made = self._last_iterate(decode, source, ids, measure)
                return self._kept_labels(posterior, decode, source, labels, ids, made)
            return ascend_latents(
                posterior, decode, source, ids, self._settings(), self.latent_std, labels, measure
            ).images

    def _kept_labels(
        self,
        posterior: Posterior,
        decode: Callable[[Tensor], Tensor],
        source: Tensor,
        labels: Tensor,
        ids: Tensor,
        made: Tensor,
    ) -> Tensor:
        """The made images, with those that lost their label replaced by the reconstructions."""
        least = self.settings.label_consistency
        if least is None:
            return made
        kept = label_probability(posterior, made, labels, ids, self.settings.task) >= least
        with torch.no_grad():
            start = decode(source).clamp(0, 1)
        return torch.where(kept.reshape([-1] + [1] * (made.dim() - 1)), made, start)

    def _measure(self, posterior: Posterior, labels: Tensor) -> Measure:
        task = self.settings.task
        if self.direction == "loss":
            return LabelLoss(posterior, labels, task)
        chosen = None
        if self.expected:
            assert self.targets is not None  # _check has seen them
            draw = torch.Generator().manual_seed((self.seed + self.calls) & 0xFFFFFFFF)
            chosen = self.targets[torch.randperm(len(self.targets), generator=draw)[:_TARGETS]].to(labels.device)
        return measure_of(posterior, self.settings.objective, task, chosen)

    def _decoder(self, images: Tensor, source: Tensor) -> Callable[[Tensor], Tensor]:
        """Latents [M, ...] -> images, with the share of the residual."""
        decode: Callable[[Tensor], Tensor] = self.autoencoder.decode
        if self.residual == 0:
            return decode
        lost = self.residual * (images - decode(source).clamp(0, 1))
        return lambda latents: decode(latents) + lost

    def _move(self, decode: Callable[[Tensor], Tensor], source: Tensor, ids: Tensor) -> Tensor:
        """``random`` and ``reconstruction``."""
        latents = source
        if self.direction == "random":
            _, radius = self._settings().lengths(self.latent_std, source[0].numel())
            latents = source + radius * random_directions(source, ids, self.seed + self.calls, self.settings.rule)
        with torch.no_grad():
            return decode(latents).clamp(0, 1)

    def _last_iterate(
        self, decode: Callable[[Tensor], Tensor], source: Tensor, ids: Tensor, measure: Measure
    ) -> Tensor:
        """Latents after K steps from where they were left; nothing is evaluated afterwards."""
        settings = self._settings()
        step, radius = settings.lengths(self.latent_std, source[0].numel())
        if settings.step_size is None:
            step = radius / 2
        latents = source + self._kept.get(self.ids, torch.zeros_like(source))
        for _ in range(settings.steps):
            with torch.enable_grad():
                leaf = latents.detach().requires_grad_()
                value = measure(decode(leaf).clamp(0, 1), ids)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
            ops.ascend_(latents, slope, source, step, radius, settings.rule)
        self._kept.put(self.ids, latents - source)
        with torch.no_grad():
            return decode(latents).clamp(0, 1)

    def _settings(self) -> AscentSettings:
        start, end = self.radius
        return replace(self.settings, radius=start + (end - start) * self.progress)

    def _modules(self) -> tuple[nn.Module, ...]:
        return (self.autoencoder,) if isinstance(self.autoencoder, nn.Module) else ()

    def _posterior_of(self, classifier: nn.Module | Posterior) -> Posterior | None:
        """The classifier's posterior, traced once, it follows the weights; None where no prediction is needed."""
        if self.direction not in _CLIMBING and (
            self.direction == "reconstruction" or self.settings.label_consistency is None
        ):
            return None
        if isinstance(classifier, Posterior):
            return classifier
        if self._posterior is None or self._posterior.classifier is not classifier:
            self._posterior = MCDropout(classifier, self.settings.samples, self.settings.masks, self.seed)
        return self._posterior

    def _check_autoencoder(self, images: Tensor) -> None:
        if not self._fits:
            check_autoencoder(self.autoencoder, check_images(images))
            check_pixel_range(self.autoencoder, images)
            self._fits = True

    def _check(self, posterior: Posterior | None, images: Tensor, labels: Tensor) -> None:
        """Once, with everything in eval mode: do the models and the first batch fit?"""
        if self._checked:
            return
        self._check_autoencoder(images)
        classes = None
        if posterior is not None:
            with torch.no_grad():
                classes = posterior.logits(images[:1]).shape[-1]
        check_extra_labels(labels, len(images), self.settings.task, classes)
        if self.expected and self.targets is None:
            raise InputError(
                "targets: got none, wanted images, or prepare(batches of training images) before the first call"
            )
        if self.targets is not None and self.targets.shape[1:] != images.shape[1:]:
            raise InputError(
                f"targets: images of shape {list(self.targets.shape[1:])}, wanted {list(images.shape[1:])}"
            )
        self._checked = True


def _first(batches: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Batches up to so many images, the last one cut; no further one is asked for."""
    left = most
    for images in batches:
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return


def _radius_pair(radius: float | Sequence[float]) -> tuple[float, float]:
    ends = tuple(radius) if isinstance(radius, (tuple, list)) else (radius, radius)
    numbers = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
    if not (numbers and all(math.isfinite(end) and end > 0 for end in ends)):
        raise InputError(f"radius: got {radius!r}, wanted a number above 0 or a pair (start, end) of them")
    return float(ends[0]), float(ends[1])
