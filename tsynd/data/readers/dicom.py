"""DICOM by pydicom: from stored values to what a viewer shows.

MONAI's PydicomReader applies the rescale and stops there: no VOI LUT or window, no MONOCHROME1, no colour, and it
wants the patient's geometry of every file. So the pixels go through pydicom's own functions here.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsynd.data.limits import check_expansion, check_limit
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, quietly, to_unit, windowed
from tsynd.utils.errors import InputError, MissingExtraError, require

__all__ = ["MAGIC_AT", "is_dicom", "read_dicom", "read_series"]

MAGIC_AT = 128  # where a DICOM file says DICM
_CODECS = "pip install 'tsynd[dicom-codecs]'"
_COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_CONTENT = "FrameContentSequence"
_PRIMARIES = ("Red", "Green", "Blue")
_JP2 = b"\0\0\0\x0cjP  "
_OVERRIDE = "window=(centre, width) (--window CENTRE WIDTH) overrides it"


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts so is DICOM."""
    return start[MAGIC_AT : MAGIC_AT + 4] == b"DICM"


def read_dicom(content: bytes, where: str, options: ReadOptions) -> tuple[list[Array], str | None]:
    """The images of a DICOM file, and who the patient is.

    In this order: modality LUT or rescale slope and intercept (of an enhanced file: each frame's own); the caller's
    window, else the VOI LUT, else the file's first window with its VOI function, else minimum to maximum of the image
    without padding pixels; MONOCHROME1 inverted; padding pixels black. A volume has one window, that of its first
    slice, or one minimum and maximum. YBR and palette colour become RGB.

    Returns:
        Images float32 in [0, 1], [1 or 3, H, W] each or, with ``volumes``, one [1 or 3, D, H, W] of several frames;
        PatientID, or the study's UID where there is none, or None.

    Raises:
        InputError: no DICOM, no image, a damaged one, several frames, or no decoder for its compression. Nothing of
            the header stands in the message but technical terms.
        MissingExtraError: pydicom is not installed.
    """
    with _guarded(where):
        dataset = _parse(content, where)
        patient = _patient(dataset)
        count = int(dataset.get("NumberOfFrames") or 1)
        if count > 1 and options.frames is None and not options.volumes:
            raise InputError(
                f"{where}: {count} frames; frames='split' (--frames split) takes each as an image, volumes=True"
                " (--volumes) all as one volume"
            )
        frames = _decode(dataset, count, where, options)
        if count > 1 and options.volumes:
            order = _order(dataset, count, where)
            frames = [frames[index] for index in order]
        images = _show(frames, options, where, together=options.volumes)
    return ([np.stack(images, 1)] if count > 1 and options.volumes else images), patient


def read_series(files: Iterable[tuple[bytes, str]], where: str, options: ReadOptions) -> tuple[Array, str | None]:
    """The volume of a series of single slices, in order along the normal of their planes.

    Args:
        files: content and name of every slice.
        where: the folder, for messages.
        options: as for :func:`read_dicom`.

    Returns:
        Float32 in [0, 1], [1 or 3, D, H, W]; the patient as for :func:`read_dicom`.

    Raises:
        InputError: as :func:`read_dicom`, or slices of several series, planes or sizes, or at one position.
    """
    slices: list[tuple[float, _Frame]] = []
    planes, series, patients = [], set(), set()
    for content, name in files:
        with _guarded(name):
            dataset = _parse(content, name)
            if int(dataset.get("NumberOfFrames") or 1) > 1:
                raise InputError(f"{name}: several frames among the slices of a series; wanted its own folder")
            try:
                plane = np.array([float(v) for v in dataset.ImageOrientationPatient]).reshape(2, 3)
                position = np.array([float(v) for v in dataset.ImagePositionPatient]).reshape(3)
            except (AttributeError, TypeError, ValueError):
                raise InputError(f"{name}: says no plane and position; wanted both to order a volume") from None
            planes.append(plane)
            series.add(_text(dataset, "SeriesInstanceUID"))
            patients.add(_patient(dataset))
            depth = float(np.cross(planes[0][0], planes[0][1]) @ position)
            slices.append((depth, _decode(dataset, 1, name, options)[0]))
    if len(series) > 1 or len(patients) > 1:
        raise InputError(f"{where}: slices of {len(series)} series; wanted one in a folder that is one volume")
    if any(np.abs(plane - planes[0]).max() > 1e-3 for plane in planes):
        raise InputError(f"{where}: slices in several planes; wanted parallel ones")
    if len({frame.values.shape for _, frame in slices}) > 1:
        raise InputError(f"{where}: slices of several sizes; wanted one")
    slices.sort(key=lambda pair: pair[0])
    _check_heights([height for height, _ in slices], where)
    with _guarded(where):
        images = _show([frame for _, frame in slices], options, where, together=True)
    return np.stack(images, 1), next(iter(patients))


