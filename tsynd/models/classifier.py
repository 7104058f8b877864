"""Classifiers of other libraries as what tsynd works on: a module from images in [0, 1] to logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from tsynd.models.pixel_range import Numbers, PixelMap, make_pixel_map
from tsynd.utils.errors import InputError

__all__ = ["ClassifierAdapter", "as_classifier", "logits_of"]


class ClassifierAdapter(nn.Module):
    """A classifier behind its pixel map; the logits are taken out of what it returns.

    The wrapped model is neither changed nor switched between training and evaluation.

    Args:
        model: gives logits [B, classes], an object with ``logits``, a dict with "logits", or a tuple that begins
            with them.
        pixels: between [0, 1] and the model's range; None leaves the pixels as they are.
    """

    def __init__(self, model: nn.Module, pixels: PixelMap | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, ...] in [0, 1]."""
        return logits_of(self.model(images if self.pixels is None else self.pixels(images)))


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier returned: a tensor, an object or dict with "logits", or a tuple's first."""
    if isinstance(output, (Tensor, fx.Proxy)):  # a proxy: while being traced
        return output  # type: ignore[return-value]
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, (Tensor, fx.Proxy)):
        raise InputError(f"classifier: returned {type(output).__name__} without logits, wanted logits [B, classes]")
    return found  # type: ignore[return-value]


def as_classifier(
    model: nn.Module,
    *,
    pixel_range: tuple[float, float] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    grey: bool = False,
) -> nn.Module:
    """Give ``model`` the face of a classifier: images [B, C, ...] in [0, 1] to logits [B, classes].

    Args:
        model: any classifier; a Hugging Face model for image classification needs no more than this.
        pixel_range: what 0 and 1 are to the model.
        mean: the model takes (x - mean) / std; one number or one a channel, as an image processor's ``image_mean``.
        std: see ``mean``.
        grey: the model has three channels, the images one: it is repeated.

    Returns:
        ``model`` itself, where it needs nothing, or a module that holds it and shares its parameters.

    Raises:
        InputError: no module, or arguments that name no range.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"classifier: got {type(model).__name__}, wanted an nn.Module")
    pixels = make_pixel_map(pixel_range, mean, std, grey)
    if isinstance(model, ClassifierAdapter) and pixels is not None:
        raise InputError("classifier: got an adapter, wanted the model itself to map")
    # by name, so that transformers need not be installed or imported
    foreign = any(kind.__module__.split(".")[0] == "transformers" for kind in type(model).__mro__)
    return ClassifierAdapter(model, pixels) if foreign or pixels is not None else model
