"""Record a function of tensors, derivatives included, as a program of plain operators with an open batch size."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tsynd.export.programs import Program
from tsynd.utils.errors import InputError, first_line

__all__ = ["layer_of", "quiet", "record", "to_program"]

Table = dict[Any, Callable[..., Any]]


def _batch(shapes: Iterable[Sequence[int]]) -> int:
    """A batch size that torch takes neither for a constant (0, 1) nor for another of the sizes."""
    return next(size for size in itertools.count(5) if not any(size in shape for shape in shapes))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters' notes on their own insides (and on torchvision, which is not needed) stay unsaid.

    Nor is garbage collected: the frames of old exceptions may hold guards of torch's, which put the thread's dispatch
    state back when they go, and must not in the middle of a trace.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    names = ("torch.onnx", "torch.export", "torch._inductor", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if collecting:
            gc.enable()


def record(program: Program, table: Table) -> fx.GraphModule:
    """The graph of operators of a program's function, for any batch size.

    Args:
        program: its function may call ``torch.autograd.grad``. Parameters become constants.
        table: operator overload -> function of plainer operators that replaces it.

    Raises:
        InputError: the function's course depends on the batch size or on the values in it.
    """

    def plain(*arguments: Tensor) -> Any:  # a bound method's own argument would be counted too
        return program.run(*arguments)

    generator, shapes = torch.Generator().manual_seed(0), program.inputs.values()
    examples = [torch.rand(_batch(shapes), *shape, generator=generator) for shape in shapes]
    trace = make_fx(plain, table, "symbolic", _allow_non_fake_inputs=True)
    # attention by its formula: the fused kernels have no counterpart in a file
    with _named(program), sdpa_kernel(SDPBackend.MATH), quiet():
        module: fx.GraphModule = trace(*examples)
    size = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    if isinstance(size, int) or size.node.maybe_as_int() is not None:
        raise InputError(f"{program.argument}: works for a batch of {size} alone, wanted any batch size")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def to_program(module: nn.Module, program: Program) -> ExportedProgram:
    """The recorded module as an exported program with a dynamic leading axis ``batch``.

    Raises:
        InputError: the module's course depends on the batch size or on the values in it.
    """
    shapes = program.inputs.values()
    examples = tuple(torch.rand(_batch(shapes), *shape) for shape in shapes)
    batch = Dim("batch", min=1)
    with _named(program), quiet():
        return torch.export.export(module, examples, dynamic_shapes=tuple({0: batch} for _ in shapes))


@contextlib.contextmanager
def _named(program: Program) -> Iterator[None]:
    """What torch and a network's own code raise under tracing becomes one error, which names the layer."""
    try:
        yield
    except InputError:
        raise
    except torch._dynamo.exc.UserError as error:
        reason = str(error).strip().splitlines()
        detail = next((line.strip(" -") for line in reason if "dynamic" in line), reason[0])
        raise InputError(f"{program.argument}: works for one batch size alone, wanted any ({detail})") from error
    except Exception as error:
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [type(owner).__name__ for owner in owners if isinstance(owner, nn.Module)]
        raise InputError(
            f"{program.argument}: {names[-1] if names else 'its code'} cannot be recorded for a file, wanted the same "
            f"operators whatever the values in a tensor are: {first_line(error)}"
        ) from error


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the innermost layer in which an operator runs."""

    def __init__(self, name: str, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.stack = name, stack
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.found is None and self.stack and func.overloadpacket.__name__ == self.name:
            self.found = self.stack[-1]
        return func(*args, **(kwargs or {}))


def layer_of(operator: str, run: Callable[[], Any], modules: Sequence[nn.Module]) -> str:
    """Name and type of the layer that an operator comes from, or "a function outside of the layers".

    Args:
        operator: as ``aten.name.overload``; a derivative is looked up by its forward operator.
        run: runs the models once.
        modules: the models.
    """
    name = operator.split(".")[1].removesuffix("_backward").removesuffix("_jvp")
    names = {part: path for module in modules for path, part in module.named_modules()}
    stack: list[str] = []

    def enter(part: nn.Module, _: Any) -> None:
        if part not in names:  # a copy that runs in a model's place
            names.update({child: path for path, child in part.named_modules() if child not in names})
        path = names[part]
        stack.append(f"{path or 'the whole'} ({type(part).__name__})")

    def leave(*_: Any) -> None:
        stack.pop()

    before = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    after = torch.nn.modules.module.register_module_forward_hook(leave)
    try:
        with _Watch(name, stack) as watch:
            run()
    finally:
        before.remove()
        after.remove()
    return watch.found or "a function outside of the layers"
