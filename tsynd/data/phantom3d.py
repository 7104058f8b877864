"""A made-up data set of lung nodules in computed tomography, for trying out volumes where no real ones are at hand.

Patches around one nodule in four classes by what it is made of: calcified, ground-glass, part-solid or solid. Density,
core, margin and spicules overlap between the classes; vessels run past or into the nodule, some lie at the pleura, and
dose, blur, size and place vary.

Measured at size 28 (``SmallResNet`` of volumes, 200 steps, mean of 2 runs), balanced accuracy on the 200 test volumes:
49 % from 50 training volumes, 55 % from 100, 67 % from 200, 73 % from 400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsynd.data.phantom import Dice, Floats, blur, draw_splits, soft_step
from tsynd.utils.errors import InputError

__all__ = ["CLASS_NAMES", "phantom3d"]

CLASS_NAMES = ("calcified", "ground-glass", "part-solid", "solid")

_SHARES = (0.20, 0.25, 0.22, 0.33)
# Mean and standard deviation per class, in the order of CLASS_NAMES. Densities are shares of the window, which goes
# from -1000 to 400 Hounsfield units; radius in half widths of the patch; core relative to the nodule's radius, and
# what it adds to the density; lobes and spicules relative to the radius.
_LAWS = {
    "radius": ((0.40, 0.07), (0.48, 0.09), (0.50, 0.08), (0.44, 0.09)),
    "density": ((0.66, 0.06), (0.34, 0.06), (0.36, 0.07), (0.62, 0.08)),
    "core": ((0.45, 0.14), (0.25, 0.10), (0.50, 0.12), (0.40, 0.15)),
    "added": ((0.17, 0.08), (0.03, 0.03), (0.24, 0.08), (0.02, 0.04)),
    "edge": ((0.050, 0.015), (0.120, 0.035), (0.095, 0.030), (0.060, 0.020)),
    "lobes": ((0.06, 0.04), (0.10, 0.05), (0.13, 0.05), (0.13, 0.06)),
    "spicules": ((0.02, 0.02), (0.05, 0.04), (0.09, 0.05), (0.11, 0.06)),
}
_VESSELS = 3
_CHUNK = 16  # volumes rendered at once, to bound memory


def phantom3d(size: int = 28, train: int = 400, val: int = 80, test: int = 200, seed: int = 0) -> dict[str, Any]:
    """Draw the data set; a volume depends on (size, seed, split, index) only, so a longer split starts alike.

    Args:
        size: depth, height and width in voxels, 16 to 96.
        train: volumes in the training split, at least 1; likewise `val` and `test`.
        val: volumes in the validation split.
        test: volumes in the test split.
        seed: 0 or more; another seed gives other volumes.

    Returns:
        `{train,val,test}_images` uint8 [n, size, size, size], `{train,val,test}_labels` uint8 [n, 1] with values
        0 to 3, and `class_names` (four strings): the layout of a MedMNIST3D file.

    Raises:
        InputError: an argument is out of its range.
    """
    if not 16 <= size <= 96:
        raise InputError(f"size: {size}; the phantom of volumes is drawn from 16 to 96 voxels wide")
    arrays = draw_splits(lambda split, index: _draw(size, seed, split, index), train, val, test, seed, _CHUNK)
    return arrays | {"class_names": np.array(CLASS_NAMES)}


def _draw(size: int, seed: int, split: int, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Volumes [n, size, size, size] and labels [n] of one chunk; each volume has its own generator."""
    streams = [np.random.Generator(np.random.PCG64([3, seed, split, int(i)])) for i in index]
    dice = Dice(streams, axes=3, count=64)
    fields = np.stack([g.standard_normal((2, size, size, size), np.float32) for g in streams])  # tissue, noise
    labels = np.searchsorted(np.cumsum(_SHARES)[:-1], dice.uniform(0, 1).ravel(), side="right")
    law = {key: np.array(values)[labels].reshape(-1, 2, 1, 1, 1) for key, values in _LAWS.items()}
    draws = {key: np.clip(dice.normal(v[:, 0], v[:, 1]), 0.01, None) for key, v in law.items()}

    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    place = [grid - dice.uniform(-0.12, 0.12) for grid in (axis[:, None, None], axis[:, None], axis)]
    # one field in three grains: the nodule's lobes, its spicules, and what lung and nodule look like inside
    lobes, spicules, grain = (_scaled(blur(fields[:, 0], sigma * size / 2)) for sigma in (0.30, 0.12, 0.07))
    radius = np.clip(draws["radius"], 0.25, 0.7)
    stretched = [
        x * np.exp(dice.normal(0, 0.10)) for x in _turned(place, [dice.uniform(0, 2 * np.pi) for _ in range(2)])
    ]
    away = np.sqrt(sum(x**2 for x in stretched)) / radius
    reach = 1 + draws["lobes"] * lobes + draws["spicules"] * spicules
    inside = soft_step(reach - away, draws["edge"] / radius)
    core = soft_step(np.clip(draws["core"], 0.1, 0.85) * reach - away, 0.12)

    lung = dice.normal(0.11, 0.02) * (1 + 0.25 * grain)
    nodule = np.clip(draws["density"], 0.2, 0.85) * (1 + 0.08 * grain) + draws["added"] * core
    body = np.maximum(lung, _vessels(dice, place))
    body = np.maximum(body, _pleura(dice, place))
    image = body + inside * np.maximum(nodule - body, 0)  # what is denser than the nodule shows through it
    # dose sets the noise, the reconstruction kernel smooths tissue and noise alike
    image = blur(image + dice.uniform(0.05, 0.14) * fields[:, 1], dice.uniform(0.35, 0.75) * size / 28)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), labels.astype(np.uint8)


