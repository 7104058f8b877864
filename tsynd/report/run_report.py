"""The report of a run: one HTML file that holds everything, and the picture for the README."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tsynd.report.pictures import COLUMNS, check_counts, difference_scale, inline_png, nats, spread, strip, views
from tsynd.report.plots import curves, histogram
from tsynd.synthesis.result import SynthesisResult
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError

__all__ = ["STYLE", "write_report"]

_MEASURES = {"mutual_information": ("mutual information", "MI"), "entropy": ("predictive entropy", "entropy")}
_SCORES = {"balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "auroc": "AUROC"}
_STATUS = {
    "raised": "reached a higher uncertainty",
    "unchanged": "stayed at the reconstruction because no step raised the uncertainty",
    "non_finite": "stopped at a value or gradient that was not finite",
    "label_limit": "stopped where the source label would have become too improbable",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #566473; --line: #dde3e9; --card: #fff; --page: #f4f6f8;
  --up: #17693f; --down: #a8321f; --before: #6b7c8f; --after: #c8441b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #a3b0bd; --line: #33404d; --card: #1b232c;
  --page: #11171d; --up: #63cc95; --down: #ff9280; --before: #93a5b8; --after: #ff8a5c; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --card: #fff; --page: #fff;
  --up: #17693f; --down: #a8321f; --before: #6b7c8f; --after: #c8441b; }
  .card, .example, tr { break-inside: avoid; } h2 { break-after: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 2.2rem 1.25rem 3.5rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.3rem 0 .5rem; }
p { margin: .5rem 0 .9rem; } .lead { font-size: 1.1rem; margin-top: .9rem; }
.soft, figcaption, .cap { color: var(--soft); font-size: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .pair > * { min-width: 0; }
.pair figcaption b { display: block; color: var(--ink); font-size: 1rem; }
.pair svg { display: block; width: 100%; height: auto; margin-top: .5rem; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .75rem; }
.example b { display: block; font-size: .92rem; margin-bottom: .35rem; }
.strip { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .4rem; text-align: center; }
.strip img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  border: 1px solid var(--line); border-radius: 4px; background: #8884; }
.strip img.small { image-rendering: pixelated; }
.strip .cap { font-size: clamp(.62rem, 1.5vw, .74rem); line-height: 1.35; margin-top: .25rem; white-space: nowrap; }
.strip .cap span { display: block; color: var(--ink); font-variant-numeric: tabular-nums; }
.plane { color: var(--soft); font-size: .74rem; margin: .45rem 0 .2rem; }
.scale { margin: 0 0 .9rem; } .scale span { white-space: nowrap; font-variant-numeric: tabular-nums; }
.scale i { display: inline-block; margin: 0 .5rem; vertical-align: -.05rem; width: 8rem; height: .7rem;
  border: 1px solid var(--line); border-radius: 3px; background: linear-gradient(90deg, #2166ac, #fff, #b2182b); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .45rem; border-bottom: 1px solid var(--line); font-weight: 400; }
th:first-child, td:first-child { text-align: left; } tbody tr:last-child > * { border-bottom: 0; }
thead th { font-size: .85rem; color: var(--soft); } thead tr:first-child th { color: var(--ink); font-weight: 600; }
.scores th[scope=colgroup] { text-align: center; } .scores tr > .first { padding-left: 1.3rem; }
.scores tbody th, .up, .down, .same { font-weight: 600; } .up { color: var(--up); } .down { color: var(--down); }
ul { margin: .5rem 0; padding-left: 1.2rem; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
details td, details th { text-align: left; font-size: .9rem; width: 33%; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
"""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    result: SynthesisResult,
    sources: Tensor,
    reconstructions: Tensor,
    class_names: Sequence[str],
    fresh_before: Tensor,
    fresh_after: Tensor,
) -> Path:
    """Write one self-contained HTML file, whole or not at all; it loads nothing and needs no script.

    Args:
        path: of the file.
        metrics: what :func:`tsynd.jobs.run.run` measured; ``synthesis`` and ``evaluation`` are needed.
        result: the synthesis, N images.
        sources: [N, C, H, W] in [0, 1], the real images; three channels are shown as RGB, else the first as grey.
            Volumes [N, C, D, H, W] are shown in orthogonal slices, see ``tsynd.report.pictures.views``.
        reconstructions: of the same shape.
        class_names: of the labels.
        fresh_before: [N], uncertainty of the reconstructions under samples that were not climbed on, in nats.
        fresh_after: [N], the same of the targeted images.

    Returns:
        The path of the file.

    Raises:
        InputError: sizes that do not belong together, or the folder cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    path, before, after = Path(path), fresh_before.detach().cpu(), fresh_after.detach().cpu()
    stages = [x.detach().cpu() for x in (sources, reconstructions, result.images)]
    texts = _label_texts(result.labels, class_names, len(result))
    check_counts(len(result), sources=stages[0], reconstructions=stages[1], fresh_before=before, fresh_after=after)
    chosen = spread(result.labels, after - before, 12)
    limit = difference_scale(stages[2][chosen] - stages[1][chosen])
    objective = str(metrics.get("settings", {}).get("objective", "mutual_information"))
    measure, short = _MEASURES.get(objective, (objective, objective))
    name = html.escape(str(metrics.get("data", {}).get("name", "the data")))
    examples = (_example(i, [x[i] for x in stages], limit, texts[i], before[i], after[i], short) for i in chosen)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>tsynd: {name}</title><style>{STYLE}</style></head><body>
<h1>Targeted images for {name}</h1>
<p class="soft">{_facts(metrics)}</p>
<p class="soft">{"<br>".join(map(html.escape, metrics.get("data", {}).get("summary", ())))}</p>
<p class="lead">{_summary(metrics)}</p>
<h2>Examples</h2>
<p class="soft">Spread over the classes and, within a class, from small to large gain; not picked for looks. Below
reconstruction and targeted: their {measure} in nats, under fresh posterior samples.{_volume_note(stages[0])}</p>
<p class="soft scale">Difference, targeted − reconstruction: <span>−{limit:.2f}<i></i>+{limit:.2f}</span>
of the intensity range{", mean over channels" if stages[0].shape[1] == 3 else ""}</p>
<div class="pair">{"".join(examples)}</div>
<h2>Uncertainty</h2>
<div class="pair">{histogram(before, after, short)}{curves(result.trajectory.detach().cpu(), short)}</div>
<h2>Accuracy on test images</h2>
<p class="soft">In percent; change in percentage points. <em>Real</em>: trained on the real images alone.
<em>Targeted</em>: trained on real and targeted images.</p>
<div class="card">{_score_table(metrics["evaluation"])}</div>
{_lost(metrics)}
<h2>How the ascents ended</h2>
{_status_list(metrics["synthesis"])}
<h2>How to read this</h2>
<p>The classifier is run many times with different random parts switched off (posterior samples by dropout).
{_meaning(short)}
The ascent moves an image's latent code to where this number is higher, within a small ball around its start, and
decodes it: the targeted image. It should differ from the reconstruction in what the classifier is unsure of; what the
autoencoder loses shows between source and reconstruction. The histogram and the numbers under the examples use
fresh samples, so they do not flatter the ascent; the curves show the samples that it climbed on.</p>
<h2>Limits</h2>
<p>{_limits(metrics)}</p>
{_details(metrics)}
</body></html>
"""
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return path


