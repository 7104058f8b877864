"""Offline rounds: the whole training set is turned into targeted images several times during a training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches
from tsynd.models.autoencoder import as_autoencoder, check_autoencoder
from tsynd.posteriors.mc_dropout import as_posterior
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.api import synthesize
from tsynd.synthesis.ascent import AscentSettings, ascent_settings
from tsynd.synthesis.result import SynthesisResult
from tsynd.training.extra_images import Augmentation
from tsynd.utils.errors import InputError

__all__ = ["RoundsAugmentation"]


class RoundsAugmentation(Augmentation):
    """Images drawn from sets that were synthesised in rounds against the classifier in training.

    At its first call and then at equal distances, all training images are turned into targeted ones against the
    classifier as it is (:func:`tsynd.synthesize`) and appended, with their sources' labels, to the synthetic set;
    every call gives as many images of that set as there are real ones in the batch, drawn with replacement from
    torch's global generator. All sets stay in memory.

    Args:
        autoencoder: anything :func:`tsynd.as_autoencoder` takes.
        data: the training images with their labels, as ``LabelledBatches`` reads them.
        settings: of the ascents; None takes three steps.
        rounds: R, at least 1 and at most the steps after the warm-up.
        seed: of the posterior samples; round r uses seed + r.
        **ascent: fields of :class:`tsynd.AscentSettings` that go before ``settings``.

    Attributes:
        results: one per round so far: the images that it appended.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        autoencoder: Any,
        data: Any,
        settings: AscentSettings | None = None,
        *,
        rounds: int = 3,
        seed: int = 0,
        **ascent: Any,
    ) -> None:
        for name, value, least in (("rounds", rounds, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        self.settings = ascent_settings(settings or AscentSettings(steps=3), ascent)
        self.autoencoder, self.batches = as_autoencoder(autoencoder), LabelledBatches(data)
        self.rounds, self.seed = rounds, seed
        self.results: list[SynthesisResult] = []
        self.progress = 0.0

    def check(self, classifier: nn.Module | Posterior, steps: int) -> None:
        """See :meth:`Augmentation.check`."""
        if self.rounds > steps:
            raise InputError(f"rounds: got {self.rounds}, wanted at most the {steps} steps after the warm-up")
        as_posterior(classifier, self.settings.samples, self.settings.masks)

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

    def state_dict(self) -> dict[str, Any]:
        """The sets so far."""
        return {"results": [{field.name: getattr(result, field.name) for field in fields(result)}
                            for result in self.results]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.results = [SynthesisResult(**result) for result in state["results"]]

    def __call__(self, classifier: nn.Module | Posterior, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As many synthetic images as real ones, and their labels."""
        # the small term: a fraction such as 49 * (1 / 49) must not fall below its whole number
        if len(self.results) < min(self.rounds, math.floor(self.progress * self.rounds + 1e-9) + 1):
            self.results.append(self._round(classifier))
        size = len(self.results[0])
        draw = torch.randint(size * len(self.results), (len(images),))
        chosen = [(self.results[index // size], index % size) for index in draw.tolist()]
        own = [result.labels[row] for result, row in chosen if result.labels is not None]
        return torch.stack([result.images[row] for result, row in chosen]), torch.stack(own)

    def _round(self, classifier: nn.Module | Posterior) -> SynthesisResult:
        parts = [self.batches.at(part) for part in self.batches.chunks(256)]
        images = torch.cat([part.images for part in parts])
        labels = torch.cat([part.labels for part in parts if part.labels is not None])
        options = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        return synthesize(
            self.autoencoder,
            classifier,
            images,
            labels,
            seed=self.seed + len(self.results),
            progress=False,
            **options,
        )
