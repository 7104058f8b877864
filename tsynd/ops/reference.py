"""Plain-torch twins of every operator: the test oracle, the export path and the fallback without the extension.

Arguments and results are those of :mod:`tsynd.ops.operators`. The twins follow the operators' formulas line by line,
work in any floating dtype and on any device, and are themselves checked by automatic differentiation in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "MASK_ROUNDS",
    "OBJECTIVES",
    "RULES",
    "TASKS",
    "ascend_",
    "dropout_expand",
    "dropout_gather",
    "dropout_head_uncertainty",
    "dropout_mask",
    "expected_information",
    "head_uncertainty",
    "keep_count",
    "logits_uncertainty",
    "philox4x32",
    "uncertainty_value",
]

OBJECTIVES = ("mutual_information", "entropy")
TASKS = ("multiclass", "multilabel")
RULES = ("l2", "linf")
MASK_ROUNDS = 7
_LOG_FLOOR = -1e30


def _log_softmax(logits: Tensor) -> Tensor:
    """log_softmax that keeps log p of a probability near 1 accurate relative to its own size (log1p)."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    shifted = torch.where(shifted < _LOG_FLOOR, _LOG_FLOOR, shifted)
    below = shifted < 0
    # for the largest entries expm1 is 0 but has the derivative of exp
    rest = torch.where(below, shifted.exp(), shifted.expm1()).sum(-1, keepdim=True)
    ties = (~below).sum(-1, keepdim=True)
    return shifted - torch.log1p(rest + (ties - 1))


def _log_probabilities(logits: Tensor, task: str) -> Tensor:
    """Log-probabilities [T, B, groups, K]: over the classes (one group) or over {1, 0} of each label."""
    if task == "multiclass":
        return _log_softmax(logits).unsqueeze(-2)
    if task == "multilabel":
        pair = torch.nn.functional.logsigmoid(torch.stack([logits, -logits], dim=-1))
        return torch.where(pair < _LOG_FLOOR, _LOG_FLOOR, pair)
    raise ValueError(f"task: got {task!r}, wanted 'multiclass' or 'multilabel'")


def _log_mean(logp: Tensor) -> Tensor:
    """log(mean_t exp(logp)), exactly logp where all samples agree."""
    top = logp.detach().amax(0, keepdim=True)
    return top + torch.log1p((logp - top).expm1().mean(0, keepdim=True))


def _relative(logp: Tensor, objective: str) -> Tensor:
    """r of the two formulas: log p - log pbar for mutual information, -log pbar for the entropy."""
    log_mean = _log_mean(logp)
    if objective == "mutual_information":
        return logp - log_mean
    if objective == "entropy":
        return (-log_mean).expand_as(logp)
    raise ValueError(f"objective: got {objective!r}, wanted 'mutual_information' or 'entropy'")


def uncertainty_value(logits: Tensor, objective: str = "mutual_information", task: str = "multiclass") -> Tensor:
    """Uncertainty of posterior samples, differentiable by autograd.

    Args:
        logits: [T, B, C], one row of logits per posterior sample, image and class (or label).
        objective: ``mutual_information`` (BALD, Houlsby et al. 2011) or ``entropy`` of the mean prediction.
        task: ``multiclass`` (softmax) or ``multilabel`` (sigmoid; summed over labels).

    Returns:
        [B] in nats, at least 0.
    """
    logp = _log_probabilities(logits, task)
    terms = (logp.exp() * _relative(logp, objective)).sum(-1)
    return terms.sum(-1).mean(0).clamp_min(0)


def logits_uncertainty(
    logits: Tensor, objective: str = "mutual_information", task: str = "multiclass"
) -> tuple[Tensor, Tensor]:
    """Twin of the operator: value [B] (see :func:`uncertainty_value`) and its gradient [T, B, C]."""
    samples = logits.shape[0]
    logp = _log_probabilities(logits, task)
    p, r = logp.exp(), _relative(logp, objective)
    inner = (p * r).sum(-1, keepdim=True)
    slope = p * (r - inner) / samples  # [T, B, groups, K]
    # in a Bernoulli group the logit moves p(1) alone: d/dlogit is the entry of outcome 1
    gradient = slope[..., 0, :] if task == "multiclass" else slope[..., 0]
    value = inner.squeeze(-1).sum(-1).mean(0).clamp_min(0)
    return value, gradient.to(logits.dtype)


