"""Giving away what a run made: its synthetic images, or its classifier, each with a card of where it comes from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tsynd.models.checkpoint import read_card
from tsynd.report.verdict import ARMS, verdict
from tsynd.synthesis.publish import push_folder
from tsynd.synthesis.result import load_result
from tsynd.utils.errors import InputError, check_choice, require

__all__ = ["push"]


def push(run: str | Path, repo: str, what: str = "images", *, private: bool = True, token: str | None = None) -> str:
    """Put a finished run's images or classifier on the Hugging Face hub, with a card made of its metrics.

    Real images stay where they are: the report, the latents and the autoencoder are not sent.

    Args:
        run: folder of a finished ``tsynd run``.
        repo: ``USER/NAME``, made where it is not there.
        what: ``images`` (a data set) or ``classifier`` (a model).
        private: for a repository that is made.
        token: of the hub; None takes the one that is logged in.

    Returns:
        Its address.

    Raises:
        InputError: no finished run, or the hub refuses it.
    """
    check_choice("what", what, ("images", "classifier"))
    folder = Path(run).expanduser()
    try:
        facts = json.loads((folder / "metrics.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"run: {folder} holds no finished run ({error}), wanted the output of tsynd run") from None
    require("huggingface_hub", "huggingface")
    if what == "images":
        names = facts["data"]["class_names"]
        result = load_result(folder / "synthetic.npz")
        return result.push_to_hub(repo, names, facts=facts, private=private, token=token)
    with tempfile.TemporaryDirectory() as name:
        for ending in ("safetensors", "json"):
            shutil.copy(folder / f"classifier.{ending}", name)
        (Path(name) / "README.md").write_text(_model_card(folder, repo, facts), encoding="utf-8")
        return push_folder(Path(name), repo, "model", private=private, token=token)


def _model_card(folder: Path, repo: str, facts: dict[str, Any]) -> str:
    hub, card, data = require("huggingface_hub", "huggingface"), read_card(folder / "classifier"), facts["data"]
    tags = ["medical", "trained-on-synthetic-images", "tsynd"]
    head = hub.ModelCardData(library_name="tsynd", pipeline_tag="image-classification", tags=tags).to_yaml()
    rows = []
    for name, conditions in facts["comparison"]["scores"].items():
        for condition, scores in conditions.items():
            value, low, high = (100 * number for number in scores["balanced_accuracy"])
            rows.append(f"| {ARMS.get(name, name)} | {condition} | {value:.1f} | {low:.1f} to {high:.1f} |")
    counts = ", ".join(f"{name} {count}" for name, count in data["test_counts"].items())
    settings = [f"| {name} | {value} |" for name, value in facts["settings"].items() if value is not None]
    return f"""---
{head}
---

# A classifier of {data["name"]}

For {", ".join(card.class_names or [])}; images of {" × ".join(map(str, card.image_shape or []))} (channels first).
Trained on {data["train"]} real images and on **synthetic** ones made of them.

```python
import tsynd
from huggingface_hub import snapshot_download

model = tsynd.load_model(snapshot_download("{repo}") + "/classifier.safetensors")
```

## What can be told

{" ".join(verdict(facts["comparison"]))}

Balanced accuracy in percent on {data["test"]} test images ({counts}), with 95 % intervals over them:

| trained with | test images | balanced accuracy | interval |
|---|---|---|---|
{chr(10).join(rows)}

## Limits

- No medical device: it was tested on the images above alone, of one training with one seed.
- Images of another place, device or mix of patients may get other answers (`tsynd evaluate --split all`).

## How it was made

With tsynd {facts["version"]}.

| setting | value |
|---|---|
{chr(10).join(settings)}
"""