def _check_heights(heights: list[float], where: str) -> None:
    """Refuse slices at one height, and a gap where a slice is missing; heights ascend."""
    steps = np.diff(heights)
    if (steps < 1e-4).any():
        raise InputError(f"{where}: two slices at one position; wanted one series of one time")
    if len(steps) > 1 and steps.max() > 1.5 * np.median(steps):
        raise InputError(
            f"{where}: slices {np.median(steps):.4g} mm apart with a gap of {steps.max():.4g} mm; one is missing, "
            "wanted all of a series"
        )


def _order(dataset: Any, count: int, where: str) -> list[int]:
    """The frames of a file in order along the normal of their planes; as they lie where it does not tell."""
    offsets = dataset.get("GridFrameOffsetVector")
    if offsets is not None and len(offsets) == count:  # a dose
        heights = [float(offset) for offset in offsets]
    else:
        found = [_place(dataset, index) for index in range(count)]
        if all(place is None for place in found):
            numbers = [_number_in_stack(dataset, index) for index in range(count)]
            told = None not in numbers and len(set(numbers)) == count
            return sorted(range(count), key=lambda index: numbers[index] or 0) if told else list(range(count))
        places = [place for place in found if place is not None]
        if len(places) < count:
            raise InputError(f"{where}: {count - len(places)} of {count} frames say no position; wanted all or none")
        if any(np.abs(plane - places[0][0]).max() > 1e-3 for plane, _ in places):
            raise InputError(f"{where}: frames in several planes; frames='split' takes each as an image")
        normal = np.cross(*places[0][0])
        heights = [float(normal @ position) for _, position in places]
    order = sorted(range(count), key=heights.__getitem__)
    _check_heights([heights[index] for index in order], where)
    return order


def _place(dataset: Any, index: int) -> tuple[Array, Array] | None:
    """Plane [2, 3] and position [3] of a frame, None where its file does not tell."""
    plane = position = None
    for group in _groups(dataset, index):
        if inner := group.get("PlaneOrientationSequence"):
            plane = inner[0].get("ImageOrientationPatient")
        if inner := group.get("PlanePositionSequence"):
            position = inner[0].get("ImagePositionPatient")
    if not plane or not position:
        return None
    return np.array([float(v) for v in plane]).reshape(2, 3), np.array([float(v) for v in position]).reshape(3)


def _number_in_stack(dataset: Any, index: int) -> int | None:
    found = [inner[0].get("InStackPositionNumber") for g in _groups(dataset, index) if (inner := g.get(_CONTENT))]
    return int(found[-1]) if found and found[-1] is not None else None


def _groups(dataset: Any, index: int) -> list[Any]:
    """The functional groups of a frame: those that all share, then its own."""
    named = (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index))
    return [dataset.get(name)[at] for name, at in named if len(dataset.get(name) or []) > at]


@dataclass(frozen=True)
class _Frame:
    """Values of a frame: grey as stored [H, W] with the header that explains them, or RGB [3, H, W] in [0, 1]."""

    values: Array
    header: Any = None


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    """Silence pydicom, whose warnings quote the header, and make one error of whatever damage leads to."""
    with quietly():
        try:
            yield
        except (InputError, MissingExtraError):
            raise
        except Exception as error:
            raise InputError(f"{where}: damaged description of its pixels ({type(error).__name__})") from None


def _text(dataset: Any, name: str) -> str:
    return str(dataset.get(name) or "").strip()


def _patient(dataset: Any) -> str | None:
    return _text(dataset, "PatientID") or _text(dataset, "StudyInstanceUID") or None


