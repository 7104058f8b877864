"""The command ``tsynd evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import Data, Device, Options, Reading, Split, refuse, takes_options
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation import evaluate as evaluation
from tsynd.evaluation.attacks import check_robustness, parse_attacks
from tsynd.models.checkpoint import load_model, read_card
from tsynd.study.cell import plain
from tsynd.study.settings import StudySettings
from tsynd.utils.atomic import atomic_path, check_writable
from tsynd.utils.calls import call_of
from tsynd.utils.errors import InputError, check_choice
from tsynd.utils.version import __version__

__all__ = ["evaluate"]

_CONDITIONS = "clean, noise (σ = 0.05), rotation (±15°), shifts, medmnist_c, one, as blur:3, or MODULE:FUNCTION."
_ATTACKS = "fgsm, pgd, apgd, square, deepfool, one budget of the range [0, 1], as pgd:2/255, or MODULE:FUNCTION."
_METRICS = "MODULE:FUNCTION, (probabilities [N, K], labels) → number, beside the scores."

_ATTACKED = {"attack_images": 256, "query_images": 64, "queries": 100}


@takes_options
def evaluate(
    context: typer.Context,
    data: Data,
    classifier: Annotated[Path, typer.Option(help="classifier.safetensors of a run or a study.")],
    attacked: Annotated[dict[str, Any], Options(StudySettings, tuple(_ATTACKED), "Test", _ATTACKED)],
    reading: Reading,
    conditions: Annotated[list[str], typer.Option(help=_CONDITIONS, rich_help_panel="Test")] = ["clean", "shifts"],  # noqa: B006
    attacks: Annotated[list[str] | None, typer.Option(help=_ATTACKS, rich_help_panel="Test")] = None,
    metrics: Annotated[list[str] | None, typer.Option(help=_METRICS, rich_help_panel="Test")] = None,
    samples: Annotated[int, typer.Option(help="T, posterior samples, at least 1.")] = 32,
    split: Split = "test",
    seed: Annotated[int, typer.Option(help="Of the shifts, the attacks and the posterior samples.")] = 0,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")] = None,
) -> None:
    """Test a saved classifier on clean, disturbed and attacked images, and test its uncertainty."""
    evaluation.choose_conditions(conditions)
    chosen = parse_attacks(attacks or [])
    check_robustness(chosen)
    if not chosen:
        refuse(context, _ATTACKED, "without --attacks")
    check_choice("split", split, ("train", "val", "test"))
    if json_file is not None:
        check_writable(json_file)
    network, names = load_model(classifier), read_card(classifier).class_names
    source = load_data(data, seed=seed, **ReadOptions(**reading).given())
    if names is not None and tuple(names) != source.class_names:
        raise InputError(
            f"classifier: was trained for {', '.join(names)}, but the data have {', '.join(source.class_names)}"
        )
    tested = getattr(source, split)
    own = {text.partition(":")[2]: call_of(text, "metrics") for text in metrics or []}
    scores = evaluation.evaluate(
        network,
        tested,
        task=source.task,
        conditions=conditions,
        attacks=attacks or [],
        attack_images=attacked["attack_images"] or None,
        query_images=attacked["query_images"] or None,
        queries=attacked["queries"],
        seed=seed,
        device=device,
        metrics=own,
    )
    trust = evaluation.evaluate_uncertainty(
        network, tested, task=source.task, samples=samples, seed=seed, device=device
    )
    _print_scores(scores, trust, len(tested), [*own])
    if json_file is not None:
        facts = {"tsynd": __version__, "data": source.name, "split": split, "images": len(tested), "seed": seed}
        content = plain({**facts, "scores": scores, "uncertainty": trust})
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _print_scores(scores: dict[str, dict[str, float]], trust: dict[str, Any], count: int, own: list[str]) -> None:
    console = Console()
    table = Table("images", "number", "balanced accuracy", "accuracy", "AUROC", "ECE", "NLL", *own)
    for name, row in scores.items():
        numbers = [row.get(key) for key in ("balanced_accuracy", "accuracy", "auroc", "ece", "nll", *own)]
        texts = ["–" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(name, str(row.get("images", count)), *texts)
    console.print(table)
    console.print(
        f"mutual information finds the {trust['error_rate']:.1%} wrong predictions with an AUROC of "
        f"{trust['error_auroc']:.3f}; without the less certain half the accuracy is "
        f"{trust['selective_accuracy'][trust['coverage'].index(0.5)]:.3f}"
    )
    for name, row in scores.items():
        if row["accuracy"] < row.get("gradient_accuracy", 0.0) - 0.02:
            console.print(
                f"{name}: accuracy {row['accuracy']:.3f} without gradients, {row['gradient_accuracy']:.3f} under PGD "
                "on the same images: the gradients may be masked"
            )
