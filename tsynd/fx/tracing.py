"""Graph surgery: a network's graph, and parts of a graph as networks of their own.

``torch.fx`` traces by exchanging ``nn.Module.__call__`` for the whole process, which breaks every other thread. Here a
private copy of the network's modules is traced instead, whose classes alone are exchanged.
"""

from __future__ import annotations

import math
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as patching

__all__ = ["counterpart", "has_hooks", "private_copy", "share_hooks", "subgraph", "trace"]

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# functions that ``fx.wrap`` names are exchanged in their own modules, for every thread, but only act on tracers
_WRAPPED = threading.RLock()


def private_copy(network: nn.Module) -> nn.Module:
    """The network in modules of its own, around the same parameters and buffers.

    Modes, hooks and classes of the copy are nobody else's. ``torch.compile`` and data-parallel wrappers are left out.
    Modules that are in no module's registry, and scripted ones, are the network's own.
    """
    copies: dict[int, nn.Module] = {}
    copied = _copied(network, copies)
    for module in copies.values():  # methods that stand in a module's own attributes belong to the copy
        for name, value in vars(module).items():
            if isinstance(value, types.MethodType) and id(value.__self__) in copies:
                vars(module)[name] = types.MethodType(value.__func__, copies[id(value.__self__)])
    return copied


def _copied(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    inner = _inside(module)
    if inner is not None and not any(vars(module)[name] for name in _HOOKS):
        return copies.setdefault(id(module), _copied(inner, copies))
    own: nn.Module = object.__new__(_Through if inner is not None else type(module))
    copies[id(module)] = own
    vars(own).update(vars(module), training=module.training)
    vars(own).pop("_compiled_call_impl", None)  # as all that is compiled, it runs the network's own modules
    if inner is not None:
        vars(own).pop("forward", None)
    for name in _HOOKS:
        vars(own)[name] = OrderedDict(vars(module)[name])
    children = {"inner": inner} if inner is not None else module._modules
    vars(own)["_modules"] = {
        name: child if child is None else _copied(child, copies) for name, child in children.items()
    }
    return own


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper runs that does nothing of its own."""
    inner = getattr(module, "_orig_mod", None) if type(module).__name__ == "OptimizedModule" else None
    if isinstance(module, _WRAPPERS) and "forward" not in vars(module):
        inner = module.module
    return inner if isinstance(inner, nn.Module) else None


class _Through(nn.Module):
    """Stands in for a wrapper that has hooks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)  # type: ignore[operator]


def _living(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph as a network that reads parameters and buffers where they live, also when they are exchanged."""
    module = fx.GraphModule(root, graph)
    if isinstance(network := root._modules.get("network"), nn.Module):
        module.network = network
    return module


def counterpart(copied: nn.Module, module: nn.Module) -> nn.Module:
    """The copy of one module in a private copy of its network, or in its trace."""
    return next(part for part in copied.modules() if part._parameters is module._parameters)


def has_hooks(module: nn.Module) -> bool:
    """Whether something of a user's runs before or after the module."""
    return any(vars(module)[name] for name in _HOOKS) or "forward" in vars(module)


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give a module the hooks of the one that it stands in for."""
    for name in _HOOKS:
        vars(other)[name] = vars(module)[name]


class _Root(nn.Module):
    """Calls one method of a network, by the network's own call where it is ``forward``."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method
        self.training = network.training

    def forward(self, x: Tensor) -> Any:
        return self.network(x) if self.method == "forward" else getattr(self.network, self.method)(x)


class _Tracer(fx.Tracer):
    """Traces a private copy; nothing outside of it is touched."""

    proxy_buffer_attributes = True  # or what is computed from a buffer would be that of today for ever

    def __init__(self, leaf: Callable[[nn.Module], bool | None], whole: bool) -> None:
        super().__init__()
        self._leaf, self._whole = leaf, whole

    def run(self, root: nn.Module) -> fx.GraphModule:
        self.root = root
        self.root_module_name = type(root).__name__
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {
            value: f"{path}.{name}".lstrip(".")
            for path, module in root.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        classes = {
            module: type(module)
            for module in root.modules()
            if module is not root and not isinstance(module, torch.jit.ScriptModule)
        }
        cache: dict[str, fx.Proxy] = {}
        changed: dict[type, type] = {}
        try:
            with _WRAPPED, patching._Patcher() as patcher:
                patching._patch_wrapped_functions(patcher)
                patching._autowrap_check(patcher, math.__dict__, self._autowrap_function_ids)
                for module, kind in classes.items():
                    scope = getattr(getattr(module, "forward", module), "__globals__", {})
                    patching._autowrap_check(patcher, scope, self._autowrap_function_ids)
                    if kind not in changed:
                        changed[kind] = self._recording(kind, cache)
                    module.__class__ = changed[kind]
                given = root.forward(self.create_proxy("placeholder", "x", (), {}))
                self.create_node("output", "output", (self.create_arg(given),), {})
        finally:
            for module, kind in classes.items():
                module.__class__ = kind
        return _living(root, self.graph)

    def _recording(self, kind: type[nn.Module], cache: dict[str, fx.Proxy]) -> type[nn.Module]:
        """The class with calls and parameters that are recorded."""

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return kind.__call__(module, *args, **kwargs)

            return self.call_module(module, forward, args, kwargs)

        def attribute(module: nn.Module, name: str) -> Any:
            return self.getattr(name, kind.__getattr__(module, name), cache)

        names = {"__call__": call, "__getattr__": attribute, "__module__": kind.__module__}
        return types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(names))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        chosen = self._leaf(m)
        return super().is_leaf_module(m, module_qualified_name) if chosen is None else chosen

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._whole:
            return super().call_module(m, forward, args, kwargs)
        stack = OrderedDict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever the module's own code raises under tracing
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def trace(
    network: nn.Module,
    method: str = "forward",
    *,
    leaf: Callable[[nn.Module], bool | None] = lambda module: None,
    whole: bool = False,
) -> fx.GraphModule:
    """The graph of a private copy of the network, which shares its parameters and buffers.

    Args:
        network: in the mode that it shall be traced in.
        method: of one tensor.
        leaf: whether a module becomes one node; None leaves it to torch.fx, which keeps torch's own modules whole.
        whole: modules that cannot be looked into become one node too.

    Raises:
        Exception: whatever the network's own code raises under tracing, and a graph that does not hold all it does.
    """
    traced = _Tracer(leaf, whole).run(_Root(private_copy(network), method))
    if any(not node.users and _in_place(node, traced) for node in traced.graph.nodes):
        raise NotImplementedError("a change in place whose result has no name")
    traced.graph.eliminate_dead_code()
    return traced


def _in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a call may change what it is given."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    told = node.kwargs.get("inplace") is True or any(given is True for given in node.args[1:])
    changes = str(name).endswith("_") and not str(name).endswith("__")
    return node.op in ("call_method", "call_function") and (changes or told)


def subgraph(whole: fx.GraphModule, inputs: Iterable[fx.Node], outputs: Any) -> fx.GraphModule:
    """A part of a graph as a network, which shares modules and parameters.

    Args:
        whole: the network.
        inputs: nodes whose values are given to the part, in this order.
        outputs: the node or nodes (as in an output's first argument) that it gives; what they need is its content.
    """
    given = list(inputs)
    needed: set[fx.Node] = set()
    waiting: list[fx.Node] = []
    fx.map_arg(outputs, waiting.append)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in given else node.all_input_nodes
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in given}
    for node in whole.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(fx.map_arg(outputs, copies.__getitem__))
    return _living(whole, part)
