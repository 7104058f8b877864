"""Addressed masks in a network that cannot be traced: every dropout call is caught while the network runs."""

from __future__ import annotations

import contextlib
import inspect
import math
import types
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tsynd.fx.tracing import private_copy
from tsynd.models.classifier import Endings
from tsynd.posteriors.dropout import MaskSource, addressed, by_rank, dropout_kind, drops_paths, path_dropout
from tsynd.posteriors.passes import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.posteriors.runner import Runner, measured
from tsynd.utils.errors import InputError

__all__ = ["AddressedDropoutMode", "DropoutCall", "Learnt", "PassLoop", "WholeNetwork", "agrees", "set_training"]

# values that a network holds per value of an image, against those that a tail holds per value it starts from
_WEIGHT = 16

Axis = tuple[int, int] | None
"""Where a dropout's input has its images: the axis, and how many of its rows an image has; None for nowhere."""


class AddressedDropoutMode(TorchFunctionMode):
    """Addresses every dropout call inside it; layers are numbered in call order.

    Args:
        source: of the masks.
        rows: T * B, what the network runs on.
        axes: of every dropout's input; None takes the first axis for the images'.
        strict: leave dropouts alone that are not told to be in training.

    Attributes:
        shapes: of the inputs of the dropouts so far.
    """

    def __init__(self, source: MaskSource, rows: int = 0, axes: list[Axis] | None = None, strict: bool = False) -> None:
        super().__init__()
        self.source, self.rows, self.axes, self.strict = source, rows, axes, strict
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
        given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = given["input"], float(given.get("p", 0.5))
        training = bool(given.get("training", given.get("train", True)))
        if p == 0.0 or (self.strict and not training):
            return x
        out = self.drop(x, by_rank(kind, x.dim()), p, training)
        in_place = given.get("inplace") or getattr(func, "__name__", "").endswith("_")
        return x.copy_(out) if in_place and out is not x else out

    def drop(self, x: Tensor, kind: str, p: float, training: bool = True) -> Tensor:
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
            if x.shape[0] != 1 and self.source.only is not None and not kind.startswith(("channel", "path")):
                ids = torch.zeros(1, dtype=torch.int64, device=x.device)  # weights, say: the same for all images
                return addressed(x[None], kind, p, layer, True, replace(self.source, sample_ids=ids, shared=True))[0]
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
        if bound.arguments["dropout_p"] == 0.0 or (self.strict and not bound.arguments["training"]):
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


@dataclass(frozen=True)
class DropoutCall:
    """One call of dropout: in which module, of what kind and rate, and whether it was told to be in training."""

    module: str
    kind: str
    p: float
    training: bool


class _Observer(AddressedDropoutMode):
    """Drops nothing, and notes what is called where."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__(MaskSource(1, 0, torch.zeros(1, dtype=torch.int64), active=False), strict=strict)
        self.calls: list[DropoutCall] = []
        self.random: list[str] = []
        self.inside = [""]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note random numbers that are no dropout's."""
        name = getattr(func, "__name__", "")
        recurrent = name in _RECURRENT and len(args) > 6 and args[5] and args[6] and args[4] > 1
        if name in _RANDOM or recurrent:
            self.random.append(f"{name} in {self.inside[-1] or 'the network itself'}")
        return super().__torch_function__(func, types, args, kwargs)

    def drop(self, x: Tensor, kind: str, p: float, training: bool = True) -> Tensor:
        self.calls.append(DropoutCall(self.inside[-1], kind, p, training))
        return super().drop(x, kind, p, training)

    def watching(self, network: nn.Module) -> contextlib.ExitStack:
        """Inside, calls are noted with the module of this private network that makes them."""

        def entering(name: str) -> Any:
            return lambda *_: self.inside.append(name)

        def leaving(*_: Any) -> None:
            self.inside.pop()

        stack = contextlib.ExitStack()
        for name, module in network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(entering(name), prepend=True).remove)
                stack.callback(module.register_forward_hook(leaving).remove)
        return stack


