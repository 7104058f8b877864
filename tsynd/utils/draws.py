"""Random numbers that are addressed, not drawn in turn: by a seed and a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["draw_rows", "random_directions", "streams"]


def streams(rows: Tensor, seed: int) -> Iterator[torch.Generator]:
    """One random stream per row, addressed by (seed, row): a batch's make-up cannot matter."""
    generator = torch.Generator()
    for row in rows.tolist():
        # torch's CPU engine uses 32 bits of its seed; the odd constant keeps the streams of two seeds apart
        yield generator.manual_seed((seed * 0x9E3779B1 + row) & 0xFFFFFFFF)


def draw_rows(draw: Callable[..., Tensor], like: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Random numbers in the shape of [M, ...], each row addressed by (seed, its place in the whole batch).

    Drawn on the CPU, so that a batch's make-up and the device do not matter.

    Args:
        draw: ``torch.rand`` or ``torch.randn``.
        like: [M, ...].
        rows: [M] int64.
        seed: 0 or more.
    """
    drawn = [draw(like[0].numel(), generator=generator) for generator in streams(rows, seed)]
    return torch.stack(drawn).reshape(like.shape).to(like)


def random_directions(like: Tensor, rows: Tensor, seed: int, rule: str) -> Tensor:
    """One uniform direction per image of a batch [B, ...], addressed by (seed, row): its length is 1.

    Length and directions are those of the rule: ``l2``, or ``linf``, where a direction is a corner of the box.
    """
    normal = draw_rows(torch.randn, like, rows, seed).flatten(1)
    unit = normal.sign() if rule == "linf" else normal / normal.norm(dim=1, keepdim=True)
    return unit.reshape(like.shape)