def _scaled(field: Floats) -> Floats:
    """The field with deviation 1 in every volume."""
    scaled: Floats = (field / field.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32)
    return scaled


def _turned(place: Sequence[Floats], angles: Sequence[Floats]) -> list[Floats]:
    """Coordinates turned about the first axis and then about the last."""
    z, y, x = place
    y, x = (
        np.cos(angles[0]) * y - np.sin(angles[0]) * x,
        np.sin(angles[0]) * y + np.cos(angles[0]) * x,
    )
    return [np.cos(angles[1]) * z - np.sin(angles[1]) * y, np.sin(angles[1]) * z + np.cos(angles[1]) * y, x]


def _vessels(dice: Dice, place: Sequence[Floats]) -> Floats:
    """Density of straight vessels at random distances from the nodule; not every volume has all."""
    density: Floats = np.zeros((1, 1, 1, 1), np.float32)
    for _ in range(_VESSELS):
        polar, turn = np.arccos(dice.uniform(-1, 1)), dice.uniform(0, 2 * np.pi)
        along = [np.cos(polar), np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn)]
        past = [x - dice.uniform(-0.8, 0.8) for x in place]
        dot = sum(p * a for p, a in zip(past, along, strict=True))
        distance = np.sqrt(np.maximum(sum(p**2 for p in past) - dot**2, 0))
        shown = dice.uniform(0, 1) < 0.7
        density = np.maximum(density, 0.55 * shown * soft_step(dice.uniform(0.05, 0.12) - distance, 0.04))
    return density


def _pleura(dice: Dice, place: Sequence[Floats]) -> Floats:
    """Density of the chest wall, a plane at the border of three volumes in ten."""
    turn, offset = dice.uniform(0, 2 * np.pi), dice.uniform(0.55, 0.9)
    depth = np.cos(turn) * place[1] + np.sin(turn) * place[2] - offset
    wall: Floats = 0.70 * (dice.uniform(0, 1) < 0.3) * soft_step(depth, 0.05)
    return wall
