"""What the images of a batch say twice: joint uncertainty of groups of images under one posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tsynd.ops import operators as ops
from tsynd.utils.errors import InputError

__all__ = ["MOST_CONFIGURATIONS", "group_size", "joint_mutual_information", "redundancy"]

MOST_CONFIGURATIONS = 256
"""Largest number of joint class configurations that are enumerated for a group."""

_LOG_FLOOR = -1e30


def group_size(classes: int) -> int:
    """Most images of ``classes`` classes each whose joint configurations can be enumerated; 1 above 16 classes."""
    size = 1
    while classes ** (size + 1) <= MOST_CONFIGURATIONS:
        size += 1
    return size


def _configurations(logp: Tensor) -> Tensor:
    """Log-probabilities [T, G, K^m] of all class configurations of groups of m, from [T, G, m, K]."""
    joint = logp[:, :, 0]
    for place in range(1, logp.shape[2]):
        joint = (joint.unsqueeze(3) + logp[:, :, place].unsqueeze(2)).flatten(2)
    return joint.clamp_min(_LOG_FLOOR)


def joint_mutual_information(logits: Tensor, task: str = "multiclass") -> Tensor:
    """Mutual information between several images' classes together and the posterior sample, exact by enumeration.

    The images share posterior samples, so p(y_1, ..., y_m) = mean_t prod_i p_t(y_i). This is the batch acquisition
    of BatchBALD (Kirsch et al. 2019, arXiv 1906.08158): images that are uncertain about the same thing get less of
    it than the sum of their own.

    Args:
        logits: [T, G, m, C], G groups of m images whose posterior samples are the same.
        task: ``multiclass``, or ``multilabel``: each label's joint over the images, summed over the labels.

    Returns:
        [G] float32 in nats, differentiable.
    """
    if task == "multiclass":
        joint = _configurations(logits.float().log_softmax(-1))
    else:
        pair = torch.stack([functional.logsigmoid(logits.float()), functional.logsigmoid(-logits.float())], -1)
        joint = _configurations(pair.transpose(2, 3).flatten(1, 2))  # every label is a group of its own
    # log-probabilities are their own logits: the operator's relative form does not cancel where the value is small
    value = ops.logits_uncertainty(joint.contiguous(), "mutual_information", "multiclass")[0]
    return value.reshape(logits.shape[1], -1).sum(1)


def redundancy(logits: Tensor, task: str = "multiclass") -> Tensor:
    """How much of a batch's uncertainty its images share: the total correlation of their classes, within groups.

    It is the images' summed mutual information less the joint one, and equally their summed entropy less that of
    the joint prediction (given the posterior sample the classes are independent). Neighbours in the batch form
    groups of :func:`group_size` images (the last may be smaller), which keeps the enumeration exact and its cost
    linear in the batch.

    Args:
        logits: [T, B, C]; the posterior samples must be shared by the images.
        task: see :func:`joint_mutual_information`.

    Returns:
        Scalar in nats, at least 0 up to rounding, differentiable.

    Raises:
        InputError: too many classes for groups of two.
    """
    samples, batch, classes = logits.shape
    size = group_size(2 if task == "multilabel" else classes)
    if size < 2:
        limit = math.isqrt(MOST_CONFIGURATIONS)
        raise InputError(f"diversity: got a weight with {classes} classes, wanted at most {limit} classes, or 0")
    # an image whose logits are not finite is left out: equal logits carry no information and spoil no neighbour
    sound = logits.detach().isfinite().all(2).all(0)
    logits = torch.where(sound[None, :, None], logits.float(), 0.0)
    shared = ops.logits_uncertainty(logits.contiguous(), "mutual_information", task)[0].sum()
    whole = batch - batch % size
    for part in (logits[:, :whole], logits[:, whole:]):
        if part.shape[1]:
            grouped = part.reshape(samples, -1, min(size, part.shape[1]), classes)
            shared = shared - joint_mutual_information(grouped, task).sum()
    return shared
