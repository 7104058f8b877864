"""Gaussian posteriors over a classifier's last layer: sampled heads on features that are computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.dataset import LabelledBatches
from tsynd.models.classifier import ClassifierAdapter, logits_of, plain
from tsynd.models.held import evaluating
from tsynd.posteriors.posterior import Posterior
from tsynd.posteriors.runner import RESOLVING, Runner, heads_logits, heads_uncertainty, structure_of
from tsynd.posteriors.splitting import trunk_to
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, MissingExtraError, check_whole, require
from tsynd.utils.fingerprint import is_sealed, seal

__all__ = ["HeadGaussian", "SampledHead", "find_layer", "training_features"]

_FORMAT = "tsynd sampled head 2"


@dataclass(frozen=True)
class HeadGaussian:
    """A Gaussian over the P = C * D (+ C) parameters of a linear layer: its weight row by row, then its bias.

    Attributes:
        kind: ``full`` (``cholesky`` [P, P], the lower factor of the precision), ``diag`` (``std`` [P]), ``kron`` (by
            block b of parameters ``vectors_b_0``, ``values_b_0`` and, for the weight, ``.._b_1``: eigenvectors and
            eigenvalues of the precision's Kronecker factors, and ``delta_b``, what is added to their product) or
            ``low_rank`` (``variance`` [P], ``deviations`` [K, P], already scaled).
        tensors: those, and ``mean`` [P]; float64 on the CPU.
    """

    kind: str
    tensors: dict[str, Tensor]

    def draw(self, samples: int, seed: int) -> Tensor:
        """Parameters [samples, P] float64, on the CPU whatever the device; pass t is the same for any ``samples``."""
        # one stream a pass, from numpy's generator, whose bits are the same on every processor
        keys = [np.array([seed & (2**64 - 1), t], dtype=np.uint64) for t in range(samples)]
        streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        mean = self.tensors["mean"]

        def normal(count: int) -> Tensor:
            return torch.from_numpy(np.stack([stream.standard_normal(count) for stream in streams]))

        noise = normal(len(mean))
        if self.kind == "full":
            noise = torch.linalg.solve_triangular(self.tensors["cholesky"].t(), noise.t(), upper=True).t()
        elif self.kind == "diag":
            noise = noise * self.tensors["std"]
        elif self.kind == "kron":
            noise = self._kronecker(noise)
        else:
            rows = self.tensors["deviations"]
            noise = noise * self.tensors["variance"].sqrt() + normal(len(rows)) @ rows
        return mean + noise

    def _kronecker(self, noise: Tensor) -> Tensor:
        parts, start, block = [], 0, 0
        while f"values_{block}_0" in self.tensors:
            left, delta = self.tensors[f"values_{block}_0"], self.tensors[f"delta_{block}"]
            turn = self.tensors[f"vectors_{block}_0"]
            if f"values_{block}_1" in self.tensors:
                right, other = self.tensors[f"values_{block}_1"], self.tensors[f"vectors_{block}_1"]
                size = len(left) * len(right)
                part = noise[:, start : start + size].reshape(-1, len(left), len(right))
                part = turn @ (part * (torch.outer(left, right) + delta).rsqrt()) @ other.t()
            else:
                size = len(left)
                part = (noise[:, start : start + size] * (left + delta).rsqrt()) @ turn.t()
            parts.append(part.flatten(1))
            start, block = start + size, block + 1
        return torch.cat(parts, 1)


def find_layer(classifier: nn.Module, layer: str | None) -> tuple[str, nn.Linear]:
    """Name and module of the last layer.

    Args:
        classifier: with a linear last layer.
        layer: its name as in ``classifier.named_modules()``; None takes the last linear layer of all.

    Raises:
        InputError: no such layer, or one that is not linear.
    """
    linear = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.Linear)}
    if layer is None and linear:
        layer = next(reversed(linear))
    if layer is None or layer not in linear:
        wanted = f"one of {', '.join(linear)}" if linear else "a classifier with an nn.Linear at its end"
        raise InputError(f"layer: got {layer!r}, wanted {wanted}")
    return layer, linear[layer]


class SampledHead(Posterior):
    """Posterior samples of a classifier's last, linear layer; everything before it runs once.

    The head's samples depend on the Gaussian, ``samples`` and ``seed`` alone and are drawn on the CPU in float64. The
    layer's own weights are not used.

    Args:
        classifier: gives logits [B, C] that are the layer's output (or what :func:`tsynd.as_classifier` knows).
        gaussian: over the layer's parameters.
        layer: name of the layer; None takes the last linear one.
        samples: T, at least 1.
        seed: of the samples.

    Raises:
        InputError: an argument does not fit.
    """

    def __init__(
        self,
        classifier: nn.Module,
        gaussian: HeadGaussian,
        layer: str | None = None,
        samples: int = 32,
        seed: int = 0,
    ) -> None:
        self._network = logits_of(classifier)
        self._faces = (self._network,)
        check_whole("samples", samples)
        self.classifier, self.gaussian, self.samples, self.seed = classifier, gaussian, samples, int(seed)
        self.layer, self._linear = find_layer(classifier, layer)
        self.networks = (classifier,)
        count = sum(p.numel() for p in self._linear.parameters())
        if len(gaussian.tensors["mean"]) != count:
            raise InputError(
                f"gaussian: over {len(gaussian.tensors['mean'])} parameters, wanted the {count} of layer {self.layer!r}"
            )
        self._drawn: Tensor | None = None
        self._placed: tuple[torch.device, Tensor, Tensor | None] | None = None
        self._settled: object = None  # the structure that the trunk was taken from
        self._settle()

    @property
    def plan(self) -> str:
        """How the passes run."""
        return "fused head"

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, C], see :meth:`Posterior.logits`; the same samples for every image."""
        return heads_logits(self.features(images), *self._weights(images.device))

    def _uncertainty(self, images: Tensor, sample_ids: Tensor | None, objective: str, task: str) -> Tensor:
        """Always fused."""
        return heads_uncertainty(self.features(images), *self._weights(images.device), objective, task)

    def features(self, images: Tensor) -> Tensor:
        """What enters the last layer, [B, D], of images [B, C, ...].

        Raises:
            InputError: at the first call, a layer whose output is not the classifier's logits.
        """
        images, kept = plain(images), {} if self._block is None else self._block
        with self._evaluating():
            if "resolved" not in kept:
                with RESOLVING, torch.no_grad():
                    if self._settled != (structure := structure_of(self.classifier)):
                        if self._settled is not None:
                            self._settle()
                        self._network.look(images)
                        _head_features(self._network, self._linear, self._runner, images[:2].detach(), self.layer)
                        self._settled = structure
                kept["resolved"] = True
            features: Tensor = self._runner.once[0](images)[0]
        return features

    def _settle(self) -> None:
        self._network.ending = None
        with evaluating(self.classifier):
            self._runner = trunk_to(self._network, self._linear)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the Gaussian as safetensors: no pickle, whole or not at all. The classifier is saved elsewhere.

        Raises:
            MissingExtraError: safetensors is not installed.
        """
        about = {
            "format": _FORMAT,
            "kind": self.gaussian.kind,
            "layer": self.layer,
            "samples": self.samples,
            "seed": self.seed,
            "trunk": _fingerprint(self.classifier, self._linear),
        }
        tensors = {name: value.contiguous() for name, value in self.gaussian.tensors.items()}
        about = seal(about | {"tensors": _digest(tensors)})
        content = require("safetensors.torch", "models").save(tensors, {"tsynd": json.dumps(about)})
        target = Path(path)
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
        return target

    @staticmethod
    def load(path: str | os.PathLike[str], classifier: nn.Module) -> SampledHead:
        """The posterior that :meth:`save` wrote.

        Args:
            path: the file.
            classifier: with the weights it had; those of the last layer do not matter.

        Raises:
            InputError: another kind of file, a damaged one, or a classifier with other weights.
            MissingExtraError: safetensors is not installed.
        """
        try:
            with require("safetensors", "models").safe_open(os.fspath(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("tsynd", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except MissingExtraError:
            raise
        except Exception as error:  # safetensors' own kinds of errors
            raise InputError(f"path: {path} cannot be read ({error}), wanted a file of SampledHead.save") from None
        if not is_sealed(about) or [about["format"], about["tensors"]] != [_FORMAT, _digest(tensors)]:
            raise InputError(f"path: {path} is damaged or holds something else, wanted a file of SampledHead.save")
        gaussian = HeadGaussian(about["kind"], tensors)
        head = SampledHead(classifier, gaussian, about["layer"], about["samples"], about["seed"])
        if _fingerprint(classifier, head._linear) != about["trunk"]:
            raise InputError(f"classifier: its weights are not those that {path} was made with, wanted the same")
        return head

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Sampled heads [T, C, D] and biases [T, C], float32."""
        if self._placed is None or self._placed[0] != device:
            if self._drawn is None:
                self._drawn = self.gaussian.draw(self.samples, self.seed).float()
            shape, drawn = self._linear.weight.shape, self._drawn.to(device)
            weight = drawn[:, : shape.numel()].reshape(self.samples, *shape).contiguous()
            bias = drawn[:, shape.numel() :].contiguous() if self._linear.bias is not None else None
            self._placed = device, weight, bias
        return self._placed[1:]


def _head_features(network: ClassifierAdapter, linear: nn.Linear, trunk: Runner, images: Tensor, name: str) -> Tensor:
    """Features [B, D] of images [B, ...], after a look at whether layer and network give the same.

    Raises:
        InputError: they do not.
    """
    features: Tensor = trunk.once[0](images)[0]
    logits = network(images)
    same = features.dim() == 2 and isinstance(logits, Tensor)
    head = functional.linear(features, linear.weight, linear.bias) if same else logits
    if network.ending == "softmax":  # the same but for a constant of each row
        head = head.log_softmax(-1)
    if not same or head.shape != logits.shape or not torch.allclose(head, logits, rtol=1e-2, atol=1e-3):
        raise InputError(
            f"classifier: its logits are not the output of layer {name!r} on features [B, D] "
            f"(features {list(features.shape)}), wanted layer= to name the linear layer that gives them"
        )
    return features


def training_features(
    classifier: nn.Module, data: Any, layer: str | None, batch_size: int
) -> tuple[Tensor, Tensor, str, nn.Linear]:
    """Features [N, D] of all images on the classifier's device, their class numbers [N], and the last layer.

    Raises:
        InputError: data or a layer that do not fit.
    """
    network, batches = logits_of(classifier), LabelledBatches(data, name="data", by_index=True)
    check_whole("batch_size", batch_size)
    name, linear = find_layer(classifier, layer)
    device = linear.weight.device
    labels = batches.labels(linear.out_features).to(device)
    with evaluating(classifier), torch.no_grad():
        network.look(batches.at(torch.arange(min(2, len(batches)))).images.to(device))
        trunk = trunk_to(network, linear)
        _head_features(network, linear, trunk, batches.at(torch.arange(min(2, len(batches)))).images.to(device), name)
        features = [trunk.once[0](batches.at(part).images.to(device))[0] for part in batches.chunks(batch_size)]
    return torch.cat(features), labels, name, linear


def _fingerprint(classifier: nn.Module, linear: nn.Linear) -> str:
    """Hash of all weights but the last layer's."""
    own = {id(linear.weight), id(linear.bias)}
    return _digest({k: v for k, v in classifier.state_dict(keep_vars=True).items() if id(v) not in own})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
