"""SIGKILL to drivers and workers at seeded moments: every sample is there once, with the bytes of an unbroken run."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from large import ENVIRONMENT, command, content, make_job, run, sample_ids

COUNT, SIZE = 24 * 16, 16  # 24 units


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The job and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("kills")
    job = make_job(folder / "job", COUNT)
    result = run(command(job, folder / "whole", shard_size=SIZE))
    assert result.returncode == 0, result.stderr[-2000:]
    return job, folder / "whole"


def _count(folder: Path) -> int:
    return len(list(folder.glob("units/shard-*.json")))


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _actors(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for child in _descendants(process):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::_Actor"):
                found.append(child)
        except psutil.Error:
            continue
    return found


def _kill(pids: list[psutil.Process]) -> None:
    for process in pids:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _wait_for(folder: Path, process: subprocess.Popen[bytes], units: int) -> bool:
    """Wait until so many units are done; False where the job ended first."""
    end = time.monotonic() + 120
    while _count(folder) < units:
        assert time.monotonic() < end, "no progress"
        if process.poll() is not None:
            return False
        time.sleep(0.003)
    return True


def _disturb(job: dict[str, str], output: Path, moments: random.Random, plan: str) -> int:
    """Run the job once per letter of the plan, or until it ends; kill the driver (d) or an actor (w) in each run."""
    kills = 0
    process: subprocess.Popen[bytes] | None = None
    more: list[str] = []
    for letter in plan:
        if process is None or process.poll() is not None:
            more = ["--workers", "2"] if "w" in plan else []
            process = subprocess.Popen(
                command(job, output, *more, shard_size=SIZE),
                env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        if not _wait_for(output, process, min(_count(output) + moments.randint(1, 2), COUNT // SIZE - 1)):
            break
        time.sleep(moments.random() * 0.03)
        if letter == "d":
            family = _descendants(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            _kill(family)
            kills += 1
        elif actors := _actors(process):
            _kill([moments.choice(actors)])
            kills += 1
    if process is not None and process.poll() is None:
        process.wait(timeout=120)
    return kills


def _check(job: dict[str, str], output: Path, whole: Path) -> None:
    last = run(command(job, output, shard_size=SIZE))
    assert last.returncode == 0, last.stderr[-2000:]
    assert sample_ids(output) == list(range(COUNT))
    assert content(output) == content(whole)
    assert not list(output.rglob(".shard-*"))


@pytest.mark.slow
def test_killed_drivers_lose_nothing(unbroken, tmp_path):
    job, whole = unbroken
    assert _disturb(job, tmp_path / "out", random.Random(1), "dd") == 2
    _check(job, tmp_path / "out", whole)


def test_a_killed_ray_actor_loses_only_its_unit(unbroken, tmp_path):
    job, whole = unbroken
    assert _disturb(job, tmp_path / "out", random.Random(2), "w") == 1
    assert content(tmp_path / "out") == content(whole)  # the same driver finished the job


@pytest.mark.study
def test_ten_kills_of_drivers_and_workers(unbroken, tmp_path):
    job, whole = unbroken
    assert _disturb(job, tmp_path / "out", random.Random(3), "wdwdwdwdwd") == 10
    _check(job, tmp_path / "out", whole)
