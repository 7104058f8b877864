"""What posteriors have in common: networks in the form of the moment, and T sampled linear heads on their features."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsynd.fx.checkpointing import staged
from tsynd.fx.folding import FoldedGraph
from tsynd.fx.layout import LaidOut, Order
from tsynd.models.held import evaluating
from tsynd.ops import operators as ops
from tsynd.utils.errors import InputError

__all__ = ["RESOLVING", "Runner", "check_classes", "heads_logits", "heads_uncertainty", "measured", "structure_of"]

RESOLVING = threading.RLock()
"""Held while a posterior finds out how to run its network."""

Form = tuple[Callable[..., Any], ...]


class Runner:
    """Networks that may be folded, compiled or staged for a while, by each thread for itself.

    Args:
        once: what runs once per image.
        tail: what runs T times, if anything does.
        keep_last: see :class:`tsynd.fx.checkpointing.Staged`.
        hidden: the networks' course cannot be compiled: they leave it halfway.
    """

    def __init__(
        self, *once: nn.Module, tail: nn.Module | None = None, keep_last: bool = False, hidden: bool = False
    ) -> None:
        self._once, self._tail, self._keep_last, self._hidden = once, tail, keep_last, hidden
        self._folded: list[FoldedGraph] = []
        self._laid: dict[tuple[Any, Order], LaidOut] = {}
        self._forms: dict[int, tuple[Form, Callable[..., Any] | None]] = {}

    @property
    def once(self) -> Form:
        """What runs once per image, in its form of the moment."""
        return self._form()[0]

    @property
    def tail(self) -> Callable[..., Any]:
        """What runs T times, in its form of the moment."""
        tail = self._form()[1]
        assert tail is not None
        return tail

    def _form(self) -> tuple[Form, Callable[..., Any] | None]:
        return self._forms.get(threading.get_ident(), (self._once, self._tail))

    @contextmanager
    def _as(self, once: Form, tail: Callable[..., Any] | None) -> Iterator[None]:
        own = threading.get_ident()
        before = self._forms.get(own)
        self._forms[own] = once, tail
        try:
            yield
        finally:
            if before is None:
                del self._forms[own]
            else:
                self._forms[own] = before

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, batch norms are part of the convolutions before them where all networks are traced."""
        parts = [*self._once, *([] if self._tail is None else [self._tail])]
        if not parts or not all(isinstance(part, fx.GraphModule) for part in parts):
            yield
            return
        if not self._folded:
            with evaluating(*parts):
                self._folded = [FoldedGraph(part) for part in parts]  # type: ignore[arg-type]
        for graph in self._folded:
            graph.refresh()
        modules = tuple(graph.module for graph in self._folded)
        with self._as(modules[: len(self._once)], modules[-1] if self._tail is not None else None):
            yield

    @contextmanager
    def laid_out(self, order: Order) -> Iterator[None]:
        """Inside, copies of the networks' weights lie in this order; to be entered after :meth:`folded`."""

        def laid(network: Any) -> Any:
            made = self._laid.get((network, order))
            if made is None:
                made = LaidOut(network, order)
                if isinstance(network, fx.GraphModule):  # others may be changed by their owner
                    self._laid[network, order] = made
            made.refresh()
            return made.module

        once, tail = self._form()
        with self._as(tuple(laid(part) for part in once), None if tail is None else laid(tail)):
            yield

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, what runs once per image goes through ``torch.compile``."""
        once, tail = self._form()
        with self._as(once if self._hidden else tuple(torch.compile(part, dynamic=False) for part in once), tail):
            yield

    @contextmanager
    def staged(self, image: Tensor) -> Iterator[int]:
        """Inside, what runs once per image keeps few activations; gives what the heaviest stage of one image takes."""
        once, tail = self._form()
        stages = [staged(part, image, self._keep_last) for part in once]
        with self._as(tuple(stages), tail):
            yield max((stage.heaviest for stage in stages), default=0)


def structure_of(network: nn.Module) -> list[Any]:
    """What a plan is made from: modules, hooks and settings such as rates, not weights."""
    found: list[Any] = [next((p.dtype for p in network.parameters() if p.is_floating_point()), None)]
    for module in network.modules():
        own = vars(module)
        found.append((id(module), type(module), *own["_forward_hooks"], 0, *own["_forward_pre_hooks"]))
        found += [one for name, value in own.items() if name not in _INTERNAL for one in _settings(value)]
    return found


_INTERNAL = frozenset(vars(nn.Module()))


def _settings(value: Any, inner: bool = True) -> Iterator[Any]:
    """What a module's code may read from an attribute: numbers and texts themselves, other things by which they are."""
    if isinstance(value, (int, float, str, type(None))):
        yield value
    elif isinstance(value, Tensor):
        if not value.requires_grad and not isinstance(value, nn.Parameter):  # else kept from a pass
            yield id(value)
    elif inner and not callable(value) and (isinstance(value, (list, tuple, dict)) or hasattr(value, "__dict__")):
        held = (
            value if isinstance(value, (list, tuple)) else (value if isinstance(value, dict) else vars(value)).values()
        )
        for one in held:
            yield from _settings(one, False)
    else:
        yield id(value)


def check_classes(classes: int, task: str) -> None:
    """Refuse one logit as one of several classes: its softmax is 1 for any image.

    Raises:
        InputError: that.
    """
    if task == "multiclass" and classes == 1:
        raise InputError(
            "classifier: gives one logit, whose softmax is always 1; wanted task='multilabel' (a sigmoid, labels "
            "[N, 1] of 0 and 1) or two logits"
        )


def measured(logits: Tensor, objective: str, task: str) -> tuple[Tensor, Tensor]:
    """Uncertainty [B] float32 in nats of logits [T, B, C] of any floating dtype, and its gradient, of theirs.

    Raises:
        InputError: one logit as one of several classes.
    """
    check_classes(logits.shape[-1], task)
    value, slope = ops.logits_uncertainty(_served(logits), objective, task)
    return value, slope.to(logits.dtype)


def _served(x: Tensor) -> Tensor:
    """In a dtype that the operators take."""
    return x.float() if x.dtype == torch.float64 or (x.dtype == torch.float16 and not x.is_cuda) else x


def heads_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [T, B, C] of features [B, D] under weights [T, C, D] and biases [T, C]: one product."""
    flat = features @ weight.flatten(0, 1).t().to(features.dtype)
    logits = flat.reshape(flat.shape[0], *weight.shape[:2]).transpose(0, 1)
    return logits if bias is None else logits + bias[:, None]


def heads_uncertainty(features: Tensor, weight: Tensor, bias: Tensor | None, objective: str, task: str) -> Tensor:
    """Uncertainty [B] in nats of features [B, D] under weights [T, C, D] and biases [T, C], fused."""
    check_classes(weight.shape[1], task)
    features = _served(features)
    kind = features.dtype
    bias = None if bias is None else bias.to(kind)
    return ops.head_uncertainty(features, weight.to(kind), bias, objective, task)[0]
