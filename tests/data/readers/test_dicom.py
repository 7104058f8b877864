"""DICOM files: every edge gives the right pixels or one clear error, and no error quotes a header."""

from __future__ import annotations

import io
import traceback
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydicom")

import pydicom
from medical_files import EXPLICIT, dicom, save
from PIL import Image

from tsynd.data.readers import ReadOptions, read_image
from tsynd.utils.errors import InputError

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 50 + 7
HOUNSFIELD = np.linspace(-1100, 2900, 64).round().astype(np.int16).reshape(8, 8)


def shown(content: bytes, **options: Any) -> np.ndarray:
    """The one image in a file, [C, H, W]."""
    images, _ = read_image(content, "dicom", "scan.dcm", ReadOptions(**options))
    assert len(images) == 1
    assert images[0].dtype == np.uint8
    return images[0]


def outcome(content: bytes) -> tuple[np.ndarray | None, str]:
    try:
        return shown(content), ""
    except InputError as error:
        return None, str(error)


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 to 0 .. 255, one pixel after the other."""
    out = []
    for x in values.ravel().tolist():
        if x <= centre - 0.5 - (width - 1) / 2:
            out.append(0.0)
        elif x > centre - 0.5 + (width - 1) / 2:
            out.append(255.0)
        else:
            out.append(((x - (centre - 0.5)) / (width - 1) + 0.5) * 255)
    return np.rint(out).reshape(values.shape)


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)


def test_missing_window_shows_minimum_to_maximum() -> None:
    assert np.array_equal(shown(dicom(RAMP))[0], ramp(RAMP, 7, 3157))
    flat = shown(dicom(np.full((4, 4), 900, np.uint16)))
    assert flat.max() == 0
    # values that fill neither the type nor BitsStored
    assert np.array_equal(shown(dicom(RAMP, stored=12))[0], ramp(RAMP, 7, 3157))


def test_monochrome1_is_inverted() -> None:
    for header in ({}, {"WindowCenter": 1600, "WindowWidth": 2000}):
        dark, bright = (shown(dicom(RAMP, photometric=f"MONOCHROME{k}", **header)) for k in (1, 2))
        assert np.abs(dark.astype(int) + bright - 255).max() <= 1
        assert bright[0, 0, 0] == 0
        assert dark[0, 0, 0] == 255


@pytest.mark.parametrize("stored", [16, 13])
def test_signed_sixteen_bits_with_rescale_and_window(stored: int) -> None:
    header = {"RescaleSlope": 1, "RescaleIntercept": -24, "WindowCenter": 40, "WindowWidth": 400}
    content = dicom(HOUNSFIELD, stored=stored, **header)
    assert np.abs(shown(content)[0] - linear(HOUNSFIELD - 24.0, 40, 400)).max() <= 1
    # the caller's window instead: centre ± half the width
    assert np.array_equal(shown(content, window=(-600, 1500))[0], ramp(HOUNSFIELD - 24.0, -1350, 150))
    # a slope below zero turns the values round, not the window
    turned = dicom(-HOUNSFIELD, stored=stored, **{**header, "RescaleSlope": -1})
    assert np.array_equal(shown(turned), shown(content))
    # unused high bits that old scanners filled
    if stored == 13:
        dirty = (HOUNSFIELD & 0x1FFF) | 0x4000
        assert np.array_equal(shown(dicom(dirty, stored=13, **header)), shown(content))


def test_first_of_several_windows_and_every_function() -> None:
    several = dicom(RAMP, WindowCenter=[1000, 2000], WindowWidth=[800, 100])
    assert np.abs(shown(several)[0] - linear(RAMP, 1000, 800)).max() <= 1
    exact = dicom(RAMP, WindowCenter=1000, WindowWidth=800, VOILUTFunction="LINEAR_EXACT")
    assert np.abs(shown(exact)[0] - ramp(RAMP, 600, 1400)).max() <= 1
    smooth = dicom(RAMP, WindowCenter=1000, WindowWidth=800, VOILUTFunction="SIGMOID")
    assert np.abs(shown(smooth)[0] - 255 / (1 + np.exp(-4 * (RAMP - 1000.0) / 800))).max() <= 1
    for width in (0, -5, 0.5):
        with pytest.raises(InputError, match=r"scan\.dcm: a window of width .*window=\(centre, width\)"):
            shown(dicom(RAMP, WindowCenter=1000, WindowWidth=width))
    assert shown(dicom(RAMP, WindowCenter=1000, WindowWidth=0), window=(1000, 800)).max() == 255


def lookup(first: int, data: list[int], bits: int) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(data), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = data
    item["LUTData"].VR = "US"
    return pydicom.Sequence([item])


def test_lookup_tables() -> None:
    small = np.arange(16, dtype=np.uint8).reshape(4, 4)
    curve = [0, 10, 40, 90, 160, 250, 360, 490, 640, 810, 1000, 1210, 1440, 1690, 1960, 4095]
    voi = dicom(small, VOILUTSequence=lookup(0, curve, 12))
    assert np.array_equal(shown(voi)[0].ravel(), ramp(np.array(curve), 0, 4095))
    both = dicom(small, VOILUTSequence=lookup(0, curve, 12), WindowCenter=3, WindowWidth=2)
    assert np.array_equal(shown(both), shown(voi))
    rescaled = dicom(small, VOILUTSequence=lookup(100, curve, 12), RescaleSlope=1, RescaleIntercept=100)
    assert np.array_equal(shown(rescaled), shown(voi))
    modality = dicom(small, ModalityLUTSequence=lookup(0, curve, 16), WindowCenter=200.5, WindowWidth=401)
    assert np.abs(shown(modality)[0].ravel() - linear(np.array(curve), 200.5, 401)).max() <= 1


def test_padding_is_black_and_not_measured() -> None:
    padded = HOUNSFIELD.copy()
    padded[0] = -2000
    image = shown(dicom(padded, PixelPaddingValue=-2000))[0]
    assert np.array_equal(image[1:], ramp(padded[1:], padded[1:].min(), padded.max()))
    assert image[0].max() == 0
    dark = shown(dicom(padded, photometric="MONOCHROME1", PixelPaddingValue=-2000))[0]
    assert dark[0].max() == 0
    assert dark[1, 0] == 255


def test_colour() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    assert np.array_equal(shown(dicom(rgb, photometric="RGB")), rgb.transpose(2, 0, 1))
    planes = dicom(rgb.transpose(2, 0, 1).copy().reshape(6, 8, 3), photometric="RGB", PlanarConfiguration=1)
    assert np.array_equal(shown(planes), rgb.transpose(2, 0, 1))
    ybr = np.array(Image.fromarray(rgb).convert("YCbCr"))
    assert np.abs(shown(dicom(ybr, photometric="YBR_FULL")).transpose(1, 2, 0).astype(int) - rgb).max() <= 3
    table = np.random.default_rng(1).integers(0, 256, (3, 16)) * 257
    palette = {}
    for colour, values in zip(("Red", "Green", "Blue"), table, strict=True):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [16, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = values.astype("<u2").tobytes()
    small = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = shown(dicom(small, photometric="PALETTE COLOR", **palette))
    assert np.array_equal(image, (table // 257)[:, small])
    grey = shown(dicom(rgb, photometric="RGB"), channels=1)
    assert np.abs(grey[0].astype(int) - np.array(Image.fromarray(rgb).convert("L"))).max() <= 1
    assert np.array_equal(shown(dicom(RAMP), channels=3), np.repeat(shown(dicom(RAMP)), 3, 0))
    with pytest.raises(InputError, match=r"window: scan\.dcm is a colour image"):
        shown(dicom(rgb, photometric="RGB"), window=(1, 2))
    with pytest.raises(InputError, match=r"scan\.dcm: colour that tsynd cannot show"):
        shown(dicom(np.zeros((4, 4, 3), np.uint8), photometric="HSV", SamplesPerPixel=3, Rows=4, Columns=4))


def test_float_pixels() -> None:
    values = np.linspace(-1, 3, 16, dtype=np.float32).reshape(4, 4)
    bare = dicom(None, Rows=4, Columns=4, BitsAllocated=32, FloatPixelData=values.tobytes())
    assert np.array_equal(shown(bare)[0], ramp(values, -1, 3))
    values[0, 0] = np.nan
    with pytest.raises(InputError, match=r"scan\.dcm: holds a value that is not finite"):
        shown(dicom(None, Rows=4, Columns=4, BitsAllocated=32, FloatPixelData=values.tobytes()))


# Compression


def compressed(encoder: str, syntax: str, pixels: np.ndarray, photometric: str = "MONOCHROME2", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoder, **how)
    raw = pydicom.encaps.encapsulate([buffer.getvalue()])
    return dicom(raw, syntax=syntax, photometric=photometric, Rows=pixels.shape[0], Columns=pixels.shape[1])


def test_run_lengths_need_no_other_package() -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(HOUNSFIELD, RescaleSlope=2, RescaleIntercept=5)))
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    assert np.array_equal(shown(save(dataset))[0], ramp(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max()))


def test_jpeg_and_jpeg_2000() -> None:
    smooth = np.add.outer(np.arange(32) * 4, np.arange(32) * 4).astype(np.uint8)
    plain = shown(dicom(smooth)).astype(int)
    jpeg = shown(compressed("JPEG", pydicom.uid.JPEGBaseline8Bit, smooth, quality=95))
    assert np.abs(plain - jpeg).max() < 8
    lossless = shown(compressed("JPEG2000", pydicom.uid.JPEG2000Lossless, smooth))
    assert np.array_equal(plain, lossless)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        (pydicom.uid.JPEGLSLossless, "JPEG-LS Lossless"),
        (pydicom.uid.JPEGLosslessSV1, "JPEG Lossless"),
        (pydicom.uid.HTJ2KLossless, "High-Throughput JPEG 2000"),
    ],
)
def test_compressed_without_a_decoder_names_the_extra(syntax: str, name: str) -> None:
    if pydicom.pixels.get_decoder(syntax).is_available:
        pytest.skip("a decoder for it is installed")
    content = dicom(pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7" + bytes(60)]), syntax=syntax, Rows=8, Columns=8)
    with pytest.raises(InputError, match=rf"scan\.dcm: compressed as {name}.*no decoder.*tsynd\[dicom-codecs\]"):
        shown(content)


def test_no_decoder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Pillow has no JPEG 2000."""
    content = compressed("JPEG2000", pydicom.uid.JPEG2000Lossless, np.zeros((8, 8), np.uint8))
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(InputError, match=r"compressed as JPEG 2000.*tsynd\[dicom-codecs\]"):
        shown(content)


