"""What an autoencoder is to tsynd, and adapters that make one out of other libraries' models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.errors import InputError
from tsynd.global_batch import batch_variance

__all__ = [
    "Autoencoder",
    "CodebookAutoencoder",
    "DiffusersAutoencoder",
    "KLAutoencoder",
    "PairAutoencoder",
    "ReconstructionLoss",
    "VariationalAutoencoder",
    "as_autoencoder",
    "check_autoencoder",
    "measure_latent_std",
]


@runtime_checkable
class Autoencoder(Protocol):
    """Anything with a deterministic ``encode`` and ``decode``, both differentiable.

    Images are floating tensors [B, C, H, W] in [0, 1]; latents are floating tensors [B, ...].
    """

    def encode(self, images: Tensor, /) -> Tensor:
        """Latents [B, ...] of images [B, C, H, W] in [0, 1]."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of latents [B, ...]."""


class _Adapter(nn.Module):
    """Base of the adapters; ``latent_std`` is NaN until ``fit_autoencoder`` measures it."""

    latent_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latent_std", torch.tensor(math.nan))

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, ...] of images [B, C, H, W] in [0, 1]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of latents [B, ...]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images [B, C, H, W]."""
        return self.decode(self.encode(images))


class PairAutoencoder(_Adapter):
    """An encoder and a decoder that are separate callables; both keep their own ranges."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], decoder: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """``encoder(images)``."""
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """``decoder(latents)``."""
        return self.decoder(latents)


class _Wrapped(_Adapter):
    """An adapter around one module of another library."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class KLAutoencoder(_Wrapped):
    """MONAI ``AutoencoderKL``: the latent is the posterior mean; output clamped to [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Posterior mean."""
        mean: Tensor = self.model.encode(images)[0]
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Decoded images, clamped to [0, 1]."""
        image: Tensor = self.model.decode(latents)
        return image.clamp(0, 1)


class VariationalAutoencoder(_Wrapped):
    """MONAI ``VarAutoEncoder``: the latent is the posterior mean; output clamped to [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Posterior mean."""
        mean: Tensor = self.model.encode_forward(images)[0]
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Decoded images, clamped to [0, 1]."""
        image: Tensor = self.model.decode_forward(latents, use_sigmoid=False)
        return image.clamp(0, 1)


class CodebookAutoencoder(_Wrapped):
    """MONAI ``VQVAE``: the latent is the continuous code, quantised straight-through when decoding."""

    def encode(self, images: Tensor) -> Tensor:
        """Continuous code before quantisation."""
        code: Tensor = self.model.encode(images)
        return code

    def decode(self, latents: Tensor) -> Tensor:
        """Decoded images of the nearest codebook entries, clamped to [0, 1]."""
        image: Tensor = self.model.decode(self.model.quantize(latents)[0])
        return image.clamp(0, 1)


class DiffusersAutoencoder(_Wrapped):
    """diffusers ``AutoencoderKL`` and ``VQModel``: their images lie in [-1, 1], ours in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Mode of the posterior, or the continuous code of a ``VQModel``."""
        output = self.model.encode(images * 2 - 1)
        latents: Tensor = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decoded images, mapped from [-1, 1] and clamped to [0, 1]."""
        image: Tensor = self.model.decode(latents).sample
        return ((image + 1) / 2).clamp(0, 1)


def as_autoencoder(model: object) -> Autoencoder:
    """Give ``model`` the face of an :class:`Autoencoder`.

    Args:
        model: an object with ``encode`` and ``decode`` (taken as is), a pair ``(encoder, decoder)``, MONAI's
            ``AutoencoderKL``, ``VarAutoEncoder``, ``VQVAE`` or ``AutoEncoder``, or one of diffusers'
            autoencoders.

    Returns:
        ``model`` itself or an adapter, an ``nn.Module``, that holds it.

    Raises:
        InputError: nothing fits.
    """
    if isinstance(model, (tuple, list)):
        if len(model) == 2 and all(callable(part) for part in model):
            return PairAutoencoder(model[0], model[1])
        kinds = ", ".join(type(part).__name__ for part in model)
        raise InputError(f"autoencoder: got a {type(model).__name__} of ({kinds}), wanted (encoder, decoder)")
    # By name, so that neither library has to be installed or imported; subclasses count too.
    ancestry = [(kind.__module__.split(".")[0], kind.__name__) for kind in type(model).__mro__]
    names = {name for package, name in ancestry if package in ("monai", "generative")}
    if "AutoencoderKL" in names:
        return KLAutoencoder(model)
    if "VarAutoEncoder" in names:
        return VariationalAutoencoder(model)
    if "VQVAE" in names:
        return CodebookAutoencoder(model)
    if "AutoEncoder" in names and isinstance(model, nn.Module):
        return PairAutoencoder(nn.Sequential(model.encode, model.intermediate), model.decode)  # type: ignore[arg-type]
    if any(package == "diffusers" for package, _ in ancestry) and hasattr(model, "encode"):
        return DiffusersAutoencoder(model)
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        return model  # type: ignore[return-value]
    raise InputError(
        f"autoencoder: got {type(model).__name__}, wanted an object with encode(images) and decode(latents),"
        " or a pair (encoder, decoder)"
    )


def check_autoencoder(autoencoder: Autoencoder, images: Tensor) -> None:
    """Encode and decode one image to find a model that does not fit before the work starts.

    The mode (train or eval) is left as it is. Modules are run without gradient.

    Args:
        autoencoder: what :func:`as_autoencoder` returned.
        images: [B, C, H, W] in [0, 1], on the autoencoder's device; only the first is used.

    Raises:
        InputError: a model that fails on the image, or whose output is of another shape or not finite.
    """
    image = images[:1]
    shape = list(image.shape)
    try:
        with torch.no_grad():
            latent = autoencoder.encode(image)
            if not isinstance(latent, Tensor):
                raise InputError(f"autoencoder.encode: returned {type(latent).__name__}, wanted a tensor")
            if not latent.is_floating_point() or latent.ndim < 2 or latent.shape[0] != 1:
                raise InputError(
                    f"autoencoder.encode: images {shape} gave {latent.dtype} {list(latent.shape)},"
                    " wanted a floating tensor [1, ...]"
                )
            decoded = autoencoder.decode(latent)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"autoencoder: failed on images {shape}: {reason}") from error
    if not isinstance(decoded, Tensor):
        raise InputError(f"autoencoder.decode: returned {type(decoded).__name__}, wanted a tensor")
    if list(decoded.shape) != shape:
        raise InputError(
            f"autoencoder.decode: images {shape} came back as {list(decoded.shape)}"
            f" (latents {list(latent.shape)}), wanted the same shape"
        )
    if not (bool(latent.isfinite().all()) and bool(decoded.isfinite().all())):
        raise InputError(f"autoencoder: images {shape} gave values that are not finite")


def measure_latent_std(batches: Iterable[Tensor]) -> Tensor:
    """Pooled standard deviation of latents around the mean latent.

    Each coordinate varies around its own mean: what all images share (an anatomy's fixed layout) is no
    variation and must not lengthen a step.

    Args:
        batches: latents [b, ...] of all images, in one or more batches, two or more images in all.

    Returns:
        Scalar float32 tensor, sqrt(mean over coordinates of the variance over images).

    Raises:
        InputError: fewer than two images.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        latents = batch.flatten(1).double()
        count += len(latents)
        total, squares = latents.sum(0) + total, latents.square().sum(0) + squares
    if count < 2:
        raise InputError(f"latents: got {count} images, wanted two or more to measure a deviation")
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp_min(0).mean().sqrt().float()


class ReconstructionLoss(nn.Module):
    """Training loss of an autoencoder: mean squared error of what disturbed latents decode to.

    Args:
        autoencoder: a module with ``encode`` and ``decode``.
        noise: largest disturbance, in deviations of the latents; each image draws its own level below it.
    """

    def __init__(self, autoencoder: nn.Module, noise: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.noise = noise

    def forward(self, images: Tensor) -> Tensor:
        """Scalar loss of images [B, C, H, W] in [0, 1], B of two or more."""
        model: Any = self.autoencoder
        latents: Tensor = model.encode(images)
        # The deviation carries a gradient: without it, ever larger latents would be a way out of the noise.
        deviation = (batch_variance(latents.flatten(1).float()).mean() + 1e-12).sqrt()
        level = self.noise * torch.rand([len(latents)] + [1] * (latents.ndim - 1), device=latents.device)
        decoded: Tensor = model.decode(latents + level * deviation * torch.randn_like(latents))
        # So the scale of the latents is free; this light spring keeps it near one.
        return functional.mse_loss(decoded.float(), images) + 1e-4 * deviation.log().square()
