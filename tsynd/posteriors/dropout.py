"""Dropout whose masks are addressed instead of drawn, for every kind of dropout torch has.

A mask bit depends on (seed, layer, pass, sample id, unit) alone, see :func:`tsynd.ops.dropout_mask`, so the same
image gets the same posterior samples in any batch, on any device and after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.ops import operators as ops
from tsynd.ops.reference import keep_count

__all__ = [
    "FINEST",
    "AddressedDropout",
    "MaskSource",
    "addressed",
    "addressing",
    "by_rank",
    "dropout_kind",
    "drops_paths",
    "expand_passes",
    "path_dropout",
]

_ALPHA = -1.7580993408473766  # -scale * alpha of SELU: what a dropped unit becomes (Klambauer et al., 2017)

_FUNCTIONS: dict[Any, str] = {
    nn.functional.dropout: "unit",
    torch.dropout: "unit",
    nn.functional.dropout1d: "channel1d",
    nn.functional.dropout2d: "channel",
    nn.functional.dropout3d: "channel3d",
    torch.feature_dropout: "channel",
    nn.functional.alpha_dropout: "alpha",
    torch.alpha_dropout: "alpha",
    nn.functional.feature_alpha_dropout: "channel_alpha",
    torch.feature_alpha_dropout: "channel_alpha",
}
for _name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):  # the same, written in place
    _FUNCTIONS[getattr(torch, f"{_name}_")] = _FUNCTIONS[getattr(torch, _name)]
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Dropout, "unit"),
    (nn.Dropout1d, "channel1d"),
    (nn.Dropout2d, "channel"),
    (nn.Dropout3d, "channel3d"),
    (nn.AlphaDropout, "alpha"),
    (nn.FeatureAlphaDropout, "channel_alpha"),
)


def dropout_kind(target: object) -> str | None:
    """Kind of a dropout module or function: unit, channel, channel1d, channel3d, alpha, channel_alpha; else None."""
    if isinstance(target, nn.Module):
        return next((kind for module, kind in _MODULES if isinstance(target, module)), None)
    try:
        return _FUNCTIONS.get(target)
    except TypeError:  # unhashable: not one of the functions
        return None


def drops_paths(module: nn.Module) -> bool:
    """Whether it is a module for stochastic depth, of whatever rate."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return any(name.endswith("DropPath") or name == "StochasticDepth" for name in names)


def path_dropout(module: nn.Module) -> tuple[str, float] | None:
    """Kind and rate of a module for stochastic depth (Huang et al., 2016), None for any other.

    Known by their names: ``DropPath`` (timm, MONAI, and transformers' ``SwinDropPath``, ``ConvNextDropPath``, ...)
    and torchvision's ``StochasticDepth``.
    """
    if not drops_paths(module):
        return None
    rate = getattr(module, "drop_prob", getattr(module, "p", None))
    if not isinstance(rate, (int, float)) or not 0 < rate < 1:
        return None
    return "path" if getattr(module, "scale_by_keep", True) else "path_unscaled", float(rate)


@dataclass
class MaskSource:
    """What addresses the masks of the current call.

    Attributes:
        samples: T, passes.
        seed: key of the generator.
        sample_ids: [B] int64 (independent masks) or [1] (shared by all images).
        shared: whether the masks are one for all images.
        active: False lets everything through unmasked, still expanded to T passes.
        kept: what may be kept until the weights change; None keeps nothing.
        only: the number of the one pass that runs, with all T passes' addresses; None for all of them at once.
    """

    samples: int
    seed: int
    sample_ids: Tensor
    shared: bool = True
    active: bool = True
    kept: dict[str, Any] | None = None
    only: int | None = None

    @property
    def passes(self) -> int:
        """How many run at once."""
        return self.samples if self.only is None else 1

    def bits(self, units: int, p: float, layer: int) -> Tensor:
        """Which units are kept, [passes, N, units] bool."""
        if self.only is None:
            return ops.dropout_mask(units, p, self.samples, self.seed, layer, self.sample_ids)
        return ops.dropout_mask(units, p, self.only + 1, self.seed, layer, self.sample_ids)[-1:]

    def part(self, images: slice) -> MaskSource:
        """That of some of the images."""
        return self if self.shared else replace(self, sample_ids=self.sample_ids[images])


