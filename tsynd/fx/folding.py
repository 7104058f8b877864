"""Batch norm folded into the convolutions before it while the weights stand still; the given modules stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from tsynd.fx.tracing import private_copy, subgraph, trace

__all__ = ["FoldedGraph", "fold", "folded_decoder"]

_TRANSPOSED: dict[type[nn.Module], bool] = {
    nn.Conv1d: False,
    nn.Conv2d: False,
    nn.Conv3d: False,
    nn.ConvTranspose1d: True,
    nn.ConvTranspose2d: True,
    nn.ConvTranspose3d: True,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedGraph:
    """A traced network in eval mode with its own copies of the convolutions that a batch norm follows.

    Args:
        traced: in eval mode; shares its other modules and parameters with the copy.

    Attributes:
        module: computes what ``traced`` does, with the weights as they were at the last :meth:`refresh`.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.module = subgraph(traced, [], next(node for node in traced.graph.nodes if node.op == "output").args[0])
        if isinstance(network := self.module._modules.get("network"), nn.Module):
            self.module.network = private_copy(network)  # what folding leaves unused is deleted below
        graph = self.module.graph
        self._folds: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        for node in list(graph.nodes):
            before = node.args[0] if node.args else None
            if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
                continue
            conv, norm = self.module.get_submodule(str(before.target)), self.module.get_submodule(str(node.target))
            if not _foldable(conv, norm) or len(before.users) != 1:
                continue
            name = f"folded_{len(self._folds)}"
            folded = fuse_conv_bn_eval(conv, norm, _TRANSPOSED[type(conv)])  # type: ignore[arg-type, type-var]
            self.module.add_submodule(name, folded)
            self._folds.append((folded, conv, norm))
            before.target = name
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights, running statistics, device and layout as they are now."""
        with torch.no_grad():
            for folded, conv, norm in self._folds:
                weight, bias = fuse_conv_bn_weights(
                    conv.weight,  # type: ignore[arg-type]
                    conv.bias,  # type: ignore[arg-type]
                    norm.running_mean,  # type: ignore[arg-type]
                    norm.running_var,  # type: ignore[arg-type]
                    norm.eps,  # type: ignore[arg-type]
                    norm.weight,  # type: ignore[arg-type]
                    norm.bias,  # type: ignore[arg-type]
                    _TRANSPOSED[type(conv)],
                )
                folded.weight, folded.bias = weight.requires_grad_(False), bias.requires_grad_(False)


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the pair is one of torch's own, with statistics to fold and nothing hooked in between."""
    if type(conv) not in _TRANSPOSED or type(norm) not in _NORMS:
        return False
    if _TRANSPOSED[type(conv)] and conv.groups != 1:  # the weight's second axis is then not the norm's channels
        return False
    hooks = (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (conv, norm))
    return norm.running_mean is not None and norm.running_var is not None and not any(hooks)


def fold(model: nn.Module, example: Tensor, method: str = "forward") -> FoldedGraph | None:
    """A method of a network with its batch norms folded; None where it cannot be traced or folding changes it.

    Args:
        model: in eval mode.
        example: a few inputs to compare on.
        method: the network's own call, or a method of one tensor.
    """
    call: Callable[[Tensor], Tensor] = model if method == "forward" else getattr(model, method)
    try:
        folded = FoldedGraph(trace(model, method, whole=True))
        with torch.no_grad():
            wanted, got = call(example), folded.module(example)
        same = torch.allclose(got, wanted, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception:  # whatever the model's own code raises under tracing
        return None
    return folded if same else None


def folded_decoder(model: Any, latents: Tensor) -> Callable[[Tensor], Tensor]:
    """``model.decode`` with its batch norms folded; as it is where that cannot be done.

    Args:
        model: in eval mode; its weights must stay as they are while the result is used.
        latents: [B, ...], a few to compare on.
    """
    folded = fold(model, latents, "decode") if isinstance(model, nn.Module) else None
    decode: Callable[[Tensor], Tensor] = model.decode if folded is None else folded.module
    return decode