def _log1p_excess(x: Tensor) -> Tensor:
    """log1p(x) - x, by its series near 0, where the difference would keep no digits."""
    series = torch.full_like(x, -1.0 / 12)
    for n in range(11, 1, -1):
        series = series * x + (-1.0 if n % 2 == 0 else 1.0) / n
    return torch.where(x.abs() < 0.0625, series * x * x, torch.log1p(x) - x)


def expected_information(logits: Tensor, targets: Tensor, task: str = "multiclass") -> tuple[Tensor, Tensor]:
    """Twin of the operator: expected predictive information gain (EPIG) about target images.

    With a = p / pbar - 1 and b = q / qbar - 1, J / (pbar qbar^T) = 1 + d for d = mean_t a_t b_t^T, and since the
    means of a and b under pbar and qbar are 0,

        value = mean_m sum_ck pbar_c qbar_mk ((1 + d) log(1 + d) - d)
        d value / d p_tc = 1 / (T M) sum_mk (qbar_mk b_mtk log(1 + d_mck) + qbar_mk (log(1 + d_mck) - d_mck)) + const

    where no sum cancels: tiny information keeps its digits, and its gradient a direction.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp, logq = (_log_probabilities(x.to(wide), task) for x in (logits, targets))  # [T, B or M, groups, K]
    samples, count = logits.shape[0], targets.shape[1]
    log_p_mean, log_q_mean = _log_mean(logp), _log_mean(logq)
    a, b = (logp - log_p_mean).expm1(), (logq - log_q_mean).expm1()
    p, p_mean, q_mean = logp.exp(), log_p_mean[0].exp(), log_q_mean[0].exp()
    # above -1: what rounding takes below stands for a joint probability of almost 0
    d = (torch.einsum("tbgc,tmgk->bmgck", a, b) / samples).clamp_min(torch.finfo(wide).eps / 2 - 1)
    ratio, excess = torch.log1p(d), _log1p_excess(d)
    value = torch.einsum("bgc,mgk,bmgck->b", p_mean, q_mean, excess + d * ratio) / count
    slope = torch.einsum("tmgk,bmgck->tbgc", b * q_mean, ratio) + torch.einsum("mgk,bmgck->bgc", q_mean, excess)
    slope = p * (slope - (p * slope).sum(-1, keepdim=True)) / (samples * count)
    gradient = slope[..., 0, :] if task == "multiclass" else slope[..., 0]
    return value.clamp_min(0), gradient.to(logits.dtype)


def head_uncertainty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    objective: str = "mutual_information",
    task: str = "multiclass",
) -> tuple[Tensor, Tensor]:
    """Twin: uncertainty under T sampled linear heads."""
    samples, classes, units = weight.shape
    logits = (features @ weight.reshape(samples * classes, units).t()).reshape(-1, samples, classes)
    logits = logits.transpose(0, 1)
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    value, slope = logits_uncertainty(logits, objective, task)
    flat = slope.transpose(0, 1).reshape(-1, samples * classes)
    return value, flat @ weight.reshape(samples * classes, units)


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
    """Twin: uncertainty of a linear head behind dropout, with a fresh mask per image and pass."""
    mask = dropout_mask(features.shape[1], p, samples, seed, layer, sample_ids)
    scaled = mask.to(features.dtype) * (256.0 / keep_count(p))  # [T, B, D]
    logits = (features * scaled) @ weight.t()
    if bias is not None:
        logits = logits + bias
    value, slope = logits_uncertainty(logits, objective, task)
    return value, ((slope @ weight) * scaled).sum(0)


def keep_count(p: float) -> int:
    """How many of 256 byte values keep a unit: 1 - p rounded to 1/256, at least 1 and (for p > 0) at most 255."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: got {p}, wanted a drop probability in [0, 1)")
    return 256 if p == 0.0 else min(255, max(1, round((1.0 - p) * 256.0)))


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = MASK_ROUNDS) -> Tensor:
    """Philox4x32 (Salmon et al., SC 2011).

    Args:
        counter: [..., 4] int64 words in [0, 2^32).
        key: two words in [0, 2^32).
        rounds: 7 for masks, 10 in most libraries.

    Returns:
        [..., 4] int64 words in [0, 2^32).
    """
    low = 0xFFFFFFFF
    x, y, z, w = counter.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        a, b = x * 0xD2511F53, z * 0xCD9E8D57  # wrap to 64 bits; the masked shifts below undo the sign
        x, y, z, w = ((b >> 32) & low) ^ y ^ k0, b & low, ((a >> 32) & low) ^ w ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([x, y, z, w], dim=-1)


