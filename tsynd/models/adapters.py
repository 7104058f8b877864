"""Adapters that give other libraries' autoencoders one face: ``encode`` and ``decode``, images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.models.pixel_range import PixelMap, make_pixel_map

__all__ = [
    "Adapter",
    "CodebookAutoencoder",
    "DiffusersAutoencoder",
    "KLAutoencoder",
    "ModelAutoencoder",
    "PairAutoencoder",
    "VariationalAutoencoder",
]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


class Adapter(nn.Module):
    """Base of the adapters; ``latent_std`` is NaN until ``fit_autoencoder`` measures it.

    The wrapped model is neither changed nor switched between training and evaluation.

    Args:
        model: the wrapped model, None where there is no single one.
        pixels: between [0, 1] and the model's range; None leaves the pixels as they are.
    """

    latent_std: Tensor

    def __init__(self, model: Any = None, pixels: PixelMap | None = None) -> None:
        super().__init__()
        if model is not None:
            self.model = model
            self.training = bool(getattr(model, "training", False))
        self.pixels = pixels
        self.register_buffer("latent_std", torch.tensor(math.nan))

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, ...] of images [B, C, H, W] or [B, C, D, H, W] in [0, 1]."""
        latents = self._to_latents(self._cast(images if self.pixels is None else self.pixels(images)))
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

    def _to_latents(self, pixels: Tensor) -> Tensor:
        """Latents of pixels in the model's range."""
        raise NotImplementedError

    def _to_pixels(self, latents: Tensor) -> Tensor:
        """Pixels in the model's range, not clamped."""
        raise NotImplementedError


class PairAutoencoder(Adapter):
    """An encoder and a decoder that are separate callables."""

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

    def _to_latents(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def _to_pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class ModelAutoencoder(Adapter):
    """Any object with ``encode`` and ``decode`` whose pixels need a map."""

    def __init__(self, model: Any, pixels: PixelMap | None = None) -> None:
        super().__init__(model, pixels)
        known = getattr(model, "latent_std", None)
        if known is not None:
            self.latent_std.copy_(torch.as_tensor(known))

    def _to_latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(pixels)
        return latents

    def _to_pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(latents)
        return decoded


class KLAutoencoder(Adapter):
    """MONAI ``AutoencoderKL``: the latent is the posterior mean."""

    def _to_latents(self, pixels: Tensor) -> Tensor:
        mean: Tensor = self.model.encode(pixels)[0]
        return mean

    def _to_pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(latents)
        return decoded


class VariationalAutoencoder(Adapter):
    """MONAI ``VarAutoEncoder``: the latent is the posterior mean; a sigmoid ends it where the model says so."""

    def _to_latents(self, pixels: Tensor) -> Tensor:
        mean: Tensor = self.model.encode_forward(pixels)[0]
        return mean

    def _to_pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode_forward(latents, use_sigmoid=self.model.use_sigmoid)
        return decoded


class CodebookAutoencoder(Adapter):
    """MONAI ``VQVAE``: the latent is the continuous code, quantised straight-through when decoding."""

    def _to_latents(self, pixels: Tensor) -> Tensor:
        code: Tensor = self.model.encode(pixels)
        return code

    def _to_pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(self.model.quantize(latents)[0])
        return decoded


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

    def _to_latents(self, pixels: Tensor) -> Tensor:
        output = self.model.encode(pixels)
        if hasattr(output, "latent_dist"):
            latents: Tensor = output.latent_dist.mode()
        else:
            latents = output.latents if hasattr(output, "latents") else output.latent
        return self.scaling(latents)  # type: ignore[no-any-return]

    def _to_pixels(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(self._cast(self.scaling.inverse(latents))).sample
        return decoded