def test_what_is_no_still_image() -> None:
    film = dicom(pydicom.encaps.encapsulate([bytes(64)]), syntax=pydicom.uid.MPEG4HP41, Rows=8, Columns=8)
    with pytest.raises(InputError, match=r"scan\.dcm: compressed as MPEG-4.*, which is no image; wanted still images"):
        shown(film)
    with pytest.raises(InputError, match=r"scan\.dcm: names no transfer syntax that is known"):
        shown(dicom(RAMP).replace(EXPLICIT.encode(), b"1.9.840.10008.1.2.1"))
    with pytest.raises(InputError, match=r"scan\.dcm: holds no image"):
        shown(dicom(None, Modality="SR"))


# Damage


def test_not_dicom_at_all() -> None:
    for content in (b"", b"text", bytes(200), b"\x89PNG\r\n\x1a\n" + bytes(500)):
        with pytest.raises(InputError, match=r"scan\.dcm: no DICOM file \(no DICM at byte 128\)"):
            shown(content)
    with pytest.raises(InputError, match=r"scan\.dcm: "):
        shown(bytes(128) + b"DICM" + b"\xff" * 100)


def test_truncated_anywhere_is_one_error() -> None:
    """Never half an image, and never an error of another kind."""
    dataset = pydicom.dcmread(io.BytesIO(dicom(HOUNSFIELD)))
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    files = [
        dicom(HOUNSFIELD, RescaleSlope=1, RescaleIntercept=0, WindowCenter=40, WindowWidth=400),
        save(dataset),
        compressed("JPEG", pydicom.uid.JPEGBaseline8Bit, np.arange(1024, dtype=np.uint8).reshape(32, 32)),
        compressed("JPEG2000", pydicom.uid.JPEG2000Lossless, np.arange(1024, dtype=np.uint8).reshape(32, 32)),
    ]
    for content in files:
        whole = shown(content)
        for end in range(0, len(content)):
            image, message = outcome(content[:end])
            if image is None:
                assert message.startswith("scan.dcm: ")
                assert "\n" not in message
            else:  # what is missing was a trailing delimiter
                assert np.array_equal(image, whole), (end, len(content))
                assert end >= len(content) - 20


