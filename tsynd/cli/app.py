"""The command ``tsynd``: run, train, synthesize, pack, evaluate, experiment, export, info."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    print("tsynd: the command line needs typer and rich: pip install 'tsynd[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from tsynd.cli import experiment as cli_study
from tsynd.cli import export as cli_export
from tsynd.cli import train as cli_large
from tsynd.cli.options import (
    Consistency,
    Data,
    Device,
    Masks,
    Objective,
    Quiet,
    Radius,
    Samples,
    Seed,
    Steps,
    TrainSize,
    takes_reading,
)
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError, MissingExtraError
from tsynd.utils.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="tsynd",
    help="Targeted synthetic images for small medical data sets (TSynD).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@takes_reading
def run(
    data: Data,
    reading: ReadOptions,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same run interrupted.")],
    train_size: TrainSize = None,
    seed: Seed = 0,
    device: Device = None,
    autoencoder_data: Annotated[
        str, typer.Option(help="train (the labelled subset) or all (every training image, unlabelled).")
    ] = "train",
    autoencoder_iterations: Annotated[int, typer.Option(help="Optimiser steps of the autoencoder.")] = 800,
    iterations: Annotated[int, typer.Option(help="Optimiser steps of each classifier.")] = 300,
    dropout: Annotated[str, typer.Option(help="head (before the last layer) or stages (everywhere).")] = "head",
    objective: Objective = "mutual_information",
    samples: Samples = 32,
    masks: Masks = "shared",
    steps: Steps = 5,
    radius: Radius = 0.5,
    label_consistency: Consistency = None,
    quiet: Quiet = False,
) -> None:
    """Train, synthesise, train again with targeted images, test both, write a report."""
    from tsynd.jobs import run as pipeline

    settings = pipeline.RunSettings(
        train_size=train_size,
        seed=seed,
        autoencoder_data=autoencoder_data,
        autoencoder_iterations=autoencoder_iterations,
        iterations=iterations,
        dropout=dropout,
        objective=objective,
        samples=samples,
        masks=masks,
        steps=steps,
        radius=radius,
        label_consistency=label_consistency,
        reading=reading,
    )
    metrics = pipeline.run(data, output, settings, device=device, progress=not quiet)
    _print_run(metrics, output)


@app.command()
@takes_reading
def synthesize(
    data: Data,
    reading: ReadOptions,
    output: Annotated[Path, typer.Option(help="New .npz file, or new folder for a PNG per image.")],
    autoencoder: Annotated[Path | None, typer.Option(help="autoencoder.safetensors of a run.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="classifier.safetensors of a run.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Instead of the two: synthesizer.onnx of tsynd export, which knows its settings."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which images: train, val or test.")] = "train",
    train_size: TrainSize = None,
    seed: Seed = 0,
    device: Device = None,
    objective: Objective = "mutual_information",
    samples: Samples = 32,
    masks: Masks = "shared",
    steps: Steps = 5,
    radius: Radius = 0.5,
    label_consistency: Consistency = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at once; as many as fit by default.")] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Less memory, about 1.4 times as long; where it is needed by default.",
        ),
    ] = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB for the activations of the images at once; 2 on a CPU, half of a GPU's free memory."),
    ] = None,
    shard_size: cli_large.ShardSize = None,
    image_format: cli_large.ImageFormat = "png",
    workers: cli_large.Workers = None,
    ray: cli_large.RayAddress = None,
    threads: cli_large.Threads = None,
    verify: cli_large.Verify = "checksum",
    quiet: Quiet = False,
) -> None:
    """Make targeted images with models saved by a run, or with an exported synthesizer."""
    if model is not None:
        beside = {"autoencoder": autoencoder, "classifier": classifier, "shard-size": shard_size}
        if wrong := [name for name, value in beside.items() if value is not None]:
            raise InputError(f"model: got --{wrong[0]} beside it, wanted the one or the other")
    elif autoencoder is None or classifier is None:
        missing = "autoencoder" if autoencoder is None else "classifier"
        raise InputError(f"{missing}: got none, wanted --autoencoder and --classifier, or --model")
    if shard_size is not None:
        cli_large.synthesize_sharded(
            cli_large.ShardSettings(
                data=data,
                autoencoder=str(autoencoder),
                classifier=str(classifier),
                output=str(output),
                split=split,
                reading=reading,
                shard_size=shard_size,
                image_format=image_format,
                objective=objective,
                samples=samples,
                masks=masks,
                steps=steps,
                radius=radius,
                label_consistency=label_consistency,
                seed=seed,
                batch_size=batch_size,
                checkpointing=checkpointing,
                memory_limit=memory_limit,
                device=device,
                threads=threads,
            ),
            train_size=train_size,
            workers=workers,
            ray=ray,
            verify=verify,
            quiet=quiet,
        )
        return
    if workers is not None or ray is not None or threads is not None:
        raise InputError("shard_size: got none with workers, ray or threads, wanted the images per shard")
    from tsynd.data.load import load_data
    from tsynd.models.checkpoint import load_model, read_card
    from tsynd.synthesis import api as synthesis
    from tsynd.utils.atomic import check_writable

    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"output: {output} exists already, wanted a new file or folder")
    check_writable(output)
    if split not in ("train", "val", "test"):
        raise InputError(f"split: got {split!r}, wanted train, val or test")
    if model is not None:
        cli_export.run_model(model, data, output, split, train_size, seed, device, batch_size, reading)
        return
    assert autoencoder is not None
    assert classifier is not None
    encoder, network = load_model(autoencoder), load_model(classifier)
    source = load_data(data, train_size=train_size, seed=seed, **reading.given())
    names = read_card(classifier).class_names
    if names is not None and tuple(names) != source.class_names:
        raise InputError(
            f"classifier: was trained for {', '.join(names)}, but the data have {', '.join(source.class_names)}"
        )
    if source.spatial_dims == 3 and output.suffix != ".npz":
        raise InputError(f"output: got {output} for volumes, wanted an .npz file: folders of PNG hold pictures")
    part = getattr(source, split)
    result = synthesis.synthesize(
        encoder,
        network,
        part,
        objective=objective,
        task=source.task,
        samples=samples,
        masks=masks,
        steps=steps,
        radius=radius,
        label_consistency=label_consistency,
        batch_size=batch_size,
        checkpointing=checkpointing,
        memory_limit=memory_limit,
        seed=seed,
        device=device,
        progress=not quiet,
    )
    result.save(output, class_names=source.class_names)
    before, after = float(result.initial_uncertainty.mean()), float(result.uncertainty.mean())
    typer.echo(f"{len(result)} images, mean uncertainty {before:.4f} → {after:.4f} nats, in {output}")


app.command()(cli_large.train)
app.command()(cli_large.pack)
app.command()(cli_study.evaluate)
app.command()(cli_study.experiment)
app.command()(cli_export.export)


@app.command()
def info(
    plan: Annotated[bool, typer.Option("--plan", help="Also which CUDA kernel serves which shape.")] = False,
) -> None:
    """Print versions, devices, operators and how they were built."""
    import platform

    import torch

    from tsynd.ops import registration

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("tsynd", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("threads", str(torch.get_num_threads()))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(names) or "none")
    if registration.compiled:
        from tsynd.ops import _C  # type: ignore[attr-defined]

        for key, value in _C.build_info().items():
            table.add_row(f"built with {key}" if key != "cpu_kernels" else "CPU kernels", value)
    else:
        table.add_row("operators", "plain torch: the compiled extension did not load")
    console.print(table)
    kernels = Table("operator", "CPU", "CUDA")
    for name, by in registration.served_by().items():
        kernels.add_row(name, by["CPU"], by["CUDA"])
    console.print(kernels)
    extras = Table("optional package", "version")
    for package in (
        "monai",
        "accelerate",
        "torchmetrics",
        "kornia",
        "safetensors",
        "pillow",
        "pooch",
        "matplotlib",
        "adversarial-robustness-toolbox",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "scipy",
        "ray",
        "webdataset",
        "pyarrow",
        "fsspec",
        "pydicom",
        "nibabel",
        "datasets",
        "transformers",
        "diffusers",
        "laplace-torch",
    ):
        try:
            extras.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            extras.add_row(package, "not installed")
    console.print(extras)
    if plan:
        from tsynd.ops.plans import describe_plans

        plans = Table("device", "shape", "operator", "kernel")
        for row in describe_plans():
            plans.add_row(*row)
        console.print(plans)


def _print_run(metrics: dict[str, object], output: Path) -> None:
    console = Console()
    scores: dict[str, dict[str, dict[str, float]]] = metrics["evaluation"]  # type: ignore[assignment]
    table = Table("balanced accuracy", "real", "targeted", "difference")
    for condition, real in scores["real"].items():
        a, b = real["balanced_accuracy"], scores["targeted"][condition]["balanced_accuracy"]
        table.add_row(condition, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
    console.print(table)
    made: dict[str, float] = metrics["synthesis"]  # type: ignore[assignment]
    before, after = made["uncertainty_before"], made["uncertainty_after"]
    console.print(
        f"{made['images']} targeted images: mean uncertainty {before:.4f} → {after:.4f} nats under fresh posterior "
        f"samples, raised for {made['raised_fraction']:.0%}"
    )
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)


def _spread(arguments: list[str]) -> list[str]:
    """``--arms a b`` as ``--arms a --arms b``: the parser takes one value per flag."""
    spread: list[str] = []
    flag, fresh = "", False
    for argument in arguments:
        if argument.startswith("--"):
            flag, fresh = (argument if argument in cli_study.LISTS else ""), True
        elif flag and not fresh:
            spread.append(flag)
        else:
            fresh = False
        spread.append(argument)
    return spread


def _fail(message: str, code: int) -> NoReturn:
    print(f"tsynd: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command; an input that cannot be used ends with one line and exit code 2."""
    try:
        code = app(_spread(sys.argv[1:]), standalone_mode=False) or 0
        if code == 130:  # the parser swallowed the interrupt
            raise KeyboardInterrupt
        raise SystemExit(code)
    except (InputError, MissingExtraError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on behind the last finished stage", 130)
    except Exception as error:
        show = getattr(error, "show", None)  # the parser's own errors know how to print themselves
        if show is None or not hasattr(error, "exit_code"):
            raise
        show()
        raise SystemExit(error.exit_code) from None
