"""``tsynd.export_torchscript``: the whole loop, derivatives included, as one file for libtorch."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tsynd.export.check import check_results
from tsynd.export.programs import in_order, prepare, write_path
from tsynd.export.tracing import record
from tsynd.fx.layout import channels_last
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.ascent import AscentOptions, AscentSettings, ascent_settings
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["export_torchscript"]


def export_torchscript(
    autoencoder: Any,
    classifier: nn.Module | Posterior | Any,
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

    Args:
        autoencoder: see :func:`tsynd.export_onnx`, as all arguments but the path.
        classifier: see there.
        path: the ``.pt`` file to write; replaced if it exists.
        kind: see there; the module's inputs and outputs are in the order given there.
        image_shape: see there.
        settings: see there.
        seed: see there.
        class_names: see there.
        ascent: see there.

    Returns:
        The path.

    Raises:
        InputError: an argument does not fit, or the file's results differ from eager torch's.
    """
    chosen = ascent_settings(settings, ascent)
    autoencoder, classifier = in_order(autoencoder, classifier)
    target = write_path(path, ".pt")
    with prepare(
        kind, classifier, autoencoder, image_shape, chosen, seed, class_names, layout=channels_last
    ) as program:
        module = _scriptable(record(program.run, list(program.inputs.values()), {}))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            try:
                scripted = torch.jit.script(module)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"model: cannot be written as TorchScript: {reason}") from error
            extra = {"metadata.json": json.dumps(program.metadata)}
            with atomic_path(target) as temporary:
                torch.jit.save(scripted, str(temporary), _extra_files=extra)
                loaded = torch.jit.load(str(temporary))  # type: ignore[no-untyped-call]

                def run(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
                    with torch.no_grad():
                        out: Sequence[Tensor] = loaded(*given.values())
                    return out

                check_results(program, run)
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
    names = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    for name in names:
        value = operator.attrgetter(name)(module)
        delattr(module, name)
        module.register_buffer(name, value.detach().clone())
    graph.lint()
    module.recompile()
    return module
