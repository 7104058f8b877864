"""Recipes: augmentations by name, with settings that were chosen on validation splits (docs/study.md)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import Alternation, Augmentation
from tsynd.training.in_place import InPlace
from tsynd.training.pixels import PixelConsistency
from tsynd.training.standard import StandardAugmentation
from tsynd.utils.errors import check_choice

__all__ = ["IN_PLACE", "RECIPES", "recipe"]

RECIPES = ("robust",)
IN_PLACE = 5_003
"""Between the seed of what is done to real images and that of extra ones, whose call n draws from seed + n."""


def recipe(
    name: str,
    autoencoder: Any,
    *,
    task: str = "multiclass",
    flip: str = "none",
    targets: Tensor | None = None,
    offline: bool = False,
    seed: int = 0,
) -> Augmentation:
    """The augmentation of a name, for :func:`tsynd.fit_classifier`.

    ``robust``: the real images of every step are turned, shifted and scaled a little (:class:`StandardAugmentation`);
    of these are made, in turn, images whose prediction is kept in a ball of pixels (:class:`PixelConsistency`) and
    images in whose latents the classifier would learn most about the targets (:class:`TargetedAugmentation`,
    ``expected_information``), with one step of ascent each.

    Args:
        name: one of :data:`RECIPES`.
        autoencoder: trained, see :class:`TargetedAugmentation`.
        task: ``multiclass`` or ``multilabel``.
        flip: flips that leave an image possible, see :class:`StandardAugmentation`.
        targets: [M, C, H, W] in [0, 1], unlabelled images of where the classifier will be used; None takes the training
            images.
        offline: for :class:`tsynd.OfflineRounds`, which makes its images once for many steps, on a pretrained encoder:
            targeted images by three steps of ascent, to which what the autoencoder loses of an image is added back, for
            such an encoder sees the blur, and standard ones in turn. No consistency: a head alone does not learn it.
        seed: of whatever is drawn.

    Raises:
        InputError: an unknown name, or an argument that cannot be used.
    """
    check_choice("recipe", name, RECIPES)
    shared: dict[str, Any] = {"task": task, "seed": seed}
    targeted = TargetedAugmentation(
        autoencoder,
        objective="expected_information",
        targets=targets,
        samples=8,
        radius=0.5,
        steps=3 if offline else 1,
        residual=1.0 if offline else 0.0,
        **shared,
    )
    if offline:
        return Alternation(targeted, StandardAugmentation(flip, seed=seed))
    consistency = PixelConsistency(budget=3 / 255, steps=1, weight=3.0, **shared)
    return InPlace(StandardAugmentation(flip, seed=seed + IN_PLACE), Alternation(consistency, targeted))
