"""Folders as people lay them out: splits by any of their names, patients' folders, and a word on what is left out."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tsynd.data.load import load_data
from tsynd.data.sources import open_source
from tsynd.utils.errors import InputError


def picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(level).integers(0, 200, (6, 6), np.uint8)
    rows[0] = level
    Image.fromarray(rows).save(path, "PNG")


def tree(root: Path, splits: tuple[str, ...], count: int = 6) -> Path:
    for number, split in enumerate(splits):
        for label, name in enumerate(("glioma", "healthy")):
            for index in range(count):
                picture(root / split / name / f"{index}.png", 60 * number + 20 * label + index)
    return root


def levels(part) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"), ("Train", "Valid", "Test"), ("TRAINING", "validation", "Testing"),
        ("train", "dev", "test"), ("train_set", "valid_set", "test_set"), ("Training", "", "Testing"),
        ("train-images", "", "test images"), ("trainset", "devset", "testset"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("below", [False, True])
def test_splits_by_the_names_that_people_give_them(tmp_path: Path, names: tuple[str, ...], below: bool) -> None:
    held = tuple(name for name in names if name)
    tree(tmp_path, held)
    if below:  # the splits inside the classes
        for split in held:
            for name in ("glioma", "healthy"):
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / split / name).rename(tmp_path / name / split)
            (tmp_path / split).rmdir()
    data = load_data(tmp_path)
    assert data.class_names == ("glioma", "healthy")
    last = 60 * (len(held) - 1)
    assert levels(data.test) == [last + 20 * label + index for label in range(2) for index in range(6)]
    if len(held) == 3:
        assert levels(data.val) == [60 + 20 * label + index for label in range(2) for index in range(6)]
        assert len(data.train) == 12
    assert open_source(str(tmp_path), "test").count == 12


def test_tables_and_arrays_take_the_same_names(tmp_path: Path) -> None:
    tree(tmp_path / "x", ("a",), 12)
    paths = sorted((tmp_path / "x").rglob("*.png"))
    splits = ["Training", "DEV", "Test"] * 8
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name},{s}" for p, s in zip(paths, splits, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    assert [len(part) for part in (lambda d: (d.train, d.val, d.test))(load_data(tmp_path / "t.csv"))] == [8, 8, 8]
    pixels, labels = np.random.default_rng(0).integers(0, 255, (20, 4, 4), np.uint8), np.arange(20) % 2
    arrays = {f"{s}_{k}": v for s in ("train", "Valid", "test") for k, v in (("images", pixels), ("labels", labels))}
    np.savez(tmp_path / "x.npz", **arrays)
    assert len(load_data(tmp_path / "x.npz").val) == 20
    assert open_source(str(tmp_path / "x.npz"), "val").count == 20
    np.savez(tmp_path / "y.npz", **arrays, validation_images=pixels)
    with pytest.raises(InputError, match="holds val_images twice"):
        load_data(tmp_path / "y.npz")


def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "twice", ("train", "test", "Test"))
    with pytest.raises(InputError, match="'Test' and 'test' are both test"):
        load_data(tmp_path / "twice")
    for index in range(8):
        for name in ("Train", "Test"):
            picture(tmp_path / "flat" / name / f"{index}.png", index)
        for name in ("valid", "broken"):
            picture(tmp_path / "words" / name / f"{index}.png", index)
    with pytest.raises(InputError, match=r"0 class folders; .* rename it or list the files in a table"):
        load_data(tmp_path / "flat")
    assert load_data(tmp_path / "words").class_names == ("broken", "valid")
    for number, names in enumerate([("1_train", "2_test"), ("chest train (1)", "chest val (1)", "notes")]):
        tree(tmp_path / str(number), names[:2])
        with pytest.raises(InputError, match=rf"{re.escape(repr(names[0]))}, .*sound like splits; wanted.*train, val"):
            load_data(tmp_path / str(number))
    assert load_data(tree(tmp_path / "stations", ("train station", "bus station"), 9)).num_classes == 2


@pytest.mark.parametrize("depth", ["", "/session1"])
def test_folders_of_patients_stay_together(tmp_path: Path, depth: str) -> None:
    for patient in range(24):
        for index in range(4):
            path = tmp_path / ("ill" if patient % 2 else "well") / f"case{patient}{depth}" / f"{index}.png"
            picture(path, 4 * patient + index)
    data = load_data(tmp_path)
    sides = [{level // 4 for level in levels(part)} for part in (data.train, data.val, data.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 24
    assert data.origin.grouping == "by folder (24)"
    mixed = load_data(tmp_path, group="none")
    sides = [{level // 4 for level in levels(part)} for part in (mixed.train, mixed.test)]
    assert sides[0] & sides[1]


def test_few_inner_folders_are_no_patients_unless_said(tmp_path: Path) -> None:
    for name in ("benign", "malignant"):
        for zoom in ("40X", "100X"):
            for index in range(10):
                picture(tmp_path / name / zoom / f"{index}.png", index)
    data = load_data(tmp_path)
    assert data.origin.grouping == "none"
    assert any("the same folders lie in all of the 2 class folders (100X, 40X)" in x for x in data.summary.lines())
    picture(tmp_path / "benign" / "200X" / "1.png", 1)
    lines = load_data(tmp_path).summary.lines()
    assert any("3 folders inside class folders are not taken for patients" in line for line in lines)
    assert load_data(tmp_path, group="folder").origin.grouping == "by folder (3)"


def test_the_summary_says_what_was_read_and_what_was_not(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 5), ("test", 12)):
        for label, name in enumerate(("a", "b")):
            for index in range(count if name == "a" else count // 3):
                picture(tmp_path / split / name / f"{index}.png", 40 * len(split) + 20 * label + index)
    for index in range(3):
        (tmp_path / "train" / "a" / f"{index}.webp").write_bytes(b"RIFF")
    (tmp_path / "train" / "notes.xlsx").write_bytes(b"PK")
    (tmp_path / "README").write_text("read me")
    (tmp_path / "masks").mkdir()
    (tmp_path / "test" / "b" / "9.png").write_bytes((tmp_path / "train" / "a" / "3.png").read_bytes())
    data = load_data(tmp_path)
    first, second, *more = data.summary.lines()
    assert first == "49 images read: train 26 (20 / 6), val 6 (5 / 1), test 17 (12 / 5); classes a, b"
    assert "6x6 grey; not grouped" in second
    for part in ("3 .webp", "1 .xlsx", "1 without suffix", "folder 'masks' beside the splits"):
        assert part in second
    assert "exact doubles (" in second
    assert data.summary.across_splits >= 1
    assert data.summary.across_classes >= 1
    assert "warning: class 'b' has 5 test images: its scores say little" in more
    assert str(data) == f"{first}\n{second}"


def test_numbers_of_doubles(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 4, 4), np.uint8)
    labels = np.arange(60) % 2
    sets = {f"{s}_{k}": v[20 * i : 20 * i + 20] for i, s in enumerate(("train", "val", "test"))
            for k, v in (("images", pixels), ("labels", labels))}  # fmt: skip
    sets["train_images"][[3, 5]] = sets["train_images"][1]  # same class
    sets["train_images"][4] = sets["train_images"][0]
    sets["train_labels"][4] = 1
    sets["test_images"][7] = sets["val_images"][9]
    np.savez(tmp_path / "x.npz", **sets)
    found = load_data(tmp_path / "x.npz").summary
    assert (found.doubles, found.across_classes, found.across_splits) == (4, 1, 1)


def test_links_pipes_and_devices(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ("train", "test"), 4)
    (root / "train" / "glioma" / "inner").mkdir()
    (root / "train" / "glioma" / "inner" / "up").symlink_to(root / "train", target_is_directory=True)
    with pytest.raises(InputError, match="a link to a folder that it lies in"):
        load_data(root)
    (root / "train" / "glioma" / "inner" / "up").unlink()
    os.mkfifo(root / "train" / "glioma" / "pipe")
    (root / "train" / "glioma" / "endless").symlink_to("/dev/zero")
    data = load_data(root)
    assert data.origin.ignored == {"links to nothing, pipes or devices": 2}
    (root / "train" / "glioma" / "9.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"9\.png: no regular file"):
        load_data(root)
    (root / "train" / "glioma" / "9.png").unlink()
    picture(tmp_path / "outside.png", 9)
    (root / "train" / "glioma" / "9.png").symlink_to(tmp_path / "outside.png")
    assert len(load_data(root).unlabelled) + len(load_data(root).val) == 9
    with pytest.raises(InputError, match="lies outside of"):
        load_data(root, inside=True)
    for name in (str(tmp_path / "outside.png"), "../outside.png"):
        rows = [f"{name},{'ab'[i % 2]}" for i in range(8)]
        (root / "t.csv").write_text("\n".join(["path,label", *rows]))
        assert load_data(root / "t.csv", group="none").num_classes == 2
        with pytest.raises(InputError, match="lies outside of"):
            load_data(root / "t.csv", inside=True)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, ("train", "test"), 4)
    closed = root / "train" / "glioma" / "closed"
    picture(closed / "1.png", 1)
    real = os.scandir

    def scandir(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\)"):
        load_data(root)


# Tables as spreadsheets write them


def test_a_table_may_lie_beside_a_tar(tmp_path: Path) -> None:
    for index in range(8):
        picture(tmp_path / f"{index}.png", index)
    (tmp_path / "archive.tar").write_bytes(bytes(1024))
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *(f"{i}.png,{'ab'[i % 2]}" for i in range(8))]))
    assert load_data(tmp_path / "t.csv").num_classes == 2


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [";", "; ", "\t"])
def test_tables_of_spreadsheets(tmp_path: Path, encoding: str, separator: str) -> None:
    if encoding == "cp1252" and separator == "\t":
        return
    rows = [separator.join(["Größe", "path", "label", "split"])]
    for index in range(20):
        picture(tmp_path / f"ä {index}.png", index)
        split = "train" if index < 14 else "test"
        rows.append(separator.join([f"{index},5", f'"ä {index}.png"', "böse" if index % 2 else "gut", split]))
    head = "sep=;\r\n" if separator == ";" else ""
    (tmp_path / "t.csv").write_bytes((head + "\r\n".join(rows) + "\r\n").encode(encoding))
    data = load_data(tmp_path / "t.csv")
    assert data.class_names == ("böse", "gut")
    assert levels(data.test) == list(range(14, 20))


def test_labels_as_spreadsheets_write_them(tmp_path: Path) -> None:
    rows = ["path;edema;mass"]
    for index in range(20):
        picture(tmp_path / f"{index}.png", index)
        rows.append(f"{index}.png;{'1,0' if index % 2 else '0,0'};{'1.0' if index % 3 else '0'}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = load_data(tmp_path / "t.csv", label_column="edema,mass")
    assert data.unlabelled.labels.tolist() == [[float(i % 2), float(i % 3 > 0)] for i in levels(data.unlabelled)]


def test_tables_written_on_windows(tmp_path: Path) -> None:
    rows = ["path,label", *(f"images\\{index:02d}.png,{'ab'[index % 2]}" for index in range(20))]
    for index in range(20):
        picture(tmp_path / "images" / f"{index:02d}.png", index)
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = load_data(tmp_path / "t.csv")
    assert sorted(levels(data.unlabelled) + levels(data.val) + levels(data.test)) == list(range(20))


def test_pictures_inside_a_table_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    cells = [{"bytes": b"\x89PNG", "path": f"{index}.png"} for index in range(8)]
    table = pyarrow.table({"image": cells, "label": [index % 2 for index in range(8)]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"image holds dict values.*datasets\.load_dataset"):
        load_data(tmp_path / "t.parquet", path_column="image")


def test_classes_that_differ_in_case_and_dark_arrays_are_pointed_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (40, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(40) % 3, class_names=["Benign", "benign ", "other"])
    with pytest.warns(UserWarning, match="no pixel is brighter than 1 of 255"):
        data = load_data(tmp_path / "x.npz")
    assert any("classes that differ in case or spaces alone ('benign')" in line for line in data.summary.lines())


def test_one_hot_labels_are_pointed_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.eye(4, dtype=int)[np.arange(40) % 4])
    data = load_data(tmp_path / "x.npz")
    assert any("exactly one of the 4 labels" in line for line in data.summary.lines())


def test_limits_are_checked_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "data", ("train", "test"), 4)
    monkeypatch.setenv("TSYND_LIMIT_VALUES", "35")
    with pytest.raises(InputError, match=r"0\.png: 36 values .*wanted at most 35 .*TSYND_LIMIT_VALUES raises it"):
        load_data(root)
    monkeypatch.setenv("TSYND_LIMIT_VALUES", "much")
    with pytest.raises(InputError, match="TSYND_LIMIT_VALUES: 'much'; wanted a number"):
        load_data(root)
    monkeypatch.delenv("TSYND_LIMIT_VALUES")
    monkeypatch.setenv("TSYND_LIMIT_ROWS", "3")
    with pytest.raises(InputError, match="rows of a table, files of a folder"):
        load_data(root)
    monkeypatch.delenv("TSYND_LIMIT_ROWS")
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((3000, 64, 64), np.uint8), labels=np.arange(3000) % 2)
    assert (tmp_path / "bomb.npz").stat().st_size < 2**16
    load_data(tmp_path / "bomb.npz")
    monkeypatch.setenv("TSYND_LIMIT_EXPANDED", str(2**20))
    for read in (load_data, lambda path: open_source(str(path))):
        with pytest.raises(InputError, match="TSYND_LIMIT_EXPANDED"):
            read(tmp_path / "bomb.npz")
    with pytest.raises(InputError, match="TSYND_LIMIT_NAMES"):
        open_source(str(tmp_path / "a-{0..999}-{0..999}.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.savez(tmp_path / "far.npz", images=np.zeros((4, 4, 4), np.uint8), labels=np.array([0, 1, 2**40, 1]))
        with pytest.raises(InputError, match="TSYND_LIMIT_CLASSES"):
            open_source(str(tmp_path / "far.npz"))
