"""Targeted augmentation: synthesis inside a training loop, against the classifier as it is at that step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.ascent import AscentSettings, ascend_latents
from tsynd.autoencoder import as_autoencoder
from tsynd.checks import check_choice
from tsynd.errors import InputError
from tsynd.posterior import MCDropout, Posterior, frozen

__all__ = ["TargetedAugmentation"]


class TargetedAugmentation:
    """Callable ``(classifier, images, labels) -> (images*, labels)`` for :func:`tsynd.fit_classifier` or any loop.

    Each call draws fresh posterior samples of the classifier, moves the latents of (part of) the batch uphill on
    their disagreement and decodes them; the labels are the sources'. The classifier's modes and its parameters'
    ``requires_grad`` are as before afterwards.

    Args:
        autoencoder: anything :func:`tsynd.as_autoencoder` takes, with ``latent_std`` measured by
            :func:`tsynd.fit_autoencoder`, or see ``latent_std``.
        objective: ``mutual_information`` or ``entropy``.
        task: ``multiclass`` or ``multilabel``.
        samples: T, posterior samples per call.
        masks: ``shared`` or ``independent``.
        steps: K, ascent steps.
        radius: see :class:`tsynd.AscentSettings`.
        step_size: see :class:`tsynd.AscentSettings`.
        label_consistency: see :class:`tsynd.AscentSettings`.
        ratio: extra images per real image of the batch, in (0, 1].
        latent_std: standard deviation of the latents; None takes the autoencoder's.
        seed: of the posterior samples; call n uses seed + n.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        autoencoder: Any,
        *,
        objective: str = "mutual_information",
        task: str = "multiclass",
        samples: int = 32,
        masks: str = "shared",
        steps: int = 3,
        radius: float = 0.5,
        step_size: float | None = None,
        label_consistency: float | None = None,
        ratio: float = 1.0,
        latent_std: float | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = AscentSettings(objective, task, steps, radius, step_size, label_consistency=label_consistency)
        check_choice("masks", masks, ("shared", "independent"))
        if not 0 < ratio <= 1:
            raise InputError(f"ratio: got {ratio!r}, wanted a number above 0 and at most 1")
        self.autoencoder = as_autoencoder(autoencoder)
        known = getattr(self.autoencoder, "latent_std", math.nan) if latent_std is None else latent_std
        self.latent_std = float(known)
        if not (math.isfinite(self.latent_std) and self.latent_std > 0):
            raise InputError(
                f"latent_std: got {self.latent_std}, wanted a number above 0; fit the autoencoder with "
                "tsynd.fit_autoencoder or give it"
            )
        self.samples, self.masks, self.ratio, self.seed = samples, masks, ratio, seed
        self.calls = 0
        self._posterior: MCDropout | None = None

    def __call__(self, classifier: nn.Module | Posterior, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targeted images for the first ``ratio`` of the batch.

        Args:
            classifier: in any mode, with active dropout, or a posterior.
            images: [B, C, H, W] in [0, 1].
            labels: [B] or [B, L].

        Returns:
            images [M, C, H, W] in [0, 1] without gradient, and their labels; M = ceil(ratio * B).
        """
        count = math.ceil(self.ratio * len(images))
        images, labels = images[:count], labels[:count]
        posterior = self._of(classifier)
        if isinstance(posterior, MCDropout):
            posterior.seed = self.seed + self.calls
        self.calls += 1
        model = self.autoencoder
        modules = (model,) if isinstance(model, nn.Module) else ()
        with posterior.frozen(), frozen(*modules):
            with torch.no_grad():
                source = model.encode(images).float()
            ids = torch.arange(count, device=images.device)
            climbed = ascend_latents(posterior, model.decode, source, ids, self.settings, self.latent_std, labels)
        return climbed.images, labels

    def _of(self, classifier: nn.Module | Posterior) -> Posterior:
        """The classifier's posterior; traced once, it follows the weights."""
        if isinstance(classifier, Posterior):
            return classifier
        if self._posterior is None or self._posterior.classifier is not classifier:
            self._posterior = MCDropout(classifier, self.samples, self.masks, self.seed)
        return self._posterior
