"""Models on disk: weights as safetensors, everything else as JSON; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
) -> Path:
    """Write ``NAME.safetensors`` and ``NAME.json``; both appear whole or not at all.

    Args:
        module: one of tsynd's networks, or what :func:`tsynd.classifier` made, on any device.
        path: ``NAME`` or ``NAME.safetensors``; the folder is made if missing.
        class_names: names of the classes or labels, in the order of the logits.
        image_shape: [C, H, W] of the training images.
        task: "multiclass" or "multilabel".

    Returns:
        The path of the safetensors file.

    Raises:
        InputError: a module that could not be rebuilt from a file.
    """
    name = type(module).__name__
    if _REGISTRY.get(name) is not type(module):
        raise InputError(f"module: got {name}, wanted one of {', '.join(_REGISTRY)}")
    # Copies: safetensors wants contiguous tensors of their own, on the CPU.
    state = {
        key: value.detach()
        .to("cpu", memory_format=torch.contiguous_format)
        .clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    content: bytes = require("safetensors.torch", "models").save(state)
    card = ModelCard(
        model=name,
        config=module.config,  # type: ignore[arg-type]
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


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """Read ``NAME.json``.

    Args:
        path: ``NAME`` or ``NAME.safetensors``.

    Raises:
        InputError: a file that is missing, no JSON, or lacks a field.
    """
    _, sheet = _paths(path)
    try:
        content = json.loads(sheet.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{sheet}: no such file, wanted the JSON that save_model wrote beside the weights") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{sheet}: cannot be read as JSON: {error}") from error
    fields = set(ModelCard.__dataclass_fields__)
    missing = sorted(fields - set(content)) if isinstance(content, dict) else sorted(fields)
    if missing:
        raise InputError(f"{sheet}: lacks {', '.join(missing)}")
    if content["model"] not in list(_REGISTRY):  # a list also takes what cannot be hashed
        raise InputError(f"{sheet}: model {content['model']!r}, wanted one of {', '.join(_REGISTRY)}")
    if not isinstance(content["config"], dict):
        raise InputError(f"{sheet}: config is a {type(content['config']).__name__}, wanted an object")
    return ModelCard(**{key: content[key] for key in fields})


def load_model(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild a module that :func:`save_model` wrote; :func:`read_card` gives the rest of the file.

    Args:
        path: ``NAME`` or ``NAME.safetensors``.
        device: where the module shall live.

    Returns:
        The module, in eval mode.

    Raises:
        InputError: a file that is missing, truncated, of another save or of another model.
    """
    card = read_card(path)
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
            kind = _REGISTRY[card.model]
            module: nn.Module = getattr(kind, "rebuild", kind)(**card.config)
        module.load_state_dict(state)
    except InputError as error:
        raise InputError(f"{sheet}: {error}") from error
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{weights}: does not fit the {card.model} in {sheet.name}: {reason}") from error
    return module.to(device).eval()
