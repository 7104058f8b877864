"""Pretrained classifiers by name: another library's network without its last layer, below a head of our own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.models.classifier import take_logits
from tsynd.models.networks import keep_inputs
from tsynd.models.sources import Source, parse_source, trusted
from tsynd.models.weights import load_weights
from tsynd.utils.errors import InputError, MissingExtraError, check_choice, check_whole, first_line, require

__all__ = ["TRAINS", "PretrainedClassifier", "build_classifier"]

TRAINS = ("head", "last_block", "all")
"""Which parts of a pretrained classifier are trained; the others stay as they came."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_USUAL_SIZE = 224


@dataclass(frozen=True)
class _Network:
    """A network as its library gives it: its usual pixels, and what makes it again without weights."""

    module: nn.Module
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    blueprint: dict[str, Any]


class PretrainedClassifier(nn.Module):
    """Images → the network without its last layer (the encoder) → dropout → a linear layer of its own.

    The encoder is always in eval mode: its batch norms keep the statistics that they came with, and its own dropout is
    off, so that the posterior's samples are those of the head. :func:`tsynd.classifier` makes one.

    Args:
        encoder: gives features [B, D] of standardised images [B, 3, H, W].
        features: D.
        num_classes: number of logits.
        dropout: probability in (0, 1) that a feature is dropped before the last layer.
        trains: one of :data:`TRAINS`.
        size: images are brought to this square before the encoder; None leaves them as they are.
        mean: what the encoder's library subtracts of pixels in [0, 1], one number a channel.
        std: what it divides by.
        config: what :meth:`rebuild` takes.

    Attributes:
        features_folder: where a training keeps the features of images that it has seen; None keeps them in memory.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        num_classes: int,
        *,
        dropout: float,
        trains: str,
        size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        check_choice("trains", trains, TRAINS)
        check_whole("classes", num_classes)
        if not 0 < dropout < 1:
            raise InputError(f"dropout: got {dropout!r}, wanted a number between 0 and 1")
        self.config, self.trains, self.size = config, trains, size
        self.features_folder: Path | None = None
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))
        for name, values in (("mean", mean), ("std", std)):
            shaped = torch.tensor([float(value) for value in values]).reshape(1, -1, 1, 1)
            self.register_buffer(name, shaped, persistent=False)
        _quiet(encoder)
        keep_inputs(encoder)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for parameter in encoder.parameters():
            parameter.requires_grad_(trains == "all")
        if trains == "last_block":
            for parameter in _last_block(encoder):
                parameter.requires_grad_(True)
        self.train(self.training)

    @classmethod
    def rebuild(cls, **config: Any) -> PretrainedClassifier:
        """The same network with weights of no meaning, for a checkpoint to fill."""
        source = parse_source(config["source"])
        network = _DOORS[source.kind](source, None, config["blueprint"])
        encoder, features = _cut(network.module, config["last_layer"])
        keep = ("num_classes", "dropout", "trains", "size", "mean", "std")
        return cls(encoder, features, **{name: config[name] for name in keep}, config=config)

    def train(self, mode: bool = True) -> PretrainedClassifier:
        """Switch the head alone."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def frozen(self) -> bool:
        """Whether the head alone is trained, so that an image has the same features at every step."""
        return self.trains == "head"

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 1 or 3, H, W] in [0, 1].

        Raises:
            InputError: images of another shape.
        """
        if isinstance(images, Tensor) and (images.dim() != 4 or images.shape[1] not in (1, 3)):
            raise InputError(
                f"images: got shape {list(images.shape)}, wanted [B, 1 or 3, H, W] for a pretrained network"
            )
        pixels = images.expand(-1, 3, -1, -1)
        if self.size is not None:
            pixels = functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return take_logits(self.encoder((pixels - self.mean) / self.std))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 1 or 3, H, W] in [0, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def parameter_groups(self, learning_rate: float, decay: float = 0.1) -> list[dict[str, Any]]:
        """What an optimiser trains, each part slower than the one above it.

        Args:
            learning_rate: of the head; the last block's is ``decay`` times that, the rest's ``decay`` squared.
            decay: see there.
        """
        block = {id(parameter) for parameter in _last_block(self.encoder)}
        parts: list[list[nn.Parameter]] = [list(self.head.parameters()), [], []]
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                parts[1 if id(parameter) in block else 2].append(parameter)
        return [{"params": part, "lr": learning_rate * decay**depth} for depth, part in enumerate(parts) if part]


def build_classifier(
    text: str,
    classes: int,
    *,
    pretrained: bool,
    weights: Path | None,
    dropout: float,
    trains: str,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    last_layer: str | None,
) -> PretrainedClassifier:
    """What :func:`tsynd.classifier` gives for another library's network; see there."""
    check_whole("image_size", image_size, optional=True)
    for argument, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or not all(math.isfinite(v) for v in values)):
            raise InputError(f"{argument}: got {values!r}, wanted three numbers")
    source = parse_source(text)
    trusted(source)
    network = _DOORS[source.kind](source, pretrained and weights is None, None)
    if weights is not None:
        load_weights(network.module, weights)
    module = network.module.float().eval()
    probe = torch.rand(1, 3, *(2 * [image_size or network.size]), generator=torch.Generator().manual_seed(0))
    layer = last_layer or _find_last_layer(module, probe, text)
    encoder, features = _cut(module, layer)
    size = image_size if image_size is not None else _only_size(encoder, network.size)
    shared: dict[str, Any] = {"num_classes": classes, "dropout": dropout, "trains": trains, "size": size}
    shared |= {"mean": list(mean or network.mean), "std": list(std or network.std)}
    config = {"source": source.text, "blueprint": network.blueprint, "last_layer": layer, **shared}
    return PretrainedClassifier(encoder, features, **shared, config=config).eval()


