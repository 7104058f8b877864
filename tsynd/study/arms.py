"""The arms of a study: what, if anything, is added to each batch of real images."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.evaluation.attacks import Attack, perturb
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.utils.errors import InputError, require

__all__ = ["ARMS", "Arm", "adversarial_images", "augmentation_of", "parse_arm", "randaugment_images"]

_LATENT: dict[str, dict[str, str]] = {
    "reconstruction": {"direction": "reconstruction"},
    "random": {"direction": "random"},
    "entropy": {"direction": "uncertainty", "objective": "entropy"},
    "mutual_information": {"direction": "uncertainty", "objective": "mutual_information"},
    "loss": {"direction": "loss"},
}
_PIXEL = ("adversarial", "randaugment")

ARMS = ("real", *_LATENT, *_PIXEL)
"""``real`` adds nothing. Through the autoencoder: ``reconstruction`` decodes the latents as they are, ``random``
moves them in a random direction to the radius, ``entropy`` and ``mutual_information`` up the classifier's uncertainty,
``loss`` up the label's cross-entropy. On pixels: ``adversarial`` is PGD training (Madry et al. 2018), ``randaugment``
RandAugment (Cubuk et al. 2020). All but ``real`` add the same number of images to the same steps."""

_TRAINING = ("augmentation_weight", "warmup_fraction")
_FIXED = ("autoencoder", "direction", "objective", "task", "latent_std", "seed")
_OPTIONS = tuple(
    name for name in inspect.signature(TargetedAugmentation.__init__).parameters if name not in ("self", *_FIXED)
)
# what an option needs climbing for is not asked of the arms that do not climb
_CLIMBING = {"typicality": ("uncertainty", "loss")}

Make = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""(classifier, images, labels, number of the call) → as many images."""


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


class _PixelImages:
    """Extra images made from pixels, in the same number and at the same steps as the autoencoder's."""

    def __init__(self, make: Make, ratio: float, every: int) -> None:
        if not 0 < ratio <= 1:
            raise InputError(f"ratio: got {ratio!r}, wanted a number above 0 and at most 1")
        if not isinstance(every, int) or every < 1:
            raise InputError(f"every: got {every!r}, wanted an integer of at least 1")
        self.make, self.ratio, self.every, self.calls = make, ratio, every, 0

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        call, self.calls = self.calls, self.calls + 1
        count = 0 if call % self.every else math.ceil(self.ratio * len(images))
        images, labels = images[:count], labels[:count]
        return (self.make(classifier, images, labels, call) if count else images), labels


def adversarial_images(budget: float, steps: int, task: str, seed: int) -> Make:
    """PGD images against the classifier as it is, in eval mode.

    Args:
        budget: of the L∞ ball, in [0, 1] pixel units.
        steps: of PGD, each 2.5 · budget / steps long, from a random start.
        task: "multiclass" or "multilabel".
        seed: call n starts from seed + n.
    """

    def make(classifier: nn.Module, images: Tensor, labels: Tensor, call: int) -> Tensor:
        attack = Attack("pgd", budget)
        with torch.enable_grad():
            return perturb(classifier, images, labels, attack, task=task, seed=seed + call, steps=steps)

    return make


_GROUP = 8  # kornia draws one pair of operations per call; this many images share it


def randaugment_images(seed: int) -> Make:
    """RandAugment by kornia: two operations of strength 10 of 30; grey images pass as RGB with equal channels.

    Args:
        seed: call n draws from seed + n; torch's global state is left as it was.
    """
    augment = require("kornia.augmentation.auto", "train").RandAugment(n=2, m=10)

    def make(classifier: nn.Module, images: Tensor, labels: Tensor, call: int) -> Tensor:
        grey = images.shape[1] == 1
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed + call)
            coloured = images.expand(-1, 3, -1, -1) if grey else images
            made = torch.cat([augment(part) for part in torch.split(coloured, _GROUP)]).clamp(0, 1)
        return made.mean(1, keepdim=True) if grey else made

    return make


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
    make = (
        adversarial_images(adversarial_budget, adversarial_steps, task, seed)
        if arm.kind == "adversarial"
        else randaugment_images(seed)
    )
    chosen = {
        "ratio": 1.0,
        "every": 1,
        **{name: options[name] for name in ("ratio", "every") if name in options},
        **own,
    }
    return _PixelImages(make, chosen["ratio"], chosen["every"])
