"""The main job end to end on tiny settings, the report, the command line and its refusals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from helpers import in_process, run_tsynd
from torch.nn import functional

import tsynd
from tsynd.cli.app import _spread, app
from tsynd.data.external import External
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation.intervals import compare
from tsynd.jobs import run as pipeline
from tsynd.jobs.steps import NetworkChoice
from tsynd.report.pictures import draw_examples
from tsynd.report.run_report import write_report
from tsynd.synthesis.result import SynthesisResult, load_result
from tsynd.training import loop

TINY = pipeline.RunSettings(
    train_size=24, autoencoder_iterations=12, iterations=10, batch_size=16, samples=8, steps=2, augmentation_steps=1
)
TINY_FLAGS = ["--train-size", "24", "--autoencoder-iterations", "12", "--iterations", "10", "--samples", "8"]


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tsynd", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, pipeline.run(data, folder, TINY, device="cpu", progress=False)


def test_files_and_metrics(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    for name in ("autoencoder", "classifier", "classifier_real", "classifier_standard", "classifier_reconstruction"):
        assert {f"{name}.safetensors", f"{name}.json"} <= names
    assert {"synthetic.npz", "metrics.json", "report.html", "examples.png", "job.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    made = metrics["synthesis"]
    assert made["images"] == 24
    assert 0 <= made["raised_fraction"] <= 1
    assert made["images_per_second"] > 0
    assert sum(made["status"].values()) == 24
    for model in ("real", "targeted"):
        for condition in ("clean", "noise", "rotation"):
            scores = metrics["evaluation"][model][condition]
            assert set(scores) >= {"balanced_accuracy", "accuracy", "auroc"}
            assert scores["nll"] >= 0
            assert all(0 <= value <= 1 for name, value in scores.items() if name != "nll")


def test_metrics_are_what_the_saved_models_give(data: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    source = tsynd.load_data(data, train_size=24)
    files = {"real": "_real", "standard": "_standard", "reconstruction": "_reconstruction", "targeted": ""}
    for name, end in files.items():
        again = tsynd.evaluate(tsynd.load_model(folder / f"classifier{end}.safetensors"), source.test)
        for condition, scores in metrics["evaluation"][name].items():
            assert again[condition] == pytest.approx(scores)
    result = load_result(folder / "synthetic.npz")
    real = tsynd.load_model(folder / "classifier_real.safetensors")
    after = tsynd.uncertainty(real, result.images, samples=32, seed=1_000_003)
    assert float(after.mean()) == pytest.approx(metrics["synthesis"]["uncertainty_after"], rel=1e-4)


def test_a_finished_run_is_not_repeated_and_an_interrupted_one_goes_on(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = finished
    stamp = (folder / "autoencoder.safetensors").stat().st_mtime_ns
    again = pipeline.run(data, folder, TINY, device="cpu", progress=False)
    assert (folder / "autoencoder.safetensors").stat().st_mtime_ns == stamp
    assert again["evaluation"] == metrics["evaluation"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "synthesize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(data, tmp_path / "b", TINY, device="cpu", progress=False)
    monkeypatch.undo()
    stamp = (tmp_path / "b" / "classifier_real.safetensors").stat().st_mtime_ns
    resumed = pipeline.run(data, tmp_path / "b", TINY, device="cpu", progress=False)
    assert (tmp_path / "b" / "classifier_real.safetensors").stat().st_mtime_ns == stamp
    assert resumed["evaluation"] == metrics["evaluation"]
    assert resumed["synthesis"]["uncertainty_after"] == metrics["synthesis"]["uncertainty_after"]


def test_a_training_goes_on_inside_a_stage(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted behind every state of every training, each step is done once, and the models are the same ones."""
    monkeypatch.setattr(pipeline, "_EVERY", 5)
    folder, whole, steps = tmp_path / "out", finished[0], []
    save, step = loop.save_state, torch.optim.AdamW.step

    def saved(path: Path, *state: Any) -> None:
        save(path, *state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", saved)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: (steps.append(1), step(*given))[1])
    for _ in range(3 + 4 * 2):  # the autoencoder's 12 steps have three states, the classifiers' ten have two
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(data, folder, TINY, device="cpu", progress=False)
    assert len(list(folder.glob("*.training"))) == 1
    pipeline.run(data, folder, TINY, device="cpu", progress=False)
    assert len(steps) == 12 + 4 * 10
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_state_of_what_is_made_again_is_not_used(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one of a stage behind it, which a training of the old file had left."""
    folder = tmp_path / "out"
    monkeypatch.setattr(pipeline, "_EVERY", 5)
    pipeline.run(data, folder, TINY, device="cpu", progress=False)
    before = (folder / "classifier.safetensors").read_bytes()
    for name in ("autoencoder", "classifier"):
        (folder / f"{name}.training").write_bytes(b"of another training")
    (folder / "autoencoder.safetensors").unlink()
    with pytest.warns(UserWarning, match="is gone or damaged"):
        pipeline.run(data, folder, TINY, device="cpu", progress=False)
    assert (folder / "classifier.safetensors").read_bytes() == before
    assert not list(folder.glob("*.training"))


def test_another_run_does_not_mix_with_a_folder(data: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    with pytest.raises(tsynd.InputError, match=r"other settings \(radius 0\.5 → 0\.7\)"):
        pipeline.run(data, folder, pipeline.RunSettings(**{**vars(TINY), "radius": 0.7}), progress=False)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]


def test_report_holds_everything(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    page = (folder / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) > 20
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert f"{metrics['synthesis']['uncertainty_after']:.4f}" in page
    for model in ("real", "targeted"):
        assert f"<td>{100 * metrics['evaluation'][model]['rotation']['balanced_accuracy']:.1f} <small>" in page
    assert "tsynd experiment --data" in page
    assert 0 <= metrics["synthesis"]["label_kept"] <= 1
    assert set(metrics["reconstruction"]["by_class"]) <= set(metrics["data"]["class_names"])
    assert sum(metrics["data"]["test_counts"].values()) == 40


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": "targeted", "radius": 1.5, "masks": "independent", "label_consistency": 0.25, "dropout": "stages"},
        {"classifier": "timm:resnet18", "encoder_size": 96, "trains": "all", "rounds": 0, "autoencoder_data": "all"},
        {"reading": ReadOptions(image_size=48, channels=1, window=(-600.0, 1500.0), group="none")},
        {"reading": ReadOptions(volumes=True, inside=True, spacing=(1.0, 1.0, 2.5)), "flip": "both"},
    ],
)
def test_the_printed_study_is_of_the_same_things(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """What the command line makes of it: every setting that both have, and the test sets, are the run's."""
    settings, folder = replace(TINY, train_size=30, **changes), tmp_path / "a study"
    others = External({"north": tmp_path / "the north", "south": "s.npz"}, {"ILL": "ill", "odd one": ""})
    line = pipeline._study_command(str(data), folder.name, tsynd.load_data(data, train_size=30), others, settings)
    commands: Any = typer.main.get_command(app)
    words = _spread(shlex.split(line))
    given = commands.commands["experiment"].make_context("experiment", words[2:]).params
    assert (words[:2], given["output"], given["train_size"], given["data"]) == (
        ["tsynd", "experiment"], Path("a study-study"), [30], str(data),
    )  # fmt: skip
    names = ["masks", "radius", "label_consistency", "dropout", "augmentation_weight", "iterations", "batch_size"]
    names += ["autoencoder_data", "autoencoder_iterations", *(part.name for part in fields(NetworkChoice))]
    for name in names:
        assert given[name] == getattr(settings, name), name
    assert ReadOptions(**{part.name: given[part.name] for part in fields(ReadOptions)}) == settings.reading
    assert given["test_data"] == [f"north={tmp_path / 'the north'}", "south=s.npz"]
    assert given["class_map"] == ["ILL=ill", "odd one="]
    assert ("recipe,flip=both" in given["arms"]) == (settings.flip == "both")


def test_the_second_classifier_is_trained_by_the_recipe_that_is_named(data: Path, tmp_path: Path) -> None:
    def trained(**options: Any) -> dict[str, torch.Tensor]:
        folder = tmp_path / "-".join(options.values())
        pipeline.run(data, folder, replace(TINY, **options), device="cpu", progress=False)
        model = tsynd.load_model(folder / "classifier.safetensors")
        assert isinstance(model, tsynd.SmallResNet)
        return model.state_dict()

    models = [trained(recipe="robust"), trained(recipe="robust", flip="both"), trained(recipe="targeted")]
    for one, other in ((0, 1), (0, 2)):
        assert any(not torch.equal(models[one][key], models[other][key]) for key in models[one])
    # by hand
    source = tsynd.load_data(data, train_size=24)
    autoencoder = tsynd.load_model(tmp_path / "robust" / "autoencoder.safetensors")
    torch.manual_seed(0)
    plain = tsynd.SmallResNet(source.channels, source.num_classes)
    options = {"iterations": 10, "batch_size": 16, "device": "cpu", "progress": False}
    tsynd.fit_classifier(plain, source.train, augmentation=tsynd.recipe("robust", autoencoder), **options)
    assert all(torch.equal(value, models[0][key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("change", [{"recipe": "best"}, {"flip": "up"}, {"objective": "expected_information"}])
def test_what_the_second_training_cannot_use_is_refused_first(tmp_path: Path, change: dict[str, str]) -> None:
    (name, value), *_ = change.items()
    with pytest.raises(tsynd.InputError, match=f"{name}: got '{value}', (which needs target images; )?wanted"):
        pipeline.run("phantom", tmp_path / "out", replace(TINY, **change), device="cpu", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("multilabel", [False, True])
def test_report_of_other_data(tmp_path: Path, channels: int, multilabel: bool) -> None:
    count = 9
    images = torch.rand(count, channels, 8, 8)
    labels = torch.randint(0, 2, (count, 3)).float() if multilabel else torch.arange(count) % 3
    values = torch.rand(count)
    latents = torch.zeros(count, 4)
    result = SynthesisResult(
        images, labels, latents, latents, values, values, torch.rand(count, 4), torch.zeros(count), torch.arange(count)
    )
    made = {"images": count, "uncertainty_before": 0.1, "uncertainty_after": 0.2, "raised_fraction": 1.0}
    metrics = {
        "data": {"name": "<script>alert(1)</script>"},
        "synthesis": {**made, "images_per_second": 5.0},
    }
    names = ("<b>x</b>", "y & z", "w")
    path = write_report(tmp_path / "r.html", metrics, result, images, images, names, values, values * 2)
    page = path.read_text()
    Links().feed(page)
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "Scores on test images" not in page  # without the comparison nothing is claimed
    assert "points" not in page
    truth = torch.arange(60) % 3
    right = functional.one_hot(truth, 3).float()
    worse = torch.cat([right[:6].roll(1, 1), right[6:]])  # two of each class are lost
    metrics["comparison"] = compare({"real": {"clean": right}, "targeted": {"clean": worse}}, truth)
    page = write_report(tmp_path / "r.html", metrics, result, images, images, names, values, values * 2).read_text()
    assert "on 60 clean test images, against real images alone, training with the extra images lost 10.0 points" in page
    assert "Scores on test images" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page
    picture = draw_examples(tmp_path / "e.png", images[:2], images[:2], images[:2], values, values, ("a", "b"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_synthesize(data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = finished
    models = ["--autoencoder", folder / "autoencoder.safetensors", "--classifier", folder / "classifier.safetensors"]
    flags = ["--data", data, *models, "--split", "val", "--samples", "4", "--quiet"]
    done = run_tsynd("synthesize", *flags, "--output", tmp_path / "new.npz")
    assert done.returncode == 0, done.stderr
    assert "20 images, mean uncertainty" in done.stdout
    assert len(load_result(tmp_path / "new.npz")) == 20
    done = run_tsynd("synthesize", *flags, "--output", tmp_path / "folders")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "folders").rglob("*.png"))) == 20
    done = run_tsynd("synthesize", *flags, "--output", tmp_path / "new.npz")
    assert done.returncode == 2
    assert "exists already" in done.stderr


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        (["--variants", "2"], {"variants": 2}),
        (["--balance"], {"balance": True}),
        (["--start", "noise"], {"start": "noise"}),
        (["--start", "interpolate"], {"start": "interpolate"}),
        (["--most-uncertain", "3"], {"most_uncertain": 3}),
    ],
)
def test_command_synthesize_chooses_its_sources(
    data: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path, flags: list[str], option: dict[str, Any]
) -> None:
    """As the function does, and not as without the option."""
    models = [finished[0] / f"{name}.safetensors" for name in ("autoencoder", "classifier")]
    words = ["synthesize", "--data", data, "--autoencoder", models[0], "--classifier", models[1], "--split", "val"]
    words += ["--samples", "4", "--steps", "2", "--quiet", "--device", "cpu", "--output", tmp_path / "new.npz"]
    done = run_tsynd(*words, *flags)
    assert done.returncode == 0, done.stderr
    found, images = load_result(tmp_path / "new.npz"), tsynd.load_data(data).val
    both = [tsynd.load_model(path) for path in models]
    given: dict[str, Any] = {"samples": 4, "steps": 2, "device": "cpu", "progress": False}
    wanted, usual = (tsynd.synthesize(*both, images, **given, **more) for more in (option, {}))
    assert torch.equal(found.sample_ids, wanted.sample_ids)
    torch.testing.assert_close(found.latents, wanted.latents, rtol=0, atol=1e-5)
    assert len(found) != len(usual) or not torch.allclose(found.latents, usual.latents, atol=1e-5)


def test_command_info() -> None:
    done = run_tsynd("info")
    assert done.returncode == 0, done.stderr
    assert tsynd.__version__ in done.stdout
    assert "head_uncertainty" in done.stdout


def test_command_run(data: Path, tmp_path: Path) -> None:
    done = command("run", "--data", data, "--output", tmp_path / "out", *TINY_FLAGS, "--steps", "2", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout.replace("\n", "")
    assert (tmp_path / "out" / "report.html").exists()


def bad_files(folder: Path, good: Path) -> dict[str, Path]:
    whole = good.read_bytes()
    arrays = dict(np.load(good, allow_pickle=False))
    files = {name: folder / f"{name}.npz" for name in ("truncated", "pickled", "text", "short", "labels", "missing")}
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    np.savez(files["pickled"], **{**arrays, "train_images": np.array([{"a": 1}], dtype=object)})
    files["text"].write_text("not an archive")
    np.savez(files["short"], **{**arrays, "train_labels": arrays["train_labels"][:-1]})
    np.savez(files["labels"], **{**arrays, "test_labels": arrays["test_labels"] + 100})
    np.savez(files["missing"], **{k: v for k, v in arrays.items() if k != "train_images"})
    files["empty folder"] = folder / "empty"
    files["empty folder"].mkdir()
    return files


def test_bad_input_on_the_command_line(data: Path, tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """Each gives exit code 2, one line that starts with the program's name, no traceback and no output."""
    files = bad_files(tmp_path, data)
    output = tmp_path / "out"
    run = ["run", "--quiet", "--output", output]
    models = ["--autoencoder", finished[0] / "autoencoder.safetensors"]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((finished[0] / "classifier.safetensors").read_bytes()[:100])
    (tmp_path / "broken.json").write_bytes((finished[0] / "classifier.json").read_bytes())
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("precious")
    (tmp_path / "a file").write_text("")
    cases: list[tuple[list[str | Path], str]] = [
        *(([*run, "--data", path], path.name) for path in files.values()),
        ([*run, "--data", tmp_path / "nowhere.npz"], "nowhere.npz"),
        ([*run, "--data", "pneumoniamnst"], "pneumoniamnist"),
        ([*run, "--data", data, "--train-size", "1"], "train_size"),
        ([*run, "--data", data, "--train-size", "9999"], "train_size"),
        ([*run, "--data", data, "--radius", "-1"], "radius"),
        ([*run, "--data", data, "--steps", "0"], "steps"),
        ([*run, "--data", data, "--samples", "0"], "samples"),
        ([*run, "--data", data, "--objective", "bald"], "objective"),
        ([*run, "--data", data, "--masks", "no"], "masks"),
        ([*run, "--data", data, "--dropout", "none"], "dropout"),
        ([*run, "--data", data, "--label-consistency", "2"], "label_consistency"),
        ([*run, "--data", data, "--device", "gpu"], "device"),
        (["run", "--quiet", "--data", data, "--output", tmp_path / "occupied"], "occupied"),
        (["run", "--quiet", "--data", data, "--output", tmp_path / "a file" / "x"], "a file"),
        (["synthesize", "--data", data, *models, "--classifier", tmp_path / "no", "--output", output], "no"),
        (["synthesize", "--data", data, *models, "--classifier", broken, "--output", output], "broken"),
    ]
    assert len(cases) >= 20
    # one process for all: starting torch twenty times would take a minute
    for arguments, word in cases:
        done = in_process(arguments)
        assert done[0] == 2, (arguments, done)
        line = done[1].strip()
        assert line.startswith("tsynd: "), (arguments, line)
        assert "\n" not in line, line
        assert word in line, (word, line)
        assert not output.exists(), arguments
    assert [p.name for p in (tmp_path / "occupied").iterdir()] == ["thesis.txt"]
    done = command("run", "--quiet", "--data", files["truncated"], "--output", output)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_real_xrays_load_and_run(real_data: Path, tmp_path: Path) -> None:
    settings = pipeline.RunSettings(**{**vars(TINY), "train_size": 40})
    metrics = pipeline.run(real_data / "pneumoniamnist.npz", tmp_path / "out", settings, device="cpu", progress=False)
    assert metrics["data"]["class_names"] == ["normal", "pneumonia"]
    assert metrics["synthesis"]["images"] == 40


def test_environment_without_extras_says_which(tmp_path: Path) -> None:
    """The command line without typer names the extra instead of failing with a traceback."""
    (tmp_path / "typer.py").write_text("raise ImportError('hidden')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command("info", env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 2
    assert "pip install 'tsynd[cli]'" in done.stderr
