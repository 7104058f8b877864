"""Every code block of the documentation runs, its tables are those of the committed measurements, its names exist."""

import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_blocks import blocks_of, run_page
from local_networks import local_networks

from tsynd.data import load as data
from tsynd.data.phantom import phantom

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: `images.npz`, `images.npy`, and the models of a run of it in `out`."""
    from tsynd.jobs.run import RunSettings, run

    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "images.npz", **phantom(28, 40, 12, 12))
    np.save(folder / "images.npy", phantom(28, 4, 1, 1)["train_images"][:, None])
    run(
        str(folder / "images.npz"),
        folder / "out",
        RunSettings(iterations=2, autoencoder_iterations=2, train_size=12),
        progress=False,
    )
    return folder


# their exports and classifiers are those of other pages and tests
_SLOW = {"docs/deployment.md"}


def _parameter(page: Path) -> Any:
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.slow] if name in _SLOW else [])


@pytest.mark.parametrize("page", [_parameter(page) for page in PAGES])
def test_every_block_runs(page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    if not any(block.language in ("python", "bash") and block.reason is None for block in blocks):
        pytest.skip("no code to run")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(data._PHANTOMS, "phantom", lambda size: phantom(size, 200, 40, 80))
    if page.name == "pretrained.md":
        local_networks(tmp_path, monkeypatch)
    if page.name == "recipes.md":
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # Lightning sets it
    own = re.search(r"tsynd run .*--output out\b", page.read_text(encoding="utf-8")) is not None
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out") if own else None)
    torch.manual_seed(0)  # pages take the first weights as they come
    before = os.environ.copy()
    run_page(page, tmp_path, short=True)
    assert os.environ == before


def test_blocks_that_are_not_run_say_why() -> None:
    for page in PAGES:
        text = page.read_text()
        fences = len(re.findall(r"^ *```\w+", text, re.MULTILINE))
        assert fences == len(blocks_of(text)), f"{page}: an unclosed or odd fence"
        indented = re.findall(r"(?:^|\n)\n {4}(?:tsynd|pip|make|python|torchrun) [^\n]+", text)
        assert not indented, f"{page}: commands outside a fence are not run: {indented[0].strip()}"
        for block in blocks_of(text):
            assert block.reason is None or len(block.reason) > 8, f"{page}:{block.line}"


def test_tables_are_those_of_the_committed_measurements() -> None:
    from benchmarks.pages import benchmark_page, study_page

    page = (ROOT / "docs/benchmarks.md").read_text()
    assert benchmark_page(page, ROOT / "benchmarks/results/cpu.json") == page
    page = (ROOT / "docs/study.md").read_text()
    assert study_page(page, ROOT / "docs/study.jsonl") == page


def _exists(name: str, start: bool) -> bool:
    """Whether a dotted name can be reached; with `start`, whether one that begins so can."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:-1]:
            found = getattr(found, part, None)
        last = parts[-1]
        return count == len(parts) or hasattr(found, last) or (start and any(n.startswith(last) for n in dir(found)))
    return False


def test_modules_and_files_that_texts_name_exist() -> None:
    """Texts follow the house: in the documentation, docstrings, comments and the build's files."""
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "CMakeLists.txt", "mkdocs.yml")]
    for folder in ("docs", "tsynd", "csrc", "benchmarks", "packaging", "examples"):
        texts += [
            p
            for p in sorted((ROOT / folder).rglob("*"))
            if p.suffix in {".md", ".py", ".cpp", ".cu", ".h", ".cuh", ".svg"}
        ]
    gone = []
    for path in texts:
        text = path.read_text()
        for match in re.finditer(r"(?<![\w./\"-])tsynd(?:\.[A-Za-z_]\w*)+(\*?)", text):
            if not _exists(match[0].rstrip("*"), bool(match[1])):
                gone.append(f"{path.relative_to(ROOT)}: {match[0]}")
        for match in re.finditer(r"(?<![\w./-])(?:tsynd|csrc|tests|docs|benchmarks|packaging)/[\w./-]*\w", text):
            if not ((ROOT / match[0]).exists() or (ROOT / f"{match[0]}.py").exists()):
                gone.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert gone == []


def test_promises_are_held_by_tests_that_exist() -> None:
    text = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| [^-p]", line)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named or "`make lowest`" in row, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
