"""Pretrained autoencoders by name: diffusers' models, and the autoencoders of MONAI bundles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.models.autoencoder import as_autoencoder
from tsynd.models.sources import Source, parse_source, trusted
from tsynd.models.weights import load_weights
from tsynd.utils.errors import InputError, check_choice, first_line, require

__all__ = ["AUTOENCODER_TRAINS", "PretrainedAutoencoder", "build_autoencoder"]

AUTOENCODER_TRAINS = ("none", "decoder", "all")
"""Which parts of a pretrained autoencoder are trained on the images at hand."""

_MONAI = ("AutoencoderKL", "VQVAE", "VarAutoEncoder", "AutoEncoder")
_BUNDLE_KEYS = ("autoencoder_def", "autoencoder", "network_def", "network")
_BUNDLE_WEIGHTS = ("autoencoder.safetensors", "autoencoder.pt", "model.safetensors", "model.pt")


class PretrainedAutoencoder(nn.Module):
    """Another library's autoencoder for images of one or three channels in [0, 1], with the latents' deviation.

    :func:`tsynd.autoencoder` makes one.

    Args:
        model: what :func:`tsynd.as_autoencoder` knows.
        channels: of the images.
        trains: one of :data:`AUTOENCODER_TRAINS`.
        pixel_range: what 0 and 1 are to the model; None is what its library says.
        config: what :meth:`rebuild` takes.

    Attributes:
        latent_std: scalar, NaN until ``fit_autoencoder``.

    Raises:
        InputError: a model of another number of channels.
    """

    latent_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        channels: int,
        *,
        trains: str,
        pixel_range: tuple[float, float] | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        check_choice("autoencoder_trains", trains, AUTOENCODER_TRAINS)
        own = _channels(model)
        if own not in (channels, 3) or channels not in (1, 3):
            raise InputError(
                f"autoencoder: {config['source']} takes images of {own} channels, but these have {channels}; wanted an "
                "autoencoder of as many, or of three for grey images"
            )
        self.config, self.trains = config, trains
        self.adapter = as_autoencoder(model, pixel_range=pixel_range, grey=own != channels)
        self.register_buffer("latent_std", torch.tensor(math.nan))
        for parameter in model.parameters():
            parameter.requires_grad_(trains == "all")
        if trains == "decoder":
            for parameter in _decoding(self.adapter, channels):
                parameter.requires_grad_(True)
        self.eval()

    @classmethod
    def rebuild(cls, **config: Any) -> PretrainedAutoencoder:
        """The same network with weights of no meaning, for a checkpoint to fill."""
        source = parse_source(config["source"])
        model, _ = _DOORS[source.kind](source, config["blueprint"])
        ends = config["pixel_range"]
        return cls(
            model,
            config["channels"],
            trains=config["trains"],
            pixel_range=None if ends is None else (ends[0], ends[1]),
            config=config,
        )

    def train(self, mode: bool = True) -> PretrainedAutoencoder:
        """Switch the adapter's clamping with the mode; a frozen model stays as it is."""
        super().train(mode and self.trains != "none")
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, ...] of images [B, C, H, W] in [0, 1]."""
        return self.adapter.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of latents [B, ...]."""
        return self.adapter.decode(latents)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images [B, C, H, W]."""
        return self.decode(self.encode(images))


def build_autoencoder(
    text: str, channels: int, *, trains: str, pixel_range: tuple[float, float] | None
) -> PretrainedAutoencoder:
    """What :func:`tsynd.autoencoder` gives for another library's model; see there."""
    source = parse_source(text)
    if source.kind not in _DOORS:
        raise InputError(
            f"autoencoder: got {text!r}, wanted diffusers:NAME, monai-bundle:PATH, MODULE:FUNCTION, small, or a file"
        )
    trusted(source)
    model, blueprint = _DOORS[source.kind](source, None)
    config: dict[str, Any] = {"source": text, "blueprint": blueprint, "channels": channels, "trains": trains}
    config["pixel_range"] = None if pixel_range is None else list(pixel_range)
    return PretrainedAutoencoder(model.float(), channels, trains=trains, pixel_range=pixel_range, config=config)


def _diffusers(source: Source, blueprint: Mapping[str, Any] | None) -> tuple[nn.Module, dict[str, Any]]:
    library = require("diffusers", "huggingface")
    if blueprint is not None:
        return _diffusers_class(library, blueprint["_class_name"]).from_config(dict(blueprint)), dict(blueprint)
    try:
        kind = _diffusers_class(
            library, library.AutoencoderKL.load_config(source.name, **source.options)["_class_name"]
        )
        model: Any = kind.from_pretrained(source.name, **source.options)
    except InputError:
        raise
    except Exception as error:  # diffusers' own, or whatever its hub's client raises
        raise InputError(
            f"autoencoder: {source.text} cannot be had ({first_line(error)}); wanted a model's name on the Hugging "
            "Face hub, or diffusers:FOLDER of one saved with save_pretrained; a pipeline's is behind ,subfolder=vae"
        ) from error
    about = {"_class_name": type(model).__name__} | {k: v for k, v in dict(model.config).items() if k[0] != "_"}
    return model, json.loads(json.dumps(about))


