"""The report of a run: one HTML file that holds everything, and the picture for the README."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tsynd.report.page import write_page
from tsynd.report.pictures import COLUMNS, check_counts, difference_scale, inline_png, nats, spread, strip, views
from tsynd.report.plots import curves, histogram
from tsynd.report.verdict import ARMS, Interval, elsewhere, points, range_text, verdict
from tsynd.synthesis.result import SynthesisResult
from tsynd.utils.errors import InputError

__all__ = ["POOR", "STYLE", "write_report"]

_MEASURES = {"mutual_information": ("mutual information", "MI"), "entropy": ("predictive entropy", "entropy")}
_SCORES = {"balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "auroc": "AUROC"}
_STATUS = {
    "raised": "reached a higher uncertainty",
    "unchanged": "stayed at the reconstruction because no step raised the uncertainty",
    "non_finite": "stopped at a value or gradient that was not finite",
    "label_limit": "stopped where the source label would have become too improbable",
}

POOR = 0.05
"""Share of a class's variance that an autoencoder may miss before its targets are said to be of little use."""

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
.strip img.flipped { outline: 3px solid var(--down); outline-offset: -1px; } .strip img { cursor: zoom-in; }
.strip img:focus { position: fixed; inset: 0; margin: auto; z-index: 9; cursor: zoom-out; width: min(94vw, 94vh);
  height: min(94vw, 94vh); background: var(--page); }
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
.scores tbody th, .up, .down { font-weight: 600; } .wide { overflow-x: auto; margin: 0 0 1rem; }
.wide figcaption b { color: var(--ink); font-size: 1rem; } .wide { overflow-wrap: normal; }
.wide th:first-child { min-width: 9rem; }
td small { display: block; color: var(--soft); font-weight: 400; white-space: nowrap; }
pre { white-space: pre-wrap; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem; }
.up { color: var(--up); } .down { color: var(--down); }
ul { margin: .5rem 0; padding-left: 1.2rem; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
details td, details th { text-align: left; font-size: .9rem; width: 33%; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } .strip { grid-template-columns: 1fr 1fr; } }
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
    judged: Tensor | None = None,
) -> Path:
    """Write one self-contained HTML file, whole or not at all; it loads nothing and needs no script.

    Args:
        path: of the file.
        metrics: what :func:`tsynd.jobs.run.run` measured; ``synthesis`` is needed;
            without ``comparison`` no score is shown.
        result: the synthesis, N images.
        sources: [N, C, H, W] in [0, 1], the real images; three channels are shown as RGB, else the first as grey.
            Volumes [N, C, D, H, W] are shown in orthogonal slices, see ``tsynd.report.pictures.views``.
        reconstructions: of the same shape.
        class_names: of the labels.
        fresh_before: [N], uncertainty of the reconstructions under samples that were not climbed on, in nats.
        fresh_after: [N], the same of the targeted images.
        judged: [N, C], probabilities that a classifier which was not climbed on gives the targeted images.

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
    name = str(metrics.get("data", {}).get("name", "the data"))
    verdicts = _verdicts(judged, result.labels, class_names)
    examples = (
        _example(texts[i], [x[i] for x in stages], limit, (i, before[i], after[i], short), verdicts[i]) for i in chosen
    )
    flipped = (
        " Below the targeted image: what a classifier that was not climbed on takes it for, and how surely; a red "
        "frame where that is not its label any more."
    ) * (judged is not None)
    colours = ", mean over channels" if stages[0].shape[1] == 3 else ""
    shown = (
        f'<p class="soft">Spread over the classes and, within a class, from small to large gain; not picked for looks; '
        f"numbered as in synthetic.npz. Below reconstruction and targeted: their {html.escape(measure)} in nats, under "
        f"fresh posterior samples{_scale(metrics, short)}.{flipped}{_volume_note(stages[0])} Select a "
        f"picture to enlarge it.</p>"
        f'<p class="soft scale">Difference, targeted − reconstruction: <span>−{limit:.2f}<i></i>+{limit:.2f}</span> of '
        f'the intensity range{colours}</p><div class="pair">{"".join(examples)}</div>'
    )
    others = metrics.get("elsewhere", {})
    plots = histogram(before, after, short), curves(result.trajectory.detach().cpu(), short)
    write_page(
        path,
        title=f"tsynd: {name}",
        heading=f"Do extra images help on {name}?",
        style=STYLE,
        facts=_facts(metrics),
        lead=[*verdict(metrics["comparison"]), *elsewhere(others)] if "comparison" in metrics else [],
        sections=[
            *([("Scores on test images", _scores(metrics))] if "comparison" in metrics else []),
            *([("The same classifiers elsewhere", _elsewhere(metrics))] if others else []),
            ("What to do now", _next(path.absolute().parent.name, class_names)),
            ("Examples", shown),
            ("Do the pictures still show their class?", _pictures(metrics)),
            ("Uncertainty", f'<div class="pair">{"".join(plots)}</div>{_status_list(metrics["synthesis"])}'),
            ("How to read this", _READING.format(meaning=_meaning(short))),
        ],
        details=("Settings, times and machine", _details(metrics)),
    )
    return path


_READING = """<p>The classifier is run many times with different random parts switched off (posterior samples by
dropout). {meaning} The ascent moves an image's latent code to where this number is higher, within a small ball around
its start, and decodes it: the targeted image. It should differ from the reconstruction in what the classifier is unsure
of; what the autoencoder loses shows between source and reconstruction. The histogram and the numbers under the examples
use fresh samples, so they do not flatter the ascent; the curves show the samples that it climbed on. That the
uncertainty rose says that the ascent works, not that training gained by it: only the scores above say that.
<em>Noise</em>: grain of a twentieth of the intensity range is added. <em>Rotation</em>: each picture is turned by up to
15°. Targeted images are made to train on, not to diagnose from.</p>"""


_NEXT = """<p>For pictures without labels, a table of each one's class, probability and uncertainty:</p>
<pre>tsynd predict --classifier {run}/classifier.safetensors --data FOLDER --output predictions.csv</pre>
<p>In Python, the same, and the targeted images as PNG in a folder for each class:</p>
<pre>import tsynd
from tsynd.synthesis.result import load_result

