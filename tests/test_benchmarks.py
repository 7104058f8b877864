"""The benchmark's peers compute what the operator computes, and its table is well formed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    __main__,
    ascend,
    document,
    dropout,
    gpu_check,
    harness,
    head,
    ladder,
    logits,
    peers,
    posteriors,
    registers,
    train,
)
from tsynd import ops
from tsynd.ops import reference
from tsynd.utils.errors import InputError


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


def test_program_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for arguments, words in (
        (["logits", "--shapes", "S1"], "logits has no 'S1', wanted some of L1"),
        (["logits", "--docs", str(tmp_path / "none.md")], "does not exist"),
    ):
        line = [sys.executable, "-m", "benchmarks", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.parametrize("suite", __main__.SUITES)
def test_every_suite_has_the_same_face(suite: str) -> None:
    module = importlib.import_module(f"benchmarks.{suite}")
    assert set(module.__all__) >= {"SHAPES", "run", "summary"}
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert f"<!-- {suite} -->" in page
    assert f"<!-- end {suite} -->" in page


def test_rows_and_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logits, "SHAPES", {"L9": (20, 3, 4)})
    monkeypatch.setattr(ascend, "SHAPES", {"A9": (20, 30)})
    monkeypatch.setattr(dropout, "SHAPES", {"S9": (40, 20, 3, 8)})
    rows = [
        row
        for module, shape in ((logits, "L9"), (ascend, "A9"), (dropout, "S9"))
        for row in module.run([shape], "cpu", torch.float32, 0.01)
    ]
    path = tmp_path / "rows.json"
    harness.write_json(rows, path)
    assert harness.read_json(path) == rows
    for row in rows:
        assert row.median_ms > 0
        assert "threads" in row.machine
        assert "torch 2." in row.machine
    own = [row for row in rows if row.suite == "logits"]
    assert logits.summary(own)[0].startswith("logits_uncertainty over a copy: L9 ")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- logits -->\nold\n<!-- end logits -->\nafter\n")
    document.update(page, "logits", own, ["a line"])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "- a line\n" in text
    assert text.count("| L9 20·3·4 |") == len(own)
    assert (tmp_path / "images" / "bench_logits.png").stat().st_size > 1000
    with pytest.raises(InputError, match="lacks the markers"):
        document.update(page, "ascend", own, [])


def test_a_wrong_method_is_not_timed() -> None:
    good = torch.tensor([1.0, 2.0])
    harness.check("good", (good, good), (good.double(), good.double()), 1e-5)
    with pytest.raises(SystemExit, match="bad: gradient is off"):
        harness.check("bad", (good, good + 1e-3), (good.double(), good.double()), 1e-5)
    with pytest.raises(SystemExit, match="bad"):
        harness.check("bad", (good, good * float("nan")), (good.double(), good.double()), 1e-5)
    with pytest.raises(SystemExit, match="not timed"):
        peers.check_law("bad", torch.full((100,), 0.5), torch.full((100,), 0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_a_call_holds() -> None:
    for _ in range(2):  # also when the C library has the memory already
        peak = harness.peak_bytes(lambda: torch.zeros(8 << 20).add_(1), "cpu")
        if peak is None:
            pytest.skip("the kernel does not let the high-water mark be reset")
        assert 28 << 20 < peak < 80 << 20


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


def test_the_gate_on_compiled_kernels() -> None:
    def kernel(**more: str) -> dict[str, str]:
        sound = {"name": "_Z5thingv", "architecture": "sm_90a", "stack": "0", "stores": "0", "loads": "0"}
        return {**sound, "registers": "200", **more}

    def sass(products: int) -> str:
        line = "        /*0100*/   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"
        return "\t\tFunction : _Z10wgmma_headv\n" + line * products + "\t\tFunction : _Z5otherv\n"

    assert registers.products(sass(12)) == {"_Z10wgmma_headv": 12, "_Z5otherv": 0}
    assert registers.gate([kernel()], "", sass(12)) == []
    (spill,) = registers.gate([kernel(stores="8")], "")
    assert "spills 8 bytes" in spill
    (stack,) = registers.gate([kernel(stack="16")], "")
    assert "stack of 16 bytes" in stack
    (many,) = registers.gate([kernel(registers="256")], "")
    assert "256 registers" in many
    (missing,) = registers.gate([kernel()], "", sass(3))
    assert "has 3 HGMMA instructions" in missing
    (waits,) = registers.gate([], "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async are serialized\n")
    assert "C7510" in waits


def test_head_says_its_ratios_in_a_line_a_shape() -> None:
    def row(method: str, median_ms: float, over_floor: float) -> harness.Row:
        rest = {"device": "cuda", "dtype": "bfloat16", "p20_ms": 0.0, "p80_ms": 0.0, "peak_bytes": 0, "machine": ""}
        return harness.Row("head", "G1 1·2·3·4", method, median_ms=median_ms, over_floor=over_floor, **rest)

    rows = [
        row(head.FLOOR, 1.0, 1.0),
        row(head.OURS, 1.25, 1.25),
        row(head.LOOP, 50.0, 50.0),
        row(head.COMPILED, 20.0, 20.0),
    ]
    assert head.summary(rows)[-1] == (
        "G1 on cuda, bfloat16: 1.25 of two bare products, 16.0 times as fast as torch.compile of the batched T heads,"
        " 40.0 times as fast as their loop"
    )


def test_gpu_check_reports_every_step(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--device", "cpu", "--only", "GPU tests"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    steps = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [step["name"] for step in steps] == ["GPU tests", "GPU tests of wgmma_head"]
    assert done.returncode == int(not all(step["passed"] for step in steps))
    assert "| GPU tests | passed |" in (tmp_path / "gpu-check.md").read_text(), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles the ladder's kernels")
@pytest.mark.slow
def test_gpu_check_dry_run(tmp_path: Path) -> None:
    """Without OUT: every rung compiled, rungs and steps named, none run and nothing written."""
    root = Path(__file__).parents[1]
    line = [sys.executable, "-m", "benchmarks.gpu_check"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()
    assert told[:2] == ["ladder for sm_80: compiled", "ladder for sm_90a: compiled"]
    rungs = [text for text in told if text.startswith("rung ")]
    steps = [text for text in told if text.startswith("step ")]
    assert len(rungs) >= 15
    assert [text for text in steps if "smallest" in text] == steps[: len(gpu_check.OPERATORS)]
    assert len(steps) >= 15
    assert all(": not run (" in text for text in rungs + steps)
    assert not list(tmp_path.iterdir())


def test_every_operator_has_its_smallest_call() -> None:
    for name in gpu_check.OPERATORS:
        line = [sys.executable, "-m", "pytest", "--collect-only", "tests/gpu", "-k", f"test_smallest[{name}-"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
        chosen = [text for text in done.stdout.splitlines() if "::" in text]
        assert chosen
        assert all(f"test_smallest[{name}-" in text for text in chosen)
    assert set(gpu_check.OPERATORS) == set(ops.served_by())


def test_a_failed_rung_is_named_and_stops_nothing(tmp_path: Path) -> None:
    program = tmp_path / "bring_up"
    program.write_text(
        "#!/bin/sh\ncase \"$1\" in\n--list) printf 'one\\tfirst\\ntwo\\tmeans that\\nthree\\tlast\\n';;\n"
        "one) exit 0;;\ntwo) echo element 3 is 7; exit 1;;\nthree) echo skipped: no such device; exit 77;;\nesac\n"
    )
    program.chmod(0o755)
    climbed = ladder.rungs(program)
    ladder.climb(program, climbed, 60.0)
    assert [(rung.name, rung.result) for rung in climbed] == [("one", "holds"), ("two", "FAILS"), ("three", "skipped")]
    told = "\n".join(ladder.lines(climbed))
    assert "The first rung that fails is `two`: means that." in told
    assert "element 3 is 7" in told


def test_the_sanitizer_watches_every_kernel() -> None:
    for name, which in gpu_check.SANITIZED.items():
        line = [sys.executable, "-m", "pytest", "--collect-only", "tests/gpu", "-k", which]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
        chosen = [text for text in done.stdout.splitlines() if "::" in text]
        assert 4 <= len(chosen) <= 80
        assert any("wgmma" in text for text in chosen) == ("wgmma" in name)
        if "wgmma" in name:
            assert any("test_head_by" in text for text in chosen)
        else:
            for part in ("test_head[", "test_dropout_head[", "test_expected_information[", "test_own_stream["):
                assert any(part in text for text in chosen), part


def test_posteriors_are_checked_and_their_paths_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posteriors, "SHAPES", {"P9": ("SmallResNet", 2, 3)})
    rows = posteriors.run(["P9"], "cpu", torch.float32, 0.01)
    methods = [row.method for row in rows]
    assert methods[0] == posteriors.FLOOR
    assert methods.count(posteriors.FLOOR) == 1
    assert "tsynd, MC dropout before the head (fused head)" in methods
    assert "tsynd, MC dropout, not traceable (whole network)" in methods
    assert len(posteriors.summary(rows)) == len(rows) - 1


def test_a_training_step_is_measured_with_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SHAPES", {"R9": (8, 4, 2)})
    monkeypatch.setattr(train, "measure", partial(harness.measure, warmups=0, least_rounds=1))
    rows = train.run(["R9"], "cpu", torch.float32, 0.01)
    assert {row.method for row in rows} >= {train.FLOOR, train.TARGETED, train.PERSISTENT, train.CONSISTENCY}
    assert sum(row.method.startswith("phase: ") for row in rows) == 6
    lines = train.summary(rows)
    assert len(lines) == len(rows) - 6 - 1 + 3
    assert any(line.startswith("R9, a training with the recipe, warm-up 0.3: ") for line in lines)
