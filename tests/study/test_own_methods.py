"""Studies are open: arms, metrics, disturbances, attacks, networks and a base of one's own, by name or as they are."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_methods
import pytest
import torch
from helpers import in_process, run_tsynd

import tsynd

pytest.importorskip("art.attacks.evasion")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy.stats")
pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

from tsynd.data.phantom import phantom
from tsynd.study import experiment
from tsynd.study.settings import StudySettings, cells_of

TINY = StudySettings(
    autoencoder_iterations=3,
    autoencoder_widths=(4, 4),
    latent_channels=2,
    iterations=5,
    batch_size=12,
    samples=2,
    steps=1,
    conditions=("clean",),
    attacks=(),
    uncertainty_samples=2,
)
WHERE = {"workers": 1, "device": "cpu", "progress": False, "report": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cells.npz"
    np.savez(path, **phantom(train=30, val=12, test=20))
    return path


def study(data: Path, folder: Path, arms: Any = ("real",), **options: Any) -> dict[str, dict[str, Any]]:
    rows = tsynd.experiment(data, folder, [16], **{"seeds": 1, "arms": arms, "settings": TINY, **WHERE, **options})
    return {f"{row['seed']} {row['arm']}": row for row in rows}


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    return study(data, tmp_path_factory.mktemp("plain") / "out")["0 real"]


def test_an_arm_of_ones_own(data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    rows = study(data, tmp_path / "out", [own_methods.Darker, "own_methods:Darker,light=0.9", own_methods.decoded])
    loss = {name: row["training"]["final_loss"] for name, row in rows.items()}
    assert len(set(loss.values())) == 4  # each arm trains otherwise, its option acts
    assert loss["0 real"] == plain["training"]["final_loss"]
    assert rows["0 own_methods:Darker"]["quality"] is None
    decoded = rows["0 own_methods:decoded"]["quality"]
    assert decoded["images"] == 16
    assert decoded["label_kept"] == decoded["label_kept_reconstruction"]
    assert (tmp_path / "out/samples/16-0-own_methods_decoded.npz").exists()


def test_a_metric_is_added_without_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(data, tmp_path / "out", attacks=(), conditions=("clean", "noise"))

    def never(*given: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "run_cell", never)
    monkeypatch.setattr(experiment, "train_autoencoder", never)
    options = {"conditions": ("clean", "noise"), "metrics": [own_methods.confidence], "report": True}
    row = study(data, tmp_path / "out", attacks=(), **options)["0 real"]
    with np.load(tmp_path / "out/predictions/16-0-real.npz") as file:
        for condition in ("clean", "noise"):
            assert row["scores"][condition]["confidence"] == pytest.approx(file[condition].max(1).mean())
            right = (file[condition].argmax(1) == file["labels"]).mean()
            assert row["scores"][condition]["accuracy"] == pytest.approx(right)
    table = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [line["value"] for line in table if line["score"] == "confidence"]
    assert "confidence" in (tmp_path / "out/results.md").read_text()
    assert "confidence" not in json.loads((tmp_path / "out/cells/16-0-real.json").read_text())["scores"]["clean"]


def test_damaged_predictions_are_made_again(data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    study(data, tmp_path / "out")
    path = tmp_path / "out/predictions/16-0-real.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert study(data, tmp_path / "out")["0 real"]["scores"] == plain["scores"]
    assert path.read_bytes() == whole


def test_a_condition_and_an_attack_of_ones_own(data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    options = {"conditions": ("clean", own_methods.inverted), "attacks": (own_methods.blackout,), "report": True}
    row = study(data, tmp_path / "out", attack_images=None, **options)["0 real"]
    assert row["scores"]["clean"] == plain["scores"]["clean"]
    model, source = tsynd.load_model(tmp_path / "out/models/classifier-16-0-real"), tsynd.load_data(data)
    for name, images in (("inverted", 1 - source.test.pixels()), ("blackout", 0 * source.test.pixels())):
        wanted = tsynd.evaluate(model, (images, source.test.labels), conditions=("clean",))["clean"]
        assert row["scores"][name]["nll"] == pytest.approx(wanted["nll"], rel=1e-5)
    text = (tmp_path / "out/results.md").read_text()
    assert "inverted %" in text
    assert "blackout %" in text


def test_networks_of_ones_own(data: Path, tmp_path: Path) -> None:
    networks = {"classifier": own_methods.network, "trains": "all", "rounds": 0}
    coder = {"autoencoder": "own_methods:coder,channels=3", "autoencoder_trains": "all"}
    study(data, tmp_path / "out", ["reconstruction"], **networks, **coder)
    for name, own in (("autoencoder-16-0", coder["autoencoder"]), ("classifier-16-0-real", "own_methods:network")):
        card = json.loads((tmp_path / f"out/models/{name}.json").read_text())
        assert card["config"]["source"] == own


@pytest.mark.parametrize("base", ["standard", "standard,flip=both", "randaugment", own_methods.negative])
def test_a_base_under_all_arms(base: Any, data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    """It acts, and as long as the arms add nothing it is the same in all."""
    rows = study(data, tmp_path / "out", [own_methods.Darker, "adversarial"], base=base, warmup_fraction=1.0)
    scores = [row["scores"]["clean"] for row in rows.values()]
    assert len(scores) == 3
    assert all(one == scores[0] for one in scores)
    assert scores[0] != plain["scores"]["clean"]


def test_seeds_by_number(data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    assert [cell.seed for cell in cells_of([16], [3, 1, 3], ["real"])] == [3, 1]
    rows = study(data, tmp_path / "out", seeds=[4, 0], report=True)
    assert list(rows) == ["0 real", "4 real"]
    assert rows["0 real"]["scores"] == plain["scores"]
    for wrong in ([], [-1], ["1"], 0):
        with pytest.raises(tsynd.InputError, match="seeds"):
            cells_of([16], wrong, ["real"])


def test_changed_code_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, folder = tmp_path / "changing.py", tmp_path / "out"
    arm = "def arm():\n    return lambda model, images, labels: (images / {}, labels)\n"
    rest = "def fog(images, indices, seed):\n    return {} * images\n"
    module.write_text(arm.format(2) + rest.format(0.5))
    monkeypatch.syspath_prepend(tmp_path)
    changing, conditions = importlib.import_module("changing"), ("clean", "changing:fog")
    study(data, folder, ["changing:arm"], conditions=conditions)
    for text, message in ((arm.format(33) + rest.format(0.5), "arms: changing:arm has changed"),
                          (arm.format(2) + rest.format(0.25), "code {'changing:fog'")):  # fmt: skip
        module.write_text(text)
        importlib.reload(changing)
        with pytest.raises(tsynd.InputError, match=message):
            study(data, folder, ["changing:arm"], conditions=conditions)
    module.write_text(arm.format(2) + rest.format(0.5) + "more = 1\n")
    importlib.reload(changing)
    study(data, folder, ["changing:arm"], conditions=conditions)


def test_what_has_no_name_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(tsynd.InputError, match=r"arms: got <function .*lambda.*top of a module"):
        study(data, tmp_path / "out", [lambda: None])
    for option in ({"arms": ["own_methods:Nothing"]}, {"arms": ["own_methods:Darker,dark=1"]}, {"base": "trades"},
                   {"attacks": ("nowhere:f",)}, {"conditions": ("clean", "own_methods:noise")},
                   {"metrics": ["own_methods:no"]}, {"weather": 1}):  # fmt: skip
        with pytest.raises(tsynd.InputError):
            study(data, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_command_line_finds_what_lies_in_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paler.py").write_text(
        "class Paler:\n    def __init__(self, seed): ...\n"
        "    def __call__(self, model, images, labels): return images / 2, labels\n"
        "def share(probabilities, labels): return float(probabilities[:, 0].mean())\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--iterations", "3", "--batch-size", "12", "--seeds", "2,5", "--workers", "1", "--attacks", "none"]
    flags += ["--condition", "clean", "--base", "standard,flip=horizontal", "--metric", "paler:share", "--quiet"]
    start = ["experiment", "--data", data, "--output", "out", "--train-size", "16", "--device", "cpu"]
    done = run_tsynd(*start, "--arm", "paler:Paler", *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == [(s, a) for s in (2, 5) for a in ("paler:Paler", "real")]
    assert all(0 < row["scores"]["clean"]["share"] < 1 for row in rows)
    assert json.loads((tmp_path / "out/job.json").read_text())["fingerprint"]["base"] == "standard,flip=horizontal"
    assert in_process([*start, "--seeds", "many"]) == (
        2,
        "tsynd: seeds: got 'many', wanted how many, or which, as 1,2,3\n",
    )


def test_evaluate_takes_them_too(data: Path, tmp_path: Path) -> None:
    study(data, tmp_path / "out")
    weights, file = tmp_path / "out/models/classifier-16-0-real.safetensors", tmp_path / "scores.json"
    flags = ["--condition", "clean", "own_methods:inverted", "--attack", "own_methods:blackout"]
    flags += ["--metric", "own_methods:confidence", "--device", "cpu", "--json", file]
    done = run_tsynd("evaluate", "--data", data, "--classifier", weights, *flags)
    assert done.returncode == 0, done.stderr
    scores = json.loads(file.read_text())["scores"]
    assert list(scores) == ["clean", "inverted", "blackout"]
    assert scores["clean"]["confidence"] != scores["inverted"]["confidence"]
    assert f"{scores['inverted']['confidence']:.3f}" in done.stdout


@pytest.mark.slow
def test_other_processes_find_it_too(data: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(TINY, conditions=("clean", "own_methods:inverted"))
    rows = study(data, tmp_path / "out", [own_methods.decoded], settings=settings, workers=2)
    assert rows["0 real"]["scores"]["clean"] == plain["scores"]["clean"]
    assert rows["0 own_methods:decoded"]["quality"]
