"""How plausible a latent is: a Gaussian fitted to the training images' latents, and its Mahalanobis distance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsynd.utils.errors import InputError

__all__ = ["LatentPrior", "fit_latent_prior"]


@dataclass(frozen=True)
class LatentPrior:
    """A Gaussian over flattened latents: a low-rank part plus one variance for all other directions.

    Probabilistic principal components (Tipping & Bishop, 1999), with the variances shrunk.

    Attributes:
        mean: [D].
        directions: [q, D], orthonormal rows.
        variances: [q], along them.
        rest: variance along every other direction, above 0.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: float

    def distance(self, latents: Tensor) -> Tensor:
        """Squared Mahalanobis distance per coordinate, differentiable.

        Args:
            latents: [B, ...] of D coordinates each.

        Returns:
            [B], about 1 for latents like those that were fitted.
        """
        centred = latents.flatten(1).float() - self.mean
        along = centred @ self.directions.t()
        # the residual itself, not |centred|^2 - |along|^2: that difference would cancel
        residual = centred - along @ self.directions
        squares = (along.square() / self.variances).sum(1) + residual.square().sum(1) / self.rest
        return squares / centred.shape[1]

    def excess(self, latents: Tensor, origin: Tensor) -> Tensor:
        """By how much a latent is less plausible than the one it came from.

        Args:
            latents: [B, ...].
            origin: [B, ...].

        Returns:
            [B], half the growth of :meth:`distance`, at least 0: the loss of log-density in nats per coordinate.
        """
        return 0.5 * (self.distance(latents) - self.distance(origin).detach()).clamp_min(0)

    def to(self, device: torch.device | str) -> LatentPrior:
        """The same on another device."""
        return LatentPrior(self.mean.to(device), self.directions.to(device), self.variances.to(device), self.rest)


def fit_latent_prior(latents: Iterable[Tensor], *, rank: int | None = None, shrinkage: float = 0.1) -> LatentPrior:
    """Fit a :class:`LatentPrior`.

    Args:
        latents: [b, ...] of all training images, in one or more batches, two or more images in all.
        rank: q, at most one below the number of images and below D; None takes a quarter of that, at most 64.
        shrinkage: in [0, 1]; every variance is moved by this part towards the mean variance of a coordinate.

    Raises:
        InputError: an argument out of range, fewer than two images, or latents that are all equal or not finite.
    """
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage: got {shrinkage!r}, wanted a number in [0, 1]")
    parts = [batch.detach().flatten(1).double() for batch in latents]
    points = torch.cat(parts) if parts else torch.empty(0, 0)
    count, dimension = points.shape
    if count < 2:
        raise InputError(f"latents: got {count} images, wanted two or more to fit their distribution")
    most = min(count - 1, dimension - 1)
    if rank is None:
        rank = max(min(1, most), min(64, most // 4))
    if not isinstance(rank, int) or not 0 <= rank <= most:
        raise InputError(f"rank: got {rank!r}, wanted an integer from 0 to {most} ({count} latents of {dimension})")
    mean = points.mean(0)
    _, lengths, directions = torch.linalg.svd(points - mean, full_matrices=False)
    spectrum = lengths.square() / (count - 1)
    average = spectrum.sum() / dimension
    if not (bool(average.isfinite()) and float(average) > 0):
        raise InputError(f"latents: their variance is {float(average):g}, wanted a finite number above 0")
    rest = spectrum[rank:].sum() / (dimension - rank)

    def shrunk(variance: Tensor) -> Tensor:
        # a floor besides the shrinkage: without it, shrinkage 0 could leave a direction of no variance
        return torch.maximum((1 - shrinkage) * variance + shrinkage * average, 1e-6 * average)

    variances = shrunk(spectrum[:rank]).float()
    return LatentPrior(mean.float(), directions[:rank].float(), variances, float(shrunk(rest)))
