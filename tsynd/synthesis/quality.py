"""What can be said of each synthetic image, to keep some and leave others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, at_once, check_task
from tsynd.models.autoencoder import as_autoencoder
from tsynd.models.classifier import logits_of
from tsynd.models.held import evaluating
from tsynd.posteriors.posterior import frozen
from tsynd.utils.device import device_of
from tsynd.utils.errors import InputError

__all__ = ["plausibility", "quality_of"]


def quality_of(result: Any, autoencoder: Any, classifier: nn.Module, sources: Any, task: str) -> dict[str, Tensor]:
    """See :meth:`tsynd.SynthesisResult.judged`."""
    check_task(task)
    if result.labels is None:
        raise InputError("labels: the result has none, wanted some to judge by")
    batches = LabelledBatches(sources, task=None, name="sources", by_index=True)
    if int(result.sample_ids.max()) >= len(batches) or batches.first.shape[1:] != result.images.shape[1:]:
        raise InputError(
            f"sources: got {len(batches)} images {list(batches.first.shape[1:])}, wanted those that were given to "
            "synthesize, of which sample_ids are the positions"
        )
    network, model = logits_of(classifier), as_autoencoder(autoencoder)
    modules = (model,) if isinstance(model, nn.Module) else ()
    device, own = device_of(network), device_of(*modules)
    found: dict[str, list[Tensor]] = {"logits": [], "distance": [], "lost": []}
    with evaluating(network), frozen(*modules), torch.no_grad():
        network.look(result.images[:2].to(device))
        for rows in torch.split(torch.arange(len(result)), at_once(batches.first.numel())):
            made, source = result.images[rows], batches.at(result.sample_ids[rows]).images
            back = model.decode(result.source_latents[rows].to(own)).float().cpu().clamp(0, 1)
            found["logits"].append(network(made.to(device)).float().cpu())
            found["distance"].append(_distance(made, source))
            found["lost"].append(_distance(back, source))
    logits, distance, lost = (torch.cat(one) for one in found.values())
    if task == "multiclass":
        chance = logits.softmax(1).gather(1, result.labels[:, None].long())[:, 0]
        kept = logits.argmax(1) == result.labels
    else:
        truth = result.labels > 0.5
        chance = torch.where(truth, logits.sigmoid(), 1 - logits.sigmoid()).amin(1)
        kept = ((logits > 0) == truth).all(1)
    return {
        "label_kept": kept,
        "label_probability": chance,
        "distance": distance,
        "reconstruction_error": lost,
        "plausibility": plausibility(result.latents, result.source_latents, result.sample_ids),
    }


def _distance(made: Tensor, source: Tensor) -> Tensor:
    """Root mean square difference [B] of images."""
    return (made - source).flatten(1).square().mean(1).sqrt()


def plausibility(latents: Tensor, sources: Tensor, ids: Tensor) -> Tensor:
    """How usual it is among the sources to lie as far from the nearest other as an image does from its nearest source.

    Args:
        latents: [N, ...], of the images.
        sources: [N, ...], of what they were made of; a source may stand there several times.
        ids: [N], which source is which.

    Returns:
        [N] in [0, 1]: share of the sources that lie at least so far from their nearest other one; 1 if there is one.
    """
    first = torch.tensor([ids.tolist().index(number) for number in sorted(set(ids.tolist()))])
    held = sources[first].flatten(1).float()
    if len(held) < 2:
        return torch.ones(len(latents))
    gaps = torch.cat([_nearest(held[part], held, part) for part in torch.split(torch.arange(len(held)), 256)])
    away = torch.cat([_nearest(part, held, None) for part in torch.split(latents.flatten(1).float(), 256)])
    return (gaps >= away[:, None]).float().mean(1)


def _nearest(latents: Tensor, sources: Tensor, own: Tensor | None) -> Tensor:
    """Distance [n] to the nearest source, other than their own."""
    distances = torch.cdist(latents, sources)
    if own is not None:
        distances[torch.arange(len(own)), own] = torch.inf
    return distances.amin(1)
