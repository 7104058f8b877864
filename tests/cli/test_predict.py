"""``tsynd predict`` and ``tsynd.predict``: files in, classes and uncertainty out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_process, run_tsynd
from torch import Tensor

import tsynd

pytest.importorskip("typer")
pytest.importorskip("monai")
pictures = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = tsynd.SmallResNet(1, 3, widths=(4, 8))
    model(torch.rand(16, 1, 16, 16))
    names = ["benign", "malignant", "normal"]
    path = tmp_path_factory.mktemp("model") / "classifier"
    return tsynd.save_model(model, path, class_names=names, image_shape=[1, 16, 16], task="multiclass")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several sizes at several depths, and what is none."""
    random = np.random.default_rng(0)
    for name, size in (("b.png", (16, 16)), ("deep/er/a.png", (31, 20)), ("deep/c.png", (16, 16, 3))):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(path)
    (tmp_path / "in" / "notes.txt").write_text("none")
    return tmp_path / "in"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder(saved: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    line = ["predict", "--data", folder, "--classifier", saved, "--output", out, "--samples", "8", "--seed", "3"]
    done = run_tsynd(*line)
    assert (done.returncode, done.stderr) == (0, "tsynd: ignored: 1 .txt\n")
    assert "deep/er/a.png" in done.stdout
    rows = table(out)
    assert [row["file"] for row in rows] == ["b.png", "deep/c.png", "deep/er/a.png"]
    image = torch.from_numpy(np.array(pictures.open(folder / "b.png")))[None, None].float() / 255
    network = tsynd.load_model(saved)
    wanted = tsynd.predict(network, image, samples=8, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(wanted.probabilities, network(image).softmax(1))
    torch.testing.assert_close(wanted.uncertainty, tsynd.uncertainty(network, image, samples=8, seed=3))
    given = [float(rows[0][f"p({name})"]) for name in ("benign", "malignant", "normal")]
    assert given == pytest.approx(wanted.probabilities[0].tolist(), abs=1e-4)
    assert float(rows[0]["uncertainty"]) == pytest.approx(float(wanted.uncertainty), abs=1e-4)
    assert rows[0]["prediction"] == ("benign", "malignant", "normal")[int(wanted.probabilities.argmax())]
    other = tmp_path / "other.csv"
    assert in_process([*line[:5], "--output", other, "--samples", "8", "--seed", "4"])[0] == 0
    assert table(other)[0]["uncertainty"] != rows[0]["uncertainty"]
    assert table(other)[0]["p(benign)"] == rows[0]["p(benign)"]


def test_one_file_and_what_is_refused(saved: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.csv"
    line = ["predict", "--classifier", saved, "--output", out, "--data"]
    assert in_process([*line, folder / "deep" / "er" / "a.png"]) == (0, "")
    assert [row["file"] for row in table(out)] == ["a.png"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for data, words in (
        (folder / "notes.txt", "is no picture, DICOM or NIfTI file"),
        (tmp_path / "gone", "is no file or folder"),
        (empty, "holds no picture, DICOM or NIfTI file"),
    ):
        code, errors = in_process([*line, data])
        assert code == 2
        assert errors.startswith("tsynd: data: ")
        assert words in errors
    code, errors = in_process([*line[:3], "--output", tmp_path / "one.txt", "--data", folder])
    assert (code, errors.count("\n")) == (2, 1)
    assert "wanted a name that ends in .csv" in errors


def test_dicom(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("nibabel")
    from medical_files import dicom, write

    write(tmp_path / "in" / "scan.dcm", dicom(np.arange(256, dtype=np.uint16).reshape(16, 16)))
    out = tmp_path / "out.csv"
    code, errors = in_process(["predict", "--classifier", saved, "--data", tmp_path / "in", "--output", out])
    assert (code, errors) == (0, "")
    assert [row["file"] for row in table(out)] == ["scan.dcm"]


def test_several_labels(images: Tensor) -> None:
    torch.manual_seed(0)
    model = tsynd.SmallResNet(1, 3, widths=(4, 8))
    made = tsynd.predict(model, images, task="multilabel", samples=4, batch_size=5)
    with torch.no_grad():
        torch.testing.assert_close(made.probabilities, model.eval()(images).sigmoid())
    wanted = tsynd.uncertainty(model, images, task="multilabel", samples=4)
    torch.testing.assert_close(made.uncertainty, wanted, rtol=1e-4, atol=1e-6)
