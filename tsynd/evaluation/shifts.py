"""Disturbed test images: seven kinds of shift in five severities, each image's draw fixed by (seed, index).

Every kind takes images [B, C, H, W] or [B, C, D, H, W] in [0, 1], ``indices`` [B], the images' numbers in their data
set, and any integer as ``seed``; the two fix what is drawn, if anything is.

Volumes [B, C, D, H, W] are turned and moved in the plane of H and W, as a patient lies on the table; JPEG codes them
slice by slice, as files of slices are; the other kinds see the whole volume.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsynd.utils.draws import draw_rows
from tsynd.utils.errors import require

__all__ = [
    "SEVERITIES",
    "SHIFTS",
    "Condition",
    "blur",
    "brightness",
    "by_pillow",
    "contrast",
    "gaussian_noise",
    "jpeg",
    "rotation",
    "severities",
    "translation",
]

Condition: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""(images [B, C, H, W] or [B, C, D, H, W] in [0, 1], their indices [B], seed) → images of that shape in [0, 1]."""

SEVERITIES = (1, 2, 3, 4, 5)


def _uniform(indices: Tensor, seed: int, count: int) -> Tensor:
    """Draws in [−1, 1), [B, count]; the first ones of an image's stream."""
    return 2 * draw_rows(torch.rand, torch.empty(len(indices), count), indices, seed) - 1


def _slices(images: Tensor) -> Tensor:
    """Volumes as pictures [B, C · D, H, W] with a channel for each slice; pictures as they are."""
    return images.flatten(1, 2) if images.ndim == 5 else images


def gaussian_noise(images: Tensor, indices: Tensor, seed: int, *, sigma: float = 0.05) -> Tensor:
    """Add Gaussian noise and clip to [0, 1].

    Args:
        sigma: standard deviation, in units of the intensity range.
    """
    return (images + sigma * draw_rows(torch.randn, images, indices, seed)).clamp(0, 1)


def rotation(images: Tensor, indices: Tensor, seed: int, *, degrees: float = 15.0) -> Tensor:
    """Rotate each image about its centre by its own angle, uniform in ±``degrees``.

    Corners that come into view repeat the border: the test is the turn, not black triangles.

    Args:
        degrees: largest angle.
    """
    rotate = require("kornia.geometry.transform", "train").rotate
    angles = (_uniform(indices, seed, 1)[:, 0] * degrees).to(images)
    rotated: Tensor = rotate(_slices(images), angles, mode="bilinear", padding_mode="border")
    return rotated.reshape(images.shape).clamp(0, 1)


def translation(images: Tensor, indices: Tensor, seed: int, *, share: float = 0.1) -> Tensor:
    """Move each image by its own vector, uniform in ±``share`` of the width and of the height.

    What comes into view repeats the border.

    Args:
        share: largest move, as a share of the side.
    """
    translate = require("kornia.geometry.transform", "train").translate
    height, width = images.shape[-2:]
    vectors = _uniform(indices, seed, 2) * share * torch.tensor([width, height])
    moved: Tensor = translate(_slices(images), vectors.to(images), mode="bilinear", padding_mode="border")
    return moved.reshape(images.shape).clamp(0, 1)


