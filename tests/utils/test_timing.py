"""Phases count every second once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier

import tsynd
from tsynd.utils.timing import Phases


def test_inner_phases_are_not_counted_twice() -> None:
    phases = Phases()
    inner = phases.timed("inner", time.sleep, torch.device("cpu"))
    start = time.perf_counter()
    with phases("outer"):
        time.sleep(0.02)
        inner(0.03)
        inner(0.01)
    whole = time.perf_counter() - start
    assert phases.seconds["inner"] >= 0.04
    assert phases.seconds["outer"] >= 0.02
    assert sum(phases.seconds.values()) <= whole
    assert set(phases.rounded()) == {"inner", "outer"}


def test_synthesis_tells_its_phases() -> None:
    phases, images = Phases(), torch.rand(20, 1, 12, 12)
    synthesize, autoencoder, classifier = tsynd.synthesize, TinyAutoencoder(), TinyClassifier()  # imported now
    start = time.perf_counter()
    synthesize(autoencoder, classifier, images, samples=4, progress=False, phases=phases)
    whole = time.perf_counter() - start
    assert set(phases.seconds) == {"prepare", "encode", "decode", "uncertainty", "backward", "collect"}
    assert 0.8 * whole < sum(phases.seconds.values()) <= whole
    with pytest.raises(tsynd.InputError, match="phases"):
        tsynd.synthesize(TinyAutoencoder(), TinyClassifier(), images, compile=True, phases=phases)


def test_import_loads_torch_and_numpy_alone() -> None:
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import tsynd; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "heavy = {'torch._dynamo', 'torch._inductor', 'torch.fx.experimental', 'sympy'}; "
        "print(sorted(new), sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tsynd'] []"