def _timm(source: Source, pretrained: bool | None, blueprint: Mapping[str, Any] | None) -> _Network:
    create = _import("timm", "pretrained").create_model
    try:
        module: nn.Module = create(source.name, pretrained=bool(pretrained), **source.options)
    except Exception as error:  # timm's own, or whatever its hub's client raises
        way = "a name of timm.list_models(), or weights=FILE with pretrained weights where there is no network"
        raise _unavailable(source, error, way) from error
    about: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    size = int(tuple(about.get("input_size") or (3, _USUAL_SIZE, _USUAL_SIZE))[-1])
    mean, std = (tuple(about.get(key) or usual) for key, usual in zip(("mean", "std"), _IMAGENET, strict=True))
    return _Network(module, size, mean, std, {})


def _hugging_face(source: Source, pretrained: bool | None, blueprint: Mapping[str, Any] | None) -> _Network:
    library = _import("transformers", "huggingface")
    mean: Sequence[float]
    std: Sequence[float]
    mean, std = _IMAGENET
    try:
        if blueprint is not None:
            kept = dict(blueprint)
            module = library.AutoModelForImageClassification.from_config(
                library.AutoConfig.for_model(kept.pop("model_type"), **kept)
            )
        else:
            settings = library.AutoConfig.from_pretrained(source.name, **source.options)
            kind = library.AutoModelForImageClassification
            module = kind.from_pretrained(source.name, config=settings) if pretrained else kind.from_config(settings)
            mean, std = _processor_pixels(library, source.name)
    except Exception as error:  # transformers' own, or whatever its hub's client raises
        way = "a model's name on the Hugging Face hub, or hf:FOLDER of one saved with save_pretrained"
        raise _unavailable(source, error, way) from error
    size = getattr(module.config, "image_size", None) or _USUAL_SIZE
    size = int(size if isinstance(size, int) else tuple(size)[-1])
    return _Network(module, size, mean, std, json.loads(module.config.to_json_string(use_diff=False)))


