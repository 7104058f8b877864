"""A tiny study end to end: pairing, resuming, refusing, reporting; the arms, the statistics, the image quality."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tsynd

pytest.importorskip("art.attacks.evasion")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy.stats")
pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")


from tsynd.evaluation.image_quality import distribution_distances, memorisation, penultimate_features
from tsynd.study import experiment
from tsynd.study.arms import augmentation_of, parse_arm
from tsynd.study.score_tables import difference_tables, masked_gradients, score_table, to_markdown
from tsynd.study.settings import Cell, StudySettings, Workplace, cells_of
from tsynd.study.statistics import mean_interval, sign_flip_p, smallest_p
from tsynd.study.study_report import write_study
from tsynd.study.summary import difference, measure_of

TINY = StudySettings(
    autoencoder_iterations=4,
    autoencoder_widths=(4, 4),
    latent_channels=2,
    iterations=6,
    batch_size=12,
    samples=4,
    steps=1,
    conditions=("clean", "noise:1", "noise:2", "blur:2"),
    attacks=("pgd:1/255", "pgd:2/255"),
    attack_images=8,
    uncertainty_samples=4,
)
ARMS = ("real", "random", "mutual_information")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tsynd.data.phantom import phantom

    path = tmp_path_factory.mktemp("data") / "cells.npz"
    np.savez(path, **phantom(train=40, val=12, test=24))
    return path


def study(data: Path, folder: Path, arms: tuple[str, ...] = ARMS, **options: Any) -> list[dict[str, Any]]:
    settings = options.pop("settings", TINY)
    chosen = {"train_sizes": [16], "seeds": 2, "workers": 1, "device": "cpu", "progress": False, **options}
    return experiment.experiment(data, folder, arms=arms, settings=settings, **chosen)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report takes longer than a tiny study."""
    monkeypatch.setattr(experiment, "write_study", lambda place, rows, facts: (place.folder / "report.html").touch())


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("study") / "out"
    return folder, study(data, folder)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "training")}
        | {"loss": row["training"]["final_loss"]}
        for row in rows
    ]


