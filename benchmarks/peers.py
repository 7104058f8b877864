"""Other ways to compute value and gradient of the uncertainty of a dropout -> linear head, in plain torch.

The tests hold each of them against the twin, so the benchmark compares equal computations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsynd import reference

__all__ = [
    "batched_analytic",
    "batched_passes",
    "independent_batched",
    "independent_loop",
    "pass_loop",
    "shared_analytic",
    "shared_autograd",
]


def _value_and_gradient(features: Tensor, logits_of: object) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_(True)
    value = reference.uncertainty_value(logits_of(leaf))  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def independent_loop(features: Tensor, weight: Tensor, p: float, samples: int) -> tuple[Tensor, Tensor]:
    """What most people run: T passes of nn.Dropout and linear, a fresh mask per image and pass."""

    def logits(leaf: Tensor) -> Tensor:
        passes = [torch.nn.functional.dropout(leaf, p, True) @ weight.t() for _ in range(samples)]
        return torch.stack(passes)

    return _value_and_gradient(features, logits)


def independent_batched(features: Tensor, weight: Tensor, p: float, samples: int) -> tuple[Tensor, Tensor]:
    """The same passes in one batch of T * B."""

    def logits(leaf: Tensor) -> Tensor:
        dropped = torch.nn.functional.dropout(leaf.expand(samples, *leaf.shape), p, True)
        return dropped @ weight.t()

    return _value_and_gradient(features, logits)


def pass_loop(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over T sampled heads [T, C, D]."""
    return _value_and_gradient(features, lambda leaf: torch.stack([leaf @ w.t() for w in weight]))


def batched_passes(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One batched product against T sampled heads."""
    return _value_and_gradient(features, lambda leaf: torch.matmul(leaf, weight.transpose(1, 2)))


def batched_analytic(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One batched product against T sampled heads with the analytic gradient: what a compiler can take whole."""
    value, slope = reference.logits_uncertainty(torch.matmul(features, weight.transpose(1, 2)))
    return value, torch.matmul(slope, weight).sum(0)


def shared_autograd(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix product against the T stacked heads, gradient by autograd."""
    samples, classes, units = weight.shape

    def logits(leaf: Tensor) -> Tensor:
        flat = leaf @ weight.reshape(samples * classes, units).t()
        return flat.reshape(-1, samples, classes).transpose(0, 1)

    return _value_and_gradient(features, logits)


def shared_analytic(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the analytic gradient: the operator's twin."""
    return reference.head_uncertainty(features, weight)