model = tsynd.load_model("{run}/classifier.safetensors")
print(tsynd.predict(model, tsynd.load_data("images.npz").test).probabilities)
load_result("{run}/synthetic.npz").save("targeted", {names})</pre>"""


def _next(run: str, names: Sequence[str]) -> str:
    return _NEXT.format(run=html.escape(run), names=html.escape(repr(tuple(map(str, names)))))


def _scale(metrics: dict[str, Any], short: str) -> str:
    """What the measure could be at most."""
    data = metrics.get("data", {})
    if data.get("task") != "multiclass" or not data.get("class_names"):
        return ""
    return f" (0 to {math.log(len(data['class_names'])):.2f}, the logarithm of the number of classes)"


def _verdicts(
    judged: Tensor | None, labels: Tensor | None, names: Sequence[str]
) -> list[tuple[str, bool]] | dict[int, tuple[str, bool]]:
    """For each image what it is taken for, and whether that is another class than its label."""
    if judged is None or labels is None:
        return defaultdict(lambda: ("", False))
    if labels.dim() == 1:
        best, sure = judged.argmax(1), judged.amax(1)
        return [
            (f"{names[int(k)]} {100 * p:.0f} %", int(k) != int(label))
            for k, p, label in zip(best, sure, labels, strict=True)
        ]
    found = []
    for chances, label in zip(judged, labels > 0.5, strict=True):
        seen = ", ".join(names[int(k)] for k in (chances > 0.5).nonzero()[:, 0]) or "no finding"
        found.append((seen, bool(((chances > 0.5) != label).any())))
    return found


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


def _facts(metrics: dict[str, Any]) -> list[str]:
    data = metrics.get("data", {})
    facts = [f"{data[key]} {key} images" for key in ("train", "test") if key in data]
    facts += ["×".join(map(str, data["image_shape"]))] if "image_shape" in data else []
    facts += [str(data["task"])] if "task" in data else []
    facts += [f"{len(data['class_names'])} classes"] if "class_names" in data else []
    facts += [f"tsynd {metrics['version']}"] if "version" in metrics else []
    return facts


def _scores(metrics: dict[str, Any]) -> str:
    """A table for each condition: every classifier's scores with intervals and their change against real only."""
    comparison, data = metrics["comparison"], metrics.get("data", {})
    read = "<br>".join(html.escape(str(line)) for line in data.get("summary", ()))
    counts = ", ".join(f"{n} of {html.escape(str(name))}" for name, n in data.get("test_counts", {}).items())
    drawn = f"the {comparison['groups']} patients" if comparison.get("groups") else "the test images"
    note = (
        f'<p class="soft">Test images: {counts or comparison["images"]}. In percent, with 95 % intervals by bootstrap '
        f"over {drawn}; changes are of the last classifier less the other, in percentage points, over the same "
        "draws. Bold and coloured where an interval leaves out 0. Intervals say what other test images would change, "
        "not what another training would: this is one run with one seed.</p>"
    )
    conditions = next(iter(comparison["scores"].values()))
    tables = "".join(_condition_table(condition, comparison) for condition in conditions)
    command = metrics.get("study_command")
    settle = (
        ""
        if command is None
        else f"<p>What would settle it, with six seeds and all controls:</p><pre>{html.escape(command)}</pre>"
    )
    return f'<p class="soft">{read}</p>{note}{tables}{settle}'