def _parse(content: bytes, where: str) -> Any:
    pydicom = require("pydicom", "medical")
    if not is_dicom(content):
        raise InputError(f"{where}: no DICOM file (no DICM at byte {MAGIC_AT})")
    try:
        _check_deflated(content, where)
        dataset = pydicom.dcmread(io.BytesIO(content))
        held = [key for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if key in dataset]
        has_rows = "Rows" in dataset
    except InputError:
        raise
    except Exception as error:  # damaged bytes lead anywhere; the message may quote the header
        raise InputError(f"{where}: damaged DICOM file ({type(error).__name__})") from None
    if not held:
        what = "its pixel data are missing; truncated?" if has_rows else "holds no image"
        raise InputError(f"{where}: {what}")
    return dataset


def _check_deflated(content: bytes, where: str) -> None:
    """Refuse a deflated data set that grows beyond the limit, before pydicom unpacks it whole."""
    if content.find(b"1.2.840.10008.1.2.1.99", 0, 4096) < 0:
        return
    reader = require("pydicom.filereader", "medical")
    file = io.BytesIO(content)
    reader.read_preamble(file, False)
    reader._read_file_meta_info(file)
    rest = content[file.tell() :]
    unpack, size, waiting = zlib.decompressobj(-zlib.MAX_WBITS), 0, rest
    while waiting:
        size += len(unpack.decompress(waiting, 2**24))
        waiting = unpack.unconsumed_tail
        check_expansion(len(rest), size, where)


def _decode(dataset: Any, count: int, where: str, options: ReadOptions) -> list[_Frame]:
    """The frames of a parsed file."""
    colour = str(dataset.PhotometricInterpretation)
    if colour not in _GREY and colour not in _COLOUR:
        raise InputError(f"{where}: colour that tsynd cannot show; wanted MONOCHROME, RGB, YBR or PALETTE COLOR")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    wanted = 1 if colour in _GREY or colour == "PALETTE COLOR" else 3
    if samples != wanted:
        raise InputError(f"{where}: {samples} samples per pixel, but its colour is {colour}, which has {wanted}")
    shape = (count, int(dataset.Rows), int(dataset.Columns), *([3] if samples == 3 else []))
    check_limit("VALUES", math.prod(shape), where)
    stored = _stored(dataset, where)
    stored = stored[None] if count == 1 else stored
    if stored.shape != shape:
        raise InputError(f"{where}: pixels {list(stored.shape)}, but its header says {list(shape)}")
    if colour in _GREY:
        return [_Frame(one, _frame_header(dataset, index)) for index, one in enumerate(stored)]
    if options.window is not None:
        raise InputError(f"window: {where} is a colour image; wanted a window with grey images alone")
    if colour == "PALETTE COLOR":
        stored, full = _palette(dataset, stored)
    else:
        full = 2.0 ** int(dataset.BitsStored) - 1
    return [_Frame(to_unit(np.moveaxis(one[..., :3], -1, 0).astype(np.float32), 0, full)) for one in stored]


def _stored(dataset: Any, where: str) -> Array:
    """Decoded values, YBR turned into RGB."""
    uid, pixels = require("pydicom.uid", "medical"), require("pydicom.pixels", "medical")
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or syntax not in uid.AllTransferSyntaxes:
        raise InputError(f"{where}: names no transfer syntax that is known; wanted a DICOM file with its meta header")
    compression = "" if not syntax.is_compressed or syntax.is_deflated else str(syntax.name)
    if compression:
        try:
            able = pixels.get_decoder(syntax).is_available
        except NotImplementedError:
            raise InputError(f"{where}: compressed as {compression}, which is no image; wanted still images") from None
        if not able:
            raise InputError(f"{where}: compressed as {compression}, for which no decoder is installed; {_CODECS}")
    try:
        if syntax in uid.JPEG2000TransferSyntaxes:
            count = int(dataset.get("NumberOfFrames") or 1)
            generate = require("pydicom.encaps", "medical").generate_frames
            if any(_endless(frame) for frame in generate(dataset.PixelData, number_of_frames=count)):
                raise ValueError("a box without length")
        return np.asarray(pixels.pixel_array(dataset, raw=False))
    except Exception as error:
        if compression:
            raise InputError(
                f"{where}: its pixels, compressed as {compression}, cannot be decoded ({type(error).__name__}): damaged"
                f" or truncated, or of a kind for other decoders; {_CODECS}"
            ) from None
        raise InputError(f"{where}: truncated or damaged pixel data ({type(error).__name__})") from None


