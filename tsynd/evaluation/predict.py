"""What a classifier says of images without labels, and how unsure it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, at_once, check_task
from tsynd.models.classifier import as_classifier
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.utils.device import place

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """On the CPU, row i belongs to image i.

    Attributes:
        probabilities: [N, classes] of the classifier without dropout; of several labels each by itself.
        uncertainty: [N], mutual information of the dropout posterior in nats, 0 .. log(classes).
    """

    probabilities: Tensor
    uncertainty: Tensor


def predict(
    classifier: nn.Module,
    images: Any,
    *,
    task: str = "multiclass",
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Prediction:
    """Probabilities and epistemic uncertainty of images.

    Args:
        classifier: with active dropout; its modes are restored.
        images: see :func:`tsynd.synthesize`; labels among them are not looked at.
        task: ``multiclass`` or ``multilabel``.
        samples: T, posterior samples of the uncertainty.
        seed: of the samples.
        batch_size: images at once; fewer where they are large.
        device: where to work; None is where the classifier is.

    Raises:
        InputError: images or a classifier that cannot be used.
    """
    check_task(task)
    source = LabelledBatches(images, task=None)
    network = as_classifier(classifier)
    where = place(device, network)
    posterior = MCDropout(network, samples, seed=seed)
    probabilities, values = [], []
    with posterior.frozen(), torch.no_grad():
        for batch in source.batches(at_once(source.first.numel(), batch_size)):
            pixels, ids = batch.images.to(where), batch.sample_ids.to(where)
            logits = network(pixels).float()
            probabilities.append((logits.softmax(1) if task == "multiclass" else logits.sigmoid()).cpu())
            values.append(posterior.uncertainty(pixels, ids, task=task).cpu())
    return Prediction(torch.cat(probabilities), torch.cat(values))
