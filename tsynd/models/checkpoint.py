"""Models on disk: weights as safetensors, everything else as JSON; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.models import networks
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.models.pretrained_autoencoder import PretrainedAutoencoder
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, require
from tsynd.utils.version import __version__

__all__ = ["ModelCard", "load_model", "read_card", "save_model"]

_REGISTRY: dict[str, type[nn.Module]] = {
    "SmallResNet": networks.SmallResNet,
    "SmallAutoencoder": networks.SmallAutoencoder,
    "PretrainedClassifier": PretrainedClassifier,
    "PretrainedAutoencoder": PretrainedAutoencoder,
}


@dataclass(frozen=True)
class ModelCard:
    """The JSON beside the weights.

    Attributes:
        model: class name, a key of the registry.
        config: what the class's ``rebuild`` takes or, where it has none, its constructor.
        class_names: names of the classes or labels, in the order of the logits.
        image_shape: [C, H, W] of the training images.
        task: "multiclass" or "multilabel", None for an autoencoder.
        tsynd: version that wrote the file.
        sha256: of the safetensors file, so that two halves of different saves are not taken for one.
    """

    model: str
    config: dict[str, Any]
    class_names: list[str] | None
    image_shape: list[int] | None
    task: str | None
    tsynd: str
    sha256: str


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """NAME.safetensors and NAME.json of NAME or NAME.safetensors (a dot in NAME is no suffix)."""
    name = os.fspath(path).removesuffix(".safetensors")
    return Path(name + ".safetensors"), Path(name + ".json")


def save_model(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    image_shape: Sequence[int] | None = None,
    task: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``NAME.safetensors`` and ``NAME.json``; both appear whole or not at all.

    Args:
        module: one of tsynd's networks, what :func:`tsynd.classifier` made, or any other with ``name``; on any device.
        path: ``NAME`` or ``NAME.safetensors``; the folder is made if missing.
        class_names: names of the classes or labels, in the order of the logits.
        image_shape: [C, H, W] of the training images.
        task: "multiclass" or "multilabel".
        name: under which ``load_model(path, builders={name: function})`` finds the function that makes such a module;
            a file itself never says which code runs.
        config: keywords of that function, JSON values.

    Returns:
        The path of the safetensors file.

    Raises:
        InputError: a module that could not be rebuilt from a file.
    """
    kind = type(module).__name__
    if name is None and _REGISTRY.get(kind) is not type(module):
        raise InputError(f"module: got {kind}, wanted one of {', '.join(_REGISTRY)}; for others give a name")
    if name in _REGISTRY:
        raise InputError(f"name: got {name!r}, which is tsynd's own, wanted another")
    given = dict(config or {}) if name is not None else module.config
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {error}; wanted JSON values") from None
    # Copies: safetensors wants contiguous tensors of their own, on the CPU.
    state = {
        key: value.detach()
        .to("cpu", memory_format=torch.contiguous_format)
        .clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    content: bytes = require("safetensors.torch", "models").save(state)
    card = ModelCard(
        model=name or kind,
        config=given,  # type: ignore[arg-type]
        class_names=None if class_names is None else [str(item) for item in class_names],
        image_shape=None if image_shape is None else [int(size) for size in image_shape],
        task=task,
        tsynd=__version__,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    weights, sheet = _paths(path)
    # the JSON, which names the weights' hash, is renamed last: until then the old pair stays readable or is refused
    with atomic_path(sheet) as sheet_file, atomic_path(weights) as weights_file:
        weights_file.write_bytes(content)
        sheet_file.write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    return weights


def read_card(path: str | os.PathLike[str], names: Sequence[str] = tuple(_REGISTRY)) -> ModelCard:
    """Read ``NAME.json``.

    Args:
        path: ``NAME`` or ``NAME.safetensors``.
        names: of the modules that can be rebuilt.

    Raises:
        InputError: a file that is missing, no JSON, lacks a field, or names another module.
    """
    _, sheet = _paths(path)
    try:
        content = json.loads(sheet.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{sheet}: no such file, wanted the JSON that save_model wrote beside the weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{sheet}: cannot be read as JSON: {error}") from None
    fields = set(ModelCard.__dataclass_fields__)
    missing = sorted(fields - set(content)) if isinstance(content, dict) else sorted(fields)
    if missing:
        raise InputError(f"{sheet}: lacks {', '.join(missing)}")
    if content["model"] not in list(names):  # a list also takes what cannot be hashed
        raise InputError(f"{sheet}: model {content['model']!r}, wanted one of {', '.join(names)}")
    classes = content["class_names"]
    if classes is not None and not (isinstance(classes, list) and all(isinstance(item, str) for item in classes)):
        raise InputError(f"{sheet}: class_names {classes!r}, wanted a list of names or null")
    if not isinstance(content["config"], dict):
        raise InputError(f"{sheet}: config is a {type(content['config']).__name__}, wanted an object")
    return ModelCard(**{key: content[key] for key in fields})


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    builders: Mapping[str, Callable[..., nn.Module]] | None = None,
) -> nn.Module:
    """Rebuild a module that :func:`save_model` wrote; :func:`read_card` gives the rest of the file.

    Args:
        path: ``NAME`` or ``NAME.safetensors``.
        device: where the module shall live.
        builders: name -> function that makes the module of the saved ``config``, for what was saved with a ``name``.

    Returns:
        The module, in eval mode.

    Raises:
        InputError: a file that is missing, truncated, of another save or of another model, or whose weights are not
            finite floating-point numbers where the module's are.
    """
    known: dict[str, Callable[..., nn.Module]] = {**(builders or {}), **_REGISTRY}
    card = read_card(path, tuple(known))
    weights, sheet = _paths(path)
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise InputError(f"{weights}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise InputError(f"{weights}: truncated, changed, or not the file that {sheet.name} describes (sha256)")
    safetensors = require("safetensors", "models")
    try:
        state = require("safetensors.torch", "models").load(content)
    except safetensors.SafetensorError as error:
        raise InputError(f"{weights}: no safetensors file: {error}") from error
    try:
        with torch.random.fork_rng(devices=[]):  # construction draws initial weights
            kind = known[card.model]
            module: nn.Module = getattr(kind, "rebuild", kind)(**card.config)
        _check_state(module, state)
        module.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{weights}: does not fit the {card.model} in {sheet.name}: {reason}") from error
    return module.to(device).eval()


def _check_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Refuse parameters of another kind of number, or that are not finite."""
    for key, own in module.named_parameters():
        value = state.get(key)
        if value is None:
            continue  # load_state_dict names what is missing
        if value.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{key} holds {value.dtype}, wanted {own.dtype}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key} holds values that are not finite")
