"""The benchmark's peers compute what the operator computes, and its table is well formed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, registers
from tsynd import ops, reference


@pytest.mark.parametrize(
    "name", ["pass_loop", "batched_passes", "batched_analytic", "shared_autograd", "shared_analytic"]
)
def test_peers_equal_the_twin(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 20, generator=generator), torch.randn(5, 3, 20, generator=generator)
    value, gradient = getattr(peers, name)(features, weight)
    wanted = reference.head_uncertainty(features.double(), weight.double())
    torch.testing.assert_close(value.double(), wanted[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["independent_loop", "independent_batched"])
def test_independent_peers_have_the_same_law(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(400, 20, generator=generator), torch.randn(3, 20, generator=generator)
    torch.manual_seed(0)
    value, _ = getattr(peers, name)(features, weight, 0.5, 32)
    ours, _ = ops.dropout_head_uncertainty(features, weight, None, 0.5, 32, 0, 0, torch.arange(400))
    error = (value.std() / 20 + ours.std() / 20) * 4
    assert abs(float(value.mean() - ours.mean())) < float(error)


def test_program(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    line = [sys.executable, "-m", "benchmarks", "head", "--shapes", "S6", "--seconds", "0.2", "--json", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert {row["method"] for row in rows} >= {"floor: two bare products", "tsynd head_uncertainty"}
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)
    assert "geometric mean" in done.stdout


def test_registers_reads_what_ptxas_says() -> None:
    text = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 37 registers, used 1 barriers, 8 bytes cumulative stack size
"""
    (kernel,) = registers.parse(text)
    assert (kernel["architecture"], kernel["registers"], kernel["stores"], kernel["loads"]) == (
        "sm_90a",
        "37",
        "4",
        "12",
    )


def test_gpu_check_reports_every_step(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--device", "cpu", "--only", "GPU tests"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    steps = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [step["name"] for step in steps] == ["GPU tests"]
    assert done.returncode == int(not steps[0]["passed"])
    assert "| GPU tests | passed |" in (tmp_path / "gpu-check.md").read_text(), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
