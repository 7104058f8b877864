"""``tsynd.export_torchscript``: the whole loop, derivatives included, as one file for libtorch."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from tsynd.export.check import check_results
from tsynd.export.programs import prepare, write_path
from tsynd.export.tracing import record
from tsynd.fx.layout import channels_last
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.ascent import AscentOptions, AscentSettings, ascent_settings
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["export_torchscript"]


def export_torchscript(
    autoencoder: Any,
    classifier: nn.Module | Posterior | None,
    path: str | Path,
    kind: str = "synthesizer",
    *,
    image_shape: Sequence[int],
    settings: AscentSettings | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    **ascent: Unpack[AscentOptions],
) -> Path:
    """Write a TorchScript file that gives what eager torch gives, and check that it does.

    The file holds operators alone, the derivatives of decoder and classifier among them, and calls tsynd's own: load
    the operator library first, in Python by ``import tsynd``, in C++ by linking or loading
    ``tsynd.ops.library_path()``. It needs no autograd. ``torch.jit.load(path, map_location="cuda")`` moves it.
    ``metadata.json`` among the file's extra files tells what :func:`tsynd.export_onnx` writes into its.

    torch calls TorchScript deprecated (unsupported from Python 3.14 on): for new deployments prefer ONNX.

    Arguments and result are those of :func:`tsynd.export_onnx`; the module's inputs and outputs are in the order given
    there.

    Args:
        path: the ``.pt`` file to write; replaced if it exists.

    Raises:
        InputError: an argument does not fit, or the file's results differ from eager torch's.
    """
    chosen = ascent_settings(settings, ascent)
    target = write_path(path, ".pt")
    with prepare(
        kind, classifier, autoencoder, image_shape, chosen, seed, class_names, layout=channels_last
    ) as program:
        module = _scriptable(record(program, {}))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            try:
                scripted = torch.jit.script(module)
            except RuntimeError as error:
                raise InputError(f"model: cannot be written as TorchScript: {first_line(error)}") from error
            extra = {"metadata.json": json.dumps(program.metadata)}
            with atomic_path(target) as temporary:
                torch.jit.save(scripted, str(temporary), _extra_files=extra)
                loaded = torch.jit.load(str(temporary))  # type: ignore[no-untyped-call]

                with torch.no_grad():
                    check_results(program, lambda given: loaded(*given.values()))
    return target


def _scriptable(module: fx.GraphModule) -> fx.GraphModule:
    """The recorded graph in words that TorchScript knows: operators without overloads, sizes and devices as asked."""
    graph = module.graph
    first = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        device = graph.call_function(getattr, (first, "device"))
    for node in list(graph.nodes):
        node.target = {torch.sym_max: max, torch.sym_min: min}.get(node.target, node.target)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is torch.ops.aten.sym_size.int:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_method("size", node.args))
            graph.erase_node(node)
            continue
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("layout", "pin_memory")}
        if "device" in kwargs:
            kwargs["device"] = device
        node.target, node.kwargs = node.target.overloadpacket, kwargs
    if not device.users:
        graph.erase_node(device)
    output = graph.find_nodes(op="output")[0]
    output.args = (tuple(output.args[0]),)
    for name in [str(node.target) for node in graph.find_nodes(op="get_attr")]:
        value = operator.attrgetter(name)(module)
        delattr(module, name)
        module.register_buffer(name, value.detach().clone())
    graph.lint()
    module.recompile()
    return module
