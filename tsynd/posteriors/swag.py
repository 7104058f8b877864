"""SWAG (Maddox et al., 2019) over the last layer: a Gaussian through the weights that SGD went through."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.posteriors.last_layer import HeadGaussian, SampledHead, find_layer, training_features
from tsynd.utils.errors import InputError

__all__ = ["SWAGHead"]


class SWAGHead(SampledHead):
    """Stochastic weight averaging, Gaussian, of the last layer (Maddox et al., 2019, arXiv 1902.02476).

    mean = the snapshots' mean; covariance = scale * (diagonal of their variance / 2 + D Dt / (2 (K - 1))), D the
    last K snapshots' deviations from the running mean at their time.

    Args:
        classifier: see :class:`tsynd.SampledHead`; what is before the last layer must have stood still while the
            snapshots were taken.
        snapshots: two or more, in order: state dicts of the classifier or of the layer (``weight``, ``bias``).
        layer: name of the layer; None takes the last linear one.
        rank: K at most, two or more.
        scale: of the covariance; 1 is the paper's.
        samples: T, at least 1.
        seed: of the samples.

    Raises:
        InputError: an argument does not fit.
    """

    def __init__(
        self,
        classifier: nn.Module,
        snapshots: Sequence[Mapping[str, Tensor]],
        *,
        layer: str | None = None,
        rank: int = 20,
        scale: float = 1.0,
        samples: int = 32,
        seed: int = 0,
    ) -> None:
        name, linear = find_layer(classifier, layer)
        if not isinstance(rank, int) or rank < 2:
            raise InputError(f"rank: got {rank!r}, wanted an integer of at least 2")
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"scale: got {scale!r}, wanted a number above 0")
        if len(snapshots) < 2:
            raise InputError(f"snapshots: got {len(snapshots)}, wanted two or more")
        points = torch.stack([_parameters(snapshot, name, linear, i) for i, snapshot in enumerate(snapshots)])
        if not bool(points.isfinite().all()):
            raise InputError("snapshots: hold weights that are not finite, wanted a smaller learning rate")
        counts = torch.arange(1, len(points) + 1, dtype=torch.float64)[:, None]
        rows = (points - points.cumsum(0) / counts)[-rank:]
        tensors = {
            "mean": points.mean(0),
            "variance": points.var(0, correction=0) * (scale / 2),
            "deviations": rows * math.sqrt(scale / (2 * (len(rows) - 1))),
        }
        super().__init__(classifier, HeadGaussian("low_rank", tensors), name, samples, seed)

    @classmethod
    def fit(
        cls,
        classifier: nn.Module,
        data: Any,
        *,
        epochs: int = 40,
        learning_rate: float = 0.05,
        batch_size: int = 32,
        weight_decay: float = 1e-3,
        layer: str | None = None,
        rank: int = 20,
        scale: float = 1.0,
        samples: int = 32,
        seed: int = 0,
    ) -> SWAGHead:
        """Run SGD at a constant rate from the last layer as it stands, a snapshot an epoch; nothing is changed.

        Args:
            classifier: trained.
            data: its training images and class numbers, as :func:`tsynd.fit_classifier` takes them.
            epochs: snapshots, two or more.
            learning_rate: of SGD; the larger, the wider the posterior.
            batch_size: images a step.
            weight_decay: of SGD.
            layer: see the class, like the next three.
            rank: of the low-rank part.
            scale: of the covariance.
            samples: T.
            seed: of the batches and of the samples.

        Raises:
            InputError: an argument does not fit, or weights that grow without bound.
        """
        if not isinstance(epochs, int) or epochs < 2:
            raise InputError(f"epochs: got {epochs!r}, wanted an integer of at least 2")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise InputError(f"learning_rate: got {learning_rate!r}, wanted a number above 0")
        features, labels, name, linear = training_features(classifier, data, layer, 256)
        head, draws = copy.deepcopy(linear).requires_grad_(True), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(head.parameters(), learning_rate, weight_decay=weight_decay)
        snapshots = []
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.split(torch.randperm(len(labels), generator=draws), batch_size):
                    rows = rows.to(labels.device)
                    loss = functional.cross_entropy(head(features[rows]), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                snapshots.append({key: value.detach().clone() for key, value in head.state_dict().items()})
        return cls(classifier, snapshots, layer=name, rank=rank, scale=scale, samples=samples, seed=seed)


def _parameters(snapshot: Mapping[str, Tensor], name: str, linear: nn.Linear, number: int) -> Tensor:
    parts = []
    for key, own in linear.named_parameters():
        value = snapshot.get(f"{name}.{key}", snapshot.get(key)) if isinstance(snapshot, Mapping) else None
        if not isinstance(value, Tensor) or value.shape != own.shape:
            got = "none" if value is None else f"{list(value.shape)}"
            raise InputError(f"snapshots: number {number} has {key} {got}, wanted {list(own.shape)} for layer {name!r}")
        parts.append(value.detach().to("cpu", torch.float64).flatten())
    return torch.cat(parts)
