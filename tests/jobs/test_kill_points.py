"""Killed at every write, started again: the same results, no refusal, no rests (tests/kill_points.py does it)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
pytest.importorskip("pyarrow")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["run", "train", "experiment", "shards", "pack"])
def test_a_job_survives_a_kill_at_every_write(job: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{_TESTS.parent}{os.pathsep}{_TESTS}"}
    command = [sys.executable, str(_TESTS / "kill_points.py"), job, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert re.search(rf"^{job}: \d+ kills, all taken up again$", done.stdout, re.MULTILINE)
