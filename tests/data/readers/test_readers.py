"""Pictures, NIfTI, tables, folders and datasets objects: the right pixels, or one error that names the place."""

from __future__ import annotations

import gzip
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

import nibabel
from medical_files import dicom, nifti, write

from tsynd.data.load import load_data
from tsynd.data.readers import ReadOptions, read_image
from tsynd.data.sources import open_source
from tsynd.utils.errors import InputError, MissingExtraError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def saved(image: Any, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **how)
    return buffer.getvalue()


def shown(content: bytes, kind: str = "picture", **options: Any) -> np.ndarray:
    images, patient = read_image(content, kind, "x.png", ReadOptions(**options))
    assert len(images) == 1
    assert patient is None
    return images[0]


def refused(message: str, content: bytes, kind: str = "picture", **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        shown(content, kind, **options)
    assert "\n" not in str(caught.value)


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_eight_bits(kind: str) -> None:
    assert np.array_equal(shown(saved(GREY, kind)), GREY[None])
    assert np.array_equal(shown(saved(RGB, kind)), RGB.transpose(2, 0, 1))


def test_other_modes() -> None:
    grey, rgb = Image.fromarray(GREY), Image.fromarray(RGB)
    clear = Image.fromarray(GREY // 2)
    assert np.array_equal(shown(saved(Image.merge("LA", [grey, clear]))), GREY[None])
    assert np.array_equal(shown(saved(Image.merge("RGBA", [*rgb.split(), clear]))), RGB.transpose(2, 0, 1))
    assert set(np.unique(shown(saved(Image.fromarray(GREY > 128))))) == {0, 255}
    palette = rgb.quantize(16)
    wanted = np.array(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(shown(saved(palette)), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(shown(saved(palette, transparency=bytes(16))), wanted)
    refused(r"x\.png: colour mode CMYK; wanted grey or RGB", saved(rgb.convert("CMYK"), "JPEG"))
    assert np.abs(shown(saved(np.full((8, 8, 3), 90, np.uint8), "JPEG")).astype(int) - 90).max() <= 2


def test_a_jpegs_orientation_mark() -> None:
    smooth = np.add.outer(np.arange(16) * 12, np.arange(8) * 4).astype(np.uint8)
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90° to the right
    turned = shown(saved(smooth, "JPEG", exif=tag, quality=98))[0].astype(int)
    assert turned.shape == (8, 16)
    assert np.abs(turned - np.rot90(smooth, -1)).max() < 12


def test_sixteen_bits_by_the_full_range_or_a_window() -> None:
    deep = RNG.integers(0, 65536, (6, 9), np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(shown(saved(deep, kind))[0], np.rint(deep / 65535 * 255))
    twelve = deep // 16
    assert shown(saved(twelve)).max() <= 16
    assert np.array_equal(shown(saved(twelve), window=(2047.5, 4095))[0], np.rint(twelve / 4095 * 255))
    white_is_zero = saved(deep, "TIFF", tiffinfo={262: 0})
    assert np.array_equal(shown(white_is_zero)[0], np.rint((65535.0 - deep) / 65535 * 255))
    assert np.array_equal(shown(saved(GREY), window=(127.5, 255))[0], GREY)
    refused(r"window: x\.png is a colour picture", saved(RGB), window=(100, 50))


def test_float_and_thirty_two_bits() -> None:
    unit = RNG.random((6, 9)).astype(np.float32)
    assert np.array_equal(shown(saved(unit, "TIFF"))[0], np.rint(unit * 255))
    refused(r"x\.png: float pixels from .*window=", saved(unit * 900, "TIFF"))
    assert np.array_equal(shown(saved(unit * 900, "TIFF"), window=(450, 900))[0], np.rint(unit * 900 / 900 * 255))
    whole = RNG.integers(-1000, 3000, (6, 9)).astype(np.int32)
    refused(r"x\.png: 32-bit pixels from .*window=", saved(whole, "TIFF"))
    assert shown(saved(whole, "TIFF"), window=(0, 4000)).shape == (1, 6, 9)


def test_pages() -> None:
    stack = saved(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY // 2)])
    refused(r"x\.png: 2 pages; frames='split'", stack)
    images, _ = read_image(stack, "picture", "x", ReadOptions(frames="split"))
    assert np.array_equal(np.stack(images)[:, 0], [GREY, GREY // 2])
    assert np.array_equal(shown(stack, volumes=True), np.stack([GREY, GREY // 2])[None])


def test_damaged_pictures_are_one_error() -> None:
    for content in (saved(RGB), saved(RGB, "JPEG"), saved(GREY, "TIFF"), saved(RGB, "BMP")):
        whole = shown(content)
        for end in range(len(content)):
            try:
                image = shown(content[:end])
            except InputError as error:
                message = str(error)
            else:  # only what stands behind the pixels is missing
                assert np.array_equal(image, whole)
                assert end > len(content) - 24
                continue
            assert message.startswith("x.png: unreadable picture")


def test_channels_and_size() -> None:
    luma = np.array(Image.fromarray(RGB).convert("L")).astype(int)
    assert np.abs(shown(saved(RGB), channels=1)[0] - luma).max() <= 1
    assert np.array_equal(shown(saved(GREY), channels=3), np.repeat(GREY[None], 3, 0))
    # the aspect ratio stays: 6 x 9 becomes 4 x 6 between two black rows above and below
    small = shown(saved(np.full((6, 9), 200, np.uint8)), image_size=6)[0]
    assert small.shape == (6, 6)
    assert (small[[0, 5]] == 0).all()
    assert (small[1:5] == 200).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert np.abs(shown(saved(stripes), image_size=8).astype(int) - 127).max() < 15
    big = shown(saved(GREY), image_size=18)[0, 3:15].astype(int)
    assert np.abs(big - np.array(Image.fromarray(GREY).resize((18, 12), Image.Resampling.BILINEAR))).max() <= 1


# NIfTI


def test_a_volume_is_laid_out_alike_whatever_its_axes() -> None:
    """Depth from feet to head, rows from front to back, columns from right to left, for every stored orientation."""
    ras = RNG.integers(0, 1000, (4, 5, 6)).astype(np.int16)  # [right, front, head]
    wanted = ras.transpose(2, 1, 0)[:, ::-1, ::-1]
    low, high = np.percentile(ras, [0.5, 99.5])
    wanted = np.rint(np.clip((wanted - low) / (high - low), 0, 1) * 255)
    stored = nibabel.Nifti1Image(ras, np.diag([2.0, 3, 4, 1]))
    for codes in ("RAS", "LPS", "LAS", "SRA", "PIR", "IAL"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
        )
        turned = stored.as_reoriented(turn)
        assert "".join(nibabel.aff2axcodes(turned.affine)) == codes
        for content in (turned.to_bytes(), gzip.compress(turned.to_bytes())):
            assert np.array_equal(shown(content, "nifti")[0], wanted), codes
    assert np.array_equal(shown(nifti(ras, np.diag([2.0, 3, 4, 1]), nibabel.Nifti2Image), "nifti")[0], wanted)


def test_slices_stand_upright() -> None:
    ras = np.zeros((8, 10, 12), np.int16)
    ras[6, 7, 9] = 1000  # towards the right, the front and the head
    ras[1, 2, 3] = 500
    content = nifti(ras)
    for plane, count, size in (("axial", 2, (10, 8)), ("coronal", 2, (12, 8)), ("sagittal", 2, (12, 10))):
        images, _ = read_image(content, "nifti", "x", ReadOptions(slices=plane, window=(500, 1000)))
        assert [image.shape for image in images] == [(1, *size)] * count  # constant ones are left out
        (bright,) = [image[0] for image in images if image.max() == 255]
        row, column = np.argwhere(bright == 255)[0]
        assert row < size[0] / 2  # front, or head, above
        assert column < size[1] / 2  # the patient's right, or front, on the left
    middle = shown(content, "nifti", slices="axial:middle", window=(500, 1000))
    assert middle.shape == (1, 10, 8)
    refused("every axial slice is constant", nifti(np.ones((4, 4, 4), np.int16)), "nifti", slices="axial")


def test_spacing_is_resampled() -> None:
    x, y, z = np.meshgrid(np.arange(8), np.arange(9), np.arange(5), indexing="ij")
    ramp = (100 * x + 50 * y * 2 + 10 * z * 4).astype(np.float32)  # linear in mm for spacing 1, 2, 4
    affine = np.diag([1.0, 2, 4, 1])
    volume = shown(nifti(ramp, affine), "nifti", spacing=(2, 2, 2), window=(1000, 2000))[0].astype(float)
    assert volume.shape == (9, 9, 4)  # 16 mm / 2, 16 / 2, 7 / 2, both ends counted
    depth, rows, columns = np.meshgrid(np.arange(9) * 2, np.arange(9) * 2, np.arange(4) * 2, indexing="ij")
    wanted = (100 * columns + 50 * rows + 10 * depth) / 2000 * 255
    assert np.abs(volume[:, ::-1, ::-1] - wanted)[1:-1, 1:-1, 1:-1].max() <= 1
    turned = nifti(ramp[::-1, ::-1], np.diag([-1.0, -2, 4, 1]))
    assert np.array_equal(shown(turned, "nifti", spacing=(2, 2, 2), window=(1000, 2000))[0], volume)
    oblique = affine.copy()
    oblique[:3, :3] = nibabel.eulerangles.euler2mat(0.1, 0.05, 0.0) @ affine[:3, :3]
    assert shown(nifti(ramp, oblique), "nifti", spacing=(2, 2, 2)).shape[1:] == (9, 9, 4)


def test_values_by_percentiles_a_window_and_the_files_slope() -> None:
    values = RNG.normal(0, 100, (10, 10, 10)).astype(np.float32)
    values[0, 0, 0] = 1e6  # one hot voxel does not darken the rest
    assert shown(nifti(values), "nifti").mean() > 100
    image = nibabel.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4))
    image.header.set_slope_inter(2.0, -1000.0)
    raw = bytes(image.to_bytes())
    wanted = np.rint(np.clip((np.arange(1000) * 2 - 1000.0 + 200) / 400, 0, 1) * 255)
    seen = np.sort(shown(raw, "nifti", window=(0, 400)).ravel())
    assert np.array_equal(seen, wanted)
    flat = shown(nifti(values[:, :, :1]), "nifti")
    assert flat.shape == (1, 10, 10)  # a single slice is a picture
    assert shown(nifti(values[..., None]), "nifti").shape == (1, 10, 10, 10)
    assert shown(nifti(values), "nifti", image_size=5).shape == (1, 5, 5, 5)


def test_bad_nifti_is_one_error(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    good = nifti(RNG.integers(0, 9, (6, 6, 6)).astype(np.int16))
    packed = gzip.compress(good)
    junk = [b"", b"text", bytes(400), b"\x1f\x8b" + bytes(60)]
    for content in [*junk, good[:100], good[:-10], packed[:40], packed[:-9]]:
        refused(r"^x\.png: ", content, "nifti")
    refused("wanted one volume", nifti(np.zeros((4, 4, 4, 3), np.int16)), "nifti")
    refused("not finite", nifti(np.full((4, 4, 4), np.nan, np.float32)), "nifti")
    colour = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    refused("colour or complex", nifti(colour), "nifti")
    refused("colour or complex", nifti(np.zeros((4, 4, 4), np.complex64)), "nifti")
    shown(good[:252] + b"\x99\x99" + good[254:], "nifti")  # a strange qform code is no harm
    assert not capfd.readouterr().err
    assert not caplog.text
    refused("neither n\\+1 nor n\\+2", good[:344] + b"what" + good[348:], "nifti")


# Folders


def test_kinds_mix_and_lie_at_any_depth(tmp_path: Path) -> None:
    values = RNG.integers(1, 4000, (8, 6, 9)).astype(np.uint16)
    for index in range(4):
        write(tmp_path / "s" / "ill" / f"case{index}" / f"1.2.840.{index}", dicom(values[index], PatientID=f"p{index}"))
        write(tmp_path / "s" / "well" / f"{index}.png", saved(values[index + 4]))
        write(tmp_path / "s" / "well" / "more" / f"{index}.JPG", saved(GREY, "JPEG"))
    write(tmp_path / "s" / "ill" / "DICOMDIR", dicom(values[0]))
    write(tmp_path / "s" / "ill" / "notes.txt", b"no image")
    write(tmp_path / "s" / "ill" / ".hidden" / "x.png", saved(GREY))
    source = load_data(tmp_path / "s")
    assert len(source.train) + len(source.val) + len(source.test) == 12
    assert source.class_names == ("ill", "well")
    streamed = open_source(str(tmp_path / "s"))
    assert (streamed.count, streamed.class_names) == (12, source.class_names)
    batch = streamed.read(0, 12)
    assert batch.images.shape == (12, 1, 6, 9)
    assert batch.labels.tolist() == [0] * 4 + [1] * 8
    held = torch.cat([part.images for part in (source.train, source.val, source.test)]).flatten(1).tolist()
    assert sorted(held) == sorted((batch.images * 255).round().to(torch.uint8).flatten(1).tolist())


def test_dark_sets_are_pointed_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index in range(6):
            write(tmp_path / name / f"{index}.png", saved(RNG.integers(0, 4096, (8, 8), np.uint16)))
    with pytest.warns(UserWarning, match=r"no pixel is brighter than 16 of 255; window="):
        load_data(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(tmp_path, window=(2048, 4096))


def test_mixed_colour_is_one_error_or_converted(tmp_path: Path) -> None:
    for index in range(6):
        write(tmp_path / "a" / f"{index}.png", saved(GREY))
        write(tmp_path / "b" / f"{index}.png", saved(RGB))
    with pytest.raises(InputError, match=r"b/0\.png: 9x6 RGB, while 0\.png is 9x6 grey.*channels=1 or 3"):
        load_data(tmp_path)
    assert load_data(tmp_path, channels=1).image_shape == (1, 6, 9)
    assert load_data(tmp_path, channels=3, image_size=4).image_shape == (3, 4, 4)


def test_series_folders_become_volumes(tmp_path: Path) -> None:
    for name, shift in (("ill", 0), ("well", 9)):
        for case in range(5):
            for index in range(4):
                content = dicom(
                    RNG.integers(0, 100, (6, 6)).astype(np.uint16) + 500 * index + shift,
                    ImagePositionPatient=[0, 0, 10 - index],
                    ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                    SeriesInstanceUID=f"1.{shift}.{case}",
                    PatientID=f"{name}{case}",
                )
                write(tmp_path / name / f"case{case}" / f"{index}.dcm", content)
    source = load_data(tmp_path, volumes=True)
    assert source.image_shape == (1, 4, 6, 6)
    assert sum(len(part) for part in (source.train, source.val, source.test)) == 10
    depth = source.train.pixels().mean((0, 1, 3, 4))
    assert (depth.diff() < 0).all()  # the first written lies highest
    streamed = open_source(str(tmp_path), options=ReadOptions(volumes=True))
    assert (streamed.count, tuple(streamed.read(2, 4).images.shape)) == (10, (2, 1, 4, 6, 6))
    folders = [str(path) for path in sorted(tmp_path.glob("*/*"))]
    listed = load_data(table(tmp_path / "t.csv", {"path": folders, "label": ["i", "w"] * 5}), volumes=True)
    held = (streamed.read(0, 10).images * 255).round().to(torch.uint8).flatten(1).tolist()
    assert all(volume in held for volume in listed.train.images.flatten(1).tolist())
    flat = load_data(tmp_path)  # without the option: 40 images of 10 patients
    assert sum(len(part) for part in (flat.train, flat.val, flat.test)) == 40


def sides(source: Any) -> list[set[int]]:
    """Patients of train, val and test, from pixels that say who."""
    return [set((part.images.flatten(1).amax(1) // 10).tolist()) for part in (source.train, source.val, source.test)]


@pytest.mark.parametrize("how", ["files", "frames", "slices"])
def test_patients_stay_together_without_a_word(tmp_path: Path, how: str) -> None:
    """DICOM by PatientID, frames and slices by their file; pixels are 10 times the patient's number."""
    for number in range(1, 21):
        for copy in range(3 if how == "files" else 1):
            stack = np.full((3, 4, 4), 10 * number, np.uint16)
            stack[:, 0, 0] = 0
            stem = tmp_path / "ab"[number % 2] / f"{number}-{copy}"
            if how == "slices":
                write(stem.with_suffix(".nii"), nifti(stack.astype(np.int16).transpose(1, 2, 0)))
            else:
                frames = {"NumberOfFrames": 3} if how == "frames" else {}
                who = {} if how == "frames" else {"PatientID": f"p{number}"}
                write(stem.with_suffix(".dcm"), dicom(stack if frames else stack[0], **frames, **who))
    options: dict[str, Any] = {"window": (127.5, 255)}
    options |= {"frames": {"frames": "split"}, "slices": {"slices": "axial"}}.get(how, {})
    found = sides(load_data(tmp_path, **options))
    assert sum(map(len, found)) == len(set.union(*found))
    assert min(map(len, found)) >= 2
    drawn = load_data(tmp_path, train_size=10, **options)
    assert len(sides(drawn)[0]) >= 9  # a draw of ten sees many
    apart = sides(load_data(tmp_path, group="none", **options))
    assert sum(map(len, apart)) > len(set.union(*apart))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow.parquet")  # a part that stays loaded when the package is hidden
    for package, extra, name, content in (
        ("pydicom", "medical", "0.dcm", dicom(np.zeros((4, 4), np.uint16))),
        ("nibabel", "medical", "0.nii", nifti(np.zeros((4, 4, 4), np.int16))),
        ("pyarrow", "tables", "t.parquet", b""),
    ):
        for folder in ("a", "b"):
            write(tmp_path / package / folder / name, content)
        source = tmp_path / package / "a" / name if extra == "tables" else tmp_path / package
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(
                MissingExtraError, match=rf"needs the package '{package}': pip install 'tsynd\[{extra}\]'"
            ):
                load_data(source)


def test_options_that_do_not_belong(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 4, 4), np.uint8), labels=np.arange(9) % 2)
    with pytest.raises(InputError, match=r"window: \[1.0, 2.0\]; wanted only with a folder"):
        load_data(tmp_path / "x.npz", window=(1, 2))
    with pytest.raises(InputError, match=r"window: .*wanted only with a folder"):
        open_source(str(tmp_path / "x.npz"), options=ReadOptions(window=(1, 2)))
    for name in ("a", "b"):
        write(tmp_path / "f" / name / "0.png", saved(GREY))
    with pytest.raises(InputError, match="label_column: 'x'; wanted only with a table"):
        load_data(tmp_path / "f", label_column="x")
    with pytest.raises(InputError, match=r"slices: not in shards"):
        open_source(str(tmp_path / "f"), options=ReadOptions(slices="axial"))
    bad = [
        ("image_size", 0), ("channels", 2), ("window", (1, 0)), ("window", (1,)), ("window", (1, float("nan"))),
        ("window", "40,400"), ("frames", "all"), ("slices", "oblique"), ("slices", "axial:first"),
        ("spacing", (1, 1)), ("spacing", (1, 1, -1)), ("group", "patient"), ("path_column", ""),
    ]  # fmt: skip
    for name, value in bad:
        with pytest.raises(InputError, match=f"^{name}: "):
            ReadOptions(**{name: value})
    with pytest.raises(InputError, match=r"^frames: 'split' together with volumes"):
        ReadOptions(frames="split", volumes=True)
    assert ReadOptions(window=[1, 2], slices="axial").given() == {"window": [1.0, 2.0], "slices": "axial"}


# Tables


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    names = [f"images/{index:02d}.png" for index in range(20)]
    for index, name in enumerate(names):
        write(tmp_path / name, saved(np.full((4, 4), 10 * index, np.uint8)))
    return names


def numbers(part: Any) -> list[int]:
    """Which pictures they are."""
    return (part.images[:, 0, 0, 0] // 10).tolist()


def table(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        return path
    separator = "\t" if path.suffix == ".tsv" else ","
    rows = [columns.keys(), *zip(*columns.values(), strict=True)]
    path.write_text("\ufeff" + "\r\n".join(separator.join(map(str, row)) for row in rows) + "\r\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(tmp_path: Path, pictures: list[str], suffix: str) -> None:
    splits = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    labels = [(2, 10)[index % 2] for index in range(20)]
    path = table(tmp_path / f"t{suffix}", {"path": pictures, "label": labels, "split": splits, "more": [1.5] * 20})
    source = load_data(path)
    assert source.class_names == ("2", "10")  # numbers by their value
    assert [numbers(part) for part in (source.train, source.val, source.test)] == [
        list(range(12)), list(range(12, 16)), list(range(16, 20)),
    ]  # fmt: skip
    assert source.train.labels.tolist() == [0, 1] * 6
    streamed = open_source(str(path), "val")
    assert (streamed.read(0, 4).images[:, 0, 0, 0] * 25.5).round().tolist() == [12, 13, 14, 15]
    columns = {"file": [str(tmp_path / name) for name in pictures], "kind": ["x y", "z"] * 10}
    path = table(tmp_path / f"u{suffix}", columns)
    source = load_data(path, path_column="file", label_column="kind")
    assert source.class_names == ("x y", "z")
    assert sum(len(part) for part in (source.train, source.val, source.test)) == 20


def test_multilabel_table(tmp_path: Path, pictures: list[str]) -> None:
    columns = {"path": pictures, "edema": [0, 1] * 10, "mass": [1.0] * 20}
    source = load_data(table(tmp_path / "t.parquet", columns), label_column="edema,mass")
    assert (source.task, source.class_names) == ("multilabel", ("edema", "mass"))
    part = source.train
    assert part.labels.tolist() == [[float(number % 2), 1.0] for number in numbers(part)]
    columns["mass"] = [-1.0] * 20
    with pytest.raises(InputError, match="row 1: label '-1' among several label columns; wanted 0 or 1"):
        load_data(table(tmp_path / "t.parquet", columns), label_column="edema,mass")


def test_bad_tables(tmp_path: Path, pictures: list[str]) -> None:
    good: dict[str, list[Any]] = {"path": pictures, "label": ["a", "b"] * 10}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"label": None}, {}, r"holds the columns path; missing label \(label_column=NAME, --label-column"),
        ({}, {"path_column": "file"}, "missing file"),
        ({}, {"group_column": "who"}, "missing who"),
        ({"path": ["a/nowhere.png", "gone.png", *pictures[2:]]}, {}, r"2 of 20 files are not there, first .* row 1,"),
        ({"label": ["a", ""] * 10}, {}, "row 2 has an empty label"),
        ({"label": ["a"] * 20}, {}, "1 class folders or labels"),
        ({"split": ["train", "more"] * 10}, {}, "row 2: split 'more'; wanted train, val"),
        ({"split": ["train"] * 20}, {}, "holds train; wanted train and test"),
    ]
    for change, options, message in cases:
        columns = {key: value for key, value in {**good, **change}.items() if value is not None}
        for suffix in (".csv", ".parquet"):
            with pytest.raises(InputError, match=message) as caught:
                load_data(table(tmp_path / f"t{suffix}", columns), **options)
            assert f"t{suffix}" in str(caught.value)
    texts = [("", "holds nothing"), ("path,label", "holds no row"), ("path,label\na", "row 1 has 1 cells, the head 2"),
             ("a,a\n1,2", "two columns of one name"), ('path,label\n"a', "unreadable table")]  # fmt: skip
    for text, message in texts:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            load_data(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,1")
    with pytest.raises(InputError, match="unreadable table"):
        load_data(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="unreadable Parquet"):
        load_data(tmp_path / "t.parquet")
    write(tmp_path / "notes.doc", b"text")
    table(tmp_path / "t.csv", {"path": ["notes.doc"] * 4, "label": ["a", "b"] * 2})
    with pytest.raises(InputError, match=r"notes\.doc: no image file that tsynd reads"):
        load_data(tmp_path / "t.csv")


# Hugging Face


def test_datasets_objects(tmp_path: Path, pictures: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "finding": datasets.ClassLabel(names=["no", "yes"])})
    opened = [Image.open(tmp_path / name) for name in pictures]
    whole = datasets.Dataset.from_dict({"image": opened, "finding": [0, 1] * 10}, features=features)
    source = load_data(whole, train_size=6)
    assert (source.class_names, source.image_shape, len(source.train)) == (("no", "yes"), (1, 4, 4), 6)
    assert source.train.labels.tolist() == [number % 2 for number in numbers(source.train)]
    parts = datasets.DatasetDict(
        train=whole.select(range(12)), validation=whole.select(range(12, 16)), test=whole.select(range(16, 20))
    )
    source = load_data(parts, image_size=8, channels=3)
    assert source.image_shape == (3, 8, 8)
    assert numbers(source.test) == list(range(16, 20))
    assert len(load_data(datasets.DatasetDict(train=whole)).test) == 3
    # files by their path, of 16 bits, with text labels and patients
    deep = [str(write(tmp_path / f"{i}.png", saved(np.full((4, 4), 2570 * i, np.uint16)))) for i in range(20)]
    rows = {"scan": deep, "label": ["b", "a"] * 10, "patient": [i // 2 for i in range(20)]}
    held = datasets.Dataset.from_dict(rows).cast_column("scan", datasets.Image())
    source = load_data(held)
    assert source.class_names == ("a", "b")
    sides = [{number // 2 for number in numbers(part)} for part in (source.train, source.val, source.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 10
    many = whole.remove_columns("finding").add_column("label", [[0], [0, 1]] * 10)
    many = many.cast_column("label", datasets.Sequence(datasets.ClassLabel(names=["edema", "mass"])))
    source = load_data(many)
    assert (source.task, source.class_names) == ("multilabel", ("edema", "mass"))
    assert source.train.labels.tolist() == [[1.0, float(number % 2)] for number in numbers(source.train)]
    for bad, options, message in (
        (whole.to_iterable_dataset(), {}, "wanted a Dataset or DatasetDict, not streamed"),
        (whole.remove_columns("image"), {}, "wanted one of the kind Image"),
        (whole.remove_columns("finding"), {}, "label_column=NAME says which"),
        (whole, {"label_column": "x"}, "without 'x'"),
        (whole, {"group_column": "x"}, "group_column: 'x'"),
        (datasets.DatasetDict(train=whole, more=whole), {}, "split 'more'"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(bad, **options)
