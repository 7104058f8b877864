"""The thirteen corruptions of MedMNIST-C for chest X-rays, in its names and severities, written for tensors.

Kinds and strengths are those of PneumoniaMNIST-C (Di Salvo et al. 2024, arXiv 2406.17536). They are published for
224 pixels; here they act on the images at their own size, with kernels and blocks counted in its pixels, so that small
images are disturbed too. Grey levels stay real numbers where the original rounds to eight bits. What is drawn depends
on the seed and an image's index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tsynd.evaluation.shifts import Condition, blur, by_pillow, gaussian_noise, jpeg, severities
from tsynd.utils.draws import streams
from tsynd.utils.errors import require

__all__ = [
    "MEDMNIST_C",
    "adjust_brightness",
    "adjust_contrast",
    "gamma_correction",
    "gaussian_kernel_blur",
    "impulse_noise",
    "pixelate",
    "shot_noise",
    "speckle_noise",
]


def _per_image(images: Tensor, indices: Tensor, seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
    """What ``draw`` makes of each image on the CPU with its own generator."""
    own = zip(images.cpu(), streams(indices, seed), strict=True)
    return torch.stack([draw(image, generator) for image, generator in own]).to(images).clamp(0, 1)


def speckle_noise(images: Tensor, indices: Tensor, seed: int, *, sigma: float) -> Tensor:
    """x + x · n with n normal of deviation ``sigma``; arguments as :func:`tsynd.evaluation.shifts.gaussian_noise`."""
    return _per_image(images, indices, seed, lambda x, g: x + x * sigma * torch.randn(x.shape, generator=g))


def impulse_noise(images: Tensor, indices: Tensor, seed: int, *, amount: float) -> Tensor:
    """Salt and pepper: a share ``amount`` of all values becomes 0 or 1, with equal chance."""

    def draw(image: Tensor, generator: torch.Generator) -> Tensor:
        hit, salt = (torch.rand(image.shape, generator=generator) for _ in range(2))
        return torch.where(hit < amount, (salt < 0.5).to(image), image)

    return _per_image(images, indices, seed, draw)


def shot_noise(images: Tensor, indices: Tensor, seed: int, *, photons: float) -> Tensor:
    """Poisson counts of ``photons`` · x, divided by ``photons``."""
    return _per_image(images, indices, seed, lambda x, g: torch.poisson(x * photons, generator=g) / photons)


def adjust_brightness(images: Tensor, indices: Tensor, seed: int, *, factor: float) -> Tensor:
    """x · ``factor``, cut to [0, 1]."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, indices: Tensor, seed: int, *, factor: float) -> Tensor:
    """Stretch each image around its mean grey by ``factor``, cut to [0, 1]."""
    weights = images.new_tensor([0.299, 0.587, 0.114]) if images.shape[1] == 3 else images.new_ones(images.shape[1])
    grey = (images.flatten(2).mean(2) * weights / weights.sum()).sum(1).reshape([-1] + [1] * (images.ndim - 1))
    return (grey + factor * (images - grey)).clamp(0, 1)


def gamma_correction(images: Tensor, indices: Tensor, seed: int, *, gamma: float) -> Tensor:
    """x to the power ``gamma``: above 1 shadows get darker."""
    return images.clamp(0, 1) ** gamma


def gaussian_kernel_blur(images: Tensor, indices: Tensor, seed: int, *, kernel: int) -> Tensor:
    """Gaussian blur with a deviation of 0.15 · ``kernel`` + 0.35 pixels, as torchvision takes it for a kernel."""
    return blur(images, indices, seed, sigma=(0.15 * kernel + 0.35) / min(images.shape[2:]))


def pixelate(images: Tensor, indices: Tensor, seed: int, *, share: float) -> Tensor:
    """Shrink to a ``share`` of both sides by a box filter and enlarge again."""
    box = require("PIL.Image", "data").Resampling.BOX

    def change(picture: Any) -> Any:
        small = picture.resize([max(1, int(share * side)) for side in picture.size], box)
        return small.resize(picture.size, box)

    return by_pillow(images, change)


MEDMNIST_C: Mapping[str, tuple[Condition, ...]] = {
    "pixelate": severities(pixelate, share=(0.8, 0.7, 0.6, 0.5, 0.4)),
    "jpeg_compression": severities(jpeg, quality=(50, 30, 15, 10, 7)),
    "gaussian_noise": severities(gaussian_noise, sigma=(0.04, 0.05, 0.06, 0.07, 0.08)),
    "speckle_noise": severities(speckle_noise, sigma=(0.05, 0.07, 0.10, 0.15, 0.20)),
    "impulse_noise": severities(impulse_noise, amount=(0.005, 0.01, 0.013, 0.017, 0.02)),
    "shot_noise": severities(shot_noise, photons=(300, 200, 150, 100, 80)),
    "gaussian_blur": severities(gaussian_kernel_blur, kernel=(3, 5, 7, 9, 11)),
    "brightness_up": severities(adjust_brightness, factor=(1.1, 1.2, 1.3, 1.4, 1.5)),
    "brightness_down": severities(adjust_brightness, factor=(0.9, 0.8, 0.7, 0.6, 0.5)),
    "contrast_up": severities(adjust_contrast, factor=(1.1, 1.2, 1.3, 1.4, 1.6)),
    "contrast_down": severities(adjust_contrast, factor=(0.9, 0.8, 0.7, 0.6, 0.4)),
    "gamma_corr_up": severities(gamma_correction, gamma=(1.1, 1.2, 1.3, 1.4, 1.6)),
    "gamma_corr_down": severities(gamma_correction, gamma=(0.9, 0.8, 0.7, 0.6, 0.4)),
}
"""Kind → its conditions of severity 1 to 5."""
