"""What an autoencoder is to tsynd, how one is made of another library's model, and what is checked of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tsynd.models.adapters import (
    Adapter,
    CodebookAutoencoder,
    DiffusersAutoencoder,
    KLAutoencoder,
    ModelAutoencoder,
    PairAutoencoder,
    PlainAutoencoder,
    VariationalAutoencoder,
)
from tsynd.models.networks import SmallAutoencoder
from tsynd.models.pixel_range import Numbers, PixelMap, make_pixel_map
from tsynd.utils.errors import InputError, first_line

__all__ = [
    "Autoencoder",
    "as_autoencoder",
    "autoencoder_of",
    "check_autoencoder",
    "check_pixel_range",
    "known_latent_std",
    "latent_deviation",
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


def as_autoencoder(
    model: object,
    *,
    pixel_range: tuple[float, float] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    grey: bool = False,
) -> Autoencoder:
    """Give ``model`` the face of an :class:`Autoencoder`, whose images lie in [0, 1].

    A model that was trained on other pixels is told so: ``pixel_range=(-1, 1)``, or ``mean`` and ``std`` of
    standardised images. diffusers' autoencoders need no telling.

    Args:
        model: an object with ``encode`` and ``decode`` (taken as is where nothing else is asked for), a pair
            ``(encoder, decoder)``; either may give (mean, log variance), (latents, loss, ...), a dict or a distribution
            (the latent is the mean, else the first tensor). Or MONAI's ``AutoencoderKL``, ``VarAutoEncoder``, ``VQVAE``
            or ``AutoEncoder``, or one of diffusers' autoencoders.
        pixel_range: what 0 and 1 are to the model.
        mean: the model takes (x - mean) / std; one number or one a channel.
        std: see ``mean``.
        grey: the model has three channels, the images one: it is repeated, and the model's output averaged.

    Returns:
        ``model`` itself or an adapter, an ``nn.Module``, that holds it.

    Raises:
        InputError: nothing fits, or the arguments name no range.
    """
    pixels = make_pixel_map(pixel_range, mean, std, grey)
    if isinstance(model, Adapter):
        if pixels is not None:
            raise InputError(f"autoencoder: got an adapter ({type(model).__name__}), wanted the model itself to map")
        return model
    if isinstance(model, (tuple, list)):
        if len(model) == 2 and all(callable(part) for part in model):
            return PairAutoencoder(model[0], model[1], pixels)
        kinds = ", ".join(type(part).__name__ for part in model)
        raise InputError(f"autoencoder: got a {type(model).__name__} of ({kinds}), wanted (encoder, decoder)")
    # By name, so that neither library has to be installed or imported; subclasses count too.
    ancestry = [(kind.__module__.split(".")[0], kind.__name__) for kind in type(model).__mro__]
    names = {name for package, name in ancestry if package in ("monai", "generative")}
    if "AutoencoderKL" in names:
        return KLAutoencoder(model, pixels)
    if "VarAutoEncoder" in names:
        return VariationalAutoencoder(model, pixels)
    if "VQVAE" in names:
        return CodebookAutoencoder(model, pixels)
    if "AutoEncoder" in names and isinstance(model, nn.Module):
        encoder = nn.Sequential(model.encode, model.intermediate)  # type: ignore[arg-type]
        encoder.training = model.training  # of the pair alone: train() would switch the model's parts too
        return PairAutoencoder(encoder, model.decode, pixels)  # type: ignore[arg-type]
    if any(package == "diffusers" for package, _ in ancestry) and hasattr(model, "encode"):
        told = pixel_range is not None or mean is not None
        return DiffusersAutoencoder(model, pixels if told else None, grey)
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        return model if pixels is None else ModelAutoencoder(model, pixels)  # type: ignore[return-value]
    raise InputError(
        f"autoencoder: got {type(model).__name__}, wanted an object with encode(images) and decode(latents),"
        " or a pair (encoder, decoder)"
    )


def autoencoder_of(model: object) -> Adapter | SmallAutoencoder:
    """The model as all of tsynd runs it: one latent an image, the encoder's mean where it samples.

    Raises:
        InputError: see :func:`as_autoencoder`.
    """
    made = as_autoencoder(model)
    return made if isinstance(made, (Adapter, SmallAutoencoder)) else PlainAutoencoder(made)


def check_autoencoder(autoencoder: Autoencoder, images: Tensor) -> None:
    """Encode and decode one image to find a model that does not fit before the work starts.

    The mode (train or eval) is left as it is. Modules are run without gradient.

    Args:
        autoencoder: what :func:`as_autoencoder` returned.
        images: [B, C, H, W] in [0, 1], on the autoencoder's device; only the first is used.

    Raises:
        InputError: a model that fails on the image, whose output is of another shape or not finite, or whose
            encoder or decoder draws random numbers in eval mode.

    Warns:
        RuntimeWarning: the encoder samples, so that its mean is taken; or it has parameters that cannot be found, in
            which case its modules are neither frozen nor in eval mode.
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
            still = not getattr(autoencoder, "training", False)
            other = autoencoder.encode(image) if still else latent
            decoded = autoencoder.decode(latent)
            again = autoencoder.decode(latent) if still else decoded
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"autoencoder: failed on images {shape}: {first_line(error)}") from error
    if not isinstance(decoded, Tensor):
        raise InputError(f"autoencoder.decode: returned {type(decoded).__name__}, wanted a tensor")
    if list(decoded.shape) != shape:
        raise InputError(
            f"autoencoder.decode: images {shape} came back as {list(decoded.shape)}"
            f" (latents {list(latent.shape)}), wanted the same shape"
        )
    if not (bool(latent.isfinite().all()) and bool(decoded.isfinite().all())):
        raise InputError(f"autoencoder: images {shape} gave values that are not finite")
    if not torch.allclose(latent, other, rtol=1e-2, atol=1e-3 * float(latent.abs().max())):
        raise InputError("autoencoder.encode: gave two latents for one image, wanted an encoder without randomness")
    if isinstance(autoencoder, Adapter):
        _warn_of(autoencoder, image)
    if not torch.allclose(decoded, again, rtol=1e-2, atol=1e-3):
        raise InputError("autoencoder.decode: gave two images for one latent, wanted a decoder without randomness")