def _endless(frame: bytes) -> bool:
    """Whether pydicom would walk the boxes of a JP2 header for ever: one has no length, and the image is not in it."""
    at = 12
    while frame.startswith(_JP2) and at < len(frame) and frame[at + 4 : at + 8] != b"jp2c":
        length = int.from_bytes(frame[at : at + 4], "big")
        if length == 0:
            return True
        at += length
    return False


def _frame_header(dataset: Any, index: int) -> Any:
    """What the grey values of a frame mean: of an enhanced file, from its functional groups."""
    header = require("pydicom", "medical").Dataset()
    header.file_meta = dataset.file_meta
    groups = [dataset]
    for group in _groups(dataset, index):
        for inner in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            groups += (group.get(inner) or [])[:1]
    for group in groups:
        for name in (
            "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "RescaleSlope",
            "RescaleIntercept",
            "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
            "PixelPaddingValue", "PixelPaddingRangeLimit", "FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit",
            "DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit",
        ):  # fmt: skip
            if group.get(name) is not None:
                header[name] = group[name]
    return header


def _show(frames: list[_Frame], options: ReadOptions, where: str, together: bool) -> list[Array]:
    """Frames as float32 [1 or 3, H, W] in [0, 1]; ``together``: under one window."""
    if frames[0].header is None:
        return [frame.values for frame in frames]
    padding = [_padding(frame) for frame in frames]
    values = [_modality(frame, hidden) for frame, hidden in zip(frames, padding, strict=True)]
    if not all(np.isfinite(one).all() for one in values):
        raise InputError(f"{where}: holds a value that is not finite")
    seen = [one[~hidden] if not hidden.all() else one for one, hidden in zip(values, padding, strict=True)]
    spans = [(float(one.min()), float(one.max())) for one in seen]
    if together:
        spans = [(min(low for low, _ in spans), max(high for _, high in spans))] * len(spans)
    images = []
    for frame, one, hidden, span in zip(frames, values, padding, spans, strict=True):
        unit = _unit(one, frames[0].header if together else frame.header, span, options, where)
        if frame.header.PhotometricInterpretation == "MONOCHROME1":
            unit = 1 - unit
        unit[hidden] = 0
        images.append(unit[None])
    return images


def _modality(frame: _Frame, hidden: Array) -> Array:
    """Values behind the modality LUT or rescale; hidden ones that are no number, as the least of the others."""
    values, header = frame.values, frame.header
    if header.get("ModalityLUTSequence"):
        return _through(header.ModalityLUTSequence[0], values)[0]
    if values.dtype.kind == "f" and hidden.any() and not hidden.all():
        values = np.where(hidden, values[~hidden].min(), values)
    return np.asarray(require("pydicom.pixels", "medical").apply_modality_lut(values, header))


def _padding(frame: _Frame) -> Array:
    """Which pixels are no image but what a scanner fills its rectangle with."""
    stored, header = frame.values, frame.header
    if stored.dtype.kind == "f":
        name = "FloatPixelPadding" if stored.dtype.itemsize == 4 else "DoubleFloatPixelPadding"
        value, limit = header.get(f"{name}Value"), header.get(f"{name}RangeLimit")
        if value is None:
            return np.zeros(stored.shape, bool)
        low, high = sorted((float(value), float(value if limit is None else limit)))
        return np.isnan(stored) if math.isnan(low) else np.asarray((stored >= low) & (stored <= high))
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((_as_stored(value, header), _as_stored(value if limit is None else limit, header)))
    return np.asarray((stored >= low) & (stored <= high))


def _as_stored(value: Any, header: Any) -> int:
    """A padding value in the sign of the stored ones, whatever the sign of its own element."""
    number = int(value if isinstance(value, (int, float, str)) else value[0])
    allocated: int = int(header.get("BitsAllocated", 16))
    stored: int = int(header.get("BitsStored", 16))
    if int(header.get("PixelRepresentation", 0)) == 1:
        for bits in (stored, allocated):
            if number >> (bits - 1) == 1:
                return number - (1 << bits)
        return number
    return number + (1 << allocated) if number < 0 else number


