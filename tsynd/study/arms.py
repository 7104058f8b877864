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
from tsynd.training.extra_images import Alternation, BatchAugmentation
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.utils.errors import InputError, check_choice, require

__all__ = ["ARMS", "RECIPE", "Arm", "RandAugmentation", "StandardAugmentation", "augmentation_of", "parse_arm"]

_LATENT: dict[str, dict[str, str]] = {
    "reconstruction": {"direction": "reconstruction"},
    "random": {"direction": "random"},
    "entropy": {"direction": "uncertainty", "objective": "entropy"},
    "mutual_information": {"direction": "uncertainty", "objective": "mutual_information"},
    "expected_information": {"direction": "uncertainty", "objective": "expected_information"},
    "loss": {"direction": "loss"},
}
_PIXEL = ("standard", "randaugment", "adversarial", "trades")

ARMS = ("real", *_PIXEL, *_LATENT)
"""``real`` adds nothing. On pixels: ``standard`` turns, shifts, scales and flips a little, ``randaugment`` is
RandAugment (Cubuk et al. 2020), ``adversarial`` is PGD training (Madry et al. 2018), ``trades`` learns the same
prediction in a ball (Zhang et al. 2019). Through the autoencoder: ``reconstruction`` decodes the latents as they are,
``random`` moves them in a random direction to the radius, ``entropy`` and ``mutual_information`` up the classifier's
uncertainty, ``expected_information`` up what the image would tell about others, ``loss`` up the label's cross-entropy.
``A+B`` takes them in turn, step by step. All but ``real`` add the same number of images to the same steps."""

RECIPE = "trades+mutual_information"
"""What the arm ``recipe`` stands for."""

