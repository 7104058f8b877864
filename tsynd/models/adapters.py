"""Adapters that give other libraries' autoencoders one face: ``encode`` and ``decode``, images in [0, 1]."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from tsynd.models.classifier import plain
from tsynd.models.pixel_range import PixelMap, make_pixel_map

__all__ = [
    "Adapter",
    "CodebookAutoencoder",
    "DiffusersAutoencoder",
    "KLAutoencoder",
    "ModelAutoencoder",
    "PairAutoencoder",
    "PlainAutoencoder",
    "VariationalAutoencoder",
    "first_tensor",
]


class Averages(TorchFunctionMode):
    """Puts the mean in the place of what is drawn at random: the latent of an encoder that samples is its mean.

    Attributes:
        used: whether anything was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace draws, pass everything else on."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _MEANS:
            return func(*args, **kwargs)
        self.used = True
        return _MEANS[name](func(*args, **kwargs), args, kwargs)


def _filled(x: Tensor, value: Any) -> Tensor:
    return x.copy_(value) if isinstance(value, Tensor) else x.fill_(value)


# what is drawn -> its mean, in place: the draw itself has made shape, dtype and device
_MEANS: dict[str, Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]] = {
    **dict.fromkeys(("randn", "randn_like"), lambda x, args, given: x.zero_()),
    **dict.fromkeys(("rand", "rand_like"), lambda x, args, given: x.fill_(0.5)),
    "normal": lambda x, args, given: _filled(x, args[0] if args else given["mean"]),
    "normal_": lambda x, args, given: _filled(x, args[1] if len(args) > 1 else given.get("mean", 0.0)),
    "uniform_": lambda x, args, given: x.fill_(
        ((args[1] if len(args) > 1 else given.get("from", 0.0)) + (args[2] if len(args) > 2 else given.get("to", 1.0)))
        / 2
    ),
}


def first_tensor(found: Any) -> Any:
    """The latents in what an encoder gives, or the images in what a decoder gives.

    A tensor is that; a distribution gives its mean; (mean, log variance), (latents, loss, ...) and other tuples give
    their first tensor; a dict or an object what it has under "latents", "latent", "mean", "z", "sample" or
    "reconstruction". Anything else is given back as it is.
    """
    if isinstance(found, (torch.distributions.Distribution, tuple, list)):
        inner = found.mean if isinstance(found, torch.distributions.Distribution) else next(iter(found), None)
        return first_tensor(inner)
    if isinstance(found, (Tensor, fx.Proxy)):  # a proxy: while being traced
        return plain(found) if isinstance(found, Tensor) else found
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mode()
    names = ("latents", "latent", "mean", "z", "sample", "reconstruction")
    inside = [found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in names]
    return next((value for value in inside if isinstance(value, (Tensor, fx.Proxy))), found)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


class Adapter(nn.Module):
    """Base of the adapters; ``latent_std`` is NaN until ``fit_autoencoder`` measures it.

    The wrapped model is neither changed nor switched between training and evaluation. Where an encoder samples in eval
    mode, the latent is the mean.

    Args:
        model: the wrapped model, None where there is no single one.
        pixels: between [0, 1] and the model's range; None leaves the pixels as they are.

    Attributes:
        averaged: whether the last call of ``encode`` would have drawn random numbers.
    """

    latent_std: Tensor

    def __init__(self, model: Any = None, pixels: PixelMap | None = None) -> None:
        super().__init__()
        if model is not None:
            self.model = model
            self.training = bool(getattr(model, "training", False))
        self.pixels = pixels
        self.averaged = False
        self.register_buffer("latent_std", torch.tensor(math.nan))

    def _keep_behind(self, *parts: Any) -> None:
        """Take the modules behind functions for parts, so that they are frozen, moved and put in eval mode too."""
        behind = [found for part in parts if not isinstance(part, nn.Module) for found in _modules_behind(part)]
        if behind:
            self.behind = nn.ModuleList(behind)
            self.behind.training = False  # of the list alone
            self.training = self.training or any(module.training for module in behind)

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, ...] of images [B, C, H, W] or [B, C, D, H, W] in [0, 1]."""
        with contextlib.nullcontext() if self.training else Averages() as averages:
            latents = self._to_latents(self._cast(images if self.pixels is None else self.pixels(images)))
        self.averaged = averages is not None and averages.used
        return _at_least_float32(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, ...] of latents [B, ...]; clamped to [0, 1] but in training, where that would cut gradients."""
        decoded = self._unmapped(self._to_pixels(self._cast(latents)), self.pixels)
        return decoded if self.training else decoded.clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images [B, C, ...]."""
        return self.decode(self.encode(images))

    def unclamped(self, images: Tensor, pixels: PixelMap | None) -> Tensor:
        """Reconstruction as it would be were the model's range the one of ``pixels``, not clamped."""
        mapped = self._cast(images if pixels is None else pixels(images))
        return self._unmapped(self._to_pixels(self._cast(self._to_latents(mapped))), pixels)

    def _unmapped(self, decoded: Tensor, pixels: PixelMap | None) -> Tensor:
        decoded = _at_least_float32(decoded)
        return decoded if pixels is None else pixels.inverse(decoded)

    def _cast(self, x: Tensor) -> Tensor:
        """As the model's weights are; one loaded in half precision takes no float32."""
        weight = next(self.parameters(), None)
        return x if weight is None else x.to(weight.dtype)  # no question of x: it may be a tracer's

    def _to_latents(self, pixels: Tensor) -> Any:
        """Latents of pixels in the model's range."""
        return first_tensor(self.model.encode(pixels))

    def _to_pixels(self, latents: Tensor) -> Any:
        """Pixels in the model's range, not clamped."""
        return first_tensor(self.model.decode(latents))