def test_every_cell_is_measured(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = finished
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (seed, arm) for seed in (0, 1) for arm in ("mutual_information", "random", "real")
    ]
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    for row in rows:
        assert set(row["scores"]) == {*TINY.conditions, *TINY.attacks}
        assert row["training"]["iterations"] == 6
        assert row["scores"]["pgd:1/255"]["images"] == 8
        assert len(row["uncertainty"]["coverage"]) == len(row["uncertainty"]["selective_accuracy"])
        assert (row["quality"] is None) == (row["arm"] == "real")
        assert (row["training"]["augmentation_share"] > 0) == (row["arm"] != "real")
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_arms_are_paired(data: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Without extra images all arms are one: same subset, first weights, batches, steps and test images."""
    unmixed = StudySettings(**{**vars(TINY), "warmup_fraction": 1.0})
    rows = study(data, tmp_path / "out", ("real", "random", "adversarial"), seeds=1, settings=unmixed)
    assert all(row["scores"] == rows[0]["scores"] for row in rows)
    weights = [
        tsynd.load_model(path).state_dict() for path in (tmp_path / "out/models").glob("classifier-*.safetensors")
    ]
    assert len(weights) == 3
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:])
    # with them they differ, and a study is repeatable
    assert len({str(row["scores"]) for row in finished[1]}) == len(finished[1])
    again = study(data, tmp_path / "again", seeds=1)
    assert comparable(again) == comparable([row for row in finished[1] if row["seed"] == 0])


def test_an_interrupted_study_repeats_no_cell(
    data: Path,
    finished: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_report: None,
) -> None:
    run, done = experiment.run_cell, list[str]()

    def counted(place: Any, one: Cell) -> Any:
        if len(done) == 2 and one.name not in done and not os.environ.get("GO_ON"):
            raise KeyboardInterrupt
        done.append(one.name)
        return run(place, one)

    monkeypatch.setattr(experiment, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        study(data, tmp_path / "out", ("real", "random"))
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 2
    assert not (tmp_path / "out" / "report.html").exists()
    # one finished cell's file is damaged: that one is done again, the other is not
    broken = tmp_path / "out" / "cells" / f"{done[1]}.json"
    broken.write_text(broken.read_text()[:50])
    monkeypatch.setenv("GO_ON", "1")
    rows = study(data, tmp_path / "out", ("real", "random"))
    assert sorted(done) == sorted([*(one.name for one in cells_of([16], 2, ("real", "random"))), broken.stem])
    assert comparable(rows) == comparable([row for row in finished[1] if row["arm"] != "mutual_information"])
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_processes_are_killed_and_the_study_goes_on(
    data: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path, no_report: None
) -> None:
    """Ctrl-C while two processes work: exit code 130, no process left, and finished cells stay."""
    folder = tmp_path / "out"
    numbers = {"iterations": 6, "autoencoder-iterations": 4, "latent-channels": 2, "batch-size": 12, "samples": 4}
    numbers |= {"steps": 1, "workers": 2, "attack-images": 8, "uncertainty-samples": 4, "seeds": 2, "train-size": 16}
    flags = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    flags += ["--autoencoder-widths", "4", "4", "--arms", "real", "random", "--device", "cpu", "--quiet"]
    flags += ["--conditions", *TINY.conditions, "--attacks", *TINY.attacks]
    line = [sys.executable, "-m", "tsynd", "experiment", "--data", str(data), "--output", str(folder), *flags]

    def hear() -> None:  # a test run in a shell's background inherits deafness to Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear)
    deadline = time.monotonic() + 600  # only a starved machine needs it
    while not list(folder.glob("cells/[!.]*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes of the group
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("tsynd: interrupted")
    assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while group_lives(process.pid) and time.monotonic() < deadline:  # the last may still be on its way out
        time.sleep(0.05)
    assert not group_lives(process.pid)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("cells/[!.]*.json")}
    assert kept
    rows = study(data, folder, ("real", "random"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert comparable(rows) == comparable([row for row in finished[1] if row["arm"] != "mutual_information"])


def group_lives(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_study_can_grow_but_not_change(
    data: Path, finished: tuple[Path, list[dict[str, Any]]], no_report: None
) -> None:
    folder, rows = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*")}
    report = (folder / "report.html").read_bytes()
    more = study(data, folder, ("real", "reconstruction"), seeds=1)
    assert [row for row in more if row["arm"] != "reconstruction"] == rows
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    (folder / "cells" / "16-0-reconstruction.json").unlink()  # the other tests know nothing of it
    assert (folder / "report.html").read_bytes() == report
    other = StudySettings(**{**vars(TINY), "radius": 0.7, "iterations": 7})
    with pytest.raises(tsynd.InputError, match=r"other settings \(iterations 6 → 7, radius 0\.5 → 0\.7\)"):
        study(data, folder, settings=other)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_report_holds_the_numbers(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = finished
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert len([link for link in page.links if link.startswith("data:image/png;base64,")]) >= 8 * 4
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    markdown = (folder / "results.md").read_text()
    for arm, title in (("real", "real only"), ("mutual_information", "mutual information")):
        clean = [row["scores"]["clean"]["balanced_accuracy"] for row in rows if row["arm"] == arm]
        half = 12.7062 * np.std(clean, ddof=1) / math.sqrt(2)  # t quantile of one degree of freedom
        text = f"{100 * np.mean(clean):.1f} ± {100 * half:.1f}"
        assert text in page.text
        assert re.search(rf"\| {title} \| 2 \| {re.escape(text)} \|", markdown)
    gain = difference(rows, "mutual_information", "real", [16], "clean")
    assert gain.pairs == 2
    wanted = f"{100 * gain.mean:+.1f}".replace("-", "−").replace("+0.0", "±0.0").replace("−0.0", "±0.0")
    assert any(text.startswith(wanted) for text in page.text)
    for title in (
        "By severity of the shift",
        "By budget of the attack",
        "Selective accuracy",
    ):
        assert title in page.text


@pytest.mark.parametrize(
    ("change", "accuracy", "nll"),
    [(0.0234, "+2.3", "+0.023"), (-0.0234, "−2.3", "−0.023"), (0.0004, "±0.0", "±0.000"), (-0.0004, "±0.0", "±0.000"),
     (0.0006, "+0.1", "+0.001"), (-0.6, "−60.0", "−0.600"), (0.0, "±0.0", "±0.000")],
)  # fmt: skip
def test_a_difference_keeps_its_sign(change: float, accuracy: str, nll: str) -> None:
    rows = []
    for seed, (arm, more) in itertools.product((0, 1), (("real", 0.0), ("random", change))):
        scores = {"balanced_accuracy": 0.7 + more, "nll": 0.9 + more}
        rows.append({"size": 16, "seed": seed, "arm": arm, "scores": {"clean": scores}})
    table = difference_tables(rows)[0]
    line = dict(zip(table.head, table.rows[0], strict=True))
    assert line["Clean"].split(" ± ")[0] == accuracy
    assert line["NLL"].split(" ± ")[0] == nll


def test_shifted_accuracy_weighs_kinds_alike(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    scores = finished[1][0]["scores"]
    noise = (scores["noise:1"]["balanced_accuracy"] + scores["noise:2"]["balanced_accuracy"]) / 2
    wanted = (noise + scores["blur:2"]["balanced_accuracy"]) / 2
    assert measure_of(finished[1][0], "shifts") == pytest.approx(wanted)


@pytest.mark.parametrize(("which", "count"), [("train", 4), ("all", 2)])
def test_autoencoders_are_shared(data: Path, tmp_path: Path, which: str, count: int, no_report: None) -> None:
    """One for a size and a seed, or for a seed, over all arms; none where no arm needs one."""
    settings = StudySettings(**{**vars(TINY), "autoencoder_data": which, "conditions": ("clean",), "attacks": ()})
    rows = study(data, tmp_path / "none", ("adversarial",), train_sizes=[16, 20], settings=settings)
    assert len(rows) == 8
    assert not list((tmp_path / "none/models").glob("autoencoder-*"))
    rows = study(data, tmp_path / "out", ("random", "entropy"), train_sizes=[16, 20], settings=settings)
    assert len(rows) == 12
    assert len(list((tmp_path / "out/models").glob("autoencoder-*.safetensors"))) == count


def test_permutation_test_against_hand_enumeration() -> None:
    for differences in ([0.1, 0.2, -0.05, 0.3], [0.4, 0.1, 0.2, 0.25, 0.3], [-1.0, 2.0, 0.5]):
        observed = abs(sum(differences))
        sums = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        wanted = sum(value >= observed - 1e-12 for value in sums) / len(sums)
        assert sign_flip_p(differences) == pytest.approx(wanted)
    assert sign_flip_p([0.1] * 5) == smallest_p(5) == 0.0625
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([3.0]) == 1
    assert sign_flip_p([0.1] * 20) < 0.001
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2), pytest.approx(4.302653 / math.sqrt(3), rel=1e-5))
    assert math.isnan(mean_interval([1.0])[1])


def test_masked_gradients_are_named(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = json.loads(json.dumps(finished[1]))
    for row in rows:
        row["scores"]["square:2/255"] = {"accuracy": 0.5, "gradient_accuracy": 0.5}
    assert masked_gradients(rows) == []
    for row in rows:
        if row["arm"] == "random":
            row["scores"]["square:2/255"]["accuracy"] = 0.3
    assert masked_gradients(rows) == ["random"]


def test_a_score_that_is_missing_is_a_dash(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = json.loads(json.dumps(finished[1]))
    for row in rows:
        if row["arm"] == "real":
            row["uncertainty"]["error_auroc"] = None
    assert "| – |" in to_markdown(score_table(rows, 16))


PIXEL_ARMS = ["adversarial", "randaugment", "randaugment,ratio=0.5", "adversarial,every=2", "standard,flip=both"]


@pytest.mark.parametrize("arm", PIXEL_ARMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_arms_on_pixels(arm: str, channels: int) -> None:
    torch.manual_seed(0)
    model = tsynd.SmallResNet(channels, 2, widths=(4,)).train()
    images, labels = torch.rand(10, channels, 12, 12), torch.arange(10) % 2
    options = dict(task="multiclass", seed=3, adversarial_budget=4 / 255, adversarial_steps=2)
    augment = augmentation_of(parse_arm(arm), None, {"samples": 4, "ratio": 1.0}, **options)
    state = torch.get_rng_state()
    made, named = augment(model, images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    count = 5 if "ratio" in arm else 10
    assert made.shape == (count, channels, 12, 12)
    assert torch.equal(named, labels[:count])
    assert 0 <= made.min() < made.max() <= 1
    distance = (made - images[:count]).abs().flatten(1).amax(1)
    assert (distance > 0).any()
    if arm.startswith("adversarial"):
        assert distance.max() <= 4 / 255 + 1e-6
    second = augment(model, images, labels)[0]
    if "every" in arm:
        assert len(second) == 0
    else:
        assert not torch.equal(second, made)
        again = augmentation_of(parse_arm(arm), None, {}, **options)
        assert torch.equal(again(model, images, labels)[0][:count], made) or "ratio" in arm


def test_arm_options() -> None:
    arm = parse_arm("mutual_information,radius=0.2:0.8,rule=linf,augmentation_weight=0.5,label_consistency=None")
    assert arm.options[0]["radius"] == (0.2, 0.8)
    assert arm.training == {"augmentation_weight": 0.5}
    autoencoder = tsynd.SmallAutoencoder(widths=(4, 4))
    autoencoder.latent_std.fill_(1.0)
    common = dict(task="multiclass", seed=0, adversarial_budget=0.1, adversarial_steps=1)
    made = augmentation_of(arm, autoencoder, {"radius": 0.5, "steps": 2, "label_consistency": 0.4}, **common)
    assert (made.radius, made.settings.steps, made.settings.label_consistency) == ((0.2, 0.8), 2, None)
    assert made.settings.objective == "mutual_information"
    control = augmentation_of(parse_arm("random"), autoencoder, {"radius": 0.1}, **common)
    assert (control.direction, control.radius) == ("random", (0.1, 0.1))
    assert augmentation_of(parse_arm("real"), None, {}, **common) is None


def test_arms_in_turn() -> None:
    """Steps alternate between the parts, each with its own options; the recipe is such an arm."""
    autoencoder = tsynd.SmallAutoencoder(1, 2, widths=(4, 4)).eval()
    autoencoder.latent_std.fill_(1.0)
    model = tsynd.SmallResNet(1, 2, widths=(4,)).train()
    images, labels = torch.rand(6, 1, 12, 12), torch.arange(6) % 2
    common = dict(task="multiclass", seed=0, adversarial_budget=0.02, adversarial_steps=2)
    arm = parse_arm("trades+reconstruction,trades.weight=2,augmentation_weight=0.5,ratio=0.5")
    assert (arm.kinds, arm.generative, arm.training) == (
        ("trades", "reconstruction"),
        True,
        {"augmentation_weight": 0.5},
    )
    augment = augmentation_of(arm, autoencoder, {"samples": 4, "steps": 1}, **common)
    first, second = augment(model, images, labels), augment(model, images, labels)
    assert (first.loss, first.weight, len(first.images)) == ("consistency", 2.0, 3)
    assert (first.images - images[:3]).abs().max() <= 0.02 + 1e-6
    torch.testing.assert_close(second[0], autoencoder.decode(autoencoder.encode(images[:3])).detach())
    assert parse_arm("trades+entropy,radius=0.3").latent().options[0]["radius"] == 0.3
    assert parse_arm("recipe").generative
    augmentation_of(parse_arm("recipe,flip=both"), autoencoder, {}, **common)
    assert parse_arm("real,iterations=9").training == {"iterations": 9}
    assert parse_arm("trades,budget=3/255").options == ({"budget": 3 / 255},)
    assert parse_arm("real,base=standard:both").training == {"base": ("standard", "both")}
    for bad in (
        "real+entropy",
        "recipe+entropy",
        "entropy+entropy",
        "trades+magic",
        "real,ratio=0.5",
        "trades,radius=1",
        "standard,flip=x",
    ):
        with pytest.raises(tsynd.InputError, match=r"arms|flip"):
            augmentation_of(parse_arm(bad), autoencoder, {}, **common)


def test_an_arms_own_base_is_that_of_the_study(data: Path, tmp_path: Path, no_report: None) -> None:
    own = study(data, tmp_path / "own", ("real", "real,base=standard:both"), settings=TINY)
    all_of_them = study(data, tmp_path / "all", ("real",), settings=replace(TINY, base="standard,flip=both"))
    assert own[1]["scores"] == all_of_them[0]["scores"] != own[0]["scores"]
    with pytest.raises(tsynd.InputError, match="base: got 'trades', wanted"):
        study(data, tmp_path / "bad", ("real,base=trades",), settings=TINY)


def test_a_recipe_written_out_is_the_recipe(data: Path, tmp_path: Path, no_report: None) -> None:
    """Also: what is done to the real images is drawn alike."""
    settings = replace(TINY, samples=8)
    long = "trades+expected_information,steps=1,trades.budget=3/255,base=standard:none"
    rows = study(data, tmp_path / "study", ("real", "recipe", long), settings=settings)
    scores = {row["arm"]: row["scores"] for row in rows}
    assert scores["recipe"] == scores[long] != scores["real"]
    assert all(row["quality"]["images"] for row in rows if row["arm"] != "real")


def test_standard_augmentation_moves_little_and_flips() -> None:
    """A pixel off the centre stays near its place or, flipped, near the mirrored one."""
    spot = torch.zeros(400, 1, 33, 33)
    spot[:, :, 15:18, 24:27] = 1  # nine to the right
    for flip, mirrored in (("none", 0.0), ("horizontal", 0.5)):
        augment = augmentation_of(
            parse_arm(f"standard,flip={flip}"),
            None,
            {},
            task="multiclass",
            seed=0,
            adversarial_budget=1,
            adversarial_steps=1,
        )
        made = augment(torch.nn.Identity(), spot, torch.zeros(400, dtype=torch.int64))[0]
        places = torch.arange(33.0) - 16
        mass = made.sum((1, 2, 3))
        x = (made.sum((1, 2)) * places).sum(1) / mass
        y = (made.sum((1, 3)) * places).sum(1) / mass
        assert float((x < 0).double().mean()) == pytest.approx(mirrored, abs=0.08)
        assert x.abs().min() > 9 / 1.15 - 2.5
        assert x.abs().max() < 9 * 1.15 + 2.5
        assert y.abs().max() < 9 * 1.1 * math.sin(math.radians(10)) + 2.5


@pytest.mark.parametrize(
    "kept",
    [
        ("clean",),
        ("clean", "blur:3"),
        ("clean", "noise:2", "gamma_corr_up:1"),
        ("clean", "noise", "square:4/255"),
        ("clean", "pgd:1/255", "pgd:2/255", "deepfool"),
        ("clean", "square:2/255", "worst:2/255", "medmnist"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_every_odd_subset_has_a_report(
    kept: tuple[str, ...], seeds: int, finished: tuple[Path, list[dict[str, Any]]], data: Path, tmp_path: Path
) -> None:
    """Whatever was measured is shown, and nothing else is asked for."""
    rows = json.loads(json.dumps([row for row in finished[1] if row["seed"] < seeds]))
    for number, row in enumerate(rows):
        base = row["scores"]["clean"]
        row["scores"] = {
            name: {**base, "balanced_accuracy": 0.3 + 0.011 * number} for name in kept if name != "medmnist"
        }
        if "deepfool" in kept:
            row["scores"]["deepfool"]["distance"] = 0.123
        if number == 1:  # one cell lacks everything but the clean images
            row["scores"] = {"clean": row["scores"]["clean"]}
    place = Workplace(str(data), tmp_path, TINY)
    facts = {"data": "cells", "tested": 24, "image_shape": [3, 24, 24], "class_names": ["a", "b"]}
    write_study(place, rows, {**facts, "task": "multiclass", "version": "0"})
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "results.md").read_text()
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {line["condition"] for line in table} == {name for row in rows for name in row["scores"]}
    assert float(table[0]["value"]) == rows[0]["scores"]["clean"]["balanced_accuracy"]
    latex = (tmp_path / "results.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 0
    assert not re.search(r"(?<!\\)[%_]", re.sub(r"^%.*$", "", latex, flags=re.MULTILINE))
    assert (
        re.search(r"\| real training images \| – .* \| \S+ ± \S+ \|", text) if seeds == 2 else "real training" in text
    )
    assert "F1" in text or not any("f1" in row["scores"]["clean"] for row in rows)
    assert ("no difference at one size can reach p = .05" in page) == (seeds < 6)
    for name in kept[1:]:
        title = {
            "blur:3": "blur",
            "noise:2": "noise",
            "gamma_corr_up:1": "gamma corr up",
            "deepfool": "DeepFool distance",
        }
        if name != "medmnist":
            assert title.get(name, name) in text
            assert title.get(name, name) in page


def test_image_quality_against_known_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.rand(6, 1, 8, 8, generator=generator) for _ in range(2))
    made = train.clone()
    made[0] += 0.01
    made[1] = train[2] + 0.02
    result = memorisation(made, train, held_out)
    assert result["nearest"] == pytest.approx(0, abs=1e-6)
    assert result["source_is_nearest"] == pytest.approx(5 / 6)
    by_hand = [min((x - y).square().mean().sqrt() for y in train) for x in held_out]
    assert result["nearest_held_out"] == pytest.approx(float(torch.stack(by_hand).median()), rel=1e-5)
    # Fréchet distance of Gaussians in one direction: (shift / scale)²
    features = torch.randn(400, 5, generator=generator)
    scale = float((features - features.mean(0)).square().mean().sqrt())
    same = distribution_distances(features, features)
    assert same["fid"] == pytest.approx(0, abs=1e-3)
    moved = distribution_distances(features + torch.tensor([2.0, 0, 0, 0, 0]), features)
    assert moved["fid"] == pytest.approx((2 / scale) ** 2, rel=1e-3)
    assert moved["kid"] > same["kid"]
    model = tsynd.SmallResNet(1, 3, widths=(4,)).eval()
    with torch.no_grad():
        logits = model.head(penultimate_features(model, train))
        torch.testing.assert_close(logits, model(train))


def in_process(arguments: list[str | Path]) -> tuple[int, str, str]:
    import contextlib
    import io
    from unittest import mock

    from tsynd import cli

    errors, output = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output)
    with mock.patch.object(sys, "argv", ["tsynd", *map(str, arguments)]), streams[0], streams[1]:
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue(), output.getvalue()
    return 0, errors.getvalue(), output.getvalue()


def test_bad_input_is_refused_before_work(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    base: list[str | Path] = ["experiment", "--quiet", "--data", data, "--output", output, "--train-size"]
    cases: list[tuple[list[str | Path], str]] = [
        ([*base, "9999"], "train_size"),
        ([*base, "16", "1"], "train_size"),
        ([*base, "16", "--seeds", "0"], "seeds"),
        ([*base, "16", "--arms", "real", "magic"], "arms: got 'magic'"),
        ([*base, "16", "--arms", "entropy,speed=3"], "speed=3"),
        ([*base, "16", "--arms", "entropy,radius=far"], "radius"),
        ([*base, "16", "--arms", "entropy,radius=-1"], "radius"),
        ([*base, "16", "--arms", "random,warmup_fraction=2"], "warmup_fraction"),
        ([*base, "16", "--workers", "0"], "workers"),
        ([*base, "16", "--device", "gpu"], "device"),
        ([*base, "16", "--split", "train"], "split"),
        ([*base, "16", "--autoencoder-data", "some"], "autoencoder_data"),
        ([*base, "16", "--iterations", "0"], "iterations"),
        ([*base, "16", "--learning-rate", "nan"], "learning_rate"),
        ([*base, "16", "--dropout-rate", "1"], "dropout_rate"),
        ([*base, "16", "--conditions", "shifts"], "conditions"),
        ([*base, "16", "--conditions", "clean", "fog:1"], "fog:1"),
        ([*base, "16", "--attacks", "pgd:9"], "pgd:9"),
        ([*base, "16", "--adversarial-budget", "0"], "adversarial_budget"),
        (["experiment", "--quiet", "--data", tmp_path / "no.npz", "--output", output, "--train-size", "16"], "no.npz"),
        (["experiment", "--quiet", "--data", data, "--output", data.parent, "--train-size", "16"], "not empty"),
        (["evaluate", "--data", data, "--classifier", tmp_path / "no.safetensors"], "no.json"),
        (["evaluate", "--data", data, "--classifier", tmp_path / "no.safetensors", "--attacks", "cw"], "cw"),
    ]
    for arguments, word in cases:
        code, errors, _ = in_process(arguments)
        assert code == 2, (arguments, errors)
        assert errors.startswith("tsynd: "), errors
        assert len(errors.strip().splitlines()) == 1, errors
        assert word in errors, (word, errors)
        assert not output.exists(), arguments


def test_command_evaluate(data: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """The saved classifier gives the scores that its cell has."""
    folder, rows = finished
    weights, file = folder / "models" / "classifier-16-0-random.safetensors", tmp_path / "scores.json"
    flags = ["--conditions", "clean", "noise:1", "--attacks", "pgd:2/255", "pgd:1/255", "--attack-images", "8"]
    code, errors, output = in_process(
        ["evaluate", "--data", data, "--classifier", weights, *flags, "--device", "cpu", "--json", file]
    )
    assert code == 0, errors
    assert "pgd:2/255" in output
    content = json.loads(file.read_text())
    assert list(content["scores"]) == ["clean", "noise:1", "pgd:2/255", "pgd:1/255"]
    for name, scores in content["scores"].items():
        row = next(row for row in rows if row["arm"] == "random" and row["seed"] == 0)
        wanted = {
            key: value for key, value in row["scores"][name].items() if value is not None and key[:9] != "conformal"
        }
        assert {key: scores[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def test_multilabel_study(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 24), ("val", 8), ("test", 16)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        arrays[f"{split}_labels"] = generator.integers(0, 2, (count, 3), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", **arrays)
    settings = StudySettings(**{**vars(TINY), "attacks": ("pgd:2/255",)})
    rows = study(tmp_path / "many.npz", tmp_path / "out", ("entropy", "adversarial"), seeds=1, settings=settings)
    assert {row["arm"] for row in rows} == {"real", "entropy", "adversarial"}
    assert all(row["scores"]["clean"]["nll"] > 0 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "multilabel" in page
    assert "entropy" in page
