"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tsynd.data.readers.options import ReadOptions

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="MedMNIST-style .npz; folder of class folders of PNG, JPEG, TIFF, DICOM or NIfTI files; table of them"
        " (.csv, .tsv, .parquet); MedMNIST name (pneumoniamnist, ...), 'phantom' or 'phantom3d'.",
    ),
]
TrainSize = Annotated[int | None, typer.Option(help="Labelled training images; all by default.")]
Seed = Annotated[int, typer.Option(help="Of the subset, the networks and the posterior samples.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]
Objective = Annotated[str, typer.Option(help="mutual_information or entropy.")]
Samples = Annotated[int, typer.Option(help="Posterior samples T.")]
Masks = Annotated[str, typer.Option(help="shared or independent dropout masks.")]
Steps = Annotated[int, typer.Option(help="Ascent steps K.")]
Radius = Annotated[float, typer.Option(help="Of the ball, times latent deviation times sqrt(dimension).")]
Consistency = Annotated[float | None, typer.Option(help="Least mean probability that the source label must keep.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]

_D = ReadOptions()
_READING: dict[str, tuple[Any, str]] = {
    "image_size": (int | None, "Make every image this square: its longest side scaled to it, the rest black."),
    "channels": (int | None, "1 or 3: turn every image into grey or RGB."),
    "window": (tuple[float, float] | None, "CENTRE WIDTH of what is shown, instead of the file's own window."),
    "frames": (str | None, "split: every frame of a multi-frame file is an image."),
    "volumes": (bool, "A multi-frame file, or a folder of DICOM slices in a class folder, is one volume."),
    "slices": (str | None, "axial, coronal or sagittal slices of NIfTI volumes; axial:middle takes the middle one."),
    "spacing": (tuple[float, float, float] | None, "X Y Z in mm, to which NIfTI volumes are resampled."),
    "path_column": (str, "Of a table: image files."),
    "label_column": (str, "Of a table: classes; several joined by commas hold 0 and 1."),
    "split_column": (str, "Of a table, where it has it: train, val or test."),
    "group_column": (str, "Of a table, where it has it: patients, each kept in one split."),
    "group": (str, "auto keeps a patient's images in one split; none splits image by image."),
}


def takes_reading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command with a parameter ``reading: ReadOptions`` one option for each of its fields instead."""

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        fields = {name: given.pop(name) for name in _READING}
        command(reading=ReadOptions(**fields), **given)

    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(_D, name),
            annotation=Annotated[
                kind, typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Reading files")
            ],
        )
        for name, (kind, text) in _READING.items()
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in signature.parameters.items() if n != "reading"]
    wrapper.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in own + options}
    return wrapper