@given(st.lists(st.tuples(st.integers(132, 900), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_give_an_image_or_an_error(changes: list[tuple[int, int]]) -> None:
    header = {"RescaleSlope": 1, "RescaleIntercept": -5, "WindowCenter": 40, "WindowWidth": 400}
    content = bytearray(dicom(HOUNSFIELD, PixelPaddingValue=-2000, **header))
    for position, value in changes:
        content[position % len(content) if position % len(content) >= 132 else 132] = value
    image, message = outcome(bytes(content))
    assert message if image is None else image.ndim == 3


def test_a_jpeg_2000_header_that_leads_nowhere() -> None:
    """Pydicom would walk it for ever."""
    content = compressed("JPEG2000", pydicom.uid.JPEG2000Lossless, np.zeros((8, 8), np.uint8))
    at = content.index(b"ftyp") - 4
    with pytest.raises(InputError, match=r"scan\.dcm: its pixels, compressed as JPEG 2000.*cannot be decoded"):
        shown(content[:at] + bytes(4) + content[at + 4 :])


# Frames


def test_frames_are_refused_split_or_a_volume() -> None:
    frames = np.stack([RAMP, RAMP + 100, RAMP + 1000])
    content = dicom(frames, NumberOfFrames=3)
    with pytest.raises(InputError, match=r"scan\.dcm: 3 frames; frames='split' \(--frames split\)"):
        shown(content)
    images, _ = read_image(content, "dicom", "x", ReadOptions(frames="split"))
    assert [image.shape for image in images] == [(1, 8, 8)] * 3
    assert np.array_equal(images[0], images[2])  # each from its own minimum to its own maximum
    volume = shown(content, volumes=True)
    assert volume.shape == (1, 3, 8, 8)
    assert np.array_equal(volume[0], ramp(frames, 7, 4157))  # one range for all
    colour = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    content = dicom(colour, photometric="RGB", NumberOfFrames=2)
    images, _ = read_image(content, "dicom", "x", ReadOptions(frames="split"))
    assert np.array_equal(np.stack(images), colour.transpose(0, 3, 1, 2))
    assert shown(dicom(RAMP, NumberOfFrames=1)).shape == (1, 8, 8)


def test_enhanced_files_explain_each_frame() -> None:
    def group(slope: float, centre: float) -> pydicom.Dataset:
        values, voi, item = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, 0
        voi.WindowCenter, voi.WindowWidth = centre, 400
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = [values], [voi]
        return item

    content = dicom(
        np.stack([RAMP, RAMP]), NumberOfFrames=2, PerFrameFunctionalGroupsSequence=[group(1, 500), group(2, 900)]
    )
    images, _ = read_image(content, "dicom", "x", ReadOptions(frames="split"))
    assert np.abs(images[0][0] - linear(RAMP, 500, 400)).max() <= 1
    assert np.abs(images[1][0] - linear(RAMP * 2.0, 900, 400)).max() <= 1


def slices(count: int = 5, **changes: Any) -> list[tuple[bytes, str]]:
    """A coronal series, in an order that is neither the names' nor the positions'."""
    header = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "SeriesInstanceUID": "1.5", "PatientID": "p", **changes}
    files = []
    for index in range(count):
        position = [0, 3.0 * index, 0]  # the normal of these planes points to the back
        content = dicom(RAMP + 100 * index, ImagePositionPatient=position, InstanceNumber=count - index, **header)
        files.append((content, f"{(index * 3) % count}.dcm"))
    return sorted(files, key=lambda pair: pair[1])


def test_a_series_is_a_volume_in_order_along_its_normal() -> None:
    from tsynd.data.readers.dicom import read_series

    volume, patient = read_series(slices(), "case", ReadOptions(volumes=True))
    assert patient == "p"
    wanted = np.stack([RAMP + 100 * index for index in range(5)])
    assert np.array_equal(np.rint(volume[0] * 255), ramp(wanted, 7, 3557))
    odd = slices()
    cases = [
        ([*odd, odd[0]], "two slices at one position"),
        ([*odd[:4], slices(5, SeriesInstanceUID="1.6")[4]], "slices of 2 series"),
        ([*odd[:4], slices(5, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])[4]], "several planes"),
        ([*odd[:4], (dicom(RAMP), "none.dcm")], "none.dcm: says no plane and position"),
    ]
    for files, message in cases:
        with pytest.raises(InputError, match=message):
            read_series(files, "case", ReadOptions(volumes=True))


# Headers


def test_errors_quote_no_header(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    mark = "QZXMARK"
    names = {"PatientName": f"{mark}^A", "PatientID": mark, "AccessionNumber": mark, "StudyDescription": mark}
    # values that pydicom would warn about, and quote
    bad = {**names, "PatientBirthDate": f"{mark}1", "StudyInstanceUID": f"1.2.{mark}", "PatientAge": mark}
    whole = dicom(RAMP, **bad)
    broken = [
        whole[:-40],
        dicom(RAMP, **names, WindowCenter=3, WindowWidth=0),
        dicom(None, **names, Modality="SR"),
        dicom(np.stack([RAMP, RAMP]), NumberOfFrames=2, **names),
        dicom(RAMP, **names, RescaleSlope="1", RescaleIntercept="2", VOILUTSequence=[pydicom.Dataset()]),
        dicom(RAMP, photometric=mark[:6], **names),
        dicom(RAMP, **names).replace(EXPLICIT.encode(), b"1.2.QZXMARK.1.2.3.4"),
    ]
    caplog.clear()  # of what writing them said
    recwarn.clear()
    assert shown(whole).shape == (1, 8, 8)
    for content in broken:
        with pytest.raises(InputError) as caught:
            shown(content)
        assert mark[:6] not in "".join(traceback.format_exception(caught.value))
        assert caught.value.__cause__ is None
    assert not [w for w in recwarn if mark[:6] in str(w.message)]
    out, err = capfd.readouterr()
    assert mark[:6] not in out + err + caplog.text


def test_the_patient_is_the_id_or_the_study() -> None:
    for header, wanted in (
        ({"PatientID": " 7 ", "StudyInstanceUID": "1.2"}, "7"),
        ({"PatientID": "", "StudyInstanceUID": "1.2"}, "1.2"),
        ({}, None),
    ):
        assert read_image(dicom(RAMP, **header), "dicom", "x", ReadOptions())[1] == wanted
