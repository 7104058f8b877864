"""Where a classifier looks: Grad-CAM (Selvaraju et al. 2017) by captum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsynd.utils.errors import InputError, require

__all__ = ["grad_cam", "last_maps", "overlay"]


def last_maps(classifier: nn.Module, image: Tensor) -> nn.Module:
    """The last module that gives feature maps of more than one position.

    Args:
        classifier: in eval mode.
        image: [1, C, H, W] or [1, C, D, H, W] in [0, 1].

    Raises:
        InputError: there is none.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() in (4, 5) and output[0, 0].numel() > 1:
            found.append(module)

    handles = [module.register_forward_hook(note) for module in classifier.modules()]
    try:
        with torch.no_grad():
            classifier(image)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError(
            f"classifier: {type(classifier).__name__} gives no feature maps, wanted a convolutional network"
        )
    return found[-1]


def grad_cam(classifier: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Evidence for a class by position: positive part of Grad-CAM at the last feature maps, deterministic network.

    Args:
        classifier: images → logits [B, K]; its modes come back.
        images: [B, C, H, W] or [B, C, D, H, W] in [0, 1].
        targets: int64 [B], the class (or label) asked about.

    Returns:
        [B, H, W] or [B, D, H, W] in [0, 1], each image by its own maximum (0 where there is no evidence),
        interpolated linearly.

    Raises:
        MissingExtraError: captum is not installed.
        InputError: no feature maps.
    """
    attribution = require("captum.attr", "robustness")
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    try:
        layer = last_maps(classifier, images[:1])
        with torch.enable_grad():
            maps = attribution.LayerGradCam(classifier, layer).attribute(images, target=targets, relu_attributions=True)
    finally:
        for module, training in modes.items():
            module.training = training
    mode = "bilinear" if images.ndim == 4 else "trilinear"
    wide = attribution.LayerAttribution.interpolate(maps.detach(), tuple(images.shape[2:]), mode)[:, 0]
    top = wide.flatten(1).amax(1).clamp_min(1e-12)
    heat: Tensor = (wide / top.reshape([-1] + [1] * (wide.ndim - 1))).clamp(0, 1)
    return heat


def overlay(image: Tensor, heat: Tensor) -> np.ndarray[Any, Any]:
    """An image [C, H, W] in [0, 1] under a heat map [H, W] in [0, 1]: uint8 [H, W, 3], untouched where heat is 0."""
    colour = torch.tensor([1.0, 0.35, 0.05])
    base = (image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0)
    mixed = base + (0.5 * heat)[..., None] * (colour - base)
    pixels: np.ndarray[Any, Any] = (mixed.clamp(0, 1) * 255).round().byte().numpy()
    return pixels
