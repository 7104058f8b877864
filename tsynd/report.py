"""The report of a run: one HTML file that holds everything, and the picture for the README."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.data import atomic_path
from tsynd.errors import InputError, require
from tsynd.synthesis import SynthesisResult

__all__ = ["draw_examples", "write_report"]

_COLUMNS = ("source", "reconstruction", "targeted", "difference")
_MEASURES = {"mutual_information": ("mutual information", "MI"), "entropy": ("predictive entropy", "entropy")}
_SCORES = {"balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "auroc": "AUROC"}
_STATUS = {
    "raised": "reached a higher uncertainty",
    "unchanged": "stayed at the reconstruction because no step raised the uncertainty",
    "non_finite": "stopped at a value or gradient that was not finite",
    "label_limit": "stopped where the source label would have become too improbable",
}
_RED, _BLUE = (178.0, 24.0, 43.0), (33.0, 102.0, 172.0)
# stand-ins that matplotlib draws with and the page replaces, so that plots follow its light or dark scheme
_INK, _SOFT, _BEFORE, _AFTER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _BEFORE: "var(--before)", _AFTER: "var(--after)"}

_STYLE = """
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
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: .45rem; text-align: center; }
.strip img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; background: #8884; }
.strip img.small { image-rendering: pixelated; }
.strip .cap { font-size: .74rem; line-height: 1.35; margin-top: .25rem; white-space: nowrap; }
.strip .cap span { display: block; color: var(--ink); font-variant-numeric: tabular-nums; }
.scale { display: flex; align-items: center; gap: .6rem; margin: 0 0 .9rem; font-variant-numeric: tabular-nums; }
.scale i { width: 9rem; height: .7rem; border: 1px solid var(--line); border-radius: 3px;
  background: linear-gradient(90deg, #2166ac, #fff, #b2182b); }
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
        metrics: what :func:`tsynd.pipeline.run` measured; ``synthesis`` and ``evaluation`` are needed.
        result: the synthesis, N images.
        sources: [N, C, H, W] in [0, 1], the real images; three channels are shown as RGB, else the first as grey.
        reconstructions: [N, C, H, W] in [0, 1].
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
    _check(len(result), sources=stages[0], reconstructions=stages[1], fresh_before=before, fresh_after=after)
    chosen = _spread(result.labels, after - before, 12)
    limit = _scale(stages[2][chosen] - stages[1][chosen])
    objective = str(metrics.get("settings", {}).get("objective", "mutual_information"))
    measure, short = _MEASURES.get(objective, (objective, objective))
    name = html.escape(str(metrics.get("data", {}).get("name", "the data")))
    examples = (_example(i, [x[i] for x in stages], limit, texts[i], before[i], after[i], short) for i in chosen)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>tsynd: {name}</title><style>{_STYLE}</style></head><body>
<h1>Targeted images for {name}</h1>
<p class="soft">{_facts(metrics)}</p>
<p class="lead">{_summary(metrics)}</p>
<h2>Examples</h2>
<p class="soft">Spread over the classes and, within a class, from small to large gain; not picked for looks. Below
reconstruction and targeted: their {measure} in nats, under fresh posterior samples.</p>
<p class="soft scale">Difference, targeted − reconstruction: <span>−{limit:.2f}</span><i></i><span>+{limit:.2f}</span>
of the intensity range{", mean over channels" if stages[0].shape[1] == 3 else ""}</p>
<div class="pair">{"".join(examples)}</div>
<h2>Uncertainty</h2>
<div class="pair">{_histogram(before, after, short)}{_curves(result.trajectory.detach().cpu(), short)}</div>
<h2>Accuracy on test images</h2>
<p class="soft">In percent; change in percentage points. <em>Real</em>: trained on the real images alone.
<em>Targeted</em>: trained on real and targeted images.</p>
<div class="card">{_score_table(metrics["evaluation"])}</div>
<h2>How the ascents ended</h2>
{_status_list(metrics["synthesis"])}
<h2>How to read this</h2>
<p>The classifier is run many times with different random parts switched off (posterior samples by dropout). {_meaning(short)}
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


def draw_examples(
    path: Path,
    sources: Tensor,
    reconstructions: Tensor,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    labels: Sequence[str],
    count: int = 4,
) -> Path:
    """Draw one row per image, with the report's four columns, as PNG.

    Args:
        path: of the PNG.
        sources: [n, C, H, W] in [0, 1].
        reconstructions: [n, C, H, W].
        images: [n, C, H, W], targeted.
        before: [n], uncertainty of the reconstructions in nats.
        after: [n], of the targeted images.
        labels: n texts.
        count: rows; of more images, these are spread over the gain from small to large.

    Returns:
        The path of the picture.

    Raises:
        InputError: sizes that do not belong together, or the folder cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    stages = [x.detach().cpu() for x in (sources, reconstructions, images)]
    _check(len(labels), sources=stages[0], reconstructions=stages[1], images=stages[2], before=before, after=after)
    rows = list(range(len(labels))) if len(labels) <= count else _spread(None, (after - before).cpu(), count)
    limit = _scale(stages[2][rows] - stages[1][rows])
    figure = require("matplotlib.figure", "cli").Figure(figsize=(7.2, 1.86 * len(rows) + 0.35), facecolor="white")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        notes = ("", f"{_nats(before[row])} nats", f"{_nats(after[row])} nats", "")
        for axis, picture, note in zip(line, _pictures([x[row] for x in stages], limit), notes, strict=True):
            axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(note, fontsize=9, color="#444444", labelpad=3)
            axis.spines[:].set_color("#cccccc")
        line[0].set_ylabel(_plain(labels[row]), fontsize=10, labelpad=6)
    for axis, title in zip(axes[0], (*_COLUMNS[:3], f"difference (±{limit:.2f})"), strict=True):
        axis.set_title(title, fontsize=10, fontweight="bold", color="#222222")
    figure.tight_layout(pad=0.5, h_pad=0.6, w_pad=0.6)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return Path(path)


def _check(count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if len(tensor) != count or count == 0:
            raise InputError(f"{name}: {len(tensor)} rows for {count} images, wanted as many and at least one")


def _label_texts(labels: Tensor | None, names: Sequence[str], count: int) -> list[str]:
    if labels is None:
        return ["no label"] * count
    wanted = int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]
    if len(names) < wanted:
        raise InputError(f"class_names: got {len(names)}, wanted {wanted} or more")
    if labels.dim() == 1:
        return [str(names[int(label)]) for label in labels]
    return [", ".join(str(names[int(i)]) for i in row.nonzero()[:, 0]) or "no finding" for row in labels > 0.5]


def _spread(labels: Tensor | None, gain: Tensor, count: int) -> list[int]:
    """``count`` indices, even over the classes (multilabel: the first positive label) and over each one's gains."""
    if labels is None:
        classes = torch.zeros(len(gain))
    else:
        classes = labels.cpu() if labels.dim() == 1 else torch.where(labels.any(1), labels.argmax(1), -1).cpu()
    groups = [(classes == c).nonzero()[:, 0] for c in torch.unique(classes)]
    if len(groups) > count:
        groups = [groups[int(i)] for i in np.linspace(0, len(groups) - 1, count)]
    shares = [0] * len(groups)
    while sum(shares) < min(count, sum(map(len, groups))):
        open_ = [g for g in range(len(groups)) if shares[g] < len(groups[g])]
        shares[min(open_, key=lambda g: shares[g])] += 1
    chosen = []
    for number, (members, share) in enumerate(zip(groups, shares, strict=True)):
        order = members[gain[members].argsort()]
        start = (number + 0.5) / len(groups)  # classes with one example each still differ in gain
        chosen += [int(order[int((k + start) / share * len(order))]) for k in range(share)]
    return chosen


def _nats(value: Any) -> str:
    x = float(value)
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.001 or not math.isfinite(x) else f"{x:.1e}"


def _signed(share: float) -> str:
    """Percentage points with their sign; ±0.0 for what rounds to nothing."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "±0.0" if text[1:] == "0.0" else text


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, cut to fit beside a picture."""
    return (text if len(text) <= 22 else text[:21] + "…").replace("$", r"\$")


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
    groups: dict[str, list[str]] = {"improved": [], "worsened": [], "did not change": []}
    for condition, real in scores["real"].items():
        change = scores["targeted"][condition]["balanced_accuracy"] - real["balanced_accuracy"]
        text = _signed(change)
        verb = {"+": "improved", "−": "worsened"}.get(text[0], "did not change")
        if math.isfinite(change):
            groups[verb].append(f"on {html.escape(condition)}" + (f" ({text} points)" if change else ""))
    changes = "; it ".join(f"{verb} {_join(parts)}" for verb, parts in groups.items() if parts)
    return (
        f"{made['images']} images were moved towards where the classifier is unsure, which "
        f"{'raised' if after > before else 'did not raise'} their mean uncertainty (from {_nats(before)} to "
        f"{_nats(after)} nats; higher for {100 * made['raised_fraction']:.0f} % of them), and with such images in "
        f"training, balanced accuracy on the test images {changes or 'could not be measured'}."
    )


def _limits(metrics: dict[str, Any]) -> str:
    text = "This is one run with a single seed; another one moves the training itself. "
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
    return f'<p>Of {made["images"]} images, judged by the samples climbed on:</p><ul>{items}</ul><p class="soft">{rate}</p>'


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
    ]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<details><summary>Settings, times and machine</summary><div class="card"><table>{rows}</table></div></details>'


def _scale(difference: Tensor) -> float:
    """Symmetric limit of the difference's colours: the 99.5 % quantile, so that one pixel does not pale all others."""
    values = difference.mean(1).abs().flatten().nan_to_num().numpy()
    return max(float(np.quantile(values, 0.995)), 0.01)


def _pictures(stages: Iterable[Tensor], limit: float) -> list[np.ndarray[Any, Any]]:
    """Source, reconstruction, targeted and the difference of the last two, white at 0, as uint8 [H, W, 3]."""
    source, start, end = ((x if len(x) == 3 else x[:1].expand(3, -1, -1)).permute(1, 2, 0) for x in stages)
    x = ((end - start).mean(2) / limit).clamp(-1, 1).nan_to_num()[..., None]
    difference = 1 + (torch.where(x > 0, torch.tensor(_RED), torch.tensor(_BLUE)) / 255 - 1) * x.abs()
    return [(y.clamp(0, 1) * 255).round().byte().numpy() for y in (source, start, end, difference)]


def _example(
    index: int, stages: list[Tensor], limit: float, label: str, before: Tensor, after: Tensor, short: str
) -> str:
    notes = ("", f"{short} {_nats(before)}", f"{short} {_nats(after)}", "")
    label, cells = html.escape(label), ""
    for name, note, pixels in zip(_COLUMNS, notes, _pictures(stages, limit), strict=True):
        buffer = io.BytesIO()
        require("PIL.Image", "cli").fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
        kind = ' class="small"' if max(pixels.shape) < 128 else ""
        alt = f"{name} of image {index} ({label})" + (f", {note} nats" if note else "")
        data = base64.b64encode(buffer.getvalue()).decode()
        cells += f'<div><img{kind} src="data:image/png;base64,{data}" alt="{alt}">'
        cells += f'<div class="cap">{name}<span>{note}</span></div></div>'
    return f'<div class="example"><b>{label}</b><div class="strip">{cells}</div></div>'


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "cli").Figure(figsize=(4.8, 3.2))
    axis = figure.subplots()
    axis.set_xlabel(x, fontsize=10, color=_INK)
    axis.set_ylabel(y, fontsize=10, color=_INK)
    axis.tick_params(which="both", labelsize=9, color=_SOFT, labelcolor=_SOFT)
    axis.spines[:].set_color(_SOFT)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Any, axis: Any, key: str, title: str, caption: str, alt: str) -> str:
    """A figure as inline SVG: the page's colours, ids of its own, no metadata or name spaces."""
    axis.legend(fontsize=9, frameon=False, labelcolor=_INK)
    figure.tight_layout(pad=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(alt)}">', text)
    ids: dict[str, int] = {}
    text = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda m: f"{m[1]}{key}{ids.setdefault(m[2], len(ids))}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return f'<figure class="card"><figcaption><b>{title}</b>{caption}</figcaption>{text}</figure>'


