"""How good synthetic images are: fidelity of the autoencoder, memorisation, distance to the real distribution."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import parts
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.utils.errors import InputError, require

__all__ = [
    "distribution_distances",
    "gradient_cosine",
    "memorisation",
    "nearest_distances",
    "penultimate_features",
    "reconstruction_error",
]


def nearest_distances(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each image to its nearest reference, and which one that is.

    Args:
        images: [N, C, H, W] in [0, 1].
        references: [M, C, H, W] in [0, 1].

    Returns:
        Root mean squared difference over the pixels, [N], and indices, int64 [N].
    """
    flat = references.flatten(1)
    # not through |a|² + |b|² − 2ab, which rounds small distances away
    found = [
        torch.cdist(part.flatten(1), flat, compute_mode="donot_use_mm_for_euclid_dist").min(1) for part in parts(images)
    ]
    values = torch.cat([part.values for part in found]) / flat.shape[1] ** 0.5
    return values, torch.cat([part.indices for part in found])


POOR_RECONSTRUCTION = 0.05
"""Share of an image's variance that is told when it is missed: a frozen encoder's classifier lost 4 points of balanced
accuracy on reconstructions that missed 4 %, 23 on such that missed 9 % (docs/study_pretrained.md)."""


def unexplained(images: Tensor, decoded: Tensor) -> Tensor:
    """Squared error of each reconstruction over its image's variance, [N]; of images and their like [N, C, ...]."""
    error = (decoded.float() - images.float()).square().flatten(1).mean(1)
    return error / images.float().flatten(1).var(1, correction=0).clamp_min(1e-8)


def gradient_cosine(posterior: Posterior, autoencoder: Any, images: Tensor, task: str = "multiclass") -> float:
    """Mean cosine of mutual information's and entropy's gradients in the latents; at 1 the two objectives are one.

    Args:
        posterior: of the classifier.
        autoencoder: with ``encode`` and ``decode``.
        images: [N, C, H, W] in [0, 1]; their latents are where the gradients are taken.
        task: "multiclass" or "multilabel".

    Returns:
        NaN where a gradient is zero for every image.
    """
    found = []
    modules = [autoencoder] if isinstance(autoencoder, nn.Module) else []
    with posterior.frozen(), frozen(*modules), torch.enable_grad():
        for part in parts(images):
            latents = autoencoder.encode(part).float().detach().requires_grad_()
            ids = torch.arange(len(part), device=part.device)
            slopes = []
            for objective in ("mutual_information", "entropy"):
                value = posterior.uncertainty(autoencoder.decode(latents).clamp(0, 1), ids, objective, task)
                slopes.append(torch.autograd.grad(value.sum(), latents)[0].flatten(1).double())
            cosine = (slopes[0] * slopes[1]).sum(1) / (slopes[0].norm(dim=1) * slopes[1].norm(dim=1))
            found.append(cosine[cosine.isfinite()])
    return float(torch.cat(found).mean())


def reconstruction_error(autoencoder: Any, images: Tensor) -> float:
    """Root mean squared error of decode(encode(x)) over all pixels of images [N, C, H, W], in [0, 1] units."""
    with torch.no_grad():
        squares = [(autoencoder.decode(autoencoder.encode(x)).clamp(0, 1) - x).square().sum() for x in parts(images)]
    return float((torch.stack(squares).sum() / images.numel()).sqrt())


def memorisation(made: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Whether synthetic images are copies of training images.

    Args:
        made: synthetic images [N, C, H, W] in [0, 1]; image i was made from ``train[i]``.
        train: [N, C, H, W].
        held_out: real images [M, C, H, W] that were not trained on: how near a new real image comes.

    Returns:
        ``nearest``: median distance (root mean squared difference) of a synthetic image to its nearest training
        image; ``nearest_held_out``: the same of the held-out images; ``source_is_nearest``: share of the synthetic
        images whose nearest training image is their source; ``to_source``: median distance to the source.
    """
    distances, which = nearest_distances(made, train)
    real, _ = nearest_distances(held_out, train)
    to_source = (made - train).flatten(1).square().mean(1).sqrt()
    return {
        "nearest": float(distances.median()),
        "nearest_held_out": float(real.median()),
        "source_is_nearest": float((which == torch.arange(len(made))).double().mean()),
        "to_source": float(to_source.median()),
    }


def penultimate_features(classifier: nn.Module, images: Tensor) -> Tensor:
    """What goes into the classifier's last linear layer, float32 [N, D]; eval mode is the caller's.

    Args:
        classifier: ends in an ``nn.Linear``.
        images: [N, C, H, W] in [0, 1].

    Raises:
        InputError: the classifier has no linear layer.
    """
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(f"classifier: {type(classifier).__name__} has no nn.Linear to take features from")
    taken: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(1).float().cpu()))
    try:
        with torch.no_grad():
            for part in parts(images):
                classifier(part)
    finally:
        handle.remove()
    return torch.cat(taken)


def distribution_distances(features: Tensor, references: Tensor) -> dict[str, float]:
    """Kernel and Fréchet distance of two sets of features, by torchmetrics (KID and FID on given features).

    The features are divided by the references' standard deviation over all, so that classifiers of other scale can
    be compared. ``kid`` is the unbiased squared maximum mean discrepancy with the cubic kernel (Bińkowski et al.
    2018), a mean over fixed random subsets of the larger set as large as the smaller one; it may be negative.
    ``fid`` (Heusel et al. 2017) is biased upwards for few images: compare it between sets of one size only.

    Args:
        features: [N, D], N of two or more.
        references: [M, D], M of two or more.
    """
    kid = require("torchmetrics.image.kid", "train").KernelInceptionDistance
    fid = require("torchmetrics.image.fid", "train").FrechetInceptionDistance
    scale = (references - references.mean(0)).square().mean().sqrt().clamp_min(1e-12)
    sizes, width = (len(features), len(references)), features.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the memory that features take
        torch.default_generator.manual_seed(0)  # the subsets are drawn
        kernel = kid(feature=_Given(width), subsets=_subsets(*sizes), subset_size=min(sizes))
        frechet = fid(feature=_Given(width), normalize=True)
        for metric in (kernel, frechet):
            metric.update(references / scale, real=True)
            metric.update(features / scale, real=False)
        return {"kid": float(kernel.compute()[0]), "fid": float(frechet.compute())}


def _subsets(first: int, second: int) -> int:
    """One pass where both sets are used whole; else enough for all of the larger to have its say."""
    return 1 if first == second else max(4, round(4 * max(first, second) / min(first, second)))


class _Given(nn.Module):
    """The identity, for metrics that expect a network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features
