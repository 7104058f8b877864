"""The arms of a study: what, if anything, is added to each batch of real images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tsynd.synthesis.ascent import AscentSettings
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import Alternation, BatchAugmentation
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.training.recipe import recipe
from tsynd.training.standard import RandAugmentation, StandardAugmentation
from tsynd.utils.errors import InputError

__all__ = ["ARMS", "Arm", "augmentation_of", "parse_arm"]

_LATENT: dict[str, dict[str, str]] = {
    "reconstruction": {"direction": "reconstruction"},
    "random": {"direction": "random"},
    "entropy": {"direction": "uncertainty", "objective": "entropy"},
    "mutual_information": {"direction": "uncertainty", "objective": "mutual_information"},
    "expected_information": {"direction": "uncertainty", "objective": "expected_information"},
    "loss": {"direction": "loss"},
}
_PIXEL = ("standard", "randaugment", "adversarial", "trades")

ARMS = ("real", *_PIXEL, *_LATENT, "recipe")
"""``real`` adds nothing. On pixels: ``standard`` turns, shifts, scales and flips a little, ``randaugment`` is
RandAugment (Cubuk et al. 2020), ``adversarial`` is PGD training (Madry et al. 2018), ``trades`` learns the same
prediction in a ball (Zhang et al. 2019). Through the autoencoder: ``reconstruction`` decodes the latents as they are,
``random`` moves them in a random direction to the radius, ``entropy`` and ``mutual_information`` up the classifier's
uncertainty, ``expected_information`` up what the image would tell about others, ``loss`` up the label's cross-entropy.
``A+B`` takes two of these in turn, step by step; ``recipe`` is the ``robust`` one of :func:`tsynd.recipe`. All but
``real`` add the same number of images to the same steps."""

_TRAINING = ("augmentation_weight", "warmup_fraction", "iterations")
_FIXED = ("autoencoder", "direction", "objective", "task", "latent_std", "seed")
_NAMES = [*inspect.signature(TargetedAugmentation.__init__).parameters, *(f.name for f in fields(AscentSettings))]
_OPTIONS = tuple(name for name in _NAMES if name not in ("self", "settings", "targets", "ascent", *_FIXED))
_OWN: dict[str, tuple[str, ...]] = {
    "standard": ("flip", "every", "ratio"),
    "randaugment": ("every", "ratio"),
    "adversarial": ("budget", "steps", "persistent", "every", "ratio"),
    "trades": ("budget", "steps", "persistent", "weight", "every", "ratio"),
    "recipe": ("flip",),
}


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
        return self.kinds == ("recipe",) or any(kind in _LATENT for kind in self.kinds)

    def latent(self) -> Arm:
        """Its first part that goes through the autoencoder, making an image of every one it is given."""
        if self.kinds == ("recipe",):
            return Arm(self.text, ("expected_information",), ({},), {})
        place = next(i for i, kind in enumerate(self.kinds) if kind in _LATENT)
        return Arm(self.text, (self.kinds[place],), ({**self.options[place], "ratio": 1.0, "every": 1},), self.training)


def parse_arm(text: str) -> Arm:
    """An arm from ``KIND`` or ``KIND+KIND``, with ``,option=value`` behind it.

    Options are those of :class:`tsynd.TargetedAugmentation`; ``budget``, ``steps`` and ``persistent`` of
    ``adversarial`` and ``trades``, ``weight`` of ``trades``, ``flip`` (``none``, ``horizontal`` or ``both``) of
    ``standard`` and ``recipe``;
    ``augmentation_weight``, ``warmup_fraction`` and ``iterations`` of :func:`tsynd.fit_classifier`. A pair is written
    ``radius=0.2:0.8``; ``trades.steps=3`` means one of several kinds that know the option. ``real,iterations=750`` is
    real only with as much time as a dearer arm.

    Raises:
        InputError: an unknown kind or option, or a value that is no number or word.
    """
    head, *settings = text.split(",")
    kinds = tuple(head.split("+"))
    if (
        not set(kinds) <= set(ARMS)
        or len(set(kinds)) < len(kinds)
        or (len(kinds) > 1 and {"real", "recipe"} & set(kinds))
    ):
        raise InputError(
            f"arms: got {text!r}, wanted KIND or KIND+KIND, then ,option=value, with KIND one of {', '.join(ARMS)}"
        )
    known = [_OPTIONS if kind in _LATENT else _OWN.get(kind, ()) for kind in kinds]
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
    if arm.kinds == ("recipe",):
        return recipe("robust", autoencoder, task=task, seed=seed, **arm.options[0])
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
        return TargetedAugmentation(autoencoder, **{**shared, **options, **own, **_LATENT[kind]})
    counts = {name: options[name] for name in ("ratio", "every") if name in options}
    if kind in ("standard", "randaugment"):
        plain = StandardAugmentation if kind == "standard" else RandAugmentation
        return plain(**{**counts, "seed": shared["seed"], **own})
    return (PixelConsistency if kind == "trades" else PixelAdversarial)(**{**shared, **budget, **counts, **own})
