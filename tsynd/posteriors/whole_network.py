"""Addressed masks in a network that cannot be traced: every dropout call is caught while the network runs."""

from __future__ import annotations

import inspect
import math
import types
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tsynd.fx.tracing import private_copy
from tsynd.posteriors.dropout import MaskSource, addressed, dropout_kind, path_dropout
from tsynd.posteriors.passes import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.posteriors.runner import Runner
from tsynd.utils.errors import InputError

__all__ = ["AddressedDropoutMode", "WholeNetwork", "attention_dropouts"]

_RATES = (
    "attention_dropout", "attn_dropout", "attn_drop", "dropout", "dropout_p", "dropout_prob", "dropout_rate",
    "attention_dropout_rate", "attention_probs_dropout_prob",
)  # fmt: skip

# values that a network holds per value of an image, against those that a tail holds per value it starts from
_WEIGHT = 16

Axis = tuple[int, int] | None
"""Where a dropout's input has its images: the axis, and how many of its rows an image has; None for nowhere."""


def attention_dropouts(network: nn.Module) -> list[nn.Module]:
    """Attention modules that hold their dropout as a number and hand it on only in training.

    ``scaled_dot_product_attention(dropout_p=self.rate if self.training else 0.0)`` has no dropout module to be found.
    They are known by an attribute that is a rate (or a dropout module, of which they may read ``p``) and by "attn" or
    "attention" in the attribute's or the class's name.
    """
    found = []
    for module in network.modules():
        named = "attention" in type(module).__name__.lower() or "attn" in type(module).__name__.lower()
        for name in _RATES:
            value = getattr(module, name, None)
            rate = value.p if isinstance(value, nn.Dropout) else value
            if isinstance(rate, float) and 0 < rate < 1 and (named or "att" in name):
                found.append(module)
                break
    return found