def _processor_pixels(library: Any, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the model's image processor; ImageNet's where it has none."""
    try:
        about = json.loads(
            Path(library.utils.cached_file(name, "preprocessor_config.json")).read_text(encoding="utf-8")
        )
    except Exception:  # no such file, or no way to get it
        return _IMAGENET
    if about.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    found = [tuple(about.get(key) or usual) for key, usual in zip(("image_mean", "image_std"), _IMAGENET, strict=True)]
    mean, std = (values * 3 if len(values) == 1 else values for values in found)
    return mean, std


def _called(source: Source, pretrained: bool | None, blueprint: Mapping[str, Any] | None) -> _Network:
    """``MODULE:FUNCTION``; rebuilt from a file only where it is a network's class or was named in this process."""
    make = source.function(known=blueprint is None)
    try:
        module = make(**source.options)
    except Exception as error:  # anything: it is another's code
        raise _unavailable(source, error, "MODULE:FUNCTION,option=value,... that gives a network") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"classifier: {source.text} gave {type(module).__name__}, wanted an nn.Module")
    return _Network(module, _USUAL_SIZE, *_IMAGENET, {})


_DOORS: dict[str, Callable[[Source, bool | None, Mapping[str, Any] | None], _Network]] = {
    "timm": _timm,
    "hf": _hugging_face,
    "call": _called,
}


def _import(module: str, extra: str) -> Any:
    try:
        return require(module, extra)
    except MissingExtraError:
        raise
    except (ImportError, RuntimeError) as error:  # installed, but what it stands on does not fit torch
        raise InputError(f"classifier: {module} is installed but cannot be imported: {first_line(error)}") from error


def _unavailable(source: Source, error: Exception, way: str) -> InputError:
    return InputError(f"classifier: {source.text} cannot be had ({first_line(error)}); wanted {way}")


def _find_last_layer(network: nn.Module, image: Tensor, text: str) -> str:
    """Name of the linear layer whose output is the network's."""
    given: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: given.append((name, output))

    network = copy.deepcopy(network)  # some, as Swin, change with the first images that they see
    linears = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(note(name)) for name, module in linears]
    try:
        with torch.no_grad():
            logits = take_logits(network(image))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"classifier: {text} fails on an image {list(image.shape)}: {first_line(error)}; wanted its image_size"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, x in given if x.data_ptr() == logits.data_ptr() and x.shape == logits.shape]
    if not found or logits.dim() != 2:
        raise InputError(
            f"classifier: {text} has no last layer that could be replaced: none of its {len(linears)} linear layers "
            f"gives its output {list(logits.shape)}; wanted last_layer, the layer's name"
        )
    return found[-1]


def _cut(network: nn.Module, layer: str) -> tuple[nn.Module, int]:
    """The network with an identity in place of its last layer, and what that layer takes."""
    parent, _, own = layer.rpartition(".")
    try:
        holder = network.get_submodule(parent)
        last = holder.get_submodule(own)
    except AttributeError:
        last = None
    if not isinstance(last, nn.Linear):
        kind = "nothing" if last is None else f"a {type(last).__name__}"
        raise InputError(f"last_layer: {layer!r} names {kind} in {type(network).__name__}, wanted a linear layer")
    setattr(holder, own, nn.Identity())
    return network, last.in_features


def _only_size(encoder: nn.Module, size: int) -> int | None:
    """The network's usual size if it takes no other, found by trying one."""
    another = size - 32 if size > 64 else size + 32
    try:
        with torch.no_grad():
            copy.deepcopy(encoder)(torch.zeros(1, 3, another, another))
    except Exception:  # whatever the network's own code raises on another size
        return size
    return None


def _quiet(encoder: nn.Module) -> None:
    """Turn the encoder's own dropout off, also where a module holds its rate as a number."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "dropout_p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _last_block(encoder: nn.Module) -> list[nn.Parameter]:
    """Parameters of the last of the encoder's repeated blocks, and of all that is registered behind it.

    A block is a child of the last ``ModuleList`` or ``Sequential`` whose children are of one kind with several layers
    each; an encoder without such counts as one block.
    """
    ordered = list(encoder.parameters())
    place = {id(parameter): index for index, parameter in enumerate(ordered)}
    start = 0
    for module in encoder.modules():
        children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(children) < 2 or len({type(child) for child in children}) > 1:
            continue
        last = list(children[-1].parameters())
        if len(last) > 2:  # more than one layer's weight and bias
            start = max(start, min(place[id(parameter)] for parameter in last))
    return ordered[start:]
