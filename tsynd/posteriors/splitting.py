"""Split a classifier at its first active dropout: what runs once, and what runs once per posterior sample.

Traced where that works; else a layer of it is looked for by running it, and it is left where the layer is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsynd.fx.tracing import counterpart, has_hooks, private_copy, share_hooks, subgraph, trace
from tsynd.posteriors.dropout import (
    FINEST,
    AddressedDropout,
    MaskSource,
    dropout_kind,
    drops_paths,
    expand_passes,
    path_dropout,
)
from tsynd.posteriors.runner import Runner
from tsynd.posteriors.whole_network import AddressedDropoutMode, WholeNetwork
from tsynd.utils.errors import InputError

__all__ = ["LinearHead", "NoDropoutError", "Split", "may_have_head", "split_at_dropout", "split_at_hook", "trunk_to"]


class NoDropoutError(ValueError):
    """The traced network has no active dropout."""


@dataclass(frozen=True)
class LinearHead:
    """A tail that is just dropout -> linear, served by the fused operators."""

    p: float
    linear: nn.Linear


@dataclass(frozen=True)
class Split:
    """A network in two parts that share its parameters.

    Attributes:
        runner: of the trunk, images [B, ...] -> tuple of tensors [B, ...] without any randomness, and of the tail,
            those tensors -> logits [T * B, C], pass-major, with the current masks.
        head: set where the tail is dropout -> linear on the trunk's only output (flattened).
        dropouts: how many calls of dropout the tail has.
    """

    runner: Runner
    head: LinearHead | None
    dropouts: int


def _active_dropouts(network: nn.Module) -> list[str]:
    """Names of the dropout modules with p > 0."""
    return [name for name, module in network.named_modules() if dropout_kind(module) and float(module.p) > 0.0]


def _stochastic(node: fx.Node, network: nn.Module, stochastic_depth: bool) -> tuple[str, float] | None:
    """Kind and drop probability of an active dropout node.

    Raises:
        NotImplementedError: attention whose dropout happens inside a call.
    """
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            raise NotImplementedError("dropout inside attention")
        if stochastic_depth and (path := path_dropout(module)) is not None:
            return path
        kind = dropout_kind(module)
        return (kind, float(module.p)) if kind and float(module.p) > 0.0 else None  # type: ignore[arg-type]
    if node.op == "call_function":
        if node.target is nn.functional.scaled_dot_product_attention:
            rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
            if rate != 0.0:
                raise NotImplementedError("dropout inside attention")
        kind = dropout_kind(node.target)
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        return (kind, float(p)) if kind and isinstance(p, (int, float)) and p > 0.0 else None
    return None


def split_at_dropout(network: nn.Module, stochastic_depth: bool = False) -> Split:
    """Trace the network in eval mode and split it.

    Args:
        network: in eval mode; its parameters are shared, not copied.
        stochastic_depth: whether modules for stochastic depth count as dropouts.

    Raises:
        NoDropoutError: nothing in the traced graph is an active dropout.
        Exception: whatever torch.fx raises for a network that cannot be traced.
    """

    def leaf(module: nn.Module) -> bool | None:
        if drops_paths(module):
            return True
        return False if dropout_kind(module) is None and _active_dropouts(module) else None

    whole = trace(network, leaf=leaf)
    graph = whole.graph
    dropouts = {node: found for node in graph.nodes if (found := _stochastic(node, whole, stochastic_depth))}
    if not dropouts:
        raise NoDropoutError("no active dropout")
    images = next(node for node in graph.nodes if node.op == "placeholder")
    of_images, tail = {images}, set[fx.Node]()
    for node in graph.nodes:
        sources = set(node.all_input_nodes)
        if sources & of_images:
            of_images.add(node)
        if node in dropouts or sources & tail:
            tail.add(node)
    # what no image has a part in is the same in all passes: the tail makes it again
    boundary = [node for node in graph.nodes if node in of_images - tail and any(user in tail for user in node.users)]
    head = _linear_head(whole, tail, boundary, dropouts)
    _address(whole, tail, boundary, dropouts)
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    trunk, rest = subgraph(whole, [images], tuple(boundary)), subgraph(whole, boundary, output)
    return Split(Runner(trunk, tail=rest, keep_last=True), head, len(dropouts))


def _address(
    whole: fx.GraphModule, tail: set[fx.Node], boundary: list[fx.Node], dropouts: dict[fx.Node, tuple[str, float]]
) -> None:
    """Put addressed dropouts in the place of the others, and T copies before what else of the tail reads the trunk."""
    graph = whole.graph
    for node in boundary:
        readers = [user for user in node.users if user in tail and user not in dropouts]
        if readers:
            with graph.inserting_before(readers[0]):
                copies = graph.call_function(expand_passes, (node,))
            for user in readers:
                user.replace_input_with(node, copies)
    for layer, (node, (kind, p)) in enumerate(dropouts.items()):
        entry, name = node.all_input_nodes[0], f"addressed_{layer}"
        stand_in = AddressedDropout(kind, p, layer, entry in tail)
        if node.op == "call_module":
            share_hooks(whole.get_submodule(str(node.target)), stand_in)
        whole.add_submodule(name, stand_in)
        with graph.inserting_before(node):
            tail.add(made := graph.call_module(name, (entry,)))
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _linear_head(
    network: fx.GraphModule,
    tail: set[fx.Node],
    boundary: list[fx.Node],
    dropouts: dict[fx.Node, tuple[str, float]],
) -> LinearHead | None:
    if len(dropouts) != 1 or len(boundary) != 1:
        return None
    (start, (kind, p)) = next(iter(dropouts.items()))
    dropped = network.get_submodule(str(start.target)) if start.op == "call_module" else None
    if kind != "unit" or not FINEST <= p < 1 or (dropped is not None and has_hooks(dropped)):
        return None
    node, steps = start, 1
    while True:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        steps += 1
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and has_hooks(module):
            return None
        if type(module) is nn.Linear:
            if module._parameters.get("weight") is None:  # made anew before each call
                return None
            break
        if not _flattens(node, module):
            return None
    output = next(iter(node.users)) if len(node.users) == 1 else None
    if output is None or output.op != "output" or output.args[0] is not node or len(tail) != steps + 1:
        return None
    return LinearHead(p, module)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node keeps the order of an image's elements and ends as [B, D]."""
    if isinstance(module, nn.Identity):
        return True
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim == 1 and module.end_dim == -1)
    if (node.op, node.target) in (("call_function", torch.flatten), ("call_method", "flatten")):
        arguments = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
        return bool(arguments.get("start_dim", 0) == 1 and arguments.get("end_dim", -1) == -1)
    return False