def _volume_note(sources: Tensor) -> str:
    if sources.ndim == 4:
        return ""
    return (
        " Each volume is cut in three planes through the place where targeted and reconstruction differ most. The "
        "planes are named for axes in DICOM's directions, and voxels are drawn as cubes."
    )


def _label_texts(labels: Tensor | None, names: Sequence[str], count: int) -> list[str]:
    if labels is None:
        return ["no label"] * count
    wanted = int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]
    if len(names) < wanted:
        raise InputError(f"class_names: got {len(names)}, wanted {wanted} or more")
    if labels.dim() == 1:
        return [str(names[int(label)]) for label in labels]
    return [", ".join(str(names[int(i)]) for i in row.nonzero()[:, 0]) or "no finding" for row in labels > 0.5]


def _signed(share: float) -> str:
    """Percentage points with their sign; ±0.0 for what rounds to nothing."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "±0.0" if text[1:] == "0.0" else text


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _facts(metrics: dict[str, Any]) -> str:
    data = metrics.get("data", {})
    facts = [f"{data[key]} {key} images" for key in ("train", "test") if key in data]
    facts += ["×".join(map(str, data["image_shape"]))] if "image_shape" in data else []
    facts += [str(data["task"])] if "task" in data else []
    facts += [f"{len(data['class_names'])} classes"] if "class_names" in data else []
    facts += [f"tsynd {metrics['version']}"] if "version" in metrics else []
    return " · ".join(html.escape(fact) for fact in facts)


def _summary(metrics: dict[str, Any]) -> str:
    """One sentence on what happened; a loss is named as plainly as a gain."""
    made, scores = metrics["synthesis"], metrics["evaluation"]
    before, after = made["uncertainty_before"], made["uncertainty_after"]
    changes = []
    for condition, real in scores["real"].items():
        change = scores["targeted"][condition]["balanced_accuracy"] - real["balanced_accuracy"]
        text, where = _signed(change), f"on {html.escape(condition)}"
        verb = {"+": "gained", "−": "lost"}.get(text[0])
        if not math.isfinite(change):
            changes.append(f"could not be measured {where}")
        else:
            changes.append(f"{verb} {text[1:]} points {where}" if verb else f"changed nothing {where}")
    return (
        f"{made['images']} images were moved towards where the classifier is unsure, which "
        f"{'raised' if after > before else 'did not raise'} their mean uncertainty (from {nats(before)} to "
        f"{nats(after)} nats; higher for {100 * made['raised_fraction']:.1f} % of them), and training with such "
        f"images {_join(changes)} (balanced accuracy on test images)."
    )


def _lost(metrics: dict[str, Any]) -> str:
    """What the autoencoder loses of each class, beside the gain: a blurred picture teaches little."""
    parts = metrics.get("reconstruction", {}).get("by_class", {})
    if not parts:
        return ""
    text = _join([f"{100 * share:.0f} % of {html.escape(str(name))}" for name, share in parts.items()])
    return f'<p class="soft">Of the variance of the pictures, reconstructions miss {text}.</p>'


def _limits(metrics: dict[str, Any]) -> str:
    text = "This is one run with a single seed; how much another would change is not measured. "
    tests = metrics.get("data", {}).get("test")
    accuracies = [row["accuracy"] for row in metrics["evaluation"]["real"].values() if math.isfinite(row["accuracy"])]
    if tests and accuracies:
        share, z2 = accuracies[0], 1.96**2
        half = math.sqrt(z2 * share * (1 - share) / tests + (z2 / tests) ** 2 / 4) / (1 + z2 / tests)  # Wilson
        text += (
            f"With {tests} test images, an accuracy of {100 * share:.1f} % has a binomial 95 % half-width of "
            f"{100 * half:.1f} percentage points: differences of about that size or less are within noise, and "
            "balanced accuracy is noisier still where a class is rare. "
        )
    return text + "Targeted images are made to train on, not to diagnose from."


def _meaning(short: str) -> str:
    if short == "MI":
        return (
            "Mutual information (MI, in nats) says how much these runs disagree about an image: high where the "
            "classifier lacks examples, low where the image itself is ambiguous but all runs agree that it is."
        )
    return f"Their uncertainty ({html.escape(short)}, in nats) is high where their mean prediction is undecided."


def _status_list(made: dict[str, Any]) -> str:
    counts = {name: n for name, n in made.get("status", {}).items() if n}
    items = "".join(f"<li>{n} {html.escape(_STATUS.get(name, name))}</li>" for name, n in counts.items())
    speed = made.get("images_per_second")
    rate = "" if speed is None else f" Synthesis made {speed:.3g} images per second."
    head = f"<p>Of {made['images']} images, judged by the samples climbed on:</p>"
    return f'{head}<ul>{items}</ul><p class="soft">{rate.strip()}</p>'


def _score_table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    head = "".join(f'<th class="first" colspan="3" scope="colgroup">{title}</th>' for title in _SCORES.values())
    columns = '<th class="first" scope="col">real</th><th scope="col">targeted</th><th scope="col">change</th>' * 3
    rows = []
    for condition, real in scores["real"].items():
        cells = f'<th scope="row">{html.escape(condition)}</th>'
        for key in _SCORES:
            a, b = (
                f"{100 * x:.1f}" if math.isfinite(x) else "–" for x in (real[key], scores["targeted"][condition][key])
            )
            change = scores["targeted"][condition][key] - real[key]
            text = _signed(change) if math.isfinite(change) else "–"
            mark = {"+": "up", "−": "down"}.get(text[0], "same")
            cells += f'<td class="first">{a}</td><td>{b}</td><td class="{mark}">{text}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<table class="scores"><thead><tr><th scope="col" rowspan="2">Test images</th>{head}</tr><tr>{columns}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _details(metrics: dict[str, Any]) -> str:
    cells = [
        (part, key, f"{value} s" if part == "seconds" else value)
        for part in ("data", "settings", "seconds", "machine")
        for key, value in metrics.get(part, {}).items()
        if (part, key) != ("data", "summary")
    ]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells)
    table = f'<div class="card"><table>{rows}</table></div>'
    return f"<details><summary>Settings, times and machine</summary>{table}</details>"


def _example(
    index: int, stages: list[Tensor], limit: float, label: str, before: Tensor, after: Tensor, short: str
) -> str:
    notes = ("", f"{short} {nats(before)}", f"{short} {nats(after)}", "")
    label, strips, shown = html.escape(label), "", views(stages)
    for number, (title, pictures) in enumerate(shown):
        cells, last = "", number == len(shown) - 1
        for name, note, pixels in zip(COLUMNS, notes, strip(pictures, limit), strict=True):
            kind = ' class="small"' if max(pixels.shape) < 128 else ""
            alt = f"{name} of image {index} ({label})" + (f", {title}" if title else "")
            alt += f", {note} nats" if note else ""
            cells += f'<div><img{kind} src="{inline_png(pixels)}" alt="{alt}">'
            cells += f'<div class="cap">{name}<span>{note}</span></div></div>' if last else "</div>"
        strips += f'<div class="plane">{title}</div>' if title else ""
        strips += f'<div class="strip">{cells}</div>'
    return f'<div class="example"><b>{label}</b>{strips}</div>'
