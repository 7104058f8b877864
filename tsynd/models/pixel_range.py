"""Between tsynd's pixels in [0, 1] and the range that another library's model was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tsynd.utils.errors import InputError

__all__ = ["PixelMap", "make_pixel_map"]

Numbers = float | Sequence[float]


class PixelMap(nn.Module):
    """Pixels of a model = scale * pixels in [0, 1] + offset, by channel.

    Args:
        scale: one number or one a channel, not 0.
        offset: the same.
        grey: the model has several channels where the images have one: repeated for it, and its output averaged.
        text: the arguments that give this map, for messages.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Numbers, offset: Numbers, grey: bool = False, text: str = "") -> None:
        super().__init__()
        self.grey, self.text = grey, text
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32), persistent=False)
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, ...] in [0, 1] -> what the model takes."""
        if self.grey and images.shape[1] == 1:
            images = images.expand(-1, 3, *images.shape[2:])
        return images * self._shaped(self.scale, images) + self._shaped(self.offset, images)

    def inverse(self, pixels: Tensor) -> Tensor:
        """What the model gives, [B, C, ...] -> images around [0, 1], not clamped."""
        images = (pixels - self._shaped(self.offset, pixels)) / self._shaped(self.scale, pixels)
        return images.mean(1, keepdim=True) if self.grey else images

    @staticmethod
    def _shaped(values: Tensor, like: Tensor) -> Tensor:
        return values if values.dim() == 0 else values.reshape(1, -1, *[1] * (like.dim() - 2))


def make_pixel_map(
    pixel_range: tuple[float, float] | None, mean: Numbers | None, std: Numbers | None, grey: bool
) -> PixelMap | None:
    """The map that a user's arguments describe, None where they leave the pixels as they are.

    Args:
        pixel_range: (low, high), what 0 and 1 become.
        mean: pixels become (x - mean) / std, one number or one a channel.
        std: see ``mean``; above 0.
        grey: see :class:`PixelMap`.

    Raises:
        InputError: both ways at once, or numbers that describe no range.
    """
    if pixel_range is not None and (mean is not None or std is not None):
        raise InputError("pixel_range: got a range with mean and std, wanted one of the two")
    if pixel_range is not None:
        ends = tuple(pixel_range) if isinstance(pixel_range, (tuple, list)) else ()
        if len(ends) != 2 or not all(_finite(end) for end in ends) or ends[0] >= ends[1]:
            raise InputError(f"pixel_range: got {pixel_range!r}, wanted (low, high) with low below high")
        low, high = float(ends[0]), float(ends[1])
        return PixelMap(high - low, low, grey, f"pixel_range=({low:g}, {high:g})")
    if (mean is None) != (std is None):
        raise InputError(f"{'std' if std is None else 'mean'}: got None, wanted mean and std, or neither of them")
    if mean is None or std is None:
        return PixelMap(1.0, 0.0, grey, "pixel_range=(0, 1)") if grey else None
    means, stds = _numbers("mean", mean), _numbers("std", std)
    if min(stds) <= 0:
        raise InputError(f"std: got {std!r}, wanted numbers above 0")
    if len(means) != len(stds):
        raise InputError(f"std: got {len(stds)} numbers with {len(means)} of mean, wanted as many")
    scale = [1 / value for value in stds]
    offset = [-a / b for a, b in zip(means, stds, strict=True)]
    text = f"mean={mean!r}, std={std!r}"
    return PixelMap(scale if len(scale) > 1 else scale[0], offset if len(offset) > 1 else offset[0], grey, text)


def _numbers(name: str, value: Numbers) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values or not all(_finite(number) for number in values):
        raise InputError(f"{name}: got {value!r}, wanted a number or one for each channel")
    return [float(number) for number in values]  # type: ignore[arg-type]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