_source: ContextVar[MaskSource] = ContextVar("source")


@contextmanager
def addressing(source: MaskSource) -> Iterator[None]:
    """Inside, in this thread, the addressed dropouts of traced networks take their masks from ``source``."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def expand_passes(x: Any, source: MaskSource | None = None) -> Any:
    """[B, ...] -> [T * B, ...], pass-major; what is no tensor stays: a check of the whole catches where it may not."""
    if not isinstance(x, Tensor):
        return x
    samples = (source or _source.get()).passes
    return x.unsqueeze(0).expand(samples, *x.shape).reshape(-1, *x.shape[1:])


def by_rank(kind: str, rank: int) -> str:
    """The kind for an input of so many axes: without a batch axis, torch takes the first axis for the channels."""
    if kind not in _UNBATCHED:
        return kind
    return "path" if rank == _UNBATCHED[kind] else "channel"


_UNBATCHED = {"channel1d": 2, "channel3d": 4}


def addressed(x: Tensor, kind: str, p: float, layer: int, expanded: bool, source: MaskSource) -> Tensor:
    """[B, ...] or, ``expanded``, [T * B, ...] -> [T * B, ...] behind the dropout that its address names."""
    if not source.active or p == 0.0:
        return x if expanded else expand_passes(x, source)
    if p >= 1.0:
        return torch.zeros_like(x if expanded else expand_passes(x, source))
    kind = by_rank(kind, x.dim())
    image, channels = x.shape[1:], kind.startswith("channel")
    units = 1 if kind.startswith("path") else image[0] if channels else math.prod(image)
    served = x.dtype in (torch.float32, torch.bfloat16) or (x.is_cuda and x.dtype == torch.float16)
    if served and p >= FINEST and source.only is None and not kind.endswith("alpha"):
        rows, address = x.reshape(x.shape[0], units, -1), (p, source.samples, source.seed, layer, source.sample_ids)
        out: Tensor = ops.dropout_expand(rows, *address, expanded).reshape(-1, *image)
        return out * (keep_count(p) / 256.0) if kind == "path_unscaled" else out
    spread = x.reshape(source.passes if expanded else 1, -1, *image)
    mask, keep = _kept(units, p, layer, source)
    rest = image[0] if channels else 1 if kind.startswith("path") else None
    mask = mask.reshape(mask.shape[0], -1, *(image if rest is None else (rest, *[1] * (len(image) - 1))))
    if kind.endswith("alpha"):
        a = (keep + _ALPHA**2 * keep * (1.0 - keep)) ** -0.5
        out = torch.where(mask, spread, _ALPHA) * a - a * _ALPHA * (1.0 - keep)
    else:
        out = torch.where(mask, spread if kind == "path_unscaled" else spread * (1.0 / keep), 0.0)
    return out.reshape(-1, *image)


FINEST = 1 / 256
"""The least rate that a mask of one byte a unit draws; rarer drops are those that two masks agree on."""


def _kept(units: int, p: float, layer: int, source: MaskSource) -> tuple[Tensor, float]:
    """Which units are kept, [passes, N, units], and at which rate."""
    if p >= FINEST:
        return source.bits(units, p, layer), keep_count(p) / 256.0
    pairs = ((a, b) for a in range(1, 256) for b in range(1, a + 1))
    a, b = min(pairs, key=lambda pair: abs(pair[0] * pair[1] - p * 65536.0))
    masks = [source.bits(units, n / 256.0, layer + shift) for n, shift in ((a, 0), (b, 2**31))]
    return masks[0] | masks[1], 1.0 - a * b / 65536.0


class AddressedDropout(nn.Module):
    """Stands in for one dropout of a traced network; the masks are those of :func:`addressing`.

    Args:
        kind: see :func:`dropout_kind`.
        p: drop probability in (0, 1).
        layer: number of this dropout in the network.
        expanded: whether the input already holds T passes ([T * B, ...]) or still one ([B, ...]).
    """

    def __init__(self, kind: str, p: float, layer: int, expanded: bool) -> None:
        super().__init__()
        self.kind, self.p, self.layer, self.expanded = kind, p, layer, expanded

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] or [T * B, ...] -> [T * B, ...]."""
        return addressed(x, self.kind, self.p, self.layer, self.expanded, _source.get())