_RANDOM = {
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "rrelu", "rrelu_", "uniform_",
}  # fmt: skip
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def settles(module: nn.Module) -> bool:
    """Whether a module normalises by statistics that it gathers in training: in a posterior it never trains."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase) or "batchnorm" in type(module).__name__.lower()
    return norm or hasattr(module, "running_mean")


@dataclass(frozen=True)
class Learnt:
    """What a look at a network found.

    Attributes:
        logits: of the images, with every unit kept.
        calls: of dropout in a pass.
        ending: see :class:`tsynd.models.classifier.ClassifierAdapter`.
        changed: whether modules of the private network now take themselves to be in training.
        notes: what a user should know.
    """

    logits: Any
    calls: list[DropoutCall]
    ending: str | None
    changed: bool
    notes: list[str]


def set_training(network: nn.Module) -> None:
    """Put a private copy into training mode by its own ``train``, which may keep a part in eval mode.

    What settles, and scripted modules, which are not copied, stay as they are.
    """
    modules = list(network.modules())
    plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    try:
        if len(plain) < len(modules):
            raise TypeError("its scripted modules are those of the user's network")
        network.train()
    except Exception:  # whatever the network's own code raises
        for module in plain:
            module.training = True
    for module in plain:
        module.training &= not settles(module)


def _silence(network: nn.Module) -> None:
    """Turn off the dropouts that the network's own ``train`` keeps in eval mode, as those of a frozen encoder.

    Args:
        network: private.
    """
    trial = private_copy(network)
    set_training(trial)
    pairs = zip(network.modules(), trial.modules(), strict=True)
    drops = [(own, other.training) for own, other in pairs if dropout_kind(other) and hasattr(own, "p")]
    if any(trains for _, trains in drops):
        for own in (own for own, trains in drops if not trains):
            vars(own)["p"] = 0.0


class WholeNetwork:
    """A network that runs T times as a whole.

    Args:
        network: gives logits [B, C]; a private copy of it is run, in eval mode.
        stochastic_depth: whether modules for stochastic depth drop their paths too.
    """

    name = "whole network"

    def __init__(self, network: nn.Module, stochastic_depth: bool) -> None:
        self.network, self._depth = private_copy(network), stochastic_depth
        self.runner = Runner(tail=self.network)
        _silence(self.network)
        for module in self._own():
            module.training = False
            if stochastic_depth and (found := path_dropout(module)) is not None:
                module.register_forward_hook(_dropping(*found))
        self._strict = False
        self._axes: tuple[tuple[int, ...], list[Axis]] | None = None

    def _own(self) -> list[nn.Module]:
        return [module for module in self.network.modules() if not isinstance(module, torch.jit.ScriptModule)]

    def learn(self, images: Tensor) -> Learnt:
        """Find the dropouts of a pass; modules that drop in training alone take themselves to be in training.

        Only those, not their children, and none that then gives something else with every unit kept.

        Args:
            images: two that differ, [2, ...].
        """
        with Endings() as seen:
            logits, shown = self._observe(images)
            ending = seen.of(logits)
        notes = [f"draws random numbers in eval mode too ({'; '.join(sorted(set(shown.random)))})"] * bool(shown.random)
        trained = self._in_training(images)
        if trained is None or not isinstance(logits, Tensor):
            return Learnt(logits, shown.calls, ending, False, notes)
        if (more := sorted(set(trained.random))) and not shown.random:
            notes.append(f"draws random numbers in training besides dropout ({'; '.join(more)}), which no pass has")
        wanted = [call for call in trained.calls if call.training]
        if _marks(wanted) == _marks(shown.calls):
            return Learnt(logits, shown.calls, ending, False, notes)
        hidden = {mark[0] for mark in Counter(_marks(wanted)) - Counter(_marks(shown.calls))}
        calls = self._drop_in(hidden, False, images, logits)
        if calls is None or _marks(calls) != _marks(wanted):
            calls = self._drop_in({call.module for call in wanted}, True, images, logits)
        if calls is None:
            self._drop_in(set(), False, images, logits)
            calls = shown.calls
        if _marks(calls) != _marks(wanted):
            notes.append(
                f"calls dropout {len(wanted)} times in training, {len(calls)} times in a pass of tsynd: "
                f"{', '.join(sorted(hidden)) or 'the network itself'} does more in training than to drop"
            )
        return Learnt(logits, calls, ending, calls is not shown.calls, notes)

    def learn_logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] with every unit kept."""
        logits: Tensor = self._observe(images)[0]
        return logits

    def _observe(self, images: Tensor) -> tuple[Any, _Observer]:
        observer = _Observer(self._strict)
        with observer.watching(self.network):
            return self.record(images, observer, self.network), observer

    def _in_training(self, images: Tensor) -> _Observer | None:
        """One pass in training mode, on buffers of its own; None where that fails."""
        before, observer = torch.get_rng_state(), None
        trial = WholeNetwork(self.network, False)
        for module in trial._own():
            vars(module)["_buffers"] = {
                name: value if value is None else value.clone() for name, value in module._buffers.items()
            }
        try:
            set_training(trial.network)
            for module in trial._own():
                module.training &= not drops_paths(module)
            observer = trial._observe(images)[1]
        except Exception:  # whatever the network's own code raises in training, where it may want labels
            pass
        if observer is None or observer.random:  # else what was drawn is another thread's
            torch.set_rng_state(before)
        return observer

    def _drop_in(self, names: set[str], strict: bool, images: Tensor, logits: Tensor) -> list[DropoutCall] | None:
        """The calls of a pass with these modules in training; None where it then gives other logits."""
        for name, module in self.network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.training = name in names and not settles(module)
        self._strict, self.runner = strict, Runner(tail=self.network)
        try:
            found, observer = self._observe(images)
        except Exception:  # as above
            return None
        return observer.calls if isinstance(found, Tensor) and agrees(found, logits) else None

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
            own = source.part(part)
            repeated = images.repeat(own.passes, *[1] * (images.dim() - 1))
            mode = AddressedDropoutMode(own, repeated.shape[0], self.axes(images), self._strict)
            return self.record(repeated, mode, self.runner.tail).reshape(own.passes, images.shape[0], -1)

        return run

    @staticmethod
    def record(images: Tensor, mode: AddressedDropoutMode, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [B, C], with every dropout of the network caught by the mode."""
        token = _mode.set(mode)
        try:
            with mode:
                logits = network(images)
        finally:
            _mode.reset(token)
        return logits

    def axes(self, images: Tensor) -> list[Axis]:
        """Found once for images of one size: the axis that grows with the number of images."""
        size = tuple(images.shape[1:])
        known = self._axes
        if known is None or known[0] != size:
            off = MaskSource(1, 0, torch.zeros(1, dtype=torch.int64, device=images.device), active=False)
            modes = [AddressedDropoutMode(off, count, strict=self._strict) for count in (2, 3)]
            with torch.no_grad():
                for mode in modes:
                    copies = images[:1].detach().expand(mode.rows, *images.shape[1:]).contiguous()
                    self.record(copies, mode, self.runner.tail)
            two, three = (mode.shapes for mode in modes)
            if len(two) != len(three):
                raise InputError("classifier: calls dropout more often for more images, wanted always as often")
            self._axes = known = size, [_axis(a, b) for a, b in zip(two, three, strict=True)]
        return known[1]


class PassLoop:
    """The plain way: one pass after another, all images of a call together, as a loop over the model would run it."""

    name = "pass by pass"

    def __init__(self, whole: WholeNetwork) -> None:
        self.whole, self.runner = whole, whole.runner

    def logits(self, images: Tensor, source: MaskSource) -> Tensor:
        """Logits [T, B, C]; backward runs each pass again."""
        runs = [self.whole._passes(replace(source, only=t)) for t in range(source.samples)]
        if not torch.is_grad_enabled():
            return torch.cat([run(slice(None), (images,)) for run in runs])
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(run, slice(None), (images,), **options) for run in runs])

    def uncertainty(self, images: Tensor, source: MaskSource, objective: str, task: str) -> Tensor:
        """Uncertainty [B]."""
        return measured(self.logits(images, source), objective, task)[0]


def agrees(got: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    exact = (
        wanted.dtype in (torch.float32, torch.float64) and not wanted.is_cuda and not torch.is_autocast_enabled("cpu")
    )
    if got.shape != wanted.shape:
        return False
    if not bool(wanted.isfinite().all()):
        return torch.equal(got.isfinite(), wanted.isfinite())
    scale = float((wanted - wanted.mean()).abs().max()) + 1e-3 * float(wanted.abs().max())
    return float((got - wanted).abs().max()) <= (2e-3 if exact else 5e-2) * scale + 1e-6


def _marks(calls: list[DropoutCall]) -> list[tuple[str, str, float]]:
    return [(call.module, call.kind, call.p) for call in calls]


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
