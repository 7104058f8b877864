"""The command ``tsynd export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tsynd.cli.options import Options, refuse, takes_options
from tsynd.export.aoti import export_aoti
from tsynd.export.onnx import export_onnx
from tsynd.export.torchscript import export_torchscript
from tsynd.models.checkpoint import load_model, read_card
from tsynd.synthesis.ascent import AscentSettings
from tsynd.utils.errors import InputError

__all__ = ["export"]

_SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "aoti": ".pt2"}
_ASCENT = ("objective", "samples", "steps", "radius")
_NEEDS = {
    "classifier": ("classifier",),
    "features": ("classifier",),
    "encoder": ("autoencoder",),
    "decoder": ("autoencoder",),
}
# options that mean nothing for a kind
_IDLE: dict[str, tuple[str, ...]] = {"classifier": ("objective", "steps", "radius", "autoencoder")}
_IDLE |= {kind: (*_ASCENT, "seed", "classifier") for kind in ("encoder", "decoder")}
_IDLE["features"] = (*_ASCENT, "seed", "autoencoder")


@takes_options
def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The file to write: .onnx, .pt (torchscript) or .pt2 (aoti).")],
    ascent: Annotated[dict[str, Any], Options(AscentSettings, _ASCENT, "Ascent")],
    kind: Annotated[
        str, typer.Option(help="synthesizer, step, classifier, encoder or decoder; aoti: encoder, decoder, features.")
    ] = "synthesizer",
    format: Annotated[str, typer.Option(help="onnx, torchscript or aoti.")] = "onnx",
    autoencoder: Annotated[Path | None, typer.Option(help="autoencoder.safetensors of a run.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="classifier.safetensors of a run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the posterior samples.")] = 0,
) -> None:
    """Write models saved by a run as a file that needs no training code, and check it against torch."""
    if format not in _SUFFIXES:
        raise InputError(f"format: got {format!r}, wanted {', '.join(_SUFFIXES)}")
    if output.suffix != _SUFFIXES[format]:
        raise InputError(f"output: got {output}, wanted a name that ends in {_SUFFIXES[format]} for {format}")
    given = {name: path for name, path in (("autoencoder", autoencoder), ("classifier", classifier)) if path}
    for name in _NEEDS.get(kind, ("autoencoder", "classifier")):
        if name not in given:
            raise InputError(f"{name}: got none, wanted --{name} for the kind {kind!r}")
    refuse(context, _IDLE.get(kind, ()), f"for the kind {kind!r}")
    models = {name: load_model(path) for name, path in given.items()}
    cards = {name: read_card(path) for name, path in given.items()}
    card = cards.get("classifier") or cards["autoencoder"]
    if card.image_shape is None:
        raise InputError(f"{next(iter(given))}: its file does not tell the shape of its images")
    shared: dict[str, Any] = {"image_shape": card.image_shape}
    if format != "aoti":
        shared |= {"seed": seed, "task": card.task or "multiclass", "class_names": card.class_names, **ascent}
    write: dict[str, Any] = {"onnx": export_onnx, "torchscript": export_torchscript, "aoti": export_aoti}
    write[format](models.get("autoencoder"), models.get("classifier"), output, kind, **shared)
    size = output.stat().st_size
    typer.echo(f"{kind} as {format}, equal to torch on random images: {output} ({size / 2**20:.1f} MiB)")
