"""The command ``tsynd synthesize``: at once, shard by shard, or with an exported synthesizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tsynd.cli.options import ASCENT, Ascent, Data, Options, Quiet, Reading, refuse, takes_options
from tsynd.data.dataset import DataSource
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.distributed.driver import synthesize_shards
from tsynd.distributed.worker import ShardSettings
from tsynd.export.runtime import OnnxSynthesizer
from tsynd.models.checkpoint import load_model, read_card
from tsynd.synthesis import api
from tsynd.utils.atomic import check_writable
from tsynd.utils.errors import InputError, check_choice

__all__ = ["synthesize"]


@dataclass(frozen=True)
class _Models:
    """What makes the images.

    Attributes:
        autoencoder: ``autoencoder.safetensors`` of a run.
        classifier: ``classifier.safetensors`` of a run.
        model: instead of the two: synthesizer.onnx of tsynd export, which knows its settings.
    """

    autoencoder: Path | None = None
    classifier: Path | None = None
    model: Path | None = None


@dataclass(frozen=True)
class _Sources:
    """Which sources, and how often.

    Attributes:
        most_uncertain: only so many sources, those of which the classifier is most uncertain.
        variants: images per source, which differ.
        balance: as many images of each class as the largest has.
        start: of an ascent: ``source``, noise, or interpolate (half way to another image of the class).
        train_size: labelled training images; all by default.
    """

    most_uncertain: int | None = None
    variants: int = 1
    balance: bool = False
    start: str = "source"
    train_size: int | None = None


@dataclass(frozen=True)
class _Workers:
    """Who makes the shards.

    Attributes:
        workers: Ray actors; more than 1 without --ray starts a local Ray.
        ray: address of a Ray cluster, or local.
        verify: how finished shards are checked: checksum or size.
    """

    workers: int | None = None
    ray: str | None = None
    verify: str = "checksum"


_SOURCES = ("most_uncertain", "variants", "balance", "start")
_MEMORY = ("batch_size", "checkpointing", "memory_limit")
_SHARDS = ("shard_size", "image_format", "threads")
_WORKERS = ("workers", "ray", "verify")


@takes_options
def synthesize(
    context: typer.Context,
    data: Data,
    output: Annotated[Path, typer.Option(help="New .npz file, or new folder for a PNG per image or for shards.")],
    models: Annotated[dict[str, Any], Options(_Models, ("autoencoder", "classifier", "model"))],
    basic: Annotated[dict[str, Any], Options(ShardSettings, ("split", "seed", "device"))],
    ascent: Ascent,
    sources: Annotated[dict[str, Any], Options(_Sources, (*_SOURCES, "train_size"), "Sources")],
    memory: Annotated[dict[str, Any], Options(ShardSettings, _MEMORY, "Memory")],
    shards: Annotated[dict[str, Any], Options(ShardSettings, _SHARDS, "Shards", {"shard_size": None})],
    workers: Annotated[dict[str, Any], Options(_Workers, _WORKERS, "Shards")],
    reading: Reading,
    quiet: Quiet = False,
) -> None:
    """Make targeted images with models saved by a run, or with an exported synthesizer."""
    train_size = sources.pop("train_size")
    if models["model"] is not None:
        for name in ("autoencoder", "classifier", "shard_size"):
            if {**models, **shards}[name] is not None:
                raise InputError(f"model: got --{name.replace('_', '-')} beside it, wanted the one or the other")
        refuse(
            context,
            (*ASCENT, *_SOURCES, *_MEMORY[1:], *_SHARDS, *_WORKERS),
            "with --model, whose file holds its settings",
        )
    for name in ("autoencoder", "classifier"):
        if models["model"] is None and models[name] is None:
            raise InputError(f"{name}: got none, wanted --autoencoder and --classifier, or --model")
    files: dict[str, Any] = {name: str(models[name]) for name in ("autoencoder", "classifier")}
    options = ReadOptions(**reading)
    if shards["shard_size"] is not None:
        refuse(context, _SOURCES, "with --shard-size, which makes one image of every source")
        if train_size is not None:
            raise InputError("train_size: not with shard_size, which takes the whole split; wanted a smaller data set")
        settings = ShardSettings(
            data=data, output=str(output), reading=options, **files, **basic, **ascent, **memory, **shards
        )
        _shards(settings, progress=not quiet, **workers)
        return
    refuse(context, (*_SHARDS, *_WORKERS), "without --shard-size")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"output: {output} exists already, wanted a new file or folder")
    check_writable(output)
    check_choice("split", basic["split"], ("train", "val", "test"))

    def read() -> tuple[DataSource, Any]:
        source = load_data(data, train_size=train_size, seed=basic["seed"], **options.given())
        return source, getattr(source, basic["split"])

    if models["model"] is not None:
        if output.suffix != ".npz":
            raise InputError(f"output: got {output}, wanted an .npz file with --model")
        synthesizer = OnnxSynthesizer(models["model"], device=basic["device"])
        source, part = read()
        _check_names("model: was exported", synthesizer.metadata["class_names"], source)
        size = {} if memory["batch_size"] is None else {"batch_size": memory["batch_size"]}
        made = synthesizer(part.images.numpy(), **size)
        made.save(output, part.labels.numpy(), source.class_names)
        text = _summary(made, f" by {synthesizer.providers[0]}")
    else:
        encoder, network = load_model(models["autoencoder"]), load_model(models["classifier"])
        source, part = read()
        _check_names("classifier: was trained", read_card(models["classifier"]).class_names, source)
        if source.spatial_dims == 3 and output.suffix != ".npz":
            raise InputError(f"output: got {output} for volumes, wanted an .npz file: folders of PNG hold pictures")
        place = {"seed": basic["seed"], "device": basic["device"], "progress": not quiet}
        result = api.synthesize(encoder, network, part, task=source.task, **ascent, **sources, **memory, **place)
        result.save(output, class_names=source.class_names)
        text = _summary(result, "")
    typer.echo(f"{text}, in {output}")


def _shards(settings: ShardSettings, *, workers: int | None, ray: str | None, verify: str, progress: bool) -> None:
    check_choice("verify", verify, ("checksum", "size"))
    if Path(settings.output).suffix == ".npz":
        raise InputError(f"output: got {settings.output}, wanted a folder for shards; tsynd pack makes an .npz of them")
    manifest = synthesize_shards(
        settings,
        workers=workers,
        ray=ray,
        checksum=verify == "checksum",
        progress=progress,
        say=lambda text: print(f"tsynd: {text}", file=sys.stderr),
    )
    if manifest is None:
        typer.echo(f"this process's shards are done; others are still missing in {settings.output}")
        return
    images = manifest["images"]
    before, after = (
        sum(shard[key] * shard["images"] for shard in manifest["shards"]) / images
        for key in ("mean_uncertainty_before", "mean_uncertainty")
    )
    typer.echo(
        f"{images} images in {len(manifest['shards'])} shards, mean uncertainty {before:.4f} → {after:.4f} nats, "
        f"in {settings.output}"
    )


def _check_names(what: str, names: Any, source: DataSource) -> None:
    if names is not None and tuple(names) != source.class_names:
        raise InputError(f"{what} for {', '.join(names)}, but the data have {', '.join(source.class_names)}")


def _summary(result: Any, by: str) -> str:
    before, after = float(result.initial_uncertainty.mean()), float(result.uncertainty.mean())
    return f"{len(result)} images{by}, mean uncertainty {before:.4f} → {after:.4f} nats"
