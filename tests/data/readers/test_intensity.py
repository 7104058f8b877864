"""Files whose headers and values disagree, and values that most scalings lose: the right pixels, or one error."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

import nibabel
import pydicom
from medical_files import dicom, nifti, save

from tsynd.data.readers import ReadOptions, read_image
from tsynd.utils.errors import InputError

RNG = np.random.default_rng(0)
SMALL = np.arange(16, dtype=np.uint8).reshape(4, 4)


def shown(content: bytes, kind: str = "dicom", **options: Any) -> np.ndarray:
    (image,), _ = read_image(content, kind, "x", ReadOptions(**options))
    return image


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


# Enhanced and other multi-frame files


def part(**elements: Any) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item


def enhanced(heights: list[float], plane: tuple[float, ...] = (1, 0, 0, 0, 1, 0), shared: bool = True) -> bytes:
    """Frames as bright as they are high."""
    orientation = pydicom.Sequence([part(ImageOrientationPatient=list(plane))])
    normal = np.cross(plane[:3], plane[3:])
    frames = []
    for height in heights:
        frame = part(PlanePositionSequence=pydicom.Sequence([part(ImagePositionPatient=list(normal * height))]))
        if not shared:
            frame.PlaneOrientationSequence = orientation
        frames.append(frame)
    common = pydicom.Sequence([part(PlaneOrientationSequence=orientation) if shared else part()])
    pixels = np.stack([np.full((4, 4), 100 * height) for height in heights]).astype(np.uint16)
    return dicom(
        pixels,
        NumberOfFrames=len(heights),
        SharedFunctionalGroupsSequence=common,
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(frames),
    )


@pytest.mark.parametrize("heights", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("plane", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)])
@pytest.mark.parametrize("shared", [True, False])
def test_frames_are_put_in_order_along_their_normal(heights, plane, shared) -> None:
    volume = shown(enhanced(heights, plane, shared), volumes=True)
    assert volume[0, :, 0, 0].tolist() == [0, 85, 170, 255]


def test_a_dose_is_ordered_by_its_offsets() -> None:
    pixels = np.stack([np.full((4, 4), 100 * height) for height in (3, 2, 1, 0)]).astype(np.uint16)
    volume = shown(dicom(pixels, NumberOfFrames=4, GridFrameOffsetVector=[9, 6, 3, 0]), volumes=True)
    assert volume[0, :, 0, 0].tolist() == [0, 85, 170, 255]
    plain = shown(dicom(pixels, NumberOfFrames=4), volumes=True)  # a film says no position: as it lies
    assert plain[0, :, 0, 0].tolist() == [255, 170, 85, 0]


def test_frames_without_positions_follow_their_number_in_the_stack() -> None:
    pixels = np.stack([np.full((4, 4), 100 * height) for height in (2, 0, 3, 1)]).astype(np.uint16)
    content = [part(FrameContentSequence=pydicom.Sequence([part(InStackPositionNumber=n + 1)])) for n in (2, 0, 3, 1)]
    file = dicom(pixels, NumberOfFrames=4, PerFrameFunctionalGroupsSequence=pydicom.Sequence(content))
    assert shown(file, volumes=True)[0, :, 0, 0].tolist() == [0, 85, 170, 255]


def test_frames_that_make_no_volume_are_refused() -> None:
    for heights, message in (([0, 1, 1, 2], "two slices at one position"), ([0, 1, 2, 4], "one is missing")):
        with pytest.raises(InputError, match=message):
            shown(enhanced(heights), volumes=True)
        images, _ = read_image(enhanced(heights), "dicom", "x", ReadOptions(frames="split"))
        assert len(images) == 4


# Lookup tables


def voi(values: np.ndarray, stated: int, first: int = 0, kind: str = "US", words: bool = True) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.LUTData = values.astype("<u2" if words else "u1").tobytes()
    item["LUTData"].VR = "OW"
    item.add_new("LUTDescriptor", kind, [len(values), first, stated])
    return pydicom.Sequence([item])


@pytest.mark.parametrize("stated", [8, 10, 12, 16])
@pytest.mark.parametrize("held", [8, 10, 12, 16])
def test_a_tables_depth_is_that_of_its_values(stated: int, held: int) -> None:
    if stated - held == 1:
        return
    curve = np.rint(np.linspace(0, 2**held - 1, 16)).astype(int)
    image = shown(dicom(SMALL, VOILUTSequence=voi(curve, stated)))
    assert np.abs(image[0].ravel() - np.rint(curve / (2**held - 1) * 255)).max() <= 1


def test_a_table_of_bytes() -> None:
    curve = np.linspace(0, 255, 16).astype(int)
    for table in (voi(curve, 8, words=False), voi(curve, 8, words=True), voi(curve, 16)):
        assert np.array_equal(shown(dicom(SMALL, VOILUTSequence=table))[0].ravel(), curve)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"])
def test_a_tables_first_input_has_the_sign_of_the_values(syntax: str) -> None:
    values = (np.arange(16) * 100).reshape(4, 4).astype(np.uint16)
    table = voi(np.arange(0, 4096, 2), 12, -1000, "SS")
    header = {"RescaleSlope": 1, "RescaleIntercept": -1000, "VOILUTSequence": table}
    image = shown(dicom(values, syntax=syntax, **header))
    assert np.abs(image[0].ravel() - np.rint(values.ravel() * 2 / 4095 * 255)).max() <= 1
    modality = dicom(values.astype(np.int16) - 1000, syntax=syntax, ModalityLUTSequence=table)
    assert np.array_equal(shown(modality, window=(2047, 4094)), shown(dicom(values * 2), window=(2047, 4094)))


@pytest.mark.parametrize(("stated", "words"), [(16, True), (8, True), (8, False)])
def test_palettes_of_bytes_in_any_dress(stated: int, words: bool) -> None:
    header: dict[str, Any] = {}
    for colour, values in zip(("Red", "Green", "Blue"), (np.arange(16) * 16, np.arange(16), 255 - SMALL), strict=True):
        header[f"{colour}PaletteColorLookupTableDescriptor"] = [16, 0, stated]
        header[f"{colour}PaletteColorLookupTableData"] = values.ravel().astype("<u2" if words else "u1").tobytes()
    image = shown(dicom(SMALL, photometric="PALETTE COLOR", **header))
    assert np.array_equal(image, np.stack([SMALL * 16, SMALL, 255 - SMALL]))


# Padding, colour


def test_padding_of_another_sign() -> None:
    values = RNG.integers(-900, 2000, (4, 4)).astype(np.int16)
    values[0] = -2000
    wanted = shown(dicom(values, PixelPaddingValue=-2000))
    assert wanted[0, 0].max() == 0
    dataset = pydicom.dcmread(io.BytesIO(dicom(values)))
    dataset.add_new("PixelPaddingValue", "US", 63536)  # -2000 as written by who does not look at the sign
    assert np.array_equal(shown(save(dataset)), wanted)
    dataset = pydicom.dcmread(io.BytesIO(dicom(values.astype(np.uint16))))
    dataset.add_new("PixelPaddingValue", "SS", -2000)
    assert shown(save(dataset))[0, 0].max() == 0
    twelve = pydicom.dcmread(io.BytesIO(dicom(values.clip(-2000, 2000), stored=12)))
    twelve.add_new("PixelPaddingValue", "US", 4096 - 2000)  # in twelve bits
    assert shown(save(twelve))[0, 0].max() == 0
    unit = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    unit[0] = -999
    header = {"Rows": 4, "Columns": 4, "BitsAllocated": 32, "FloatPixelData": unit.tobytes()}
    image = shown(dicom(None, FloatPixelPaddingValue=-999.0, **header))
    assert image[0, 0].max() == 0
    assert np.array_equal(image[0, 1:], np.rint((unit[1:] - unit[1, 0]) / (1 - unit[1, 0]) * 255))


@pytest.mark.parametrize(("written", "says"), [("RGB", "MONOCHROME2"), ("RGB", "MONOCHROME1"), ("MONOCHROME2", "RGB"),
                                               ("MONOCHROME2", "YBR_FULL"), ("RGB", "PALETTE COLOR")])  # fmt: skip
def test_samples_that_contradict_the_colour(written: str, says: str) -> None:
    pixels = RNG.integers(0, 255, (8, 8, 3) if written == "RGB" else (8, 8)).astype(np.uint8)
    dataset = pydicom.dcmread(io.BytesIO(dicom(pixels, photometric=written)))
    dataset.PhotometricInterpretation = says
    with pytest.raises(InputError, match=r"x: [13] samples per pixel, but its colour is"):
        shown(save(dataset))


# NIfTI


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sparse_volume_is_not_black(sign: int) -> None:
    values = np.zeros((32, 32, 32), np.float32)
    values[4:9, 4:9, 4:9] = sign * RNG.uniform(1, 10, (5, 5, 5))
    image = shown(nifti(values), "nifti")
    assert (image.min(), image.max()) == (0, 255)
    assert len(np.unique(image)) > 50


def test_not_a_number_is_background() -> None:
    values = RNG.uniform(5, 9, (8, 8, 8)).astype(np.float32)
    values[:2] = np.nan
    image = shown(nifti(values), "nifti", window=(7, 4))
    assert np.array_equal(image, shown(nifti(np.nan_to_num(values, nan=np.nanmin(values))), "nifti", window=(7, 4)))
    values[4, 4, 4] = np.inf
    with pytest.raises(InputError, match="not finite"):
        shown(nifti(values), "nifti")


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 1, 0, 1])])
def test_an_unusable_sform(bad: np.ndarray) -> None:
    values = RNG.integers(0, 200, (4, 5, 6)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([-2.0, 2, 2, 1]))
    image.header.set_qform(np.diag([-2.0, 2, 2, 1]), code=1)
    wanted = shown(image.to_bytes(), "nifti")
    content = bytearray(image.to_bytes())
    content[252:256] = struct.pack("<hh", 1, 1)  # the codes of qform and sform
    content[280:328] = bad[:3].astype("<f4").tobytes()
    assert np.array_equal(shown(bytes(content), "nifti"), wanted)
    content[252:254] = bytes(2)
    with pytest.raises(InputError, match=r"sform .* singular or not finite"):
        shown(bytes(content), "nifti")


# Pictures


def test_a_cameras_second_picture_is_left_out() -> None:
    photo, gain = (
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)),
        Image.fromarray(np.full((16, 16, 3), 255, np.uint8)),
    )
    content = saved(photo, "MPO", save_all=True, append_images=[gain])
    for options in ({}, {"frames": "split"}, {"volumes": True}):
        image = shown(content, "picture", **options)
        assert image.shape == (3, 64, 64)
        assert image.max() < 95


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_orientation_mark_of_any_depth(kind: str, dtype: type) -> None:
    if kind == "PNG" and dtype is np.float32:
        return
    values = np.add.outer(np.arange(6) * 12, np.arange(4))
    pixels = (
        (values / 255).astype(np.float32)
        if dtype is np.float32
        else (values * (257 if dtype is np.uint16 else 1)).astype(dtype)
    )
    tag = Image.Exif()
    tag[0x0112] = 6
    image = Image.fromarray(pixels)
    content = saved(image, kind, exif=tag) if kind == "PNG" else saved(image, kind, tiffinfo={274: 6})
    assert np.array_equal(shown(content, "picture")[0], np.rot90(values, -1))


def test_floats_that_are_inverted_or_no_number() -> None:
    unit = RNG.random((6, 9)).astype(np.float32)
    assert np.array_equal(
        shown(saved(Image.fromarray(unit), "TIFF", tiffinfo={262: 0}), "picture")[0], np.rint((1 - unit) * 255)
    )
    unit[0] = np.nan
    for options in ({}, {"window": (0.5, 1.0)}):
        image = shown(saved(Image.fromarray(unit), "TIFF"), "picture", **options)[0]
        assert image[0].max() == 0
        assert np.array_equal(image[1:], np.rint(unit[1:] * 255))


def test_only_documented_formats_are_opened() -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/x 1 def showpage\n"
    with pytest.raises(InputError, match="unreadable picture"):
        shown(program, "picture")
    assert shown(saved(Image.fromarray(SMALL), "WEBP", lossless=True), "picture").shape == (3, 4, 4)
