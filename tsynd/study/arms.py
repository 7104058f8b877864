"""The arms of a study: what, if anything, is added to each batch of real images."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tsynd.synthesis.ascent import AscentSettings
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import Alternation, BatchAugmentation, as_augmentation
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.training.recipe import recipe
from tsynd.training.standard import RandAugmentation, StandardAugmentation
from tsynd.utils.calls import call_digest, call_of, is_call
from tsynd.utils.errors import InputError

__all__ = ["ARMS", "Arm", "Base", "augmentation_of", "parse_arm"]

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
``real`` add the same number of images to the same steps. ``MODULE:FUNCTION`` is anybody's own, see
:func:`parse_arm`."""

_GIVEN = ("autoencoder", "task", "seed")  # to a function of one's own, as far as it takes them
_TRAINING = ("augmentation_weight", "warmup_fraction", "iterations", "base")
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
        kinds: of :data:`ARMS`, in turn where there are several; or one MODULE:FUNCTION.
        options: for each kind what it sets otherwise than the study.
        training: its own ``augmentation_weight``, ``warmup_fraction``, ``iterations`` and ``base``.
    """

    text: str
    kinds: tuple[str, ...]
    options: tuple[Mapping[str, Any], ...]
    training: Mapping[str, Any]

    @property
    def own(self) -> bool:
        """Whether it is a function or class of the user's."""
        return ":" in self.kinds[0]

    @property
    def code(self) -> str | None:
        """Digest of the source text of an arm of one's own, which tells when it is another."""
        return call_digest(self.kinds[0], "arms") if self.own else None

    @property
    def generative(self) -> bool:
        """Whether any of its images come out of the autoencoder."""
        if self.own:
            return "autoencoder" in _parameters(self.kinds[0])
        return self.kinds == ("recipe",) or any(kind in _LATENT for kind in self.kinds)

    def latent(self) -> Arm:
        """Its first part that goes through the autoencoder, making an image of every one it is given."""
        if self.own:
            return self
        if self.kinds == ("recipe",):
            return Arm(self.text, ("expected_information",), ({},), {})
        place = next(i for i, kind in enumerate(self.kinds) if kind in _LATENT)
        return Arm(self.text, (self.kinds[place],), ({**self.options[place], "ratio": 1.0, "every": 1},), self.training)


def _parameters(text: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(call_of(text, "arms")).parameters
    except ValueError as error:  # compiled
        raise InputError(f"arms: {text}: {error}; wanted a function or class written in Python") from None


def parse_arm(text: str) -> Arm:
    """An arm from ``KIND`` or ``KIND+KIND``, with ``,option=value`` behind it.

    ``MODULE:FUNCTION`` (or a class) is called with those of ``autoencoder``, ``task`` and ``seed`` that it takes, and
    with the options; it gives an augmentation, see :class:`tsynd.Augmentation`. Only one that takes ``autoencoder``
    counts as made by it: the autoencoder is trained and the images' quality measured.

    Options are those of :class:`tsynd.TargetedAugmentation`; ``budget``, ``steps`` and ``persistent`` of
    ``adversarial`` and ``trades``, ``weight`` of ``trades``, ``flip`` (``none``, ``horizontal`` or ``both``) of
    ``standard`` and ``recipe``;
    ``augmentation_weight``, ``warmup_fraction`` and ``iterations`` of :func:`tsynd.fit_classifier`; ``base``, what is
    done to the real images, ``standard`` or ``standard:horizontal`` with those flips, as :class:`Base` reads it. A pair
    is written ``radius=0.2:0.8``, a number also ``3/255``; ``trades.steps=3`` means one of several kinds that know the
    option. ``real,iterations=750`` is real only with as much time as a dearer arm.

    Raises:
        InputError: an unknown kind or option, or a value that is no number or word.
    """
    head, *settings = text.split(",")
    kinds = (head,) if is_call(head) else tuple(head.split("+"))
    if not is_call(head) and (
        not set(kinds) <= set(ARMS)
        or len(set(kinds)) < len(kinds)
        or (len(kinds) > 1 and {"real", "recipe"} & set(kinds))
    ):
        raise InputError(
            f"arms: got {text!r}, wanted KIND, KIND+KIND or MODULE:FUNCTION, then ,option=value, with KIND one of "
            + ", ".join(ARMS)
        )
    if is_call(head):
        _OWN[head] = tuple(name for name in _parameters(head) if name not in _GIVEN)
    known = [_OPTIONS if kind in _LATENT else _OWN.get(kind, ()) for kind in kinds]
    training = ("iterations", "base") if kinds == ("real",) else _TRAINING
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
    if re.fullmatch(r"\d+/[1-9]\d*", text):
        return int(text.split("/")[0]) / int(text.split("/")[1])
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
    if arm.own:
        offered = {"autoencoder": autoencoder, "task": task, "seed": seed}
        given = {name: offered[name] for name in _GIVEN if name in _parameters(arm.kinds[0])}
        try:
            return as_augmentation(call_of(arm.kinds[0], "arms")(**given, **arm.options[0]))
        except TypeError as error:
            raise InputError(f"arms: {arm.text}: {error}") from error
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


class Base:
    """What is done to every batch of real images in all arms, drawn alike in all of them.

    Args:
        text: ``standard`` or ``randaugment``, with options as an arm's; or MODULE:FUNCTION, (images, labels) →
            (images, labels), as ``transform`` of :func:`tsynd.fit_classifier`. Of an arm also a pair of a kind and
            its flips.
        seed: call n draws from seed + n; torch's global state is left as it was.

    Raises:
        InputError: another text, or options that cannot be used.
    """

    def __init__(self, text: str | tuple[str, str], seed: int) -> None:
        self.seed, self.calls = seed, 0
        if not isinstance(text, str):
            text = f"{text[0]},flip={text[1]}"
        self.function: Callable[..., Any]
        if is_call(text):
            self.function = call_of(text, "base")
            return
        arm = parse_arm(text)
        if arm.kinds[0] not in ("standard", "randaugment") or {"ratio", "every"} & set(arm.options[0]) or arm.training:
            raise InputError(f"base: got {text!r}, wanted standard, standard,flip=..., randaugment or MODULE:FUNCTION")
        made = _one(arm.kinds[0], None, {}, {"task": "multiclass", "seed": seed}, {}, arm.options[0])
        self.function = lambda images, labels: made(None, images, labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        """Other images and labels, as many."""
        self.calls += 1
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(self.seed + self.calls)
            return self.function(images, labels)