def _cells(comparison: dict[str, Any], name: str, condition: str, key: str) -> str:
    """A classifier's score with its interval, and the last one's change to it."""
    value = Interval(*comparison["scores"][name][condition][key])
    cell = f"<td>{_percent(value.value)} <small>{_percent(value.low)}–{_percent(value.high)}</small></td>"
    if name not in comparison["changes"]:
        return cell + "<td></td>"
    change, sure = Interval(*comparison["changes"][name][condition][key]), comparison["fewest"] >= comparison["least"]
    mark = ("up" if change.value > 0 else "down") if sure and change.clear else "plain"
    text = f"{points(change.value)} <small>{range_text(change)}</small>" if math.isfinite(change.value) else "–"
    return f'{cell}<td class="{mark}">{text}</td>'


def _condition_table(condition: str, comparison: dict[str, Any]) -> str:
    head = "".join(f'<th scope="col">{title}</th><th scope="col">change to it</th>' for title in _SCORES.values())
    rows = []
    for name in comparison["scores"]:
        cells = f'<th scope="row">{html.escape(ARMS.get(name, name))}</th>'
        cells += "".join(_cells(comparison, name, condition, key) for key in _SCORES)
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<figure class="card wide"><figcaption><b>{html.escape(condition.capitalize())}</b></figcaption>'
        f'<table class="scores"><thead><tr><th scope="col">Trained with</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></figure>"
    )