def _warn_of(autoencoder: Adapter, image: Tensor) -> None:
    if autoencoder.averaged:
        _warn("autoencoder.encode: samples its latents; their mean is taken, so that an image has one latent")
    if next(autoencoder.parameters(), None) is None:
        with torch.enable_grad():
            found = autoencoder.decode(autoencoder.encode(image.detach()))
        if found.requires_grad:
            _warn(
                "autoencoder: has parameters that cannot be found behind its functions, so its modules are neither "
                "frozen nor in eval mode; wanted (encoder, decoder) as modules"
            )


# a reconstruction's error over the image's variance that counts as reconstructed, and as reconstructed well; how many
# times better is certain, and how many times better is worth a word. A model trained for 40 steps that was off by a
# constant missed 2.1 as it was and 0.23 through [-1, 1]; models trained on another range missed 0.08 on their own.
_RECONSTRUCTED, _WELL, _CERTAIN, _LIKELY = 0.25, 0.1, 4.0, 1.5


def check_pixel_range(autoencoder: Autoencoder, images: Tensor) -> None:
    """Find a trained autoencoder that is given another range of pixels than it was trained on.

    Certain is only this: it reconstructs the image well when the pixels are brought to another range, and at least
    four times as badly as they are. A model that reconstructs nothing (untrained, badly trained) is no such case.

    Args:
        autoencoder: what :func:`as_autoencoder` returned, in eval mode.
        images: [B, C, ...] in [0, 1], on its device; only the first is used.

    Raises:
        InputError: such a model; the message names the argument of ``as_autoencoder`` that puts it right.

    Warns:
        RuntimeWarning: another range is better by less than that, or most decoded pixels lie outside [0, 1], where
            they are clamped and pass no gradient on.
    """
    image = images[:1].float()
    if not image.std() > 1e-4:
        return
    current = autoencoder.pixels if isinstance(autoencoder, Adapter) else None
    with torch.no_grad():
        decoded = _reconstruct(autoencoder, image, current)
        error = _unexplained(decoded, image)
        if error <= _RECONSTRUCTED / 2:
            return
        others = {
            (other.text, remedy): _unexplained(_reconstruct(autoencoder, image, other.to(image.device)), image)
            for other, remedy in _other_ranges(image, current)
        }
    (best, remedy), least = min(others.items(), key=lambda item: item[1])
    if least <= _RECONSTRUCTED and error >= _LIKELY * least:
        given = current.text if current is not None and current.text else "pixels in [0, 1]"
        found = f"with {given} it misses {error:.0%} of an image's variance, with {best} only {least:.0%}"
        if least <= _WELL and error >= _CERTAIN * least:
            raise InputError(f"autoencoder: {found}: it was trained on another range, wanted {remedy}")
        _warn(f"autoencoder: {found}; if it was trained on another range: {remedy}")
        return
    outside = float(((decoded < -0.05) | (decoded > 1.05)).float().mean())
    if outside > 0.5:
        _warn(
            f"autoencoder: {outside:.0%} of the pixels that it decodes lie outside [0, 1]; they are clamped and pass "
            "no gradient on. It is untrained, or was trained on another range: see pixel_range of tsynd.as_autoencoder"
        )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _reconstruct(autoencoder: Autoencoder, image: Tensor, pixels: PixelMap | None) -> Tensor:
    if isinstance(autoencoder, Adapter):
        return autoencoder.unclamped(image, pixels)
    decoded = autoencoder.decode(autoencoder.encode(image if pixels is None else pixels(image)))
    return decoded if pixels is None else pixels.inverse(decoded)


def _unexplained(decoded: Tensor, image: Tensor) -> float:
    error = float((decoded.float() - image).square().mean() / image.var(correction=0))
    return error if error == error else float("inf")


def _other_ranges(image: Tensor, current: PixelMap | None) -> list[tuple[PixelMap, str]]:
    """Ranges that models are commonly trained on, and what to do about each."""
    grey = current is not None and current.grey
    mean, std = round(float(image.mean()), 2), max(0.01, round(float(image.std()), 2))
    found = [make_pixel_map(ends, None, None, grey) for ends in ((0, 1), (-1, 1), (0, 255))]
    if image.shape[1] == 3 or grey:
        found.append(make_pixel_map(None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), grey))
    known = "pixel_range=(0, 1)" if current is None else current.text
    ranges = [
        (pixels, f"tsynd.as_autoencoder(model, {pixels.text})")
        for pixels in found
        if pixels is not None and pixels.text != known
    ]
    own = make_pixel_map(None, mean, std, grey)  # stands for images standardised by their own numbers
    if own is not None:
        ranges.append((own, "tsynd.as_autoencoder(model, mean=..., std=...) with the numbers of its training images"))
    return ranges


def known_latent_std(autoencoder: Any) -> float | None:
    """The autoencoder's own ``latent_std``; None where it has none that is finite and above 0."""
    known = getattr(autoencoder, "latent_std", None)
    value = float(known) if known is not None else math.nan
    return value if math.isfinite(value) and value > 0 else None


def latent_deviation(batches: Iterable[Tensor]) -> Tensor:
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
