"""What goes with synthetic images that are given away: Croissant metadata, a card, and the way to the hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsynd.data.formats import save_class_folders, to_uint8
from tsynd.utils.atomic import atomic_path, save_npz
from tsynd.utils.errors import InputError, require
from tsynd.utils.fingerprint import hash_file
from tsynd.utils.version import __version__

__all__ = ["dataset_card", "push_folder", "push_images", "write_croissant"]

SYNTHETIC = (
    "These images are synthetic: each was made of a real image by an autoencoder, moved to where a classifier is "
    "unsure, and bears the real image's label. They are for training, not for diagnosis."
)
LIMITS = (
    "A label is that of the source: how many images still show it is said above where it was measured.",
    "Each image lies close to a real one and may show what was in it. Whoever may not see the sources should not be "
    "given these without a check of what they give away; ask whether the sources' licence and consent allow it.",
    "They have the biases of their sources, and those of the classifier that they were made against.",
    "That uncertainty rose says that the ascent worked, not that training on them helps.",
)

_TERMS = (
    "citeAs column conformsTo=dct:conformsTo containedIn equivalentProperty extract field fileProperty fileObject "
    "fileSet format includes isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated "
    "replace samplingRate separator source subField transform"
)


def _context() -> dict[str, Any]:
    pairs = (term.partition("=") for term in _TERMS.split())
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "dct": "http://purl.org/dc/terms/",
        "prov": "http://www.w3.org/ns/prov#",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "sc": "https://schema.org/",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        **{term: other or f"cr:{term}" for term, _, other in pairs},
    }


def write_croissant(path: Path, result: Any, class_names: Sequence[str] | None = None) -> Path:
    """Describe a saved set in Croissant 1.1, as ``NAME.croissant.json`` beside an .npz, ``croissant.json`` in a folder.

    Args:
        path: of the saved set.
        result: what it holds, a :class:`tsynd.SynthesisResult`.
        class_names: of its labels.

    Returns:
        The path of the description.
    """
    folder = path.is_dir()
    shape = "×".join(map(str, result.images.shape[1:]))
    names = "" if class_names is None else f" Classes: {', '.join(class_names)}."
    content: dict[str, Any] = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": path.stem,
        "description": f"{len(result)} synthetic images of {shape}.{names} {SYNTHETIC}",
        "keywords": ["synthetic", "medical imaging", "targeted synthetic data generation"],
        "version": "1.0.0",
        "citeAs": "Niemeijer et al. 2024, TSynD: Targeted Synthetic Data Generation, arXiv 2406.17473",
        "isLiveDataset": False,
        "prov:wasGeneratedBy": {"@type": "prov:Activity", "name": f"tsynd {__version__}"},
        "rai:dataCollection": SYNTHETIC,
        "rai:dataLimitations": " ".join(LIMITS),
        "distribution": [_images_of(path) if folder else _file_of(path)],
    }
    if folder:
        content["recordSet"] = [_records()]
    target = path / "croissant.json" if folder else path.with_name(f"{path.stem}.croissant.json")
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def _file_of(path: Path) -> dict[str, Any]:
    about = "uint8 images, labels and, where there are any, class_names, as in MedMNIST; latents and uncertainties"
    return {
        "@type": "cr:FileObject",
        "@id": "images",
        "name": path.name,
        "description": f"NumPy arrays: {about}.",
        "contentUrl": path.name,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": "application/x-npz",
        "sha256": hash_file(path),
    }


def _images_of(path: Path) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "description": "One PNG an image, in the folder of its class.",
        "encodingFormat": "image/png",
        "includes": "**/*.png" if (path / "images").is_dir() else "*/*.png",
    }


def _records() -> dict[str, Any]:
    def field(name: str, kind: str, extract: str, **more: Any) -> dict[str, Any]:
        source = {"fileSet": {"@id": "images"}, "extract": {"fileProperty": extract}, **more}
        return {"@type": "cr:Field", "@id": f"records/{name}", "name": name, "dataType": kind, "source": source}

    label = {"transform": {"regex": "([^/]+)/[^/]+\\.png$"}}
    fields = [field("image", "sc:ImageObject", "content"), field("label", "sc:Text", "fullpath", **label)]
    return {"@type": "cr:RecordSet", "@id": "records", "name": "records", "field": fields}


def dataset_card(result: Any, class_names: Sequence[str] | None, facts: Mapping[str, Any]) -> str:
    """The body of a data set's card, in Markdown.

    Args:
        result: the images.
        class_names: of the labels.
        facts: of the run that made them, as its ``metrics.json``; may be empty.
    """
    data, made = facts.get("data", {}), facts.get("synthesis", {})
    title = f"# Synthetic images of {data.get('name', 'an image set')}"
    lines = [title, "", f"**{SYNTHETIC}**", "", "## What is here", ""]
    lines += [f"- {len(result)} images, {' × '.join(map(str, result.images.shape[1:]))} (channels first)"]
    if result.labels is not None and result.labels.ndim == 1 and class_names is not None:
        counts = result.labels.bincount(minlength=len(class_names)).tolist()
        lines += [f"- {name}: {count}" for name, count in zip(class_names, counts, strict=False)]
    before, after = float(result.initial_uncertainty.mean()), float(result.uncertainty.mean())
    lines += [f"- mean uncertainty {before:.4f} → {after:.4f} nats under the posterior samples climbed on"]
    lines += [f"- sources: {data['train']} training images of {data['name']}"] if "train" in data else []
    if "label_kept" in made:
        lines += [
            f"- a classifier that was not climbed on takes {100 * made['label_kept']:.0f} % of them for their label "
            f"({100 * made['label_kept_reconstruction']:.0f} % of the plain reconstructions)"
        ]
    return "\n".join([*lines, *_settings(facts), "", "## Limits", "", *(f"- {text}" for text in LIMITS), ""])


def _settings(facts: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in facts.get("settings", {}).items() if value is not None]
    head = ["", "## How they were made", "", f"With tsynd {facts.get('version', __version__)}.", ""]
    return [*head, *(["| setting | value |", "|---|---|", *rows] if rows else [])]


def push_images(
    result: Any,
    repo: str,
    class_names: Sequence[str] | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """See :meth:`tsynd.SynthesisResult.push_to_hub`."""
    hub = require("huggingface_hub", "huggingface")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / repo.rpartition("/")[2]
        folder.mkdir()
        arrays: dict[str, Any] = {"images": to_uint8(result.images)}  # no latents: they are the real images, encoded
        arrays |= {} if result.labels is None else {"labels": result.labels}
        arrays |= {} if class_names is None else {"class_names": np.array(class_names)}
        save_npz(folder / "synthetic.npz", **arrays)
        if result.labels is not None and result.labels.ndim == 1 and result.images.ndim == 4:
            titles = class_names or [str(number) for number in range(int(result.labels.max()) + 1)]
            save_class_folders(folder / "images", result.images, result.labels, titles)
        write_croissant(folder, result, class_names)
        about = {"pretty_name": f"Synthetic images ({folder.name})", "tags": ["synthetic", "medical", "tsynd"]}
        config: dict[str, Any] = {}
        if (folder / "images").is_dir():
            config = {"configs": [{"config_name": "default", "data_files": "images/**"}]}
        head = hub.DatasetCardData(task_categories=["image-classification"], **about, **config).to_yaml()
        (folder / "README.md").write_text(
            f"---\n{head}\n---\n\n{dataset_card(result, class_names, facts or {})}", encoding="utf-8"
        )
        return push_folder(folder, repo, "dataset", private=private, token=token)


def push_folder(folder: Path, repo: str, kind: str, *, private: bool, token: str | None) -> str:
    """Upload a folder to a repository of the Hugging Face hub, made where it is not there; its address.

    Raises:
        InputError: the hub refuses it.
    """
    hub = require("huggingface_hub", "huggingface")
    api = hub.HfApi(token=token)
    try:
        address = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message=f"tsynd {__version__}")
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise InputError(f"repo: {repo} cannot be written to: {' '.join(str(error).split())[:200]}") from error
    return str(address)