def _elsewhere(metrics: dict[str, Any]) -> str:
    """One table: the classifiers' balanced accuracy on their own test images and on every other set."""
    own = metrics["comparison"]
    sets = {"its own test images": own} | {name: other["comparison"] for name, other in metrics["elsewhere"].items()}
    head = "".join(
        f'<th scope="col">{html.escape(name)}, {one["images"]} images</th><th scope="col">change to it</th>'
        for name, one in sets.items()
    )
    rows = "".join(
        f'<tr><th scope="row">{html.escape(ARMS.get(name, name))}</th>'
        + "".join(_cells(one, name, "clean", "balanced_accuracy") for one in sets.values())
        + "</tr>"
        for name in own["scores"]
    )
    counts = "; ".join(
        f"{name}: " + ", ".join(f"{count} of {label}" for label, count in other["test_counts"].items())
        for name, other in metrics["elsewhere"].items()
    )
    return (
        f'<p class="soft">Balanced accuracy on clean images, over the classes that occur there, with intervals as '
        f"above. {html.escape(counts)}. Where it falls from the first column to another, the classifier does not "
        f'carry over to that place.</p><figure class="card wide"><table class="scores"><thead><tr>'
        f'<th scope="col">Trained with</th>{head}</tr></thead><tbody>{rows}</tbody></table></figure>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if math.isfinite(share) else "–"


def _pictures(metrics: dict[str, Any]) -> str:
    """Labels that a classifier which was not climbed on still sees, and how well each class is reconstructed."""
    made, texts = metrics["synthesis"], []
    if "label_kept" in made:
        texts.append(
            f"A classifier that was not climbed on takes {_percent(made['label_kept'])} % of the targeted images for "
            f"their label, and {_percent(made['label_kept_reconstruction'])} % of the reconstructions that they "
            "started from. Where the first is much smaller, the labels of the targeted images are in doubt."
        )
    missed = metrics.get("reconstruction", {}).get("by_class", {})
    poor = [str(name) for name, share in missed.items() if not share <= POOR]
    if missed:
        each = ", ".join(f"{_percent(share)} % of {name}" for name, share in missed.items())
        texts.append(f"Of the variance of the pictures, the autoencoder's reconstructions miss: {each}.")
    warning = ""
    if poor:
        warning = (
            f'<p class="down">This autoencoder does not yet reproduce your pictures of {html.escape(", ".join(poor))}: '
            "its targets will hardly help there. Train it longer (--autoencoder-iterations) or on more images "
            "(--autoencoder-data all).</p>"
        )
    return warning + "".join(f"<p>{html.escape(text)}</p>" for text in texts)


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
    head = (
        f"<p>Mean uncertainty of the {made['images']} images under fresh samples: {nats(made['uncertainty_before'])} → "
        f"{nats(made['uncertainty_after'])} nats, higher for {_percent(made['raised_fraction'])} % of them. Judged by "
        "the samples climbed on:</p>"
    )
    return f'{head}<ul>{items}</ul><p class="soft">{rate.strip()}</p>'


def _details(metrics: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        (part, key, f"{value} s" if part == "seconds" else value)
        for part in ("data", "settings", "seconds", "machine")
        for key, value in metrics.get(part, {}).items()
        if (part, key) != ("data", "summary")
    ]


def _example(
    label: str, stages: list[Tensor], limit: float, about: tuple[int, Tensor, Tensor, str], taken: tuple[str, bool]
) -> str:
    index, before, after, short = about
    notes = (f"image {index}", f"{short} {nats(before)}", f"{short} {nats(after)}", "")
    label, strips, shown = html.escape(label), "", views(stages)
    for number, (title, pictures) in enumerate(shown):
        cells, last = "", number == len(shown) - 1
        for name, note, pixels in zip(COLUMNS, notes, strip(pictures, limit), strict=True):
            targeted = name == "targeted"
            kinds = " ".join(["small"] * (max(pixels.shape) < 128) + ["flipped"] * (targeted and taken[1]))
            kind = f' class="{kinds}"' if kinds else ""
            alt = f"{name} of image {index} ({label})" + (f", {title}" if title else "")
            alt += f", {note} nats" if name in COLUMNS[1:3] else ""
            cells += f'<div><img{kind} tabindex="0" src="{inline_png(pixels)}" alt="{alt}">'
            said = f"<span>{html.escape(taken[0])}</span>" if targeted and taken[0] else ""
            cells += f'<div class="cap">{name}<span>{note}</span>{said}</div></div>' if last else "</div>"
        strips += f'<div class="plane">{title}</div>' if title else ""
        strips += f'<div class="strip">{cells}</div>'
    return f'<div class="example"><b>{label}</b>{strips}</div>'
