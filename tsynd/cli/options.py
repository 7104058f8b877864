"""Options of the commands: made from the fields of the settings' dataclasses, or shared by several commands."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from tsynd.data.readers.options import ReadOptions
from tsynd.synthesis.ascent import AscentSettings
from tsynd.utils.errors import InputError

__all__ = [
    "ASCENT",
    "Ascent",
    "ClassMap",
    "Data",
    "Device",
    "Options",
    "Quiet",
    "Reading",
    "TestData",
    "Track",
    "field_texts",
    "given_options",
    "refuse",
    "takes_options",
]


@dataclass(frozen=True)
class Options:
    """Mark of a parameter that stands for several options: fields of a dataclass, which come as one dict.

    Attributes:
        settings: the dataclass; names, types, defaults and, from its docstring, help texts are its.
        names: the fields.
        panel: of the help; None is the command's basic part.
        defaults: where they are not the dataclass's.
    """

    settings: type
    names: tuple[str, ...]
    panel: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self) -> list[inspect.Parameter]:
        """One parameter for each field, as typer reads them."""
        hints, texts = get_type_hints(self.settings), field_texts(self.settings)
        own = {part.name: part for part in fields(self.settings)}
        made = []
        for name in self.names:
            kind, default = hints[name], self.defaults.get(name, own[name].default)
            if get_origin(kind) is tuple and Ellipsis in get_args(kind):
                kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
            flag = f"--{name.replace('_', '-')}"
            if kind == (bool | None):
                flag += f"/--no-{flag[2:]}"
            if default is None and get_origin(kind) not in (types.UnionType, Union):
                kind = kind | None
            annotation: Any = Annotated[kind, typer.Option(flag, help=texts[name], rich_help_panel=self.panel)]
            if default is MISSING:
                default = inspect.Parameter.empty
            made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        return made


def field_texts(settings: type) -> dict[str, str]:
    """What the ``Attributes`` of a dataclass's docstring, and of those it inherits from, say of each field."""
    texts: dict[str, str] = {}
    for part in reversed(settings.__mro__):
        _, _, section = inspect.cleandoc(part.__doc__ or "").partition("\nAttributes:\n")
        section = re.split(r"\n\S", section)[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE):
            text = re.sub(r"; None (?!\()[^;.]*", "", " ".join(text.split()))  # which an option cannot be
            plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")
            texts[name] = plain if text.startswith("``") else plain[0].upper() + plain[1:]
    return texts


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, for each parameter marked with :class:`Options`, the options that it stands for."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Options] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        marks = [mark for mark in get_args(parameter.annotation)[1:] if isinstance(mark, Options)]
        if marks:
            groups[name] = marks[0]
            flat += marks[0].parameters()
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        grouped = {name: {field: given.pop(field) for field in group.names} for name, group in groups.items()}
        command(**given, **grouped)

    wrapper.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return wrapper


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that the command line sets."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that were given although they cannot act.

    Args:
        context: of the command.
        names: of its parameters.
        reason: why they cannot, for instance ``with --model``.

    Raises:
        InputError: one of them was given.
    """
    if wrong := [name for name in names if name in given_options(context)]:
        raise InputError(f"{wrong[0]}: --{wrong[0].replace('_', '-')} does nothing {reason}; leave it out")


ASCENT = ("objective", "samples", "masks", "steps", "radius", "label_consistency")

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="MedMNIST-style .npz; folder of class folders of PNG, JPEG, TIFF, DICOM or NIfTI files; table of them"
        " (.csv, .tsv, .parquet); MedMNIST name (pneumoniamnist, ...), 'phantom' or 'phantom3d'.",
    ),
]
ClassMap = Annotated[
    list[str] | None,
    typer.Option(
        help="THEIRS=OURS: classes of the tested data by the classifier's names; THEIRS= leaves one out.",
        rich_help_panel="Test",
    ),
]
TestData = Annotated[
    list[str] | None,
    typer.Option(help="NAME=DATA: more test sets, as of other hospitals, all their images.", rich_help_panel="Test"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Track = Annotated[
    str | None,
    typer.Option(help="Log losses by tensorboard, wandb, mlflow, ... into OUTPUT/logs.", rich_help_panel="Training"),
]
Ascent = Annotated[dict[str, Any], Options(AscentSettings, ASCENT, "Ascent")]
Reading = Annotated[
    dict[str, Any], Options(ReadOptions, tuple(part.name for part in fields(ReadOptions)), "Reading files")
]
