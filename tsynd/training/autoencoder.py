"""Training of autoencoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.dataset import LabelledBatches
from tsynd.models.adapters import first_tensor
from tsynd.models.autoencoder import as_autoencoder, autoencoder_of, check_autoencoder, latent_deviation
from tsynd.models.pretrained_autoencoder import PretrainedAutoencoder
from tsynd.training.global_batch import batch_variance
from tsynd.training.loop import Checkpoint, FitReport, Track, TrainingSettings, _Loop
from tsynd.utils.device import resolve_device
from tsynd.utils.errors import InputError, require
from tsynd.utils.settings import override

__all__ = ["AutoencoderSettings", "ReconstructionLoss", "fit_autoencoder"]


@dataclass(frozen=True)
class AutoencoderSettings(TrainingSettings):
    """How an autoencoder is trained; see :class:`tsynd.training.loop.TrainingSettings` for the rest.

    Attributes:
        latent_noise: largest noise, in deviations of the latents, 0 or more.
        crop: side of the windows of large images that a step looks at, for a convolutional autoencoder; 0 takes whole
            images.
    """

    iterations: int = 1500
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    latent_noise: float = 0.5
    crop: int = 0


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
        latents: Tensor = first_tensor(model.encode(images))
        # The deviation carries a gradient: without it, ever larger latents would be a way out of the noise.
        deviation = (batch_variance(latents.flatten(1).float()).mean() + 1e-12).sqrt()
        level = self.noise * torch.rand([len(latents)] + [1] * (latents.ndim - 1), device=latents.device)
        decoded: Tensor = first_tensor(model.decode(latents + level * deviation * torch.randn_like(latents)))
        # So the scale of the latents is free; this light spring keeps it near one.
        return functional.mse_loss(decoded.float(), images) + 1e-4 * deviation.log().square()


def fit_autoencoder(
    autoencoder: Any,
    images: Any,
    settings: AutoencoderSettings | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    track: Track | None = None,
    **training: Any,
) -> FitReport:
    """Train an autoencoder, in place, to reconstruct ``images`` from disturbed latents.

    The loss is the mean squared error. Each image's latent is disturbed by Gaussian noise of up to
    ``latent_noise`` deviations, so that the surroundings of a real latent decode to images too. A pretrained one
    that is frozen (``trains="none"``) is not trained. At the end the autoencoder's buffer ``latent_std``, where it has
    one, is set (``latent_deviation``).

    Args:
        autoencoder: of modules, as :func:`tsynd.synthesize` takes it; it is moved to the device and left in eval mode.
        images: [N, C, H, W], or labelled data, as ``LabelledBatches`` reads them.
        settings: see :class:`AutoencoderSettings`.
        device: Accelerate's choice by default.
        progress: show a bar.
        checkpoint: keep the training's state; a killed training that is called again in the same way (number of
            processes may differ) ends, on a CPU, with the same weights bit for bit as one that was not.
        track: log the loss of every step, for instance ``Track("tensorboard", Path("logs"))``.
        **training: fields of the settings, instead of those given there, as ``iterations=800``.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    settings = override(settings or AutoencoderSettings(), training, "the training")
    autoencoder = as_autoencoder(autoencoder)
    if not isinstance(autoencoder, nn.Module):
        raise InputError(f"autoencoder: got {type(autoencoder).__name__}, wanted a module or a pair of them to train")
    batches = LabelledBatches(images, task=None, by_index=True)
    if isinstance(autoencoder, PretrainedAutoencoder) and autoencoder.trains == "none":
        accelerator = require("accelerate", "train").Accelerator(device_placement=False)
        target = accelerator.device if device is None else resolve_device(device)
        check_autoencoder(autoencoder.to(target), batches.first.to(target))
        _measure(autoencoder, batches, target)
        return FitReport((), 0, 0.0)
    loop = _Loop(ReconstructionLoss(autoencoder, settings.latent_noise), batches, device, settings, track)
    model = autoencoder_of(autoencoder.eval())
    check_autoencoder(model, batches.first.to(loop.device))

    def compute_loss(engine: nn.Module, step: int, ids: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        if settings.crop:
            images = _window(images, settings.crop, settings.seed + step)
        with loop.over_all(loop.rows, loop.batch_size), loop.autocast():
            loss: Tensor = engine(images)
        return loss if loop.ranks == 1 else loss * (len(images) / loop.batch_size)

    autoencoder.train()
    try:
        losses, seconds = loop.run(compute_loss, "autoencoder", progress, checkpoint)
    finally:
        autoencoder.eval()
    loop.stop_tracking()
    _measure(autoencoder, batches, loop.device)
    return FitReport(losses, settings.iterations, seconds)


def _window(images: Tensor, side: int, seed: int) -> Tensor:
    """The same random window of all images, of at most that side."""
    generator = torch.Generator().manual_seed(seed)
    for axis in range(2, images.dim()):
        if (room := images.shape[axis] - side) > 0:
            start = int(torch.randint(room + 1, (), generator=generator))
            images = images.narrow(axis, start, side)
    return images


def _measure(model: Any, batches: LabelledBatches, device: torch.device) -> None:
    """Set the model's ``latent_std``, where it has one."""
    if isinstance(getattr(model, "latent_std", None), Tensor):
        with torch.no_grad():
            face = autoencoder_of(model)
            latents = (face.encode(batches.at(part).images.to(device)) for part in batches.chunks(256))
            model.latent_std.copy_(latent_deviation(latents))
