"""The operators of ``torch.ops.tsynd`` with documentation, fake kernels and autograd rules.

Importing this module registers them: from the compiled extension ``tsynd._C`` where it loads, otherwise from
the plain-torch twins of :mod:`tsynd.reference` (same results, slower), which is said once in a warning. Twins also
serve an operator on a device that it has no compiled kernel for yet; :func:`served_by` tells.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsynd import reference
from tsynd.errors import InputError

__all__ = [
    "ascend_",
    "compiled",
    "dropout_expand",
    "dropout_gather",
    "dropout_head_uncertainty",
    "dropout_mask",
    "head_uncertainty",
    "library_path",
    "logits_uncertainty",
    "served_by",
]

_SCHEMAS = {
    "logits_uncertainty": "(Tensor logits, str objective, str task) -> (Tensor value, Tensor gradient)",
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
        from tsynd import _C  # noqa: F401  (registers the operators)

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
        return (out[0].float(), out[1]) if isinstance(out, tuple) else out

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
    return str(Path(str(importlib.import_module("tsynd._C").__file__)).with_name("libtsynd_ops.so"))


def served_by() -> dict[str, dict[str, str]]:
    """Which code serves each operator on each device: ``compiled`` or ``plain torch``."""
    return {
        name: {key: "plain torch" if (name, key) in _twins else "compiled" for key in ("CPU", "CUDA")}
        for name in _SCHEMAS
    }


def _logits_uncertainty_fake(logits: Tensor, objective: str, task: str) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[1], dtype=torch.float32), torch.empty_like(
        logits, memory_format=torch.contiguous_format
    )


def _head_fake(features: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape[0], dtype=torch.float32), torch.empty_like(
        features, memory_format=torch.contiguous_format
    )


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


torch.library.register_fake("tsynd::logits_uncertainty", _logits_uncertainty_fake)
torch.library.register_fake("tsynd::head_uncertainty", _head_fake)
torch.library.register_fake("tsynd::dropout_head_uncertainty", _head_fake)
torch.library.register_fake("tsynd::dropout_mask", _dropout_mask_fake)
torch.library.register_fake("tsynd::dropout_expand", _dropout_expand_fake)
torch.library.register_fake("tsynd::dropout_gather", _dropout_gather_fake)
torch.library.register_fake("tsynd::ascend_", _ascend_fake)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _scale_logits_gradient(ctx: Any, value: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    (gradient,) = ctx.saved_tensors
    return None if value is None else (gradient * value[None, :, None]).to(gradient.dtype), None, None


def _scale_features_gradient(inputs: int) -> Any:
    def backward(ctx: Any, value: Tensor | None, _: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = None if value is None else (gradient * value[:, None]).to(gradient.dtype)
        return (scaled, *[None] * (inputs - 1))

    return backward


torch.library.register_autograd("tsynd::logits_uncertainty", _scale_logits_gradient, setup_context=_keep_gradient)
torch.library.register_autograd("tsynd::head_uncertainty", _scale_features_gradient(5), setup_context=_keep_gradient)
torch.library.register_autograd(
    "tsynd::dropout_head_uncertainty", _scale_features_gradient(10), setup_context=_keep_gradient
)


def _keep_address(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.address = inputs[1:]


def _gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return (torch.ops.tsynd.dropout_gather(gradient, *ctx.address), *[None] * 6)


def _expand_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return (torch.ops.tsynd.dropout_expand(gradient, *ctx.address), *[None] * 6)


# linear, and each other's transpose: differentiable as often as one likes
torch.library.register_autograd("tsynd::dropout_expand", _gather_gradient, setup_context=_keep_address)
torch.library.register_autograd("tsynd::dropout_gather", _expand_gradient, setup_context=_keep_address)


def logits_uncertainty(
    logits: Tensor, objective: str = "mutual_information", task: str = "multiclass"
) -> tuple[Tensor, Tensor]:
    """Uncertainty of T posterior samples' logits, and its gradient, in one pass.

    Args:
        logits: [T, B, C] float32 or bfloat16 (float16 on CUDA).
        objective: ``mutual_information`` (BALD, Houlsby et al. 2011) or ``entropy`` of the mean prediction.
        task: ``multiclass`` (softmax over C) or ``multilabel`` (a sigmoid per label, summed over labels).

    Returns:
        value [B] float32 in nats (0 <= MI <= log C, or C log 2 for multilabel) and d value / d logits
        [T, B, C]. The value is differentiable; the gradient is not differentiable again.

    Raises:
        RuntimeError: wrong rank, dtype, device, objective or task; the message names the argument.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.logits_uncertainty(logits, objective, task)
    return out


