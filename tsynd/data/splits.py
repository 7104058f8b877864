"""Drawing and splitting labelled images: stratified, seeded, and never with a patient on two sides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsynd.utils.errors import InputError

__all__ = ["check_apart", "split", "stratified_order"]


def stratified_order(labels: Tensor, seed: int, groups: Tensor | None = None) -> Tensor:
    """A seeded order whose every beginning keeps the class shares (multilabel: any order).

    Args:
        labels: int64 [N] (multiclass), or [N, L] of 0 and 1.
        seed: of the order.
        groups: int64 [N], numbers that the images of one patient share: within a class every patient has its first
            turn before any has its second, so that a small draw sees many patients.

    Returns:
        int64 [N], every index once.
    """
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    if groups is not None:
        shuffled = shuffled[np.argsort(_turns(groups.numpy()[shuffled]), kind="stable")]
    if labels.ndim == 1:
        # Sainte-Laguë: the j-th of a class of n has turn (j + 1/2) / n; the first of every class goes first.
        classes, turn = labels.numpy()[shuffled], np.empty(len(labels))
        for c in np.unique(classes):
            members = np.flatnonzero(classes == c)
            if groups is not None:  # a patient's turns count within the class
                members = members[np.argsort(_turns(groups.numpy()[shuffled[members]]), kind="stable")]
            turn[members] = (np.arange(len(members)) + 0.5) / len(members)
            turn[members[0]] = -1
        shuffled = shuffled[np.argsort(turn, kind="stable")]
    return torch.from_numpy(shuffled)


def _turns(groups: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many of the same group stand before each."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], groups[order], side="left")
    turns = np.empty(len(groups), np.int64)
    turns[order] = np.arange(len(groups)) - starts
    return turns


def split(labels: Tensor, seed: int, parts: int, where: str, groups: Tensor | None = None) -> list[Tensor]:
    """Divide images: 15 % each for the last parts, the rest for the first, with the class shares kept.

    Args:
        labels: as for :func:`stratified_order`.
        seed: of the division.
        parts: 2 (train, val) or 3 (train, val, test).
        where: the source, for messages.
        groups: int64 [N]: images of one number stay together; shares and classes are then met as well as they can be.

    Returns:
        int64 indices of each part, ascending; every class is in the first (multiclass).

    Raises:
        InputError: too few images, or patients, for that.
    """
    names = "val" + " and test" * (parts - 2)
    if groups is not None:
        return _split_groups(
            labels, seed, parts, f"{where}: {{}} patients (or files) are too few to split off {names}", groups
        )
    order = stratified_order(labels, seed)
    share = max(1, round(0.15 * len(order)))
    rest = len(order) - share * (parts - 1)
    if rest < (len(set(labels.tolist())) if labels.ndim == 1 else 1):
        raise InputError(f"{where}: {len(order)} images are too few to split off {names}")
    return [piece.msort() for piece in [order[:rest], *order[rest:].reshape(parts - 1, share)]]


def _split_groups(labels: Tensor, seed: int, parts: int, message: str, groups: Tensor) -> list[Tensor]:
    """Whole groups, the large ones first, each to the part that lacks most of what it holds."""
    numbers, inverse = np.unique(groups.numpy(), return_inverse=True)
    count, member = len(numbers), torch.from_numpy(inverse)
    classes = torch.nn.functional.one_hot(labels) if labels.ndim == 1 else labels
    columns = torch.cat([torch.ones(len(labels), 1), classes.float()], 1).double()  # all images, then every class
    held = torch.zeros(count, columns.shape[1], dtype=torch.float64).index_add_(0, member, columns)
    shares = torch.tensor([1 - 0.15 * (parts - 1), *[0.15] * (parts - 1)], dtype=torch.float64)
    total = held.sum(0).clamp_min(1)
    lacking = shares[:, None] * held.sum(0)
    place = torch.full((count,), -1)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    order = order[np.argsort(-held[order, 0].numpy(), kind="stable")]

    def put(group: int, part: int) -> None:
        place[group] = part
        lacking[part] -= held[group]

    if labels.ndim == 1:  # first a group of every class to train, the rarest class's first
        for c in (held[:, 1:] > 0).sum(0).argsort(stable=True).tolist():
            owners = [int(g) for g in order if held[g, 1 + c] > 0]
            if owners and not any(place[g] == 0 for g in owners):
                put(max(owners, key=lambda g: int((held[g, 1:] > 0).sum())), 0)
    elif count:
        put(int(order[0]), 0)
    waiting = [int(g) for g in order if place[g] < 0]
    for left, group in zip(range(len(waiting), 0, -1), waiting, strict=True):
        empty = [part for part in range(1, parts) if not bool((place == part).any())]
        value = (held[group] * lacking / total**2).sum(1)
        if left <= len(empty):  # no more groups than parts that still have none
            put(group, max(empty, key=lambda part: float(value[part])))
        else:
            put(group, int(value.argmax()))
    pieces = [(place[member] == part).nonzero()[:, 0] for part in range(parts)]
    if any(len(piece) == 0 for piece in pieces):
        raise InputError(message.format(count))
    return pieces


def check_apart(groups: list[Tensor], where: str) -> None:
    """Raise :class:`InputError` where splits that were given share a patient; says how many, not whom."""
    seen = [set(part.tolist()) for part in groups]
    both = {number for i, part in enumerate(seen) for other in seen[:i] for number in part & other}
    if both:
        who = "patient (or file) has" if len(both) == 1 else "patients (or files) have"
        raise InputError(
            f"{where}: {len(both)} {who} images in more than one of train, val and test; wanted each in one, or "
            "group='none' (--group none) to take the splits as they are"
        )
