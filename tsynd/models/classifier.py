"""Classifiers of other libraries as what tsynd works on: a module from images in [0, 1] to logits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from tsynd.models.pixel_range import Numbers, PixelMap, make_pixel_map
from tsynd.utils.errors import InputError

__all__ = [
    "ClassifierAdapter",
    "Endings",
    "as_classifier",
    "ending_note",
    "logits_of",
    "plain",
    "take_logits",
    "two_images",
]


class ClassifierAdapter(nn.Module):
    """A classifier behind its pixel map; the logits are taken out of what it returns.

    The wrapped model is neither changed nor switched between training and evaluation. Images take the dtype of its
    weights.

    Args:
        model: gives logits [B, classes], an object with ``logits``, a dict with "logits" (or "out", "output", "pred"),
            or a tuple or list that begins with one of those.
        pixels: between [0, 1] and the model's range; None leaves the pixels as they are.

    Attributes:
        ending: ``softmax`` or ``sigmoid`` where the model gives probabilities, which are then taken back to logits.
    """

    def __init__(self, model: nn.Module, pixels: PixelMap | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.pixels = pixels
        self.ending: str | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, ...] in [0, 1]."""
        mapped = images if self.pixels is None else self.pixels(images)
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if weight is not None:
            mapped = mapped.to(weight.dtype)  # no question of its dtype: it may be a tracer's
        found = take_logits(self.model(mapped))
        if self.ending is None:
            return found
        p = found.float().clamp(_TINY, 1)
        return p.log() if self.ending == "softmax" else p.log() - (1 - p).clamp_min(_EPSILON).log()

    def look(self, images: Tensor) -> None:
        """Find out by these images [B, C, ...] whether the model gives probabilities.

        Warns:
            RuntimeWarning: it does.
        """
        with _LOOKING:  # or another thread would see probabilities that are logits by now
            if self.ending is not None:
                return
            with torch.no_grad(), Endings() as seen:
                found = self(two_images(images))
            self.ending = seen.of(found)
        if self.ending is not None:
            warnings.warn(f"{type(self.model).__name__} {ending_note(self.ending)}", RuntimeWarning, stacklevel=3)


def two_images(images: Tensor) -> Tensor:
    """Two of them that differ, [2, C, ...]: the second is the first one's negative where there is no other."""
    few = images[:2].detach()
    return few if len(few) == 2 and not torch.equal(few[0], few[1]) else torch.cat([few[:1], 1 - few[:1]])


_LOOKING = threading.RLock()
_TINY, _EPSILON = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).eps


def ending_note(ending: str) -> str:
    """What to say of a model that gives probabilities."""
    return f"ends in a {ending}: it gives probabilities, which are taken back to logits"


class Endings(TorchFunctionMode):
    """Notes what softmax and sigmoid give while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on."""
        out = func(*args, **(kwargs or {}))
        kind = {"softmax": "softmax", "sigmoid": "sigmoid", "expit": "sigmoid"}.get(getattr(func, "__name__", ""))
        if kind is not None and isinstance(out, Tensor):
            self._seen.append((out, kind))
        return out

    def of(self, logits: Any) -> str | None:
        """What the logits are, if they are none: what a call of those gave, or since all rows sum to 1."""
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            return None
        for out, kind in self._seen:  # in another shape or dtype maybe
            if out.numel() == logits.numel() and torch.equal(out.flatten().to(logits), logits.flatten()):
                return kind
        if len(logits) < 2 or logits.shape[1] < 2 or not bool((logits >= 0).all()):
            return None
        return "softmax" if float((logits.float().sum(1) - 1).abs().max()) < 1e-4 else None


def plain(x: Tensor) -> Tensor:
    """Without a subclass such as MONAI's ``MetaTensor``, whose records are no part of the arithmetic."""
    special = type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return x.as_subclass(Tensor) if special else x  # those with a dispatch of their own are torch's, while it traces


def take_logits(output: Any) -> Tensor:
    """The logits in what a classifier returns, see :class:`ClassifierAdapter`.

    Raises:
        InputError: there are none.
    """
    if isinstance(output, (Tensor, fx.Proxy)):  # a proxy: while being traced
        return plain(output) if isinstance(output, Tensor) else output  # type: ignore[return-value]
    found = getattr(output, "logits", None)
    if isinstance(output, Mapping):
        found = next((output[name] for name in ("logits", "out", "output", "pred") if name in output), None)
    if found is None and isinstance(output, (tuple, list)) and len(output):
        found = output[0]
    if found is None:
        raise InputError(f"classifier: returned {type(output).__name__} without logits, wanted logits [B, classes]")
    return take_logits(found)


def logits_of(model: nn.Module) -> ClassifierAdapter:
    """The model as all of tsynd runs it: whatever it returns, logits come out.

    Raises:
        InputError: no module.
    """
    made = as_classifier(model)
    return made if isinstance(made, ClassifierAdapter) else ClassifierAdapter(made)


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
