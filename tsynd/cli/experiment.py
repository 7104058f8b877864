"""The commands ``tsynd evaluate`` and ``tsynd experiment``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tsynd.cli.options import Consistency, Data, Device, Masks, Quiet, Radius, Samples, Steps, takes_reading
from tsynd.data.readers.options import ReadOptions
from tsynd.study.settings import DEFAULT_ARMS, StudySettings
from tsynd.utils.errors import InputError
from tsynd.utils.version import __version__

__all__ = ["LISTS", "evaluate", "experiment"]

LISTS = ("--train-size", "--arms", "--conditions", "--attacks")
"""Options that take several values behind one flag."""

_S = StudySettings()
_CONDITIONS = "clean, noise (σ = 0.05), rotation (±15°), shifts (all kinds and severities), or one, as blur:3."
_ATTACKS = "fgsm, pgd, square, or one budget of the range [0, 1], as pgd:2/255."


@takes_reading
def evaluate(
    data: Data,
    reading: ReadOptions,
    classifier: Annotated[Path, typer.Option(help="classifier.safetensors of a run or a study.")],
    conditions: Annotated[list[str], typer.Option(help=_CONDITIONS)] = list(_S.conditions),  # noqa: B006
    attacks: Annotated[list[str] | None, typer.Option(help=_ATTACKS)] = None,
    attack_images: Annotated[int, typer.Option(help="Images that FGSM and PGD attack; 0 is all.")] = 256,
    query_images: Annotated[int, typer.Option(help="How many of these Square attacks; 0 is all.")] = 64,
    samples: Samples = 32,
    split: Annotated[str, typer.Option(help="Which images: train, val or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the shifts, the attacks and the posterior samples.")] = 0,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")] = None,
) -> None:
    """Test a saved classifier on clean, disturbed and attacked images, and test its uncertainty."""
    from tsynd.data.load import load_data
    from tsynd.evaluation import evaluate as evaluation
    from tsynd.evaluation.attacks import check_robustness, parse_attacks
    from tsynd.models.checkpoint import load_model, read_card
    from tsynd.utils.atomic import atomic_path, check_writable

    evaluation.choose_conditions(conditions)
    if parse_attacks(attacks or []):
        check_robustness()
    if split not in ("train", "val", "test"):
        raise InputError(f"split: got {split!r}, wanted train, val or test")
    if json_file is not None:
        check_writable(json_file)
    network, names = load_model(classifier), read_card(classifier).class_names
    source = load_data(data, seed=seed, **reading.given())
    if names is not None and tuple(names) != source.class_names:
        raise InputError(
            f"classifier: was trained for {', '.join(names)}, but the data have {', '.join(source.class_names)}"
        )
    tested = getattr(source, split)
    scores = evaluation.evaluate(
        network,
        tested,
        task=source.task,
        conditions=conditions,
        attacks=attacks or [],
        attack_images=attack_images or None,
        query_images=query_images or None,
        seed=seed,
        device=device,
    )
    trust = evaluation.evaluate_uncertainty(
        network, tested, task=source.task, samples=samples, seed=seed, device=device
    )
    _print_scores(scores, trust, len(tested))
    if json_file is not None:
        from tsynd.study.cell import plain

        facts = {"tsynd": __version__, "data": source.name, "split": split, "images": len(tested), "seed": seed}
        content = plain({**facts, "scores": scores, "uncertainty": trust})
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _print_scores(scores: dict[str, dict[str, float]], trust: dict[str, Any], count: int) -> None:
    console = Console()
    table = Table("images", "number", "balanced accuracy", "accuracy", "AUROC", "ECE", "NLL")
    for name, row in scores.items():
        numbers = [row[key] for key in ("balanced_accuracy", "accuracy", "auroc", "ece", "nll")]
        table.add_row(name, str(row.get("images", count)), *(f"{number:.3f}" for number in numbers))
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


@takes_reading
def experiment(
    data: Data,
    reading: ReadOptions,
    output: Annotated[Path, typer.Option(help="New or empty folder, or that of the same study.")],
    train_size: Annotated[list[int], typer.Option(help="Labelled training images, one or more sizes.")],
    seeds: Annotated[int, typer.Option(help="How many; they are 0, 1, ...")] = 5,
    arms: Annotated[
        list[str],
        typer.Option(
            help="real, reconstruction, random, entropy, mutual_information, loss, adversarial, randaugment; with own"
            " options as mutual_information,radius=1.0,typicality=0.1."
        ),
    ] = list(DEFAULT_ARMS),  # noqa: B006
    workers: Annotated[int | None, typer.Option(help="Processes; one per core on a CPU, one on a GPU.")] = None,
    device: Device = None,
    split: Annotated[str, typer.Option(help="What is scored: test, or val to choose settings on.")] = _S.split,
    autoencoder_data: Annotated[
        str, typer.Option(help="train (the labelled subset) or all (every training image, unlabelled).")
    ] = _S.autoencoder_data,
    autoencoder_iterations: Annotated[
        int, typer.Option(help="Optimiser steps of the autoencoder.")
    ] = _S.autoencoder_iterations,
    autoencoder_widths: Annotated[
        tuple[int, int], typer.Option(help="Channels at half and at a quarter of the resolution.")
    ] = _S.autoencoder_widths,
    latent_channels: Annotated[int, typer.Option(help="Channels of the latents.")] = _S.latent_channels,
    iterations: Annotated[int, typer.Option(help="Optimiser steps of every classifier.")] = _S.iterations,
    batch_size: Annotated[int, typer.Option(help="Real images per step.")] = _S.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Of the classifiers.")] = _S.learning_rate,
    dropout: Annotated[str, typer.Option(help="head (before the last layer) or stages (everywhere).")] = _S.dropout,
    dropout_rate: Annotated[float, typer.Option(help="Before the last layer.")] = _S.dropout_rate,
    augmentation_weight: Annotated[
        float, typer.Option(help="Weight of the extra images' loss.")
    ] = _S.augmentation_weight,
    warmup_fraction: Annotated[
        float, typer.Option(help="Part of the steps without extra images.")
    ] = _S.warmup_fraction,
    samples: Samples = _S.samples,
    masks: Masks = _S.masks,
    steps: Steps = _S.steps,
    radius: Radius = _S.radius,
    step_size: Annotated[float | None, typer.Option(help="Of the ascent; 2.5 · radius / steps.")] = _S.step_size,
    rule: Annotated[str, typer.Option(help="l2 (a ball) or linf (a box).")] = _S.rule,
    label_consistency: Consistency = _S.label_consistency,
    ratio: Annotated[float, typer.Option(help="Extra images per real image.")] = _S.ratio,
    every: Annotated[int, typer.Option(help="Extra images at every n-th step.")] = _S.every,
    typicality: Annotated[float, typer.Option(help="Weight of the penalty on implausible latents.")] = _S.typicality,
    adversarial_budget: Annotated[
        float, typer.Option(help="Of the adversarial arm's training, in the range [0, 1].")
    ] = _S.adversarial_budget,
    adversarial_steps: Annotated[int, typer.Option(help="PGD steps of the adversarial arm.")] = _S.adversarial_steps,
    conditions: Annotated[list[str], typer.Option(help=_CONDITIONS)] = list(_S.conditions),  # noqa: B006
    attacks: Annotated[list[str], typer.Option(help=_ATTACKS + " 'none' for none.")] = list(_S.attacks),  # noqa: B006
    attack_images: Annotated[int, typer.Option(help="Images that FGSM and PGD attack; 0 is all.")] = _S.attack_images
    or 0,
    query_images: Annotated[int, typer.Option(help="How many of these Square attacks; 0 is all.")] = _S.query_images
    or 0,
    uncertainty_samples: Annotated[
        int, typer.Option(help="Posterior samples of the measured uncertainty.")
    ] = _S.uncertainty_samples,
    quiet: Quiet = False,
) -> None:
    """Train and test all arms with paired seeds and equal steps, and report whether targeting helped."""
    from tsynd.study import experiment as study

    settings = StudySettings(
        autoencoder_data=autoencoder_data,
        autoencoder_iterations=autoencoder_iterations,
        autoencoder_widths=autoencoder_widths,
        latent_channels=latent_channels,
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        dropout_rate=dropout_rate,
        augmentation_weight=augmentation_weight,
        warmup_fraction=warmup_fraction,
        samples=samples,
        masks=masks,
        steps=steps,
        radius=radius,
        step_size=step_size,
        rule=rule,
        label_consistency=label_consistency,
        ratio=ratio,
        every=every,
        typicality=typicality,
        adversarial_budget=adversarial_budget,
        adversarial_steps=adversarial_steps,
        split=split,
        conditions=tuple(conditions),
        attacks=() if attacks == ["none"] else tuple(attacks),
        attack_images=attack_images or None,
        query_images=query_images or None,
        uncertainty_samples=uncertainty_samples,
        reading=reading,
    )
    rows = study.experiment(
        data, output, train_size, seeds, arms, settings, workers=workers, device=device, progress=not quiet
    )
    _print_study(rows, output)


def _print_study(rows: list[dict[str, Any]], output: Path) -> None:
    from tsynd.study.score_tables import difference_tables, score_table
    from tsynd.study.summary import sizes_of

    console = Console()
    for table in [*(score_table(rows, size, brief=True) for size in sizes_of(rows)), *difference_tables(rows)]:
        shown = Table(*(text.replace("\u00ad", "") for text in table.head), title=table.title)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
