"""What each kind of file computes, as functions of tensors that are recorded and checked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.export.runtime import FORMAT_VERSION, KINDS
from tsynd.fx.folding import folded_decoder
from tsynd.fx.layout import LaidOut, Order, contiguous
from tsynd.models.autoencoder import Autoencoder, autoencoder_of, check_autoencoder, known_latent_std
from tsynd.ops import operators as ops
from tsynd.ops import reference
from tsynd.posteriors.mc_dropout import MCDropout, as_posterior
from tsynd.posteriors.passes import undivided
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import AscentSettings, ascend_latents
from tsynd.synthesis.objectives import EXPECTED
from tsynd.utils.errors import InputError, check_choice, first_line
from tsynd.utils.version import __version__

__all__ = ["Program", "prepare", "write_path"]

_NEEDS_POSTERIOR = ("classifier", "features", "step", "synthesizer")
_NEEDS_AUTOENCODER = ("encoder", "decoder", "step", "synthesizer")
_OUTPUTS = {
    "classifier": ("probabilities", "mutual_information", "entropy"),
    "features": ("features",),
    "encoder": ("latents",),
    "decoder": ("images",),
    "step": ("next_latents", "value"),
    "synthesizer": ("targeted", "latents", "initial_uncertainty", "uncertainty", "status"),
}


@dataclass(frozen=True)
class Program:
    """One function to export.

    Attributes:
        kind: one of :data:`tsynd.export.runtime.KINDS`, or ``features``.
        run: the function, of tensors [B, ...] float32 in the order of ``inputs``.
        inputs: name -> shape of one item.
        outputs: names.
        metadata: what a file tells of itself, JSON values.
        modules: the networks in it.
        warm: runs the networks forward once.
        encode: images -> latents; the images themselves where there is no autoencoder.
        measure: decoded images and uncertainty of latents, for kinds that climb.
        limits: length of a step and of the ball in latent units, and the rule, for kinds that climb.
    """

    kind: str
    run: Callable[..., tuple[Tensor, ...]]
    inputs: dict[str, list[int]]
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
    modules: tuple[nn.Module, ...]
    warm: Callable[[], Any]
    encode: Callable[[Tensor], Tensor]
    measure: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    limits: tuple[float, float, str] | None = None

    @property
    def argument(self) -> str:
        """Where its networks come from, for errors."""
        given = {"autoencoder": _NEEDS_AUTOENCODER, "classifier": _NEEDS_POSTERIOR}
        return " or ".join(name for name, kinds in given.items() if self.kind in kinds)

    def examples(self, count: int, seed: int = 0) -> dict[str, Tensor]:
        """Random images, or what the autoencoder makes of them, as inputs."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(count, *self.metadata["image_shape"], generator=generator)
        if "images" in self.inputs:
            return {"images": images}
        with torch.no_grad():
            latents = self.encode(images)
        return {"latents": latents, "origins": latents * 0.9} if self.kind == "step" else {"latents": latents}


@contextlib.contextmanager
def prepare(
    kind: str,
    classifier: nn.Module | Posterior | None,
    autoencoder: Any,
    image_shape: Sequence[int],
    settings: AscentSettings,
    seed: int,
    class_names: Sequence[str] | None,
    kinds: Sequence[str] = KINDS,
    layout: Order = contiguous,
) -> Iterator[Program]:
    """Check the arguments and yield the program; inside, its networks are frozen.

    Args:
        kind: one of ``kinds``.
        classifier: see :func:`tsynd.export_onnx`, as the other arguments.
        autoencoder: see there.
        image_shape: [C, H, W] or [C, D, H, W].
        settings: of the ascent and of its posterior samples.
        seed: of the posterior samples.
        class_names: kept in the metadata.
        kinds: what can be asked for.
        layout: puts the weights in order for the recording.

    Raises:
        InputError: an argument does not fit.
    """
    check_choice("kind", kind, tuple(kinds))
    if settings.objective == EXPECTED:
        raise InputError(f"objective: got {EXPECTED!r}, wanted another: a file has no target images")
    if settings.label_consistency is not None:
        raise InputError("label_consistency: got a limit, wanted None: an exported file sees no labels")
    shape = _check_shape(image_shape)
    posterior = _posterior(kind, classifier, settings, seed) if kind in _NEEDS_POSTERIOR else None
    model = autoencoder_of(autoencoder) if kind in _NEEDS_AUTOENCODER else None
    modules = (*(posterior.networks if posterior else ()), *((model,) if isinstance(model, nn.Module) else ()))
    _check_parameters(modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(*modules))
        probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
        if posterior is not None:
            stack.enter_context(undivided())
            stack.enter_context(posterior.frozen())
            with _named(probe), torch.no_grad():
                posterior.logits(probe)
            stack.enter_context(posterior.folded())  # as tsynd.synthesize does
            stack.enter_context(posterior.laid_out(layout))
        latent: list[int] = []
        decode: Callable[[Tensor], Tensor] | None = None
        if model is not None:
            check_autoencoder(model, probe)
            model = LaidOut(model, layout).module
            with torch.no_grad():
                latents = model.encode(probe).float()
            latent, decode = list(latents.shape[1:]), folded_decoder(model, latents)

        def warm() -> None:
            with torch.no_grad():
                images = probe if model is None or decode is None else decode(model.encode(probe))
                if posterior is not None:
                    posterior.logits(images)

        with _named(probe):
            warm()  # what is worked out and cached at the first call must not be recorded
        yield _program(kind, posterior, model, decode, settings, shape, latent, class_names, modules, warm)


