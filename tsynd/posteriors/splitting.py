"""Split a classifier at its first active dropout: what runs once, and what runs once per posterior sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsynd.posteriors.dropout import AddressedDropout, MaskSource, dropout_kind, expand_passes, path_dropout

__all__ = ["LinearHead", "NoDropoutError", "Split", "active_dropouts", "split_at_dropout"]


class NoDropoutError(ValueError):
    """The traced network has no active dropout."""


@dataclass(frozen=True)
class LinearHead:
    """A tail that is just dropout -> linear, served by the fused operators."""

    p: float
    linear: nn.Linear


@dataclass(frozen=True)
class Split:
    """A traced network in two parts that share its parameters.

    Attributes:
        trunk: images [B, ...] -> tuple of tensors [B, ...], without any randomness; an fx.GraphModule where the
            network was traced.
        tail: those tensors -> logits [T * B, C], pass-major, masks from the current :class:`MaskSource`.
        head: set where the tail is dropout -> linear on the trunk's only output (flattened).
        dropouts: how many calls of dropout the tail has.
    """

    trunk: nn.Module
    tail: nn.Module
    head: LinearHead | None
    dropouts: int


def active_dropouts(network: nn.Module) -> list[str]:
    """Names of the dropout modules with p > 0."""
    return [name for name, module in network.named_modules() if dropout_kind(module) and float(module.p) > 0.0]


class _Tracer(fx.Tracer):
    """Looks inside torch's own containers where they hold an active dropout."""

    def __init__(self, stochastic_depth: bool) -> None:
        super().__init__()
        self._stochastic_depth = stochastic_depth

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._stochastic_depth and path_dropout(m) is not None:
            return True
        if dropout_kind(m) is None and active_dropouts(m):
            return False
        return super().is_leaf_module(m, module_qualified_name)


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


def split_at_dropout(network: nn.Module, source: Callable[[], MaskSource], stochastic_depth: bool = False) -> Split:
    """Trace the network in eval mode and split it.

    Args:
        network: in eval mode; its parameters are shared, not copied.
        source: gives the masks' address at run time.
        stochastic_depth: whether modules for stochastic depth count as dropouts.

    Raises:
        NoDropoutError: nothing in the traced graph is an active dropout.
        Exception: whatever torch.fx raises for a network that cannot be traced.
    """
    graph = fx.GraphModule(network, _Tracer(stochastic_depth).trace(network)).graph
    graph.eliminate_dead_code()
    dropouts = {node: found for node in graph.nodes if (found := _stochastic(node, network, stochastic_depth))}
    if not dropouts:
        raise NoDropoutError("no active dropout")
    tail: set[fx.Node] = set()
    for node in graph.nodes:
        if node in dropouts or any(source_node in tail for source_node in node.all_input_nodes):
            tail.add(node)
    boundary = [
        node
        for node in graph.nodes
        if node not in tail and node.op != "get_attr" and any(user in tail for user in node.users)
    ]
    return Split(
        _trunk(network, graph, tail, boundary),
        _tail(network, graph, tail, boundary, dropouts, source),
        _linear_head(network, graph, tail, boundary, dropouts),
        len(dropouts),
    )


def _trunk(network: nn.Module, graph: fx.Graph, tail: set[fx.Node], boundary: list[fx.Node]) -> fx.GraphModule:
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in tail and node.op != "output":
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(tuple(copies[node] for node in boundary))
    trunk = fx.GraphModule(network, part, "Trunk")
    trunk.graph.eliminate_dead_code()
    trunk.recompile()
    return trunk


def _tail(
    network: nn.Module,
    graph: fx.Graph,
    tail: set[fx.Node],
    boundary: list[fx.Node],
    dropouts: dict[fx.Node, tuple[str, float]],
    source: Callable[[], MaskSource],
) -> fx.GraphModule:
    part = fx.Graph()
    raw = {node: part.placeholder(f"boundary_{i}") for i, node in enumerate(boundary)}
    copies: dict[fx.Node, fx.Node] = {}
    addressed: dict[str, nn.Module] = {"expand_passes": _ExpandPasses(source)}

    def expanded(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op == "get_attr":
                copies[node] = part.node_copy(node)
            else:
                copies[node] = part.call_module("expand_passes", (raw[node],))
        return copies[node]

    for layer, node in enumerate(dropouts):
        kind, p = dropouts[node]
        entry = node.all_input_nodes[0]
        addressed[f"addressed_{layer}"] = AddressedDropout(kind, p, layer, entry in tail, source)
    layers = {node: layer for layer, node in enumerate(dropouts)}
    for node in graph.nodes:
        if node not in tail:
            continue
        if node in dropouts:
            entry = node.all_input_nodes[0]
            argument = copies[entry] if entry in tail else raw[entry]
            copies[node] = part.call_module(f"addressed_{layers[node]}", (argument,))
        else:
            copies[node] = part.node_copy(node, expanded)
    return fx.GraphModule(_Holder(network, addressed), part, "Tail")


class _Holder(nn.Module):
    """The network's own submodules and parameters plus the addressed dropouts, under one root for fx."""

    def __init__(self, network: nn.Module, addressed: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in [*network.named_children(), *addressed.items()]:
            self.add_module(name, child)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


class _ExpandPasses(nn.Module):
    """[B, ...] -> [T * B, ...] for what the tail reads besides the dropouts' own inputs."""

    def __init__(self, source: Callable[[], MaskSource]) -> None:
        super().__init__()
        self._source = source

    def forward(self, value: Any) -> Any:
        # sizes and other plain values stay; the posterior's own check catches a tail that they no longer fit
        return expand_passes(value, self._source()) if isinstance(value, Tensor) else value


def _linear_head(
    network: nn.Module,
    graph: fx.Graph,
    tail: set[fx.Node],
    boundary: list[fx.Node],
    dropouts: dict[fx.Node, tuple[str, float]],
) -> LinearHead | None:
    if len(dropouts) != 1 or len(boundary) != 1:
        return None
    (start, (kind, p)) = next(iter(dropouts.items()))
    if kind != "unit":
        return None
    node, steps = start, 1
    while True:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        steps += 1
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.Linear:
            break
        flattens = _flattens(node, module)
        if not flattens:
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
