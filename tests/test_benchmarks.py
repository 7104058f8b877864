"""The benchmark's peers compute what the operator computes, and its table is well formed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from tsynd import ops, reference


@pytest.mark.parametrize("name", ["pass_loop", "batched_passes", "shared_autograd", "shared_analytic"])
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
