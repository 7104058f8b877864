"""The part of a classifier in front of a layer, which runs once: traced where that works, else left at a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsynd.posteriors.dropout import AddressedDropout, MaskSource, dropout_kind
from tsynd.posteriors.splitting import LinearHead, Split, active_dropouts
from tsynd.posteriors.whole_network import AddressedDropoutMode, WholeNetwork
from tsynd.utils.errors import InputError

__all__ = ["HookedTrunk", "may_have_head", "split_at_hook", "trunk_to"]


class _ReachedError(Exception):
    """Carries what entered the layer out of the network."""

    def __init__(self, entered: Tensor) -> None:
        super().__init__("reached")
        self.entered = entered


class HookedTrunk(nn.Module):
    """Runs a network until a layer of it is called, and gives what entered that layer.

    Args:
        network: its parameters are shared.
        layer: one of its modules.
    """

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.network, self.layer = network, layer
        self.training = network.training

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """What enters the layer, for images [B, ...].

        Raises:
            InputError: the network does not call the layer.
        """
        handle = self.layer.register_forward_pre_hook(_leave, with_kwargs=True)
        try:
            self.network(images)
        except _ReachedError as reached:
            return (reached.entered,)
        finally:
            handle.remove()
        raise InputError(f"classifier: its layer {type(self.layer).__name__} is not called for these images")


def _leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _ReachedError(args[0] if args else kwargs["input"])


def trunk_to(network: nn.Module, layer: nn.Module) -> nn.Module:
    """Images [B, ...] -> (what enters the layer,).

    Args:
        network: in eval mode; its parameters are shared.
        layer: one of its modules, called once.
    """
    try:
        graph = fx.GraphModule(network, fx.Tracer().trace(network)).graph
        names = [name for name, module in network.named_modules(remove_duplicate=False) if module is layer]
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
        if len(calls) != 1 or len(calls[0].all_input_nodes) != 1:
            return HookedTrunk(network, layer)
        part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in graph.nodes:
            if node is calls[0]:
                break
            copies[node] = part.node_copy(node, lambda n: copies[n])
        part.output((copies[calls[0].all_input_nodes[0]],))
        trunk = fx.GraphModule(network, part, "Trunk")
        trunk.graph.eliminate_dead_code()
        trunk.recompile()
        return trunk
    except Exception:  # whatever the network's own code raises under tracing
        return HookedTrunk(network, layer)


class _HeadTail(nn.Module):
    """Dropout -> linear, for T passes."""

    def __init__(self, p: float, linear: nn.Linear, source: Callable[[], MaskSource]) -> None:
        super().__init__()
        self.dropout = AddressedDropout("unit", p, 0, False, source)
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear(self.dropout(features))
        return out


def may_have_head(network: nn.Module) -> bool:
    """Whether it may be that the only dropout stands right before the last linear layer."""
    return len(active_dropouts(network)) == 1


def split_at_hook(whole: WholeNetwork, images: Tensor, source: Callable[[], MaskSource]) -> Split | None:
    """Split a network that cannot be traced but ends in its only dropout and a linear layer.

    Found by running it: the linear layer gets the dropout's output itself, and the network gives the linear layer's.

    Args:
        whole: the network, in eval mode.
        images: a few, [B, ...].
        source: gives the masks' address at run time.

    Returns:
        None where it is another kind of network.
    """
    network, calls = whole.network, list[tuple[nn.Module, Any, Any]]()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append((module, inputs[0] if inputs else None, output))

    kinds = [m for m in network.modules() if type(m) is nn.Linear or dropout_kind(m) == "unit"]
    handles = [module.register_forward_hook(note) for module in kinds]
    off = MaskSource(1, 0, torch.zeros(1, dtype=torch.int64, device=images.device), active=False)
    mode = AddressedDropoutMode(off)
    try:
        with torch.no_grad():
            logits = whole.record(images, mode)
    finally:
        for handle in handles:
            handle.remove()
    if len(mode.shapes) != 1 or len(mode.shapes[0]) != 2:
        return None
    drops = [(m, out) for m, _, out in calls if not isinstance(m, nn.Linear) and float(m.p) > 0]  # type: ignore[arg-type]
    for layer, entered, out in calls:
        if isinstance(layer, nn.Linear) and out is logits and len(drops) == 1 and entered is drops[0][1]:
            p = float(drops[0][0].p)  # type: ignore[arg-type]
            return Split(HookedTrunk(network, drops[0][0]), _HeadTail(p, layer, source), LinearHead(p, layer), 1)
    return None
