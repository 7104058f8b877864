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

__all__ = ["AddressedDropout", "MaskSource", "addressed", "addressing", "dropout_kind", "expand_passes", "path_dropout"]

_ALPHA = -1.7580993408473766  # -scale * alpha of SELU: what a dropped unit becomes (Klambauer et al., 2017)

_FUNCTIONS: dict[Any, str] = {
    nn.functional.dropout: "unit",
    torch.dropout: "unit",
    nn.functional.dropout1d: "channel",
    nn.functional.dropout2d: "channel",
    nn.functional.dropout3d: "channel",
    torch.feature_dropout: "channel",
    nn.functional.alpha_dropout: "alpha",
    torch.alpha_dropout: "alpha",
    nn.functional.feature_alpha_dropout: "channel_alpha",
    torch.feature_alpha_dropout: "channel_alpha",
}
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Dropout, "unit"),
    (nn.Dropout1d, "channel"),
    (nn.Dropout2d, "channel"),
    (nn.Dropout3d, "channel"),
    (nn.AlphaDropout, "alpha"),
    (nn.FeatureAlphaDropout, "channel_alpha"),
)


def dropout_kind(target: object) -> str | None:
    """``unit``, ``channel``, ``alpha`` or ``channel_alpha`` for a dropout module or function, else None."""
    if isinstance(target, nn.Module):
        return next((kind for module, kind in _MODULES if isinstance(target, module)), None)
    try:
        return _FUNCTIONS.get(target)
    except TypeError:  # unhashable: not one of the functions
        return None


def path_dropout(module: nn.Module) -> tuple[str, float] | None:
    """Kind and rate of a module for stochastic depth (Huang et al., 2016), None for any other.

    Known by their names: ``DropPath`` (timm, MONAI, and transformers' ``SwinDropPath``, ``ConvNextDropPath``, ...)
    and torchvision's ``StochasticDepth``.
    """
    names = [kind.__name__ for kind in type(module).__mro__]
    if not any(name.endswith("DropPath") or name == "StochasticDepth" for name in names):
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
    """

    samples: int
    seed: int
    sample_ids: Tensor
    shared: bool = True
    active: bool = True
    kept: dict[str, Any] | None = None

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
    samples = (source or _source.get()).samples
    return x.unsqueeze(0).expand(samples, *x.shape).reshape(-1, *x.shape[1:])


def addressed(x: Tensor, kind: str, p: float, layer: int, expanded: bool, source: MaskSource) -> Tensor:
    """[B, ...] or, ``expanded``, [T * B, ...] -> [T * B, ...] behind the dropout that its address names."""
    if not source.active or p == 0.0:
        return x if expanded else expand_passes(x, source)
    image, channels = x.shape[1:], kind.startswith("channel")
    path = kind.startswith("path")
    units = 1 if path else image[0] if channels else math.prod(image)
    address = (p, source.samples, source.seed, layer, source.sample_ids)
    if not kind.endswith("alpha"):
        rows = x.reshape(x.shape[0], units, -1)
        out: Tensor = ops.dropout_expand(rows, *address, expanded).reshape(-1, *image)
        if kind == "path_unscaled":
            out = out * (keep_count(p) / 256.0)
        return out
    spread = x.reshape(source.samples if expanded else 1, -1, *image)
    bits = ops.dropout_mask(units, *address)
    mask = bits.reshape(source.samples, -1, *((image[0], *[1] * (len(image) - 1)) if channels else image))
    keep = keep_count(p) / 256.0
    a = (keep + _ALPHA**2 * keep * (1.0 - keep)) ** -0.5
    kept = torch.where(mask, spread, _ALPHA)
    out = kept * a - a * _ALPHA * (1.0 - keep)
    return out.reshape(-1, *image)


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