@contextlib.contextmanager
def _named(images: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise InputError(f"classifier: failed on images {list(images.shape)}: {first_line(error)}") from None


def _program(
    kind: str,
    posterior: Posterior | None,
    model: Autoencoder | None,
    decode: Callable[[Tensor], Tensor] | None,
    settings: AscentSettings,
    shape: list[int],
    latent: list[int],
    class_names: Sequence[str] | None,
    modules: tuple[nn.Module, ...],
    warm: Callable[[], Any],
) -> Program:
    climbs = kind in ("step", "synthesizer")
    metadata: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "version": __version__,
        "kind": kind,
        "image_shape": shape,
        "image_range": [0, 1],
        "latent_shape": latent or None,
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "samples": posterior.samples if posterior else None,
        "seed": getattr(posterior, "seed", None),
        "task": settings.task if posterior else None,
    }
    encode = (lambda x: x) if model is None else torch.no_grad()(lambda x: model.encode(x).float())
    if not climbs:
        inputs = {"latents": latent} if kind == "decoder" else {"images": shape}
        run = _plain(kind, posterior, encode, decode, settings.task)
        return Program(kind, run, inputs, _OUTPUTS[kind], metadata, modules, warm, encode)
    assert posterior is not None
    assert model is not None
    assert decode is not None
    deviation = _deviation(model, settings.latent_std)
    step, radius = settings.lengths(deviation, math.prod(latent))
    metadata |= {
        "objective": settings.objective,
        "steps": settings.steps,
        "radius": settings.radius,
        "step_size": settings.step_size,
        "rule": settings.rule,
        "latent_std": deviation,
    }

    def measure(latents: Tensor) -> tuple[Tensor, Tensor]:
        images = decode(latents).clamp(0, 1)
        return images, posterior.uncertainty(images, None, settings.objective, settings.task)

    def climb(images: Tensor) -> tuple[Tensor, ...]:
        source = encode(images)
        ids = torch.zeros(1, dtype=torch.int64)  # masks are shared: no image has its own
        done = ascend_latents(posterior, decode, source, ids, settings, deviation)
        return done.images, done.latents, done.trajectory[0], done.uncertainty, done.status

    def move(latents: Tensor, origins: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_(True)
            value = measure(leaf)[1]
            gradient = torch.autograd.grad(value.sum(), leaf)[0]
        moved = latents.clone()
        ops.ascend_(moved, gradient.float(), origins, step, radius, settings.rule)
        return moved, value.detach()

    limits = (step, radius, settings.rule)
    if kind == "step":
        inputs = {"latents": latent, "origins": latent}
        return Program(kind, move, inputs, _OUTPUTS[kind], metadata, modules, warm, encode, measure, limits)
    inputs = {"images": shape}
    return Program(kind, climb, inputs, _OUTPUTS[kind], metadata, modules, warm, encode, measure, limits)


def _plain(
    kind: str,
    posterior: Posterior | None,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor] | None,
    task: str,
) -> Callable[..., Any]:
    """The kinds without an ascent."""

    def classify(images: Tensor) -> tuple[Tensor, ...]:
        assert posterior is not None
        logits = posterior.logits(images).float()
        mean = (logits.softmax(-1) if task == "multiclass" else logits.sigmoid()).mean(0)
        return mean, *(ops.logits_uncertainty(logits, name, task)[0] for name in reference.OBJECTIVES)

    def features(images: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(posterior, MCDropout)
        return (posterior.features(images),)

    def decoded(latents: Tensor) -> tuple[Tensor, ...]:
        assert decode is not None
        return (decode(latents).clamp(0, 1),)

    run = {"classifier": classify, "features": features, "encoder": lambda x: (encode(x),), "decoder": decoded}[kind]
    return torch.no_grad()(run)


def _check_shape(image_shape: Sequence[int]) -> list[int]:
    shape = list(image_shape)
    if len(shape) not in (3, 4) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"image_shape: got {shape}, wanted [C, H, W] or [C, D, H, W]")
    return shape


def _posterior(kind: str, classifier: nn.Module | Posterior | None, settings: AscentSettings, seed: int) -> Posterior:
    if classifier is None:
        raise InputError("classifier: got None, wanted a module or a tsynd.Posterior for this kind")
    posterior = as_posterior(classifier, settings.samples, settings.masks, seed)
    if kind == "features" and not isinstance(posterior, MCDropout):
        raise InputError(f"classifier: got {type(posterior).__name__}, wanted MC dropout for 'features'")
    if isinstance(posterior, MCDropout) and posterior.masks != "shared":
        raise InputError(
            "masks: got 'independent', wanted 'shared': masks that differ by image cannot be constants of a file; "
            "export MCDropout(classifier, masks='shared')"
        )
    return posterior


def _check_parameters(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            if parameter.device.type != "cpu":
                raise InputError(f"{type(module).__name__}: on {parameter.device}, wanted on the CPU for an export")
            if parameter.dtype != torch.float32:
                raise InputError(f"{type(module).__name__}: has {parameter.dtype} parameters, wanted float32")


def _deviation(model: Autoencoder, given: float | None) -> float:
    value = given or known_latent_std(model)
    if value is None:
        raise InputError(
            f"latent_std: got None, and the autoencoder's own is {getattr(model, 'latent_std', None)}; wanted a number "
            "above 0, for instance from tsynd.fit_autoencoder"
        )
    return value


def write_path(path: str | Path, suffix: str) -> Path:
    """The path, if it ends as such a file must.

    Raises:
        InputError: it does not.
    """
    target = Path(path).expanduser()
    if target.suffix != suffix:
        raise InputError(f"path: got {path}, wanted a name that ends in {suffix}")
    return target