def blur(images: Tensor, indices: Tensor, seed: int, *, sigma: float = 1.0 / 28) -> Tensor:
    """Blur with a Gaussian, the same for all images; borders are mirrored.

    Args:
        sigma: standard deviation as a share of the shorter side, so that it means the same at every resolution.
    """
    gaussian = require("kornia.filters", "train").gaussian_blur2d
    side = min(images.shape[2:])
    pixels = sigma * side
    # three deviations either side, but mirroring needs a kernel narrower than the image
    width = 2 * min(int(np.ceil(3 * pixels)), side // 2 - 1) + 1
    blurred: Tensor = gaussian(_slices(images), (width, width), (pixels, pixels))
    if images.ndim == 5:  # a Gaussian is separable: what is left is the depth
        columns = blurred.reshape(images.shape).flatten(3, 4)
        blurred = gaussian(columns, (width, 1), (pixels, pixels))
    return blurred.reshape(images.shape).clamp(0, 1)


def _up_or_down(images: Tensor, indices: Tensor, seed: int, up: float, down: float) -> tuple[Tensor, Tensor]:
    """[B, C, H, W], a volume's slices one below the other; and a factor [B, 1, 1, 1], each of the two as likely."""
    factors = torch.where(_uniform(indices, seed, 1)[:, 0] < 0, down, up).to(images)
    return images.flatten(2, 3) if images.ndim == 5 else images, factors.view(-1, 1, 1, 1)


def brightness(images: Tensor, indices: Tensor, seed: int, *, up: float = 1.3, down: float = 0.7) -> Tensor:
    """Multiply each image by ``up`` or ``down``, which of them by an even chance, and clip to [0, 1]."""
    flat, factors = _up_or_down(images, indices, seed, up, down)
    return (flat * factors).clamp(0, 1).reshape(images.shape)


def contrast(images: Tensor, indices: Tensor, seed: int, *, up: float = 1.3, down: float = 0.7) -> Tensor:
    """Stretch each image around its mean grey by ``up`` or ``down``, by an even chance, and clip to [0, 1]."""
    flat, factors = _up_or_down(images, indices, seed, up, down)
    # not by kornia, which took the mean of the whole batch until 0.9
    grey = require("kornia.color", "train").rgb_to_grayscale(flat) if images.shape[1] == 3 else flat
    return (flat * factors + grey.mean((1, 2, 3), True) * (1 - factors)).clamp(0, 1).reshape(images.shape)


def jpeg(images: Tensor, indices: Tensor, seed: int, *, quality: int = 30) -> Tensor:
    """Compress as JPEG with Pillow and decompress; channels other than three are compressed one by one, as grey.

    Args:
        quality: Pillow's, 1 to 95.
    """
    pillow = require("PIL.Image", "data")

    def code(picture: Any) -> Any:
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        return pillow.open(file)

    return by_pillow(images, code)


def by_pillow(images: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """What a function of Pillow's pictures makes of images, rounded to 8 bits before.

    Args:
        images: [B, C, H, W] or, slice by slice, [B, C, D, H, W] in [0, 1]; three channels are a colour picture,
            others one grey picture each.
        change: picture of mode ``RGB`` or ``L`` → picture of the same size and mode.
    """
    pillow = require("PIL.Image", "data")
    # the slices of volumes are pictures of their own
    pictures = images.movedim(2, 1).flatten(0, 1) if images.ndim == 5 else images
    pixels = (pictures * 255).round().byte().cpu().numpy()

    def changed(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(change(pillow.fromarray(picture)))

    if images.shape[1] == 3:
        rows = [changed(np.ascontiguousarray(image.transpose(1, 2, 0))).transpose(2, 0, 1) for image in pixels]
    else:
        rows = [np.stack([changed(channel) for channel in image]) for image in pixels]
    made = torch.from_numpy(np.stack(rows)).to(images) / 255
    return made.reshape(len(images), -1, *made.shape[1:]).movedim(1, 2) if images.ndim == 5 else made


def severities(shift: Callable[..., Tensor], **values: tuple[float, ...]) -> tuple[Condition, ...]:
    """A shift with each of its strengths."""
    rows = zip(*values.values(), strict=True)
    return tuple(functools.partial(shift, **dict(zip(values, row, strict=True))) for row in rows)


# Strengths of noise, brightness, contrast and JPEG quality as in MedMNIST-C (``tsynd.evaluation.corruptions`` has all
# of it; its separate "up" and "down" are one shift here); blur, as a share of the side, and geometry are our own.
SHIFTS: Mapping[str, tuple[Condition, ...]] = {
    "noise": severities(gaussian_noise, sigma=(0.04, 0.05, 0.06, 0.07, 0.08)),
    "blur": severities(blur, sigma=(0.5 / 28, 0.75 / 28, 1.0 / 28, 1.5 / 28, 2.0 / 28)),
    "rotation": severities(rotation, degrees=(3.0, 6.0, 9.0, 12.0, 15.0)),
    "translation": severities(translation, share=(0.03, 0.06, 0.09, 0.12, 0.15)),
    "contrast": severities(contrast, up=(1.1, 1.2, 1.3, 1.4, 1.6), down=(0.9, 0.8, 0.7, 0.6, 0.4)),
    "brightness": severities(brightness, up=(1.1, 1.2, 1.3, 1.4, 1.5), down=(0.9, 0.8, 0.7, 0.6, 0.5)),
    "jpeg": severities(jpeg, quality=(50, 30, 15, 10, 7)),
}
"""Kind → its conditions of severity 1 to 5."""