class PairAutoencoder(Adapter):
    """An encoder and a decoder, each a callable; the modules that functions and methods work with are found in them."""

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        pixels: PixelMap | None = None,
    ) -> None:
        super().__init__(None, pixels)
        self.encoder = encoder
        self.decoder = decoder
        self.training = any(getattr(part, "training", False) for part in (encoder, decoder))
        self._keep_behind(encoder, decoder)

    def _to_latents(self, pixels: Tensor) -> Any:
        return first_tensor(self.encoder(pixels))

    def _to_pixels(self, latents: Tensor) -> Any:
        return first_tensor(self.decoder(latents))


def _modules_behind(function: Any) -> list[nn.Module]:
    """The modules that a function, method, partial or callable object works with, as far as they can be found."""
    if isinstance(function, functools.partial):
        return [*_modules_behind(function.func), *(x for x in function.args if isinstance(x, nn.Module))]
    owner = getattr(function, "__self__", None)
    held: list[Any] = [owner, *getattr(function, "__dict__", {}).values()]
    if owner is not None and not isinstance(owner, nn.Module):
        held += getattr(owner, "__dict__", {}).values()
    own = getattr(function, "__func__", function)
    if isinstance(own, types.FunctionType):
        held += [cell.cell_contents for cell in own.__closure__ or () if _is_filled(cell)]
        held += [own.__globals__.get(name) for name in own.__code__.co_names]
        held += own.__defaults__ or ()
    return list(dict.fromkeys(x for x in held if isinstance(x, nn.Module)))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not set yet
        return False


class ModelAutoencoder(Adapter):
    """Any object with ``encode`` and ``decode`` whose pixels need a map."""

    def __init__(self, model: Any, pixels: PixelMap | None = None) -> None:
        super().__init__(model, pixels)
        if not isinstance(model, nn.Module):
            self._keep_behind(model.encode, model.decode)
        known = getattr(model, "latent_std", None)
        if known is not None:
            self.latent_std.copy_(torch.as_tensor(known))


class PlainAutoencoder(ModelAutoencoder):
    """Any object with ``encode`` and ``decode`` on images in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, ...] of latents [B, ...], as the model gives them."""
        return self._unmapped(self._to_pixels(self._cast(latents)), None)


class KLAutoencoder(Adapter):
    """MONAI ``AutoencoderKL``: the latent is the posterior mean."""


class VariationalAutoencoder(Adapter):
    """MONAI ``VarAutoEncoder``: the latent is the posterior mean; a sigmoid ends it where the model says so."""

    def _to_latents(self, pixels: Tensor) -> Any:
        return self.model.encode_forward(pixels)[0]

    def _to_pixels(self, latents: Tensor) -> Any:
        return self.model.decode_forward(latents, use_sigmoid=self.model.use_sigmoid)


class CodebookAutoencoder(Adapter):
    """MONAI ``VQVAE``: the latent is the continuous code, quantised straight-through when decoding."""

    def _to_pixels(self, latents: Tensor) -> Any:
        return self.model.decode(self.model.quantize(latents)[0])


class DiffusersAutoencoder(Adapter):
    """diffusers' autoencoders: the posterior's mode or the code, scaled as diffusion pipelines scale it.

    Latents are (z - latents_mean) * scaling_factor / latents_std or (z - shift_factor) * scaling_factor, with what
    the model's config names. A ``VQModel`` quantises straight-through when decoding. The range is [-1, 1]; only
    ``AutoencoderRAE`` takes [0, 1] and scales its latents itself. Video models take volumes [B, C, D, H, W].
    """

    def __init__(self, model: Any, pixels: PixelMap | None = None, grey: bool = False) -> None:
        own = any(kind.__name__ == "AutoencoderRAE" for kind in type(model).__mro__)
        usual = make_pixel_map((0, 1) if own else (-1, 1), None, None, grey)
        super().__init__(model, pixels or usual)
        config = None if own else getattr(model, "config", None)

        def read(name: str, otherwise: float) -> Tensor:
            value = getattr(config, name, None)
            return torch.as_tensor(otherwise if value is None else value, dtype=torch.float32)

        standardised = all(getattr(config, name, None) is not None for name in ("latents_mean", "latents_std"))
        mean = read("latents_mean", 0.0) if standardised else read("shift_factor", 0.0)
        factor = read("scaling_factor", 1.0) / (read("latents_std", 1.0) if standardised else 1.0)
        self.scaling = PixelMap(factor.tolist(), (-mean * factor).tolist())

    def _to_latents(self, pixels: Tensor) -> Any:
        return self.scaling(first_tensor(self.model.encode(pixels)))

    def _to_pixels(self, latents: Tensor) -> Any:
        return self.model.decode(self._cast(self.scaling.inverse(latents))).sample
