"""The command ``tsynd predict``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import Device, Reading, takes_options
from tsynd.data.external import as_trained
from tsynd.data.readers.options import ReadOptions
from tsynd.data.unlabelled import read_unlabelled
from tsynd.evaluation.predict import Prediction
from tsynd.evaluation.predict import predict as predict_images
from tsynd.models.checkpoint import load_model, read_card
from tsynd.utils.atomic import atomic_path, check_writable
from tsynd.utils.errors import InputError

__all__ = ["predict"]

_SHOWN = 30


@takes_options
def predict(
    data: Annotated[str, typer.Option(help="A picture, DICOM or NIfTI file, or a folder with such at any depth.")],
    classifier: Annotated[Path, typer.Option(help="classifier.safetensors of a run.")],
    reading: Reading,
    output: Annotated[Path | None, typer.Option(help="Also write a table of all images to this .csv file.")] = None,
    samples: Annotated[int, typer.Option(help="T, posterior samples of the uncertainty.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the posterior samples.")] = 0,
    device: Device = None,
) -> None:
    """Say of images without labels which class they are, and how unsure the classifier is.

    Images are brought to the size and colour of the classifier's training images.
    """
    if output is not None:
        if output.suffix != ".csv":
            raise InputError(f"output: got {output}, wanted a name that ends in .csv")
        check_writable(output)
    network, card = load_model(classifier), read_card(classifier)
    names, images, ignored = read_unlabelled(data, as_trained(ReadOptions(**reading), card.image_shape))
    if ignored:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
        print(f"tsynd: ignored: {found}", file=sys.stderr)
    if card.image_shape is not None and list(images.shape[1:]) != card.image_shape:
        raise InputError(f"data: images of {list(images.shape[1:])}, the classifier was trained on {card.image_shape}")
    task = card.task or "multiclass"
    made = predict_images(network, images, task=task, samples=samples, seed=seed, device=device)
    classes = card.class_names or [str(number) for number in range(made.probabilities.shape[1])]
    rows = _rows(names, made, classes, task)
    if output is not None:
        with atomic_path(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file", "prediction", *(f"p({name})" for name in classes), "uncertainty"])
            for (name, label, _, uncertainty), each in zip(rows, made.probabilities.tolist(), strict=True):
                table.writerow([name, label, *(f"{p:.4f}" for p in each), f"{uncertainty:.4f}"])
    shown = Table("file", "prediction", "probability", "uncertainty (nats)")
    for name, label, probability, uncertainty in rows[:_SHOWN]:
        shown.add_row(name, label, f"{probability:.3f}", f"{uncertainty:.4f}")
    Console().print(shown)
    if len(rows) > _SHOWN:
        typer.echo(f"the first {_SHOWN} of {len(rows)} images; --output takes all")


def _rows(names: list[str], made: Prediction, classes: list[str], task: str) -> list[tuple[str, str, float, float]]:
    """File, what is predicted, its probability (of the least sure label) and the uncertainty."""
    rows = []
    for name, p, uncertainty in zip(names, made.probabilities, made.uncertainty.tolist(), strict=True):
        if task == "multiclass":
            best = int(p.argmax())
            label, sure = classes[best], float(p[best])
        else:
            label = ", ".join(word for word, own in zip(classes, p.tolist(), strict=True) if own > 0.5) or "none"
            sure = float(p.maximum(1 - p).amin())
        rows.append((name, label, sure, uncertainty))
    return rows