def head_uncertainty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    objective: str = "mutual_information",
    task: str = "multiclass",
) -> tuple[Tensor, Tensor]:
    """Uncertainty under T sampled linear heads (shared masks, an ensemble's or a Laplace posterior's last layers).

    On CUDA the environment's ``TSYND_CUDA_HEAD`` (wgmma, fused or rows) names the best kernel it may take.

    Args:
        features: [B, D].
        weight: [T, C, D]; no gradient flows to it.
        bias: [T, C] or None; no gradient flows to it.
        objective: as in :func:`logits_uncertainty`.
        task: as in :func:`logits_uncertainty`.

    Returns:
        value [B] float32 in nats and d value / d features [B, D]; differentiable as in
        :func:`logits_uncertainty`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.head_uncertainty(features, weight, bias, objective, task)
    return out


def dropout_head_uncertainty(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    samples: int,
    seed: int,
    layer: int,
    sample_ids: Tensor,
    objective: str = "mutual_information",
    task: str = "multiclass",
) -> tuple[Tensor, Tensor]:
    """Uncertainty of a linear head behind dropout with a fresh mask per image and pass, made in the kernel.

    Args:
        features: [B, D], before the dropout.
        weight: [C, D]; no gradient flows to it.
        bias: [C] or None; no gradient flows to it.
        p: drop probability in [0, 1), quantised to 1/256 (:func:`tsynd.reference.keep_count`).
        samples: T, at least 1.
        seed: any 64-bit integer.
        layer: number of the dropout in the network, 0 .. 2^32 - 1.
        sample_ids: [B] int64 in [0, 2^32), the images' global indices.
        objective: as in :func:`logits_uncertainty`.
        task: as in :func:`logits_uncertainty`.

    Returns:
        value [B] float32 in nats and d value / d features [B, D]; differentiable as in
        :func:`logits_uncertainty`.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    out: tuple[Tensor, Tensor] = torch.ops.tsynd.dropout_head_uncertainty(
        features, weight, bias, p, samples, seed, layer, sample_ids, objective, task
    )
    return out


def dropout_mask(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """Which units are kept, addressed by (seed, layer, pass, sample id, unit) alone.

    Args:
        units: D, elements of one image at that layer.
        p: drop probability in [0, 1), quantised to 1/256.
        samples: T, at least 1.
        seed: any 64-bit integer.
        layer: 0 .. 2^32 - 1.
        sample_ids: [N] int64 in [0, 2^32); one id 0 for masks shared by all images.

    Returns:
        [T, N, D] bool on the device of ``sample_ids``.
    """
    mask: Tensor = torch.ops.tsynd.dropout_mask(units, p, samples, seed, layer, sample_ids)
    return mask


def dropout_expand(
    input: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Activations of T passes behind addressed dropout, without a mask in memory: kept units times 1 / keep rate.

    Args:
        input: [B, D, R], D units of R values each (R = 1 for elementwise dropout, the map's size for channel
            dropout); or [T * B, D, R], pass-major, where ``passes``.
        p: drop probability in [0, 1), quantised to 1/256.
        samples: T, at least 1.
        seed: any 64-bit integer.
        layer: 0 .. 2^32 - 1.
        sample_ids: [B] int64 in [0, 2^32), or one id for masks shared by all images.
        passes: whether ``input`` has its own values for every pass already.

    Returns:
        [T * B, D, R], pass-major; differentiable.
    """
    out: Tensor = torch.ops.tsynd.dropout_expand(input, p, samples, seed, layer, sample_ids, passes)
    return out


def dropout_gather(
    gradient: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    """Transpose of :func:`dropout_expand`: [T * B, D, R] to [B, D, R], summed over passes, or to [T * B, D, R]."""
    out: Tensor = torch.ops.tsynd.dropout_gather(gradient, p, samples, seed, layer, sample_ids, passes)
    return out


def ascend_(latents: Tensor, gradient: Tensor, origin: Tensor, step: float, radius: float, rule: str = "l2") -> None:
    """One projected ascent step in place, each image by itself.

    ``l2``: z <- P(z + step * g / |g|) onto the ball |z - origin| <= radius; ``linf``: z <- P(z + step * sign(g))
    onto the box. An image whose gradient is zero or not finite stays where it is.

    Args:
        latents: [B, ...], changed in place.
        gradient: [B, ...], same dtype and device.
        origin: [B, ...], the balls' centres.
        step: length of the step, in latent units.
        radius: of the ball, in latent units, at least 0.
        rule: ``l2`` or ``linf``.
    """
    torch.ops.tsynd.ascend_(latents, gradient, origin, step, radius, rule)