def _table(item: Any, data: str, descriptor: str) -> tuple[Array, int, int]:
    """Entries of a lookup table, its first input and the depth of its values in bits.

    The entries are 16-bit words or bytes by how many there are, not by the stated depth; a depth that the values go
    beyond, or stay four times below, is not theirs.
    """
    count, first, stated = (int(v) for v in item[descriptor].value)
    count = count % 2**16 or 2**16
    raw = item[data].value
    if isinstance(raw, (bytes, bytearray)):
        order = ">" if getattr(item, "is_little_endian", None) is False else "<"
        entries = np.frombuffer(raw, f"{order}u2" if len(raw) >= 2 * count else np.uint8)
    else:
        entries = np.atleast_1d(np.asarray(raw, np.int64)) % 2**16
    if len(entries) < count:
        raise ValueError("a lookup table is shorter than it says")
    entries = entries[:count].astype(np.int64)
    needed = max(1, int(entries.max()).bit_length())
    return entries, first, needed if needed > stated or needed <= stated - 2 else stated


def _through(item: Any, values: Array) -> tuple[Array, int]:
    """Values through a lookup table, and the depth of what comes out."""
    entries, first, depth = _table(item, "LUTData", "LUTDescriptor")
    return _looked_up(entries, first, values), depth


def _looked_up(entries: Array, first: int, values: Array) -> Array:
    whole = (values if values.dtype.kind in "iu" else np.rint(values)).astype(np.int64)
    low, high = int(whole.min()), int(whole.max())

    def covered(start: int) -> int:
        return min(high, start + len(entries) - 1) - max(low, start)

    # the sign of the first input is that of the values, which pydicom may have read otherwise
    first = max((first, first - 2**16, first + 2**16), key=covered)
    return np.asarray(entries[np.clip(whole - first, 0, len(entries) - 1)])


def _palette(dataset: Any, stored: Array) -> tuple[Array, float]:
    """Palette colour as RGB [..., 3], and what is white."""
    if any(f"Segmented{colour}PaletteColorLookupTableData" in dataset for colour in _PRIMARIES):
        rgb = require("pydicom.pixels", "medical").apply_color_lut(stored, dataset)
        return rgb[..., :3], 2.0 ** (8 * rgb.dtype.itemsize) - 1
    name = "{}PaletteColorLookupTable{}"
    tables = [_table(dataset, name.format(c, "Data"), name.format(c, "Descriptor")) for c in _PRIMARIES]
    rgb = np.stack([_looked_up(entries, first, stored) for entries, first, _ in tables], -1)
    # words may hold bytes: then no entry of any colour is above 255
    return rgb, 255.0 if max(int(entries.max()) for entries, _, _ in tables) < 256 else 65535.0


def _unit(values: Array, header: Any, span: tuple[float, float], options: ReadOptions, where: str) -> Array:
    """Values behind the modality LUT as float32 in [0, 1], black to white."""
    if options.window is not None:
        return windowed(values, options.window)
    if header.get("VOILUTSequence"):
        shown, depth = _through(header.VOILUTSequence[0], values)
        return to_unit(shown.astype(np.float32), 0, 2.0**depth - 1)
    if "WindowCenter" in header and "WindowWidth" in header:
        return _own_window(values, header, where)
    return to_unit(values.astype(np.float64), *span)


def _own_window(values: Array, header: Any, where: str) -> Array:
    width = header.WindowWidth
    width = float(width if isinstance(width, (int, float)) else width[0])
    exact = str(header.get("VOILUTFunction", "LINEAR")).upper() != "LINEAR"
    if not width > 0 or (width < 1 and not exact):
        raise InputError(f"{where}: a window of width {width:g}; {_OVERRIDE}")
    # pydicom's result lies between the ends of the stored values; the two infinities show where they are
    both = np.concatenate([values.astype(np.float64).ravel(), [-np.inf, np.inf]])
    with np.errstate(over="ignore"):
        shown: Array = require("pydicom.pixels", "medical").apply_windowing(both, header)
    low, high = shown[-2:]
    return np.reshape(to_unit((shown[:-2] - low) / (high - low), 0, 1), values.shape)
