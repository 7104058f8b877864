"""The command line of big runs: sharded synthesis, packing, training on several devices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tsynd.cli.options import Consistency, Data, Device, Quiet, Radius, Samples, Seed, Steps, TrainSize, takes_reading
from tsynd.data.readers.options import ReadOptions
from tsynd.distributed.driver import synthesize_shards
from tsynd.distributed.worker import ShardSettings
from tsynd.utils.errors import InputError

__all__ = ["ShardSettings", "pack", "synthesize_sharded", "train"]

ShardSize = Annotated[
    int | None, typer.Option(help="Write WebDataset shards of this many images into the folder --output; resumable.")
]
ImageFormat = Annotated[str, typer.Option(help="In shards: png (8 bits) or npy (float32).")]
Workers = Annotated[int | None, typer.Option(help="Ray actors; more than 1 without --ray starts a local Ray.")]
RayAddress = Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of each worker.")]
Verify = Annotated[str, typer.Option(help="How finished shards are checked: checksum or size.")]


def synthesize_sharded(
    settings: ShardSettings,
    *,
    train_size: int | None,
    workers: int | None,
    ray: str | None,
    verify: str,
    quiet: bool,
) -> None:
    """What ``tsynd synthesize --shard-size`` does."""
    if train_size is not None:
        raise InputError("train_size: not with shard_size, which takes the whole split; wanted a smaller data set")
    if verify not in ("checksum", "size"):
        raise InputError(f"verify: got {verify!r}, wanted checksum or size")
    if Path(settings.output).suffix == ".npz":
        raise InputError(f"output: got {settings.output}, wanted a folder for shards; tsynd pack makes an .npz of them")
    manifest = synthesize_shards(
        settings,
        workers=workers,
        ray=ray,
        checksum=verify == "checksum",
        progress=not quiet,
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


def pack(
    shards: Annotated[Path, typer.Argument(help="Folder of a finished sharded synthesis.")],
    output: Annotated[Path, typer.Option(help="New .npz file, or new folder for class folders of PNG.")],
    quiet: Quiet = False,
) -> None:
    """Turn shards into one MedMNIST-style .npz or into class folders."""
    from tsynd.distributed.pack import pack as pack_shards

    count = pack_shards(shards, output, progress=not quiet)
    typer.echo(f"{count} images, in {output}")


@takes_reading
def train(
    data: Data,
    reading: ReadOptions,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same training interrupted.")],
    model: Annotated[str, typer.Option(help="classifier or autoencoder.")] = "classifier",
    autoencoder: Annotated[
        Path | None, typer.Option(help="autoencoder.safetensors: trains the classifier with targeted images.")
    ] = None,
    iterations: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Images per step over all processes.")] = 64,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    train_size: TrainSize = None,
    seed: Seed = 0,
    device: Device = None,
    samples: Samples = 8,
    steps: Steps = 3,
    radius: Radius = 0.5,
    label_consistency: Consistency = None,
    quiet: Quiet = False,
) -> None:
    """Train one model, alone or as one process of torchrun; the same command goes on after an interruption."""
    from tsynd.jobs.train import TrainSettings, train_model

    settings = TrainSettings(
        model=model,
        autoencoder=None if autoencoder is None else str(autoencoder),
        iterations=iterations,
        batch_size=batch_size,
        train_size=train_size,
        seed=seed,
        samples=samples,
        steps=steps,
        radius=radius,
        label_consistency=label_consistency,
        reading=reading,
    )
    path, loss = train_model(
        data, output, settings, device=device, checkpoint_every=checkpoint_every, progress=not quiet
    )
    if path is not None:
        typer.echo(f"{iterations} steps, last loss {loss:.4f}, in {path}")