def dropout_mask(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """Twin: which units are kept.

    The bit of unit u is addressed by (seed, layer, pass, sample id, u) alone: byte u % 16 of the Philox block
    with key = seed and counter = (u // 16, pass, layer, sample id), kept when below :func:`keep_count`.
    """
    device = sample_ids.device
    blocks = (units + 15) // 16
    shape = (samples, sample_ids.shape[0], blocks)
    axes = (
        torch.arange(blocks, device=device).expand(shape),
        torch.arange(samples, device=device)[:, None, None].expand(shape),
        torch.full(shape, layer, dtype=torch.int64, device=device),
        (sample_ids & 0xFFFFFFFF)[None, :, None].expand(shape),
    )
    words = philox4x32(torch.stack(axes, dim=-1), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    shifts = torch.arange(0, 32, 8, device=device)
    draws = (words.unsqueeze(-1) >> shifts) & 0xFF  # [T, N, blocks, 4, 4]
    return draws.reshape(samples, -1, blocks * 16)[:, :, :units] < keep_count(p)


def _expansion_scale(like: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """Mask over keep rate [T, B or 1, D, 1]."""
    mask = dropout_mask(like.shape[1], p, samples, seed, layer, sample_ids)
    return mask.unsqueeze(-1).to(like.dtype) * (256.0 / keep_count(p))


def dropout_expand(
    input: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Twin: [B, D, R] (or [T * B, D, R] where ``passes``) to T masked and scaled copies [T * B, D, R]."""
    scale = _expansion_scale(input, p, samples, seed, layer, sample_ids)
    spread = input.reshape(samples, -1, *input.shape[1:]) if passes else input.unsqueeze(0)
    # not a product: what is dropped is 0 even where the activation is not finite
    return torch.where(scale > 0, spread * scale, 0.0).flatten(0, 1)


def dropout_gather(
    gradient: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Twin: transpose of :func:`dropout_expand`."""
    scale = _expansion_scale(gradient, p, samples, seed, layer, sample_ids)
    spread = gradient.reshape(samples, -1, *gradient.shape[1:])
    masked = torch.where(scale > 0, spread * scale, 0.0)
    return masked.flatten(0, 1) if passes else masked.sum(0)


def ascend_(latents: Tensor, gradient: Tensor, origin: Tensor, step: float, radius: float, rule: str = "l2") -> None:
    """Twin: one projected ascent step in place, each image by itself."""
    dims = tuple(range(1, latents.dim()))
    z, g, z0 = latents.double(), gradient.double(), origin.double()
    squares = g.square().sum(dims, keepdim=True) if dims else g.square()
    if rule == "l2":
        offset = z + step * g / squares.sqrt() - z0
        length = offset.square().sum(dims, keepdim=True).sqrt() if dims else offset.abs()
        moved = z0 + torch.where(length > radius, radius / length, 1.0) * offset
    elif rule == "linf":
        moved = z0 + (z + step * g.sign() - z0).clamp(-radius, radius)
    else:
        raise ValueError(f"rule: got {rule!r}, wanted 'l2' or 'linf'")
    usable = (squares > 0) & torch.isfinite(squares)
    latents.copy_(torch.where(usable, moved, z))
