"""Every script of ten lines under examples/ runs, and raises the uncertainty of nearly every image."""

from __future__ import annotations

import runpy
import time
import warnings
from pathlib import Path

import pytest
import torch

from tsynd.synthesis.result import SynthesisResult

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# the scripts; a program with options of its own (def main) is no example of ten lines
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "def main(" not in path.read_text())
NEEDS = {"monai": "monai", "diffusers": "diffusers", "transformers": "transformers", "laplace": "laplace"}
NEEDS |= {"dicom": "pydicom", "nifti": "nibabel", "huggingface": "datasets"}


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_example(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for word, module in NEEDS.items():
        if script.stem.startswith(word):
            pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)  # the scripts take the first weights as they come
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = runpy.run_path(str(script), run_name="__main__")["result"]
    assert isinstance(result, SynthesisResult)
    raised = float((result.uncertainty > result.initial_uncertainty).float().mean())
    assert raised >= 0.95, f"{raised:.0%} of {len(result)} images rose"
    assert "->" in capsys.readouterr().out
    assert time.monotonic() - start < 120  # a script that hangs or grew, not a measurement


def test_examples_are_short() -> None:
    assert {script.stem for script in SCRIPTS} >= {
        "monai_models",
        "diffusers_models",
        "transformers_models",
        "laplace_head",
    }
    for script in SCRIPTS:
        code = [line for line in script.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(code) <= 20, f"{script.name}: {len(code)} lines of code"