_TRAINING = ("augmentation_weight", "warmup_fraction", "iterations")
_FIXED = ("autoencoder", "direction", "objective", "task", "latent_std", "seed")
_NAMES = [*inspect.signature(TargetedAugmentation.__init__).parameters, *(f.name for f in fields(AscentSettings))]
_OPTIONS = tuple(name for name in _NAMES if name not in ("self", "settings", "targets", "ascent", *_FIXED))
_OWN: dict[str, tuple[str, ...]] = {
    "standard": ("flip",),
    "adversarial": ("budget", "steps", "persistent"),
    "trades": ("budget", "steps", "persistent", "weight"),
}
# what an option needs climbing for is not asked of the arms that do not climb
_CLIMBING = {"typicality": ("uncertainty", "loss")}


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        text: as it was written.
        kinds: of :data:`ARMS`, in turn where there are several.
        options: for each kind what it sets otherwise than the study.
        training: its own ``augmentation_weight``, ``warmup_fraction`` and ``iterations``.
    """

    text: str
    kinds: tuple[str, ...]
    options: tuple[Mapping[str, Any], ...]
    training: Mapping[str, Any]

    @property
    def generative(self) -> bool:
        """Whether any of its images come out of the autoencoder."""
        return any(kind in _LATENT for kind in self.kinds)

    def latent(self) -> Arm:
        """Its first part that goes through the autoencoder, making an image of every one it is given."""
        place = next(i for i, kind in enumerate(self.kinds) if kind in _LATENT)
        return Arm(self.text, (self.kinds[place],), ({**self.options[place], "ratio": 1.0, "every": 1},), self.training)


def parse_arm(text: str) -> Arm:
    """An arm from ``KIND``, ``KIND+KIND`` or ``recipe``, with ``,option=value`` behind it.

    Options are those of :class:`tsynd.TargetedAugmentation`; ``budget``, ``steps`` and ``persistent`` of
    ``adversarial`` and ``trades``, ``weight`` of ``trades``, ``flip`` (``none``, ``horizontal`` or ``both``) of
    ``standard``;
    ``augmentation_weight``, ``warmup_fraction`` and ``iterations`` of :func:`tsynd.fit_classifier`. A pair is written
    ``radius=0.2:0.8``; ``trades.steps=3`` means one of several kinds that know the option. ``real,iterations=750`` is
    real only with as much time as a dearer arm.

    Raises:
        InputError: an unknown kind or option, or a value that is no number or word.
    """
    head, *settings = text.split(",")
    kinds = tuple((RECIPE if head == "recipe" else head).split("+"))
    if not set(kinds) <= set(ARMS) or len(set(kinds)) < len(kinds) or ("real" in kinds and len(kinds) > 1):
        raise InputError(
            f"arms: got {text!r}, wanted KIND, KIND+KIND or recipe, and perhaps ,option=value, with KIND one of"
            f" {', '.join(ARMS)}"
        )
    known = [() if k == "real" else _OPTIONS if k in _LATENT else ("every", "ratio", *_OWN.get(k, ())) for k in kinds]
    training = ("iterations",) if kinds == ("real",) else _TRAINING
    options: tuple[dict[str, Any], ...] = tuple({} for _ in kinds)
    own: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        kind, dot, short = name.rpartition(".")
        takers = [i for i, names in enumerate(known) if short in names and (not dot or kinds[i] == kind)]
        if not equals or not (takers or name in training):
            wanted = ", ".join(dict.fromkeys([*(n for names in known for n in names), *training]))
            raise InputError(f"arms: got {setting!r} in {text!r}, wanted option=value with option one of {wanted}")
        for i in takers:
            options[i][short] = _value(value)
        if name in training:
            own[name] = _value(value)
    return Arm(text, kinds, options, own)


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


class StandardAugmentation(BatchAugmentation):
    """What most trainings do, by kornia: turns of up to 10°, shifts of 5 % of the sides, scales of 0.9 to 1.1, flips.

    Args:
        flip: ``none``, ``horizontal`` or ``both``: the flips that leave a picture possible, each by an even chance.
        ratio: see :class:`tsynd.training.extra_images.BatchAugmentation`.
        every: see there.
        seed: call n draws from seed + n; torch's global state is left as it was.
    """

    def __init__(self, flip: str = "horizontal", ratio: float = 1.0, every: int = 1, seed: int = 0) -> None:
        super().__init__(ratio, every, seed)
        check_choice("flip", flip, ("none", "horizontal", "both"))
        kornia = require("kornia.augmentation", "train")
        steps = [kornia.RandomAffine(10.0, (0.05, 0.05), (0.9, 1.1), padding_mode="border", p=1.0)]
        steps += [kornia.RandomHorizontalFlip(p=0.5)] if flip != "none" else []
        steps += [kornia.RandomVerticalFlip(p=0.5)] if flip == "both" else []
        self.augment = kornia.AugmentationSequential(*steps, data_keys=["input"])

    def make(self, classifier: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`tsynd.training.extra_images.BatchAugmentation.make`."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed + self.calls)
            made: Tensor = self.augment(images)
            return made.clamp(0, 1)


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
        adversarial_budget: of ``adversarial`` and ``trades``, in [0, 1] pixel units.
        adversarial_steps: of both.

    Raises:
        InputError: an option that cannot be used.
    """
    if arm.kinds == ("real",):
        return None
    budget = {"budget": adversarial_budget, "steps": adversarial_steps}
    made = [
        _one(kind, autoencoder, options, {"task": task, "seed": seed}, budget, own)
        for kind, own in zip(arm.kinds, arm.options, strict=True)
    ]
    return made[0] if len(made) == 1 else Alternation(*made)


def _one(
    kind: str,
    autoencoder: Any,
    options: Mapping[str, Any],
    shared: dict[str, Any],
    budget: dict[str, Any],
    own: Mapping[str, Any],
) -> BatchAugmentation:
    if kind in _LATENT:
        direction = _LATENT[kind]["direction"]
        usable = {name: value for name, value in options.items() if direction in _CLIMBING.get(name, (direction,))}
        return TargetedAugmentation(autoencoder, **{**shared, **usable, **own, **_LATENT[kind]})
    counts = {name: options[name] for name in ("ratio", "every") if name in options}
    if kind in ("standard", "randaugment"):
        plain = StandardAugmentation if kind == "standard" else RandAugmentation
        return plain(**{**counts, "seed": shared["seed"], **own})
    return (PixelConsistency if kind == "trades" else PixelAdversarial)(**{**shared, **budget, **counts, **own})