def _diffusers_class(library: Any, name: object) -> Any:
    if not isinstance(name, str) or not (name.startswith("Autoencoder") or name == "VQModel"):
        raise InputError(f"autoencoder: a diffusers model of the kind {name!r}, wanted an autoencoder")
    return getattr(library, name)


def _monai_bundle(source: Source, blueprint: Mapping[str, Any] | None) -> tuple[nn.Module, dict[str, Any]]:
    """A bundle's network from its definition alone: no expression of its configuration is run."""
    if blueprint is not None:  # of a checkpoint, which fills it
        return _monai_network(source, blueprint), dict(blueprint)
    folder = Path(source.name).expanduser()
    found = _definition(folder, source)
    own = source.options.get("weights")
    files = [folder / str(own)] if own else [folder / "models" / name for name in _BUNDLE_WEIGHTS]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        names = ", ".join(str(path.relative_to(folder)) for path in files)
        raise InputError(f"autoencoder: {folder} holds none of {names}; wanted ,weights=FILE inside it")
    model = _monai_network(source, found)
    load_weights(model, path)
    return model, found


def _monai_network(source: Source, definition: Mapping[str, Any]) -> nn.Module:
    arguments = dict(definition)
    name = str(arguments.pop("_target_")).rpartition(".")[2]
    library = require("monai.networks.nets", "models")
    if name not in _MONAI:
        raise InputError(f"autoencoder: {source.text} holds a {name}, wanted one of {', '.join(_MONAI)}")
    try:
        model: nn.Module = getattr(library, name)(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"autoencoder: {source.text}: MONAI's {name} refuses it: {first_line(error)}") from error
    return model


def _definition(folder: Path, source: Source) -> dict[str, Any]:
    configs = [folder / "configs" / f"{name}.json" for name in ("inference", "train")]
    path = next((path for path in configs if path.is_file()), None)
    if path is None:
        raise InputError(f"autoencoder: {folder} has no configs/inference.json or configs/train.json: no MONAI bundle")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"autoencoder: {path} cannot be read as JSON: {first_line(error)}") from error
    wanted = [source.options["key"]] if "key" in source.options else _BUNDLE_KEYS
    given = [key for key in wanted if isinstance(config, dict) and isinstance(config.get(key), dict)]
    if not given or "_target_" not in config[given[0]]:
        raise InputError(
            f"autoencoder: {path} defines none of {', '.join(wanted)}; wanted ,key=NAME of its autoencoder"
        )
    return dict(_resolved(config[given[0]], config, path, 0))


def _resolved(value: Any, config: Mapping[str, Any], path: Path, depth: int) -> Any:
    """A definition with its references ``@KEY`` and ``@KEY::KEY`` replaced."""
    if depth > 20:
        raise InputError(f"autoencoder: {path}: references go round in a circle, or too deep")
    if isinstance(value, dict):
        return {key: _resolved(item, config, path, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, config, path, depth + 1) for item in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$"):
        return value
    if value[0] == "$":
        raise InputError(f"autoencoder: {path}: {value[:60]!r} is an expression, which is not run; wanted plain values")
    found: Any = config
    for part in value[1:].replace("#", "::").split("::"):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise InputError(f"autoencoder: {path}: nothing is called {value}") from None
    return _resolved(found, config, path, depth + 1)


def _called(source: Source, blueprint: Mapping[str, Any] | None) -> tuple[nn.Module, dict[str, Any]]:
    """``MODULE:FUNCTION``; rebuilt from a file only where it was named in this process."""
    make = source.function(known=blueprint is None, what="autoencoder")
    try:
        model = make(**source.options)
    except Exception as error:  # anything: it is another's code
        raise InputError(
            f"autoencoder: {source.text} cannot be had ({first_line(error)}); wanted MODULE:FUNCTION,option=value,..."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"autoencoder: {source.text} gave {type(model).__name__}, wanted an nn.Module")
    return model, {}


_DOORS = {"diffusers": _diffusers, "monai-bundle": _monai_bundle, "call": _called}


def _channels(model: nn.Module) -> int:
    """What the first convolution takes."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    raise InputError(f"autoencoder: {type(model).__name__} has no convolution, wanted one for images")


def _decoding(adapter: Any, channels: int) -> list[nn.Parameter]:
    """The parameters that decoding uses, found by doing it once."""
    model: nn.Module = adapter
    side = 64
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        latents = adapter.encode(torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)))
    with torch.enable_grad():
        adapter.decode(latents.detach()).sum().backward()
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    return used
