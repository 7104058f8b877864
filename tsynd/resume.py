"""The state of a training on disk, so that a killed one goes on as if nothing had happened; never pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.errors import InputError, require
from tsynd.storage import atomic_path

__all__ = ["TrainingState", "load_state", "save_state"]


@dataclass
class TrainingState:
    """What a training is made of besides its settings.

    Attributes:
        step: finished iterations.
        losses: of those.
        extra: what an augmentation's ``state_dict`` said.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    held = {f"module.{key}": value for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        held |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    held["generator.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        held["generator.cuda"] = torch.cuda.get_rng_state(device)
    return held


def save_state(
    path: Path,
    settings: dict[str, Any],
    state: TrainingState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Write everything as one safetensors file; the old one stays until the new one is on the disk."""
    held = {
        key: value.detach()
        .to("cpu", memory_format=torch.contiguous_format)
        .clone(memory_format=torch.contiguous_format)
        for key, value in _tensors(module, optimizer, device).items()
    }
    held["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    about = {"settings": json.dumps(settings), "step": str(state.step), "extra": json.dumps(state.extra)}
    content: bytes = require("safetensors.torch", "models").save(held, metadata=about)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load_state(
    path: Path,
    settings: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> TrainingState:
    """Put the modules, the optimiser and the generators where the file says; a fresh state where there is no file.

    Raises:
        InputError: the file is damaged, or of a training with other settings.
    """
    if not path.exists():
        return TrainingState()
    try:
        with require("safetensors", "models").safe_open(str(path), framework="pt") as file:
            about = file.metadata()
            then, step, extra = json.loads(about["settings"]), int(about["step"]), json.loads(about["extra"])
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (require("safetensors", "models").SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"checkpoint: {path} cannot be read ({type(error).__name__}); delete it") from None
    differ = [key for key in settings if then.get(key) != settings[key]]
    if differ:
        changes = ", ".join(f"{key} {then.get(key)!r} → {settings[key]!r}" for key in differ)
        raise InputError(f"checkpoint: {path} is of a training with other settings ({changes}); wanted another file")
    try:
        module.load_state_dict({k.removeprefix("module."): v for k, v in held.items() if k.startswith("module.")})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in held.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:  # as the optimiser makes it: in the parameter's memory order
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                optimizer.state[parameter][name] = value
        torch.set_rng_state(held["generator.cpu"])
        if device.type == "cuda" and "generator.cuda" in held:
            torch.cuda.set_rng_state(held["generator.cuda"], device)
    except (RuntimeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint: {path} does not fit this model: {reason}") from error
    return TrainingState(step, held["losses"].tolist(), extra)
