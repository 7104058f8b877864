"""Options are the settings' fields; what cannot act, or is given twice, is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import in_process

pytest.importorskip("typer")

import typer.main
from typer.testing import CliRunner

from tsynd.cli import app
from tsynd.cli.options import field_texts
from tsynd.data.readers.options import ReadOptions
from tsynd.distributed.worker import ShardSettings
from tsynd.jobs.run import RunSettings
from tsynd.jobs.steps import ClassifierChoice, NetworkChoice
from tsynd.jobs.train import TrainSettings
from tsynd.study.settings import StudySettings
from tsynd.synthesis.ascent import AscentSettings
from tsynd.utils.version import __version__

SETTINGS = (AscentSettings, ReadOptions, RunSettings, ShardSettings, StudySettings, TrainSettings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_field_has_a_text(settings: Any) -> None:
    texts = field_texts(settings)
    for field in dataclasses.fields(settings):
        assert len(texts[field.name]) > 10
        assert not {"``", ":class:", ":func:", "see tsynd.synthesize"} & set(texts[field.name].split())
    if issubclass(settings, AscentSettings):
        assert texts["rule"] == "l2 (normalised gradient) or linf (its sign)."


@pytest.mark.parametrize(
    ("command", "settings"),
    [("run", RunSettings), ("train", TrainSettings), ("experiment", StudySettings), ("synthesize", ShardSettings)],
)
def test_options_are_the_fields(command: str, settings: Any) -> None:
    commands: Any = typer.main.get_command(app)
    made = {p.name: p.default for p in commands.commands[command].params}
    shared = {f.name: f.default for f in dataclasses.fields(settings) if f.name in made}
    assert len(shared) > 8
    for name, default in shared.items():
        given = made[name]() if callable(made[name]) else made[name]
        if (command, name) not in (("synthesize", "shard_size"), ("synthesize", "output"), ("synthesize", "data")):
            wanted = list(default) if isinstance(default, tuple) and isinstance(given, list) else default
            assert given == wanted or wanted is dataclasses.MISSING, name


@pytest.mark.parametrize(
    ("command", "settings"),
    [("run", NetworkChoice), ("train", ClassifierChoice), ("experiment", StudySettings), ("synthesize", ReadOptions)],
)
def test_every_choice_is_an_option(command: str, settings: Any) -> None:
    """And so are those of how files are read."""
    made = {p.name for p in COMMANDS.commands[command].params}
    assert {f.name for part in (settings, ReadOptions) for f in dataclasses.fields(part)} - {"reading"} <= made


COMMANDS: Any = typer.main.get_command(app)
MODELS = ["--autoencoder", "a.safetensors", "--classifier", "c.safetensors"]
MADE = ["synthesize", "--data", "phantom", "--output", "out.npz"]
EXPORT = ["export", "--output", "f.onnx", *MODELS]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([*MADE, "--model", "s.onnx", "--radius", "0.7"], "radius: --radius does nothing with --model, whose file"),
        ([*MADE, "--model", "s.onnx", "--memory-limit", "1"], "memory_limit: --memory-limit does nothing with --model"),
        ([*MADE, "--model", "s.onnx", "--no-checkpointing"], "checkpointing: --checkpointing does nothing with"),
        ([*MADE, "--model", "s.onnx", *MODELS], "model: got --autoencoder beside it, wanted the one or"),
        ([*MADE, "--model", "s.onnx", "--shard-size", "8"], "model: got --shard-size beside it, wanted the one or"),
        ([*MADE, *MODELS, "--verify", "size"], "verify: --verify does nothing without --shard-size"),
        ([*MADE, *MODELS, "--image-format", "png"], "image_format: --image-format does nothing without --shard-size"),
        ([*MADE, *MODELS, "--workers", "2"], "workers: --workers does nothing without --shard-size"),
        ([*MADE, "--radius", "1", "--radius", "2"], "radius: --radius is given twice, wanted once"),
        (
            ["run", "--data", "t.csv", "--output", "o", "--label-column", "a", "--label-column=b"],
            "label_column: --label-column is given twice, wanted once; several columns are joined by commas",
        ),
        ([*EXPORT, "--kind", "classifier", "--steps", "2"], "steps: --steps does nothing for the kind 'classifier'"),
        ([*EXPORT, "--kind", "encoder", "--seed", "0"], "seed: --seed does nothing for the kind 'encoder'"),
        (
            ["train", "--data", "phantom", "--output", "o", "--radius", "1"],
            "radius: --radius does nothing without --autoencoder",
        ),
        (
            ["evaluate", "--data", "phantom", "--classifier", "c.safetensors", "--query-images", "3"],
            "query_images: --query-images does nothing without --attacks",
        ),
        (
            ["experiment", "--data=phantom", "--output=o", "--train-size=9", "--attacks=none", "--attack-images=3"],
            "attack_images: --attack-images does nothing without attacks",
        ),
    ],
)
def test_what_cannot_act_is_refused(
    line: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = in_process(list(line))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"tsynd: {words}"), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", sorted(COMMANDS.commands))
def test_help_is_readable(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(number for number, line in enumerate(lines) if line.startswith("╭─ Options"))
    assert next(number for number, line in enumerate(lines[start:]) if line.startswith("╰")) <= 30
    assert "--help" in shown.stdout


JOBS = {
    "run": ("tsynd.cli.run.job.run", ["--output", "o"], {}),
    "train": ("tsynd.cli.train.train_model", ["--output", "o", "--autoencoder", "a"], {"autoencoder": "is given"}),
    "experiment": ("tsynd.cli.experiment.study.experiment", ["--output", "o", "--train-size", "9"], {}),
    "synthesize": ("tsynd.cli.synthesize.synthesize_shards", ["--output", "o", *MODELS, "--shard-size", "8"],
                   dict.fromkeys(("balance", "model", "most_uncertain", "start", "variants"), "is refused")
                   | dict.fromkeys(("autoencoder", "classifier", "shard_size"), "is given")),
}  # fmt: skip
VALUES = {
    "channels": "3", "frames": "split", "slices": "axial", "group": "none", "seeds": "4,7", "verify": "size",
    "test_data": "north=n.npz", "class_map": "A=b", "split": "val", "label_consistency": "0.25",
    "objective": "entropy", "masks": "independent", "rule": "linf", "image_format": "png",
}  # fmt: skip


@pytest.mark.parametrize("command", sorted(JOBS))
def test_every_option_reaches_the_job(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is left on the way would change nothing and say nothing."""
    place, needed, elsewhere = JOBS[command]
    handed: list[str] = []

    def taken(*given: Any, **options: Any) -> None:
        handed.append(repr((given, options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(place, taken)
    monkeypatch.chdir(tmp_path)

    def handed_over(*words: str) -> str:
        code, errors = in_process([command, "--data", "d", *needed, *words])
        assert code == 130, (words, errors)
        return handed.pop()

    usual, tried = handed_over(), 0
    for option in COMMANDS.commands[command].params:
        if option.name in ("help", "data", "output", "train_size", *elsewhere):
            continue
        values = [VALUES.get(option.name, "7")] * option.nargs
        beside = ["--test-data", "s=s.npz"] if option.name == "class_map" else []
        flag = [option.opts[0]] if option.is_flag else [option.opts[0], *values]
        if option.secondary_opts:
            flag = [option.secondary_opts[0]]
        assert handed_over(*flag, *beside) != (handed_over(*beside) if beside else usual), flag
        tried += 1
    assert tried > 15


def test_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"tsynd {__version__}\n")
