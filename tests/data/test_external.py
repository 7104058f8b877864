"""Test sets from elsewhere: whole sources without training images, under the classifier's class names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_tsynd

import tsynd
from tsynd.data.external import External, load_test, parse_class_map
from tsynd.data.phantom import phantom

NAMES = ("NORMAL", "SICK")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders of another size and colour, with patients in their names' folders, one class more."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label, count in (("normal", 4), ("pneumonia", 3), ("other", 2)):
        for number in range(count):
            folder = tmp_path / "other" / label / f"patient{number // 2}{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "other"


def test_a_folder_is_brought_to_the_classifier(pictures: Path) -> None:
    given = {"normal": "NORMAL", "pneumonia": "SICK", "other": ""}
    options = {"image_shape": [1, 12, 12], "reading": tsynd.ReadOptions(group="folder")}
    found = load_test(pictures, NAMES[::-1], class_map=given, **options)
    assert found.images.shape == (7, 1, 12, 12)
    assert found.labels.tolist() == [1] * 4 + [0] * 3  # in the classifier's order; the third class is left out
    assert found.groups is not None
    assert len(set(found.groups.tolist())) == 4
    with pytest.raises(tsynd.InputError, match=r"'other' is none of the classifier's.*'other=NAME'"):
        load_test(pictures, NAMES, class_map={"normal": "NORMAL", "pneumonia": "SICK"}, image_shape=[1, 12, 12])
    with pytest.raises(tsynd.InputError, match=r"'normal', 'other', .* are none.*'normal=NORMAL' 'other=NAME'"):
        load_test(pictures, NAMES, class_map={"NORMAL": "normal"}, image_shape=[1, 12, 12])  # the wrong way round


def test_archives_of_any_splits(tmp_path: Path) -> None:
    arrays = phantom(size=16, train=6, val=3, test=5)
    names = [str(name) for name in arrays["class_names"]]
    np.savez(tmp_path / "whole.npz", **arrays)
    whole = load_test(tmp_path / "whole.npz", names)
    assert len(whole) == 14
    source = tsynd.load_data(tmp_path / "whole.npz")
    parts = [source.train.labels, source.val.labels, source.test.labels]
    assert torch.equal(whole.labels, torch.cat(parts))
    assert torch.equal(load_test(tmp_path / "whole.npz", names, split="test").images, source.test.images)
    np.savez(tmp_path / "test.npz", **{key: value for key, value in arrays.items() if key[:4] in ("test", "clas")})
    alone = load_test(tmp_path / "test.npz", names)
    assert torch.equal(alone.images, source.test.images)
    for split, shape, message in (("train", None, "split: got 'train', wanted all, test"), ("all", [3, 9, 9], "as tr")):
        with pytest.raises(tsynd.InputError, match=message):
            load_test(tmp_path / "test.npz", names, split=split, image_shape=shape)


def test_multilabel_columns_are_matched(tmp_path: Path) -> None:
    labels = np.array([[1, 0], [0, 0], [1, 1]], dtype=np.uint8)
    images = np.zeros((3, 8, 8), np.uint8)
    np.savez(tmp_path / "many.npz", images=images, labels=labels, class_names=np.array(["a", "b"]))
    found = load_test(tmp_path / "many.npz", ["B", "a"], task="multilabel", class_map={"b": "B"})
    assert found.labels.tolist() == [[0, 1], [0, 0], [1, 1]]
    for names, task, message in ((["a", "b", "c"], "multilabel", "3 labels"), (["a", "b"], "multiclass", "multilabel")):
        with pytest.raises(tsynd.InputError, match=message):
            load_test(tmp_path / "many.npz", names, task=task)


def test_forms() -> None:
    assert parse_class_map(["a=b", "c="]) == {"a": "b", "c": ""}
    assert External.of(["B=b.npz"], ["a=b"]) == External({"B": "b.npz"}, {"a": "b"})
    for texts, own in ((["b.npz"], None), (["B=x", "B=y"], None), (None, ["a=b"]), (["B=x"], ["a"])):
        with pytest.raises(tsynd.InputError):
            External.of(texts, own)


def test_groups_follow_their_images() -> None:
    data = tsynd.LabelledImages(torch.zeros(4, 1, 8, 8), torch.arange(4), torch.tensor([5, 5, 6, 7]))
    assert data.subset(torch.tensor([2, 0])).groups.tolist() == [6, 5]
    with pytest.raises(tsynd.InputError, match="groups"):
        tsynd.LabelledImages(torch.zeros(4, 1, 8, 8), torch.arange(4), torch.zeros(3))


def test_commands_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate --split all`, `run` and `experiment` agree on another hospital's images."""
    for package in ("accelerate", "matplotlib", "scipy"):
        pytest.importorskip(package)
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    own = phantom(size=16, train=48, val=8, test=24)
    np.savez("own.npz", **own)
    names = [str(name) for name in own["class_names"]]
    for number, (pixels, label) in enumerate(zip(own["train_images"], own["train_labels"].ravel(), strict=True)):
        folder = Path("own") / names[label] / f"patient{label}{number // 8}"  # of whom each has two or three images
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(folder / f"{number}.png")
    far = phantom(size=16, train=2, val=2, test=30)
    theirs = np.array([f"{name}2" for name in names])
    np.savez("far.npz", images=far["test_images"], labels=far["test_labels"], class_names=theirs)
    elsewhere = ["--test-data", "Far=far.npz", "--class-map", *(f"{name}2={name}" for name in names)]
    short = ["--iterations", "3", "--batch-size", "12", "--autoencoder-iterations", "2", "--device", "cpu", "--quiet"]
    folders = ["--data", "own", "--group", "folder", "--output", "run", "--iterations", "3"]
    done = run_tsynd("run", *folders, *short[4:], *elsewhere)
    assert done.returncode == 0, done.stderr
    assert "Far" in done.stdout
    everything = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    metrics, drawn = everything["elsewhere"]["Far"], everything["comparison"]
    tested = tsynd.load_data("own", group="folder").test.groups
    assert drawn["groups"] == len(set(tested.tolist())) < drawn["images"]  # patients are drawn, not images
    assert metrics["comparison"]["groups"] is None
    assert metrics["images"] == 30
    assert "The same classifiers elsewhere" in Path("run/report.html").read_text(encoding="utf-8")
    flags = ["--conditions", "clean", "--device", "cpu", "--split", "all", "--json", "scores.json", *elsewhere[2:]]
    done = run_tsynd("evaluate", "--data", "far.npz", "--classifier", "run/classifier.safetensors", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("scores.json").read_text(encoding="utf-8"))["scores"]["clean"] == pytest.approx(
        metrics["evaluation"]["targeted"]
    )
    start = ["experiment", "--data", "own.npz", "--output", "study", "--train-size", "16", "--arms", "real", *short]
    start += ["--conditions", "clean", "--attacks", "none", "--workers", "1", "--seeds", "1"]
    assert run_tsynd(*start).returncode == 0
    stamp = Path("study/cells/16-0-real.json").stat().st_mtime_ns
    for _ in range(2):  # the second time from what is kept
        done = run_tsynd(*start, *elsewhere)
        assert done.returncode == 0, done.stderr
        row = json.loads(Path("study/results.jsonl").read_text(encoding="utf-8"))
        model = tsynd.load_model("study/models/classifier-16-0-real")
        tested = load_test("far.npz", names, class_map={f"{name}2": name for name in names})
        wanted = tsynd.evaluate(model, tested, conditions=("clean",))["clean"]
        assert row["scores"]["at:Far"] == pytest.approx(wanted, rel=1e-5)
    assert Path("study/cells/16-0-real.json").stat().st_mtime_ns == stamp
    assert "At Far %" in Path("study/results.md").read_text(encoding="utf-8")
