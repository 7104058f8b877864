"""The arms of a study: what, if anything, is added to each batch of real images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.synthesis.ascent import AscentSettings
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import BatchAugmentation
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.utils.errors import InputError, require

__all__ = ["ARMS", "Arm", "RandAugmentation", "augmentation_of", "parse_arm"]

_LATENT: dict[str, dict[str, str]] = {
    "reconstruction": {"direction": "reconstruction"},
    "random": {"direction": "random"},
    "entropy": {"direction": "uncertainty", "objective": "entropy"},
    "mutual_information": {"direction": "uncertainty", "objective": "mutual_information"},
    "loss": {"direction": "loss"},
}
_PIXEL = ("adversarial", "trades", "randaugment")

ARMS = ("real", *_LATENT, *_PIXEL)
"""``real`` adds nothing. Through the autoencoder: ``reconstruction`` decodes the latents as they are, ``random``
moves them in a random direction to the radius, ``entropy`` and ``mutual_information`` up the classifier's uncertainty,
``loss`` up the label's cross-entropy. On pixels: ``adversarial`` is PGD training (Madry et al. 2018), ``trades`` learns
the same prediction in a ball (Zhang et al. 2019), ``randaugment`` is RandAugment (Cubuk et al. 2020). All but ``real``
add the same number of images to the same steps."""

_TRAINING = ("augmentation_weight", "warmup_fraction")
_FIXED = ("autoencoder", "direction", "objective", "task", "latent_std", "seed")
_NAMES = [*inspect.signature(TargetedAugmentation.__init__).parameters, *(f.name for f in fields(AscentSettings))]
_OPTIONS = tuple(name for name in _NAMES if name not in ("self", "settings", "targets", "ascent", *_FIXED))
# what an option needs climbing for is not asked of the arms that do not climb
_CLIMBING = {"typicality": ("uncertainty", "loss")}


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        text: as it was written.
        kind: one of :data:`ARMS`.
        options: what it sets otherwise than the study.
    """

    text: str
    kind: str
    options: Mapping[str, Any]

    @property
    def generative(self) -> bool:
        """Whether its images come out of the autoencoder."""
        return self.kind in _LATENT

    @property
    def training(self) -> dict[str, Any]:
        """Its own ``augmentation_weight`` and ``warmup_fraction``."""
        return {name: value for name, value in self.options.items() if name in _TRAINING}


def parse_arm(text: str) -> Arm:
    """An arm from ``KIND`` or ``KIND,option=value,...``, as ``mutual_information,radius=1.0,typicality=0.1``.

    Options are those of :class:`tsynd.TargetedAugmentation`, and ``augmentation_weight`` and ``warmup_fraction`` of
    :func:`tsynd.fit_classifier`. A pair is written ``radius=0.2:0.8``.

    Raises:
        InputError: an unknown kind or option, or a value that is no number or word.
    """
    kind, *settings = text.split(",")
    if kind not in ARMS:
        raise InputError(f"arms: got {text!r}, wanted KIND or KIND,option=value with KIND one of {', '.join(ARMS)}")
    allowed = () if kind == "real" else (*_OPTIONS, *_TRAINING) if kind in _LATENT else ("every", "ratio", *_TRAINING)
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in allowed:
            wanted = ", ".join(allowed) or "none"
            raise InputError(f"arms: got {setting!r} in {text!r}, wanted option=value with option one of {wanted}")
        options[name] = _value(value)
    return Arm(text, kind, options)


def _value(text: str) -> Any:
    if ":" in text:
        return tuple(_value(part) for part in text.split(":"))
    try:
        return json.loads({"None": "null"}.get(text, text))
    except ValueError:
        return text


_GROUP = 8  # kornia draws one pair of operations per call; this many images share it


class RandAugmentation(BatchAugmentation):
    """RandAugment by kornia: two operations of strength 10 of 30; grey images pass as RGB with equal channels.

    Args:
        ratio: see :class:`tsynd.training.extra_images.BatchAugmentation`.
        every: see there.
        seed: call n draws from seed + n; torch's global state is left as it was.
    """

    def __init__(self, ratio: float = 1.0, every: int = 1, seed: int = 0) -> None:
        super().__init__(ratio, every, seed)
        self.augment = require("kornia.augmentation.auto", "train").RandAugment(n=2, m=10)

    def make(self, classifier: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`tsynd.training.extra_images.BatchAugmentation.make`."""
        grey = images.shape[1] == 1
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed + self.calls)
            coloured = images.expand(-1, 3, -1, -1) if grey else images
            made = torch.cat([self.augment(part) for part in torch.split(coloured, _GROUP)]).clamp(0, 1)
        return made.mean(1, keepdim=True) if grey else made


def augmentation_of(
    arm: Arm,
    autoencoder: Any,
    options: Mapping[str, Any],
    *,
    task: str,
    seed: int,
    adversarial_budget: float,
    adversarial_steps: int,
) -> Any:
    """The arm's augmentation for :func:`tsynd.fit_classifier`; None for ``real``.

    Args:
        arm: see :func:`parse_arm`; its options go before the study's.
        autoencoder: trained; not used by the arms on pixels.
        options: the study's, of :class:`tsynd.TargetedAugmentation`.
        task: "multiclass" or "multilabel".
        seed: of everything that is drawn.
        adversarial_budget: of ``adversarial``, in [0, 1] pixel units.
        adversarial_steps: of ``adversarial``.

    Raises:
        InputError: an option that cannot be used.
    """
    if arm.kind == "real":
        return None
    own = {name: value for name, value in arm.options.items() if name not in _TRAINING}
    if arm.generative:
        direction = _LATENT[arm.kind]["direction"]
        usable = {name: value for name, value in options.items() if direction in _CLIMBING.get(name, (direction,))}
        return TargetedAugmentation(autoencoder, task=task, seed=seed, **{**usable, **own, **_LATENT[arm.kind]})
    shared = {"seed": seed, **{name: options[name] for name in ("ratio", "every") if name in options}, **own}
    if arm.kind == "randaugment":
        return RandAugmentation(**shared)
    kind = PixelConsistency if arm.kind == "trades" else PixelAdversarial
    return kind(adversarial_budget, adversarial_steps, task=task, **shared)