class AddressedDropoutMode(TorchFunctionMode):
    """Addresses every dropout call inside it; layers are numbered in call order.

    Args:
        source: of the masks.
        rows: T * B, what the network runs on.
        axes: of every dropout's input; None takes the first axis for the images'.

    Attributes:
        shapes: of the inputs of the dropouts so far.
    """

    def __init__(self, source: MaskSource, rows: int = 0, axes: list[Axis] | None = None) -> None:
        super().__init__()
        self.source, self.rows, self.axes = source, rows, axes
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace dropouts, pass everything else on."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        kind = dropout_kind(func)
        if kind is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        p = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        return x if p == 0.0 else self.drop(x, kind, p)

    def drop(self, x: Tensor, kind: str, p: float) -> Tensor:
        """The next layer's dropout of x, whose rows are pass-major."""
        layer = len(self.shapes)
        self.shapes.append(tuple(x.shape))
        if not self.source.active:
            return x
        axis: Axis = (0, 1)
        if self.axes is not None:
            if layer >= len(self.axes):
                raise InputError("classifier: calls dropout more often than before, wanted always as often")
            axis = self.axes[layer]
        if axis is None:
            if x.shape[0] != 1:
                raise InputError(
                    f"classifier: a dropout's input {list(x.shape)} has no axis of images, so its mask cannot differ "
                    "between passes; wanted dropout behind what depends on the image"
                )
            return addressed(x.expand(self.rows, *x.shape[1:]), kind, p, layer, True, self.source)
        place, multiple = axis
        moved = x.movedim(place, 0) if place else x
        shape = moved.shape
        if multiple > 1:  # an image's windows or heads stand in rows: they are units of that image
            moved = moved.reshape(shape[0] // multiple, multiple * math.prod(shape[1:2]), *shape[2:])
        out = addressed(moved, kind, p, layer, True, self.source).reshape(shape)
        return out.movedim(0, place) if place else out

    def _attend(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Softmax, dropout, product: the fused kernels draw their masks themselves."""
        if dropout_p == 0.0:
            options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            out: Tensor = func(query, key, value, attn_mask, 0.0, **options)
            return out
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self.drop(scores.softmax(-1), "unit", dropout_p) @ value

    def _multi_head(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run torch's own code of multi-head attention so that the calls in it come by here too."""
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["dropout_p"] == 0.0:
            return func(*args, **kwargs)
        bound.arguments["training"] = True
        with self:
            return _opened(func)(*bound.args, **bound.kwargs)


def _opened(func: Any) -> Any:
    """A copy of one of torch's functions that does not hand itself over to a mode."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


class WholeNetwork:
    """A network that runs T times as a whole.

    Args:
        network: gives logits [B, C]; a private copy of it is run, in eval mode.
        stochastic_depth: whether modules for stochastic depth drop their paths too.
    """

    name = "whole network"

    def __init__(self, network: nn.Module, stochastic_depth: bool) -> None:
        self.network, self.runner = private_copy(network), Runner()
        for module in self.network.modules():
            module.training = False
        for module in attention_dropouts(self.network):  # it alone, not its children
            module.training = True
        for module in self.network.modules():
            if stochastic_depth and (found := path_dropout(module)) is not None:
                module.register_forward_hook(_dropping(*found))
        self._axes: tuple[tuple[int, ...], list[Axis]] | None = None

    def logits(self, images: Tensor, source: MaskSource) -> Tensor:
        """Logits [T, B, C] of images [B, C, ...].

        Raises:
            InputError: no dropout was called, or one on a tensor without an axis of images.
        """
        return passes_logits(self._passes(source), (images,), self._at_once(images, source))

    def uncertainty(self, images: Tensor, source: MaskSource, objective: str, task: str) -> Tensor:
        """Uncertainty [B]."""
        return passes_uncertainty(self._passes(source), (images,), self._at_once(images, source), objective, task)

    @staticmethod
    def _at_once(images: Tensor, source: MaskSource) -> int | None:
        return images_at_once((images,), source.samples, _WEIGHT)

    def _passes(self, source: MaskSource) -> Passes:
        def run(part: slice, inputs: tuple[Tensor, ...]) -> Tensor:
            (images,) = inputs
            repeated = images.repeat(source.samples, *[1] * (images.dim() - 1))
            mode = AddressedDropoutMode(source.part(part), repeated.shape[0], self.axes(images))
            return self.record(repeated, mode).reshape(source.samples, images.shape[0], -1)

        return run

    def record(self, images: Tensor, mode: AddressedDropoutMode) -> Tensor:
        """Logits [B, C], with every dropout of the network caught by the mode."""
        token = _mode.set(mode)
        try:
            with mode:
                logits: Tensor = self.network(images)
        finally:
            _mode.reset(token)
        return logits

    def axes(self, images: Tensor) -> list[Axis]:
        """Found once for images of one size: the axis that grows with the number of images."""
        size = tuple(images.shape[1:])
        if self._axes is None or self._axes[0] != size:
            off = MaskSource(1, 0, torch.zeros(1, dtype=torch.int64, device=images.device), active=False)
            modes = [AddressedDropoutMode(off, count) for count in (2, 3)]
            with torch.no_grad():
                for mode in modes:
                    self.record(images[:1].detach().expand(mode.rows, *images.shape[1:]).contiguous(), mode)
            two, three = (mode.shapes for mode in modes)
            if len(two) != len(three):
                raise InputError("classifier: calls dropout more often for more images, wanted always as often")
            self._axes = size, [_axis(a, b) for a, b in zip(two, three, strict=True)]
        return self._axes[1]


_mode: ContextVar[AddressedDropoutMode | None] = ContextVar("mode", default=None)


def _dropping(kind: str, p: float) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        mode = _mode.get()
        return output if mode is None else mode.drop(output, kind, p)

    return hook


def _axis(two: tuple[int, ...], three: tuple[int, ...]) -> Axis:
    """From the shapes of one dropout's input for two and for three images."""
    found = [place for place, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not found:
        return None
    place = found[0]
    if len(found) > 1 or two[place] % 2 or three[place] * 2 != two[place] * 3:
        raise InputError(
            f"classifier: a dropout sees {list(two)} for two images and {list(three)} for three, wanted one axis that "
            "grows with the images"
        )
    return place, two[place] // 2
