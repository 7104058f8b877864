"""How images are read: what a caller may choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tsynd.utils.errors import InputError, check_choice, check_whole

__all__ = ["ReadOptions"]

_PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class ReadOptions:
    """How folders, tables and ``datasets`` objects are read; an .npz is taken as it is.

    Attributes:
        image_size: make every image this square (volumes: this cube): scaled with antialiasing until its longest side
            fits, the aspect ratio kept, centred on black.
        channels: 1 or 3 turns every image into grey (ITU-R 601 luma) or RGB (grey repeated); None takes them as they
            are, all of one kind.
        window: (centre, width): what lies at centre − width/2 becomes black, at centre + width/2 white; in the unit
            of the file's values (Hounsfield units in CT), instead of the file's own window. Grey images only.
        frames: ``split`` makes every frame of a multi-frame file an image of its own; None refuses such files.
        volumes: a multi-frame file, or a folder of the slices of one DICOM series, is one volume.
        slices: ``axial``, ``coronal`` or ``sagittal``: volumes become their slices in that plane, without constant
            ones; with ``:middle`` behind it, the one in the middle alone. None keeps volumes.
        spacing: (x, y, z) in mm, to which NIfTI volumes are resampled (linear), x running to the patient's right.
        path_column: of a table or ``datasets`` object: image files.
        label_column: of a table: classes; several, joined by commas, hold 0 and 1 (multilabel).
        split_column: of a table, where it has it: train, val or test.
        group_column: of a table, where it has it: patients, each kept in one split.
        group: ``auto`` keeps a patient's images in one split: by the group column, a DICOM file's PatientID (where
            that is empty, its study), the folder inside the class folder where every class has three or more
            (``folder``: also where it has fewer), or the file that frames and slices come from. ``none`` splits image
            by image.
        inside: refuse files that links, absolute paths or ``..`` lead to outside of the folder, or of the table's.

    Raises:
        InputError: a value that cannot be used.
    """

    image_size: int | None = None
    channels: int | None = None
    window: tuple[float, float] | None = None
    frames: str | None = None
    volumes: bool = False
    slices: str | None = None
    spacing: tuple[float, float, float] | None = None
    path_column: str = "path"
    label_column: str = "label"
    split_column: str = "split"
    group_column: str = "patient"
    group: str = "auto"
    inside: bool = False

    def __post_init__(self) -> None:
        check_whole("image_size", self.image_size, optional=True)
        if self.channels not in (None, 1, 3):
            raise InputError(f"channels: {self.channels!r}; wanted 1 (grey) or 3 (RGB)")
        if self.frames is not None:
            check_choice("frames", self.frames, ("split",))
            if self.volumes:
                raise InputError("frames: 'split' together with volumes; wanted the one or the other")
        for name, count, wanted in (("window", 2, "(centre, width)"), ("spacing", 3, "(x, y, z) in mm")):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _numbers(name, value, count, wanted))
        if self.window is not None and self.window[1] <= 0:
            raise InputError(f"window: width {self.window[1]:g}; wanted (centre, width) with a width above 0")
        if self.spacing is not None and min(self.spacing) <= 0:
            raise InputError(f"spacing: {self.spacing}; wanted (x, y, z) in mm, each above 0")
        if self.slices is not None:
            check_choice("slices", self.slices, [p + end for p in _PLANES for end in ("", ":middle")])
        check_choice("group", self.group, ("auto", "folder", "none"))
        for name in ("path_column", "label_column", "split_column", "group_column"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InputError(f"{name}: {getattr(self, name)!r}; wanted the name of a column")

    def given(self) -> dict[str, Any]:
        """What is not as by default, JSON-able."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {f.name: plain[f.name] for f in fields(self) if values[f.name] != f.default}

    def named(self, column: str) -> bool:
        """Whether the caller chose this column's name."""
        return bool(getattr(self, column) != type(self).__dataclass_fields__[column].default)


def _numbers(name: str, value: Any, count: int, wanted: str) -> tuple[float, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count:
        try:
            numbers = tuple(float(number) for number in value)
        except (TypeError, ValueError):
            numbers = ()
        if numbers and all(map(math.isfinite, numbers)):
            return numbers
    raise InputError(f"{name}: {value!r}; wanted {wanted}, finite numbers")
