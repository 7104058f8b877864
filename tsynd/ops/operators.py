"""The operators of ``torch.ops.tsynd``, documented; :mod:`tsynd.ops.registration` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ascend_",
    "dropout_expand",
    "dropout_gather",
    "dropout_head_uncertainty",
    "dropout_mask",
    "expected_information",
    "head_uncertainty",
    "logits_uncertainty",
]


def logits_uncertainty(
    logits: Tensor, objective: str = "mutual_information", task: str = "multiclass"
) -> tuple[Tensor, Tensor]:
    """Uncertainty of T posterior samples' logits, and its gradient, in one pass.

    Args:
        logits: [T, B, C] float32 or bfloat16 (float16 on CUDA).
        objective: ``mutual_information`` (BALD, Houlsby et al. 2011) or ``entropy`` of the mean prediction.
        task: ``multiclass`` (softmax over C) or ``multilabel`` (a sigmoid per label, summed over labels).

    Returns:
        value [B] float32 in nats (0 <= MI <= log C, or C log 2 for multilabel) and d value / d logits
        [T, B, C]. The value is differentiable; the gradient is not differentiable again.

    Raises:
        RuntimeError: wrong rank, dtype, device, objective or task; the message names the argument.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.logits_uncertainty(logits, objective, task)
    return out


def expected_information(logits: Tensor, targets: Tensor, task: str = "multiclass") -> tuple[Tensor, Tensor]:
    """What an image's label would tell about those of the targets (EPIG, Bickford Smith et al. 2023), and its gradient.

    With p_t and q_mt the class probabilities of an image and of target m under posterior sample t, and
    J_m = mean_t p_t q_mt^T, the value is the mean over targets of the mutual information of J_m,
    sum_ck J_m log(J_m / (pbar qbar_m^T)); multilabel: of each label with itself, summed over labels. It is 0 where a
    target's samples agree, does not depend on how often the targets are repeated, and is at most the image's
    mutual information.

    Args:
        logits: [T, B, C] float32 or bfloat16 (float16 on CUDA).
        targets: [T, M, C], at least one target: its logits (not log-probabilities) under the same T posterior samples
            in the same order, of the same dtype and device; no gradient flows to them.
        task: ``multiclass`` (softmax over C) or ``multilabel`` (a sigmoid per label).

    Returns:
        value [B] float32 in nats (at least 0) and d value / d logits [T, B, C]; differentiable as in
        :func:`logits_uncertainty`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.expected_information(logits, targets, task)
    return out


def head_uncertainty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    objective: str = "mutual_information",
    task: str = "multiclass",
) -> tuple[Tensor, Tensor]:
    """Uncertainty under T sampled linear heads (shared masks, an ensemble's or a Laplace posterior's last layers).

    ``objective`` and ``task`` are as in :func:`logits_uncertainty`. On CUDA the environment's ``TSYND_CUDA_HEAD``
    (wgmma, fused or rows) names the best kernel it may take.

    Args:
        features: [B, D].
        weight: [T, C, D]; no gradient flows to it.
        bias: [T, C] or None; no gradient flows to it.

    Returns:
        value [B] float32 in nats and d value / d features [B, D]; differentiable as in
        :func:`logits_uncertainty`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.head_uncertainty(features, weight, bias, objective, task)
    return out


def dropout_head_uncertainty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    samples: int,
    seed: int,
    layer: int,
    sample_ids: Tensor,
    objective: str = "mutual_information",
    task: str = "multiclass",
) -> tuple[Tensor, Tensor]:
    """Uncertainty of a linear head behind dropout with a fresh mask per image and pass, made in the kernel.

    ``p``, ``samples``, ``seed``, ``layer`` and ``sample_ids`` address the mask as in :func:`dropout_mask`;
    ``objective`` and ``task`` are as in :func:`logits_uncertainty`.

    Args:
        features: [B, D], before the dropout.
        weight: [C, D]; no gradient flows to it.
        bias: [C] or None; no gradient flows to it.

    Returns:
        value [B] float32 in nats and d value / d features [B, D]; differentiable as in
        :func:`logits_uncertainty`.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.dropout_head_uncertainty(
        features, weight, bias, p, samples, seed, layer, sample_ids, objective, task
    )
    return out


def dropout_mask(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """Which units are kept, addressed by (seed, layer, pass, sample id, unit) alone.

    Args:
        units: D, elements of one image at that layer.
        p: drop probability in [0, 1), quantised to 1/256 (:func:`tsynd.ops.reference.keep_count`).
        samples: T, at least 1.
        seed: any 64-bit integer.
        layer: number of the dropout in the network, 0 .. 2^32 - 1.
        sample_ids: [N] int64 in [0, 2^32), the images' global indices; one id 0 for masks shared by all images.

    Returns:
        [T, N, D] bool on the device of ``sample_ids``.
    """
    mask: Tensor = torch.ops.tsynd.dropout_mask(units, p, samples, seed, layer, sample_ids)
    return mask


def dropout_expand(
    input: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Activations of T passes behind addressed dropout, without a mask in memory: kept units times 1 / keep rate.

    ``p``, ``samples``, ``seed``, ``layer`` and ``sample_ids`` address the mask as in :func:`dropout_mask`.

    Args:
        input: [B, D, R], D units of R values each (R = 1 for elementwise dropout, the map's size for channel
            dropout); or [T * B, D, R], pass-major, where ``passes``.
        passes: whether ``input`` has its own values for every pass already.

    Returns:
        [T * B, D, R], pass-major; differentiable.
    """
    out: Tensor = torch.ops.tsynd.dropout_expand(input, p, samples, seed, layer, sample_ids, passes)
    return out


def dropout_gather(
    gradient: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Transpose of :func:`dropout_expand`: [T * B, D, R] to [B, D, R], summed over passes, or to [T * B, D, R]."""
    out: Tensor = torch.ops.tsynd.dropout_gather(gradient, p, samples, seed, layer, sample_ids, passes)
    return out


def ascend_(latents: Tensor, gradient: Tensor, origin: Tensor, step: float, radius: float, rule: str = "l2") -> None:
    """One projected ascent step in place, each image by itself.

    ``l2``: z <- P(z + step * g / |g|) onto the ball |z - origin| <= radius; ``linf``: z <- P(z + step * sign(g))
    onto the box. An image whose gradient is zero or not finite stays where it is.

    Args:
        latents: [B, ...], changed in place.
        gradient: [B, ...], same dtype and device.
        origin: [B, ...], the balls' centres.
        step: length of the step, in latent units.
        radius: of the ball, in latent units, at least 0.
        rule: ``l2`` or ``linf``.
    """
    torch.ops.tsynd.ascend_(latents, gradient, origin, step, radius, rule)
