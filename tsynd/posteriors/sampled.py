"""T sampled linear heads on one set of features: what every posterior over a last layer ends in."""

from __future__ import annotations

from torch import Tensor

from tsynd.ops import operators as ops

__all__ = ["heads_logits", "heads_uncertainty"]


def heads_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [T, B, C] of features [B, D] under weights [T, C, D] and biases [T, C]: one product."""
    flat = features @ weight.flatten(0, 1).t().to(features.dtype)
    logits = flat.reshape(flat.shape[0], *weight.shape[:2]).transpose(0, 1)
    return logits if bias is None else logits + bias[:, None]


def heads_uncertainty(features: Tensor, weight: Tensor, bias: Tensor | None, objective: str, task: str) -> Tensor:
    """Uncertainty [B] in nats of features [B, D] under weights [T, C, D] and biases [T, C], fused."""
    kind = features.dtype
    bias = None if bias is None else bias.to(kind)
    return ops.head_uncertainty(features, weight.to(kind), bias, objective, task)[0]
