"""The commands that make files which run elsewhere, and run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tsynd.cli.options import Data, Device, Objective, Radius, Samples, Seed, Steps, TrainSize
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError

__all__ = ["export", "run_model"]

_SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "aoti": ".pt2"}


def export(
    output: Annotated[Path, typer.Option(help="The file to write: .onnx, .pt (torchscript) or .pt2 (aoti).")],
    kind: Annotated[
        str, typer.Option(help="synthesizer, step, classifier, encoder or decoder; aoti: encoder, decoder, features.")
    ] = "synthesizer",
    format: Annotated[str, typer.Option(help="onnx, torchscript or aoti.")] = "onnx",
    autoencoder: Annotated[Path | None, typer.Option(help="autoencoder.safetensors of a run.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="classifier.safetensors of a run.")] = None,
    objective: Objective = "mutual_information",
    samples: Samples = 32,
    seed: Seed = 0,
    steps: Steps = 5,
    radius: Radius = 0.5,
) -> None:
    """Write models saved by a run as a file that needs no training code, and check it against torch."""
    from tsynd.export.aoti import export_aoti
    from tsynd.export.onnx import export_onnx
    from tsynd.export.torchscript import export_torchscript
    from tsynd.models.checkpoint import load_model, read_card

    if format not in _SUFFIXES:
        raise InputError(f"format: got {format!r}, wanted {', '.join(_SUFFIXES)}")
    if output.suffix != _SUFFIXES[format]:
        raise InputError(f"output: got {output}, wanted a name that ends in {_SUFFIXES[format]} for {format}")
    given = {name: path for name, path in (("autoencoder", autoencoder), ("classifier", classifier)) if path}
    needs = {"classifier": ["classifier"], "features": ["classifier"], "encoder": ["autoencoder"]}
    needs["decoder"] = ["autoencoder"]
    for name in needs.get(kind, ["autoencoder", "classifier"]):
        if name not in given:
            raise InputError(f"{name}: got none, wanted --{name} for the kind {kind!r}")
    models = {name: load_model(path) for name, path in given.items()}
    cards = {name: read_card(path) for name, path in given.items()}
    card = cards.get("classifier") or cards["autoencoder"]
    if card.image_shape is None:
        raise InputError(f"{next(iter(given))}: its file does not tell the shape of its images")
    shared: dict[str, Any] = {"image_shape": card.image_shape}
    if format != "aoti":
        shared |= {"objective": objective, "samples": samples, "seed": seed, "steps": steps, "radius": radius}
        shared |= {"task": card.task or "multiclass", "class_names": card.class_names}
    write = {"onnx": export_onnx, "torchscript": export_torchscript, "aoti": export_aoti}
    write[format](models.get("classifier"), models.get("autoencoder"), output, kind, **shared)
    size = output.stat().st_size
    typer.echo(f"{kind} as {format}, equal to torch on random images: {output} ({size / 2**20:.1f} MiB)")


def run_model(
    model: Path,
    data: Data,
    output: Path,
    split: str,
    train_size: TrainSize,
    seed: Seed,
    device: Device,
    batch_size: int | None,
    reading: ReadOptions,
) -> None:
    """``tsynd synthesize --model``: targeted images from an exported synthesizer."""
    from tsynd.data.load import load_data
    from tsynd.export.runtime import OnnxSynthesizer

    if output.suffix != ".npz":
        raise InputError(f"output: got {output}, wanted an .npz file with --model")
    synthesizer = OnnxSynthesizer(model, device=device)
    source = load_data(data, train_size=train_size, seed=seed, **reading.given())
    names = synthesizer.metadata["class_names"]
    if names is not None and tuple(names) != source.class_names:
        raise InputError(
            f"model: was exported for {', '.join(names)}, but the data have {', '.join(source.class_names)}"
        )
    part = getattr(source, split)
    result = synthesizer(part.images.numpy(), **({} if batch_size is None else {"batch_size": batch_size}))
    result.save(output, part.labels.numpy(), source.class_names)
    before, after = float(result.initial_uncertainty.mean()), float(result.uncertainty.mean())
    typer.echo(
        f"{len(result)} images by {synthesizer.providers[0]}, mean uncertainty {before:.4f} → {after:.4f} nats, "
        f"in {output}"
    )