def _wide(values: np.ndarray[Any, Any]) -> bool:
    """Whether a logarithmic axis shows these better."""
    positive = values[values > 0]
    return len(positive) > 0.5 * values.size and bool(np.quantile(positive, 0.95) > 30 * np.quantile(positive, 0.05))


def _histogram(before: Tensor, after: Tensor, short: str) -> str:
    figure, axis = _axes(f"{short} [nats]", "images")
    kinds = [x[x.isfinite()].double().numpy() for x in (before, after)]
    both = np.concatenate([*kinds, np.zeros(0 if any(map(len, kinds)) else 1)])
    low, high, caption = float(both.min()), float(both.max()), ""
    if _wide(both):
        low = max(float(both[both > 0].min()), high * 1e-6)
        bins = np.geomspace(low, high, 31)
        axis.set_xscale("log")
        smaller = int((both < low).sum())
        caption = f" Logarithmic axis{f'; {smaller} smaller values stand in the first bin' if smaller else ''}."
    else:
        bins = np.linspace(low, high if high > low else low + 1e-3, 31)
    styles = ((_BEFORE, 0.45, "reconstruction"), (_AFTER, 0.35, "targeted"))
    for values, (colour, alpha, name) in zip(kinds, styles, strict=True):
        counts, _ = np.histogram(values.clip(bins[0], bins[-1]), bins)
        axis.stairs(counts, bins, fill=True, color=colour, alpha=alpha, label=name)
        axis.stairs(counts, bins, color=colour, linewidth=1.3)
    medians = [_nats(np.median(values)) if len(values) else "unknown" for values in kinds]
    alt = f"Histogram of uncertainty: median {medians[0]} nats of reconstructions, {medians[1]} of targeted images"
    caption = f"Fresh samples. Median {medians[0]} → {medians[1]} nats.{caption}"
    return _svg(figure, axis, "h", "Before and after", caption, alt)


def _curves(trajectory: Tensor, short: str) -> str:
    figure, axis = _axes("step", f"{short} [nats]")
    values = trajectory[trajectory.isfinite().all(1)].double().numpy()
    dropped = len(trajectory) - len(values)
    caption, alt = "Samples climbed on; thin lines are single images.", "Uncertainty by ascent step"
    if dropped:
        caption += f" {dropped} with a value that is not finite left out."
    if len(values):
        steps = np.arange(values.shape[1])
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        order = values[:, -1].argsort()
        for row in values[order[np.unique(np.linspace(0, len(values) - 1, 10).astype(int))]]:
            axis.plot(steps, row, color=_SOFT, linewidth=0.7, alpha=0.6)
        axis.fill_between(steps, low, high, color=_AFTER, alpha=0.2, linewidth=0, label="10–90 %")
        axis.plot(steps, median, color=_AFTER, linewidth=2, label="median")
        axis.set_xticks(steps[:: -(-len(steps) // 11)])
        if _wide(np.stack([low, high])):
            axis.set_yscale("log")
        alt += f": median from {_nats(median[0])} to {_nats(median[-1])} nats"
    return _svg(figure, axis, "c", "Along the ascent", caption, alt)
