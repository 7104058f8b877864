"""Registers the operators of ``torch.ops.tsynd``: kernels, fake kernels and autograd rules.

The kernels are those of the compiled extension ``tsynd.ops._C`` where it loads, otherwise the plain-torch twins of
:mod:`tsynd.ops.reference` (same results, slower), which is said once in a warning. Twins also serve an operator on a
device that it has no compiled kernel for yet; :func:`served_by` tells.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsynd.ops import reference
from tsynd.utils.errors import InputError

__all__ = ["compiled", "library_path", "served_by"]


_SCHEMAS = {
    "logits_uncertainty": "(Tensor logits, str objective, str task) -> (Tensor value, Tensor gradient)",
    "expected_information": "(Tensor logits, Tensor targets, str task) -> (Tensor value, Tensor gradient)",
    "head_uncertainty": "(Tensor features, Tensor weight, Tensor? bias, str objective, str task)"
    " -> (Tensor value, Tensor gradient)",
    "dropout_head_uncertainty": "(Tensor features, Tensor weight, Tensor? bias, float p, int samples, int seed,"
    " int layer, Tensor sample_ids, str objective, str task) -> (Tensor value, Tensor gradient)",
    "dropout_mask": "(int units, float p, int samples, int seed, int layer, Tensor sample_ids) -> Tensor mask",
    "dropout_expand": "(Tensor input, float p, int samples, int seed, int layer, Tensor sample_ids, bool passes)"
    " -> Tensor out",
    "dropout_gather": "(Tensor gradient, float p, int samples, int seed, int layer, Tensor sample_ids, bool passes)"
    " -> Tensor out",
    "ascend_": "(Tensor(a!) latents, Tensor gradient, Tensor origin, float step, float radius, str rule) -> ()",
}


def _load() -> bool:
    try:
        from tsynd.ops import _C  # type: ignore[attr-defined]  # noqa: F401  (registers the operators)

        loaded = True
    except ImportError as error:
        warnings.warn(
            f"tsynd's compiled operators did not load ({error}); using the slower plain-torch ones",
            RuntimeWarning,
            stacklevel=3,
        )
        for name, schema in _SCHEMAS.items():
            torch.library.define(f"tsynd::{name}", schema)
        loaded = False
    for name in _SCHEMAS:
        for key in ("CPU", "CUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"tsynd::{name}", key):
                torch.library.impl(f"tsynd::{name}", key, _eager_twin(name))
                _twins.add((name, key))
    return loaded


def _eager_twin(name: str) -> Any:
    twin = getattr(reference, name)

    def run(*arguments: Any) -> Any:
        with torch.no_grad():
            out = twin(*arguments)
        return (out[0].float(), out[1].contiguous()) if isinstance(out, tuple) else out

    return run


_twins: set[tuple[str, str]] = set()


compiled: bool = _load()
"""Whether the compiled extension loaded."""


def library_path() -> str:
    """Path of the operator library, for a C++ program to link or load.

    Raises:
        InputError: the compiled extension is not there.
    """
    if not compiled:
        raise InputError("library: the compiled operators did not load, so there is no library of them")
    return str(Path(str(importlib.import_module("tsynd.ops._C").__file__)).with_name("libtsynd_ops.so"))


def served_by() -> dict[str, dict[str, str]]:
    """Which code serves each operator on each device: ``compiled`` or ``plain torch``."""
    return {
        name: {key: "plain torch" if (name, key) in _twins else "compiled" for key in ("CPU", "CUDA")}
        for name in _SCHEMAS
    }


def _value_fake(images: int) -> Any:
    """Value and gradient of an operator whose first input has its images at this axis."""

    def fake(given: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        value = given.new_empty(given.shape[images], dtype=torch.float32)
        return value, torch.empty_like(given, memory_format=torch.contiguous_format)

    return fake


def _dropout_mask_fake(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    return sample_ids.new_empty((samples, sample_ids.shape[0], units), dtype=torch.bool)


def _dropout_expand_fake(
    input: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool
) -> Tensor:
    return input.new_empty((input.shape[0] * (1 if passes else samples), *input.shape[1:]))


def _dropout_gather_fake(
    gradient: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool
) -> Tensor:
    return gradient.new_empty((gradient.shape[0] // (1 if passes else samples), *gradient.shape[1:]))


def _ascend_fake(latents: Tensor, gradient: Tensor, origin: Tensor, step: float, radius: float, rule: str) -> None:
    return None


class _Once(torch.autograd.Function):
    """The identity on a gradient that is a number to autograd: differentiating it would silently miss a part."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "gradient of an uncertainty: got a derivative of it to take; the operators are differentiable once"
        )


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.source = inputs[0]  # not saved: its values are not needed, and may change


def _scale_gradient(inputs: int, images: int) -> Any:
    """Backward of an operator with this many inputs: value's gradient times what was returned, images at this axis."""

    def backward(ctx: Any, value: Tensor | None, _: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        if value is None:
            return (None,) * inputs
        scale = value.reshape([-1 if axis == images else 1 for axis in range(gradient.dim())])
        scaled = (gradient * scale).to(gradient.dtype)
        if torch.is_grad_enabled():
            scaled = _Once.apply(scaled, ctx.source)  # type: ignore[no-untyped-call]
        return (scaled, *[None] * (inputs - 1))

    return backward


def _keep_address(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.address = inputs[1:]


def _gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return (torch.ops.tsynd.dropout_gather(gradient, *ctx.address), *[None] * 6)


def _expand_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return (torch.ops.tsynd.dropout_expand(gradient, *ctx.address), *[None] * 6)


torch.library.register_fake("tsynd::dropout_mask", _dropout_mask_fake)
torch.library.register_fake("tsynd::dropout_expand", _dropout_expand_fake)
torch.library.register_fake("tsynd::dropout_gather", _dropout_gather_fake)
torch.library.register_fake("tsynd::ascend_", _ascend_fake)


# operator: inputs and the axis of images; all but the first input (targets, weights) are constants
for _name, _inputs, _images in (
    ("logits_uncertainty", 3, 1),
    ("expected_information", 3, 1),
    ("head_uncertainty", 5, 0),
    ("dropout_head_uncertainty", 10, 0),
):
    torch.library.register_fake(f"tsynd::{_name}", _value_fake(_images))
    torch.library.register_autograd(f"tsynd::{_name}", _scale_gradient(_inputs, _images), setup_context=_keep_gradient)


# linear, and each other's transpose: differentiable as often as one likes
torch.library.register_autograd("tsynd::dropout_expand", _gather_gradient, setup_context=_keep_address)
torch.library.register_autograd("tsynd::dropout_gather", _expand_gradient, setup_context=_keep_address)


def _ascend_counted(keys: Any, latents: Tensor, *rest: Any) -> None:
    """Count the change, so that a backward pass that needs the latents as they were is an error."""
    torch.autograd.graph.increment_version(latents)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.tsynd.ascend_.default.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, latents, *rest)


_new_library: Any = torch.library.Library
_fragment = _new_library("tsynd", "FRAGMENT")  # kept, or what it registers goes
_fragment.impl("ascend_", _ascend_counted, "ADInplaceOrView", with_keyset=True)
