"""The command ``tsynd evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import ClassMap, Data, Device, Options, Reading, refuse, takes_options
from tsynd.data.dataset import LabelledImages
from tsynd.data.external import load_test, parse_class_map
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation import evaluate as evaluation
from tsynd.evaluation.attacks import check_robustness, parse_attacks
from tsynd.models.checkpoint import ModelCard, load_model, read_card
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


@dataclass(frozen=True)
class _Tested:
    """What is tested.

    Attributes:
        split: ``train``, val, test, or all (of data from elsewhere).
        seed: of the shifts, the attacks and the posterior samples.
        samples: T, posterior samples, at least 1.
    """

    split: str = "test"
    seed: int = 0
    samples: int = 32


@takes_options
def evaluate(
    context: typer.Context,
    data: Data,
    classifier: Annotated[Path, typer.Option(help="classifier.safetensors of a run or a study.")],
    attacked: Annotated[dict[str, Any], Options(StudySettings, tuple(_ATTACKED), "Test", _ATTACKED)],
    what: Annotated[dict[str, Any], Options(_Tested, ("split", "seed", "samples"))],
    reading: Reading,
    conditions: Annotated[list[str], typer.Option(help=_CONDITIONS, rich_help_panel="Test")] = ["clean", "shifts"],  # noqa: B006
    attacks: Annotated[list[str] | None, typer.Option(help=_ATTACKS, rich_help_panel="Test")] = None,
    metrics: Annotated[list[str] | None, typer.Option(help=_METRICS, rich_help_panel="Test")] = None,
    class_map: ClassMap = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")] = None,
) -> None:
    """Test a saved classifier on clean, disturbed and attacked images, and test its uncertainty."""
    split, seed, samples = what["split"], what["seed"], what["samples"]
    evaluation.choose_conditions(conditions)
    chosen = parse_attacks(attacks or [])
    check_robustness(chosen)
    if not chosen:
        refuse(context, _ATTACKED, "without --attacks")
    check_choice("split", split, ("train", "val", "test", "all"))
    if json_file is not None:
        check_writable(json_file)
    network, card = load_model(classifier), read_card(classifier)
    tested, name, task, names = _tested(data, card, split, class_map, ReadOptions(**reading), seed)
    own = {text.partition(":")[2]: call_of(text, "metrics") for text in metrics or []}
    scores = evaluation.evaluate(
        network,
        tested,
        task=task,
        conditions=conditions,
        attacks=attacks or [],
        attack_images=attacked["attack_images"] or None,
        query_images=attacked["query_images"] or None,
        queries=attacked["queries"],
        seed=seed,
        device=device,
        metrics=own,
    )
    trust = evaluation.evaluate_uncertainty(network, tested, task=task, samples=samples, seed=seed, device=device)
    _print_scores(scores, trust, len(tested), [*own], names)
    if json_file is not None:
        facts = {"tsynd": __version__, "data": name, "split": split, "images": len(tested), "seed": seed}
        content = plain({**facts, "scores": scores, "uncertainty": trust})
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _tested(
    data: str, card: ModelCard, split: str, class_map: list[str] | None, reading: ReadOptions, seed: int
) -> tuple[LabelledImages, str, str, Sequence[str]]:
    """What is tested on, its name, task and the names of its classes."""
    if split == "all" or class_map:
        if card.class_names is None:
            raise InputError("classifier: its file names no classes, wanted one that does for --split all, --class-map")
        task, known = card.task or "multiclass", parse_class_map(class_map or [])
        options: dict[str, Any] = {"image_shape": card.image_shape, "reading": reading}
        images = load_test(data, card.class_names, task=task, class_map=known, split=split, **options)
        return images, Path(data).stem, task, card.class_names
    source = load_data(data, seed=seed, **reading.given())
    if card.class_names is not None and tuple(card.class_names) != source.class_names:
        raise InputError(
            f"classifier: was trained for {', '.join(card.class_names)}, but the data have "
            f"{', '.join(source.class_names)}; --class-map {source.class_names[0]}=... says which is which"
        )
    return getattr(source, split), source.name, source.task, source.class_names


def _print_scores(
    scores: dict[str, dict[str, float]], trust: dict[str, Any], count: int, own: list[str], names: Sequence[str]
) -> None:
    console = Console()
    table = Table("images", "number", "balanced accuracy", "accuracy", "AUROC", "ECE", "NLL", *own)
    for name, row in scores.items():
        numbers = [row.get(key) for key in ("balanced_accuracy", "accuracy", "auroc", "ece", "nll", *own)]
        texts = ["–" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(name, str(row.get("images", count)), *texts)
    console.print(table)
    first, row = next(iter(scores.items()))
    recalls = [f"{name} {row[f'recall:{k}']:.3f}" for k, name in enumerate(names) if f"recall:{k}" in row]
    console.print(
        f"{first}: F1 {row['f1']:.3f}, average precision {row['average_precision']:.3f}, sensitivity at 90 % "
        f"specificity {row['sensitivity_at_90']:.3f}; recall of {', '.join(recalls)}"
    )
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
