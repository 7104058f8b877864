"""Croissant metadata beside saved sets; what goes to the hub, by a stand-in of its client that keeps it here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyClassifier
from helpers import run_tsynd
from torch import Tensor, nn

import tsynd
from tsynd.data.phantom import phantom

NAMES = ("clear", "small one", "large")


@pytest.fixture
def result(autoencoder: nn.Module, images: Tensor) -> tsynd.SynthesisResult:
    options: dict[str, Any] = {"samples": 4, "steps": 1, "latent_std": 0.4, "progress": False}
    return tsynd.synthesize(autoencoder, TinyClassifier(), images, torch.arange(23) % 3, **options)


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a client of the hub was asked for; files are copied to ``hub``."""
    hub, calls = pytest.importorskip("huggingface_hub"), dict[str, Any]()

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls["token"] = token

        def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
            if repo.startswith("refused/"):
                raise OSError("403: not yours")
            calls.update(repo=repo, type=repo_type, private=private, exist_ok=exist_ok)
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> None:
            assert (repo_id, repo_type) == (calls["repo"], calls["type"])
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(hub, "HfApi", Api)
    return calls


def test_saved_sets_are_described(result: tsynd.SynthesisResult, tmp_path: Path) -> None:
    result.save(tmp_path / "set.npz", NAMES)
    pytest.importorskip("PIL")
    result.save(tmp_path / "folder", NAMES)
    about = json.loads((tmp_path / "set.croissant.json").read_text(encoding="utf-8"))
    assert "http://mlcommons.org/croissant/1.1" in about["conformsTo"]
    assert "synthetic" in about["keywords"]
    assert "23 synthetic images of 1×12×12. Classes: clear, small one, large." in about["description"]
    assert about["distribution"][0]["contentUrl"] == "set.npz"
    assert len(tsynd.load_data(tmp_path / "folder").unlabelled) < 23  # is read as before
    croissant = pytest.importorskip("mlcroissant")
    for path in (tmp_path / "set.croissant.json", tmp_path / "folder" / "croissant.json"):
        read = croissant.Dataset(str(path))
        assert not read.metadata.ctx.issues.errors
        assert read.metadata.name in ("set", "folder")
    labels = [record["records/label"].decode() for record in read.records("records")]
    assert {label: labels.count(label) for label in labels} == {"0_clear": 8, "1_small one": 8, "2_large": 7}


def test_images_go_without_their_sources(result: tsynd.SynthesisResult, sent: dict[str, Any], tmp_path: Path) -> None:
    assert result.push_to_hub("me/spots", NAMES, token="secret") == "https://hub/me/spots"
    assert sent == {"token": "secret", "repo": "me/spots", "type": "dataset", "private": True, "exist_ok": True}
    with np.load(tmp_path / "hub/synthetic.npz") as file:
        assert set(file.files) == {"images", "labels", "class_names"}
        assert file["images"].shape == (23, 12, 12)
    assert len(list((tmp_path / "hub/images").rglob("*.png"))) == 23
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    for text in (
        "tags:\n- synthetic",
        "These images are synthetic",
        "- small one: 8",
        "## Limits",
        "data_files: images/**",
    ):
        assert text in card
    assert "http://mlcommons.org/croissant/1.1" in (tmp_path / "hub/croissant.json").read_text(encoding="utf-8")
    with pytest.raises(tsynd.InputError, match="repo: refused/x cannot be written to: 403"):
        result.push_to_hub("refused/x", NAMES)


def test_a_run_is_pushed(sent: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "cells.npz", **phantom(16, train=20, val=6, test=12))
    short = ["--iterations", "2", "--autoencoder-iterations", "2", "--device", "cpu", "--quiet"]
    assert run_tsynd("run", "--data", tmp_path / "cells.npz", "--output", tmp_path / "out", *short).returncode == 0
    done = run_tsynd("push", "--run", tmp_path / "out", "--repo", "me/cells")
    assert (done.returncode, done.stdout) == (0, "https://hub/me/cells\n"), done.stderr
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    for text in ("sources: 20 training images of cells", "| radius | 0.5 |", "for their label"):
        assert text in card
    shutil.rmtree(tmp_path / "hub")
    done = run_tsynd("push", "--run", tmp_path / "out", "--repo", "me/net", "--what", "classifier", "--public")
    assert done.returncode == 0, done.stderr
    assert (sent["type"], sent["private"]) == ("model", False)
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md", "classifier.json", "classifier.safetensors",
    ]  # fmt: skip
    tsynd.load_model(tmp_path / "hub/classifier.safetensors")
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    for text in (
        "pipeline_tag: image-classification",
        "cannot tell whether",
        "| real images alone | clean |",
        "No medical",
    ):
        assert text in card
    for flags, word in ((["--run", tmp_path, "--repo", "a/b"], "run:"), (["--run", tmp_path / "out", "--repo", "a/b",
                        "--what", "all"], "what:")):  # fmt: skip
        done = run_tsynd("push", *flags)
        assert (done.returncode, done.stderr.startswith(f"tsynd: {word}")) == (2, True)