class _ReachedError(Exception):
    """Carries what entered the layer out of the network."""

    def __init__(self, entered: Tensor) -> None:
        super().__init__("reached")
        self.entered = entered


class HookedTrunk(nn.Module):
    """Runs a network until a layer of it is called, and gives what entered that layer.

    Args:
        network: private: it gets a hook.
        layer: one of its modules.
    """

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.network, self.kind = network, type(layer).__name__
        self.training = network.training
        layer.register_forward_pre_hook(_leave, with_kwargs=True)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """What enters the layer, for images [B, ...].

        Raises:
            InputError: the network does not call the layer.
        """
        try:
            self.network(images)
        except _ReachedError as reached:
            return (reached.entered,)
        raise InputError(f"classifier: its layer {self.kind} is not called for these images")


def _leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _ReachedError(args[0] if args else kwargs["input"])


def trunk_to(network: nn.Module, layer: nn.Module) -> Runner:
    """Images [B, ...] -> (what enters the layer,), traced where that works.

    Args:
        network: in eval mode; its parameters are shared.
        layer: one of its modules, called once.
    """
    try:
        whole = trace(network)
        module = counterpart(whole, layer)
        names = [name for name, other in whole.named_modules(remove_duplicate=False) if other is module]
        calls = [node for node in whole.graph.nodes if node.op == "call_module" and node.target in names]
        if len(calls) == 1 and len(calls[0].all_input_nodes) == 1:
            images = next(node for node in whole.graph.nodes if node.op == "placeholder")
            return Runner(subgraph(whole, [images], (calls[0].all_input_nodes[0],)), keep_last=True)
    except Exception:  # whatever the network's own code raises under tracing
        pass
    own = private_copy(network)
    return Runner(HookedTrunk(own, counterpart(own, layer)), keep_last=True, hidden=True)


def may_have_head(network: nn.Module) -> bool:
    """Whether it may be that the only dropout stands right before the last linear layer."""
    return len(_active_dropouts(network)) == 1


def split_at_hook(whole: WholeNetwork, images: Tensor) -> Split | None:
    """Split a network that cannot be traced but ends in its only dropout and a linear layer.

    Found by running it: the linear layer gets the dropout's output itself, and the network gives the linear layer's.

    Args:
        whole: the network, in eval mode.
        images: a few, [B, ...].

    Returns:
        None where it is another kind of network.
    """
    network, calls = private_copy(whole.network), list[tuple[nn.Module, Any, Any]]()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append((module, inputs[0] if inputs else None, output))

    handles = [
        module.register_forward_hook(note)
        for module in network.modules()
        if (type(module) is nn.Linear or dropout_kind(module) == "unit") and not has_hooks(module)
    ]
    mode = AddressedDropoutMode(MaskSource(1, 0, torch.zeros(1, dtype=torch.int64, device=images.device), active=False))
    with torch.no_grad(), mode:
        logits = network(images)
    for handle in handles:
        handle.remove()
    if len(mode.shapes) != 1 or len(mode.shapes[0]) != 2:
        return None
    drops = [(m, out) for m, _, out in calls if not isinstance(m, nn.Linear) and float(m.p) > 0]  # type: ignore[arg-type]
    for layer, entered, out in calls:
        if isinstance(layer, nn.Linear) and out is logits and len(drops) == 1 and entered is drops[0][1]:
            p = float(drops[0][0].p)  # type: ignore[arg-type]
            if layer._parameters.get("weight") is None or not FINEST <= p < 1:
                return None
            tail = nn.Sequential(AddressedDropout("unit", p, 0, False), layer)
            trunk = HookedTrunk(network, drops[0][0])
            return Split(Runner(trunk, tail=tail, keep_last=True, hidden=True), LinearHead(p, layer), 1)
    return None
