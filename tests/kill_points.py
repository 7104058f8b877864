"""Kill a job at every write: ``python tests/kill_points.py JOB FOLDER [EVERY]`` with JOB one of JOBS.

The job runs once whole. Then it is started again and again in new folders and killed before its first, second, ...
change of a file's name, folder or content (Python's audit events say when), until it reaches its end; after each kill
the same job is started once more and must end with what the whole one made, and leave no temporary file. A process
forked from this one does each run, so that packages are imported once. Prints one line for each kill. EVERY leaves all
but every so many-th of them out.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large import content, make_job

from tsynd.data.phantom import phantom
from tsynd.distributed.driver import synthesize_shards
from tsynd.distributed.pack import pack
from tsynd.distributed.worker import ShardSettings
from tsynd.jobs.run import RunSettings, run
from tsynd.jobs.train import TrainSettings, train_model
from tsynd.study.experiment import experiment
from tsynd.study.settings import StudySettings


def _data(folder: Path) -> Path:
    path = folder / "cells.npz"
    if not path.exists():
        np.savez(path, **phantom(28, 24, 12, 12))
    return path


def _run(data: Path, output: Path) -> None:
    settings = RunSettings(
        train_size=12, autoencoder_iterations=2, iterations=2, batch_size=8, samples=4, steps=1, augmentation_steps=1
    )
    run(data, output, settings, device="cpu", progress=False)


def _train(data: Path, output: Path) -> None:
    settings = TrainSettings(iterations=4, batch_size=8, train_size=12)
    train_model(data, output, settings, device="cpu", checkpoint_every=2, progress=False)


def _experiment(data: Path, output: Path) -> None:
    settings = StudySettings(
        iterations=2, autoencoder_iterations=2, batch_size=8, samples=4, steps=1, uncertainty_samples=4,
        conditions=("clean",), attacks=(),
    )  # fmt: skip
    arms = ("real", "reconstruction")
    experiment(data, output, (12,), 1, arms, settings, workers=1, device="cpu", progress=False)


def _shards(data: Path, output: Path) -> None:
    job = make_job(data.parent / "job", 40) if not (data.parent / "job").exists() else _job(data.parent / "job")
    settings = ShardSettings(**job, output=str(output), samples=4, steps=1, shard_size=16, device="cpu")
    synthesize_shards(settings, progress=False)


def _job(folder: Path) -> dict[str, str]:
    return {"data": str(folder / "data.npz")} | {
        name: str(folder / f"{name}.safetensors") for name in ("autoencoder", "classifier")
    }


def _pack(data: Path, output: Path) -> None:
    made = data.parent / "made"
    if not made.exists():
        _shards(data, made)
    for name in ("packed.npz", "folders"):
        if not (output / name).exists():
            pack(made, output / name, progress=False)


# what the jobs import when they need it
_SHARED = (
    "PIL.Image", "accelerate", "kornia.augmentation.auto", "kornia.filters", "kornia.geometry.transform",
    "matplotlib.figure", "monai.networks.nets", "pyarrow.parquet", "safetensors.torch", "scipy.stats",
    "torchmetrics.functional.classification", "torchmetrics.image.fid", "torchmetrics.image.kid",
)  # fmt: skip

JOBS: dict[str, Callable[[Path, Path], None]] = {
    "run": _run,
    "train": _train,
    "experiment": _experiment,
    "shards": _shards,
    "pack": _pack,
}


def _result(job: str, folder: Path) -> dict[str, Any]:
    """What must not depend on a kill: everything but times and files that show them."""
    if job in ("shards", "pack"):
        return content(folder)
    found: dict[str, Any] = {"names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" and path.stem != "training":
            found[path.name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found[path.name] = {name: file[name].tobytes() for name in file.files}
    if job == "run":
        metrics = json.loads((folder / "metrics.json").read_text())
        found["scores"] = metrics["evaluation"]
    if job == "experiment":
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        for row in rows:
            del row["seconds"], row["training"]["augmentation_share"]  # of the time
        found["rows"] = rows
    return found


def _watch(folder: Path, kill_at: int) -> None:
    """Kill this process before its `kill_at`-th change below a folder."""
    seen, root = [0], str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(root):
            return
        hidden = os.path.basename(path).startswith(".")
        if event == "open":  # a file touched to see whether one can write is none; nor is the lock
            mode, flags = arguments[1:]
            if mode is None or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event == "os.remove" and hidden:
            return
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _in_a_fork(work: Callable[[], None]) -> int:
    """The exit status of a process that does the work: 0, 1 after a traceback, or minus the signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def step_through(job: str, folder: Path, every: int = 1) -> int:
    """Kill a job at every write, or every so many-th; returns the number of kills.

    Raises:
        AssertionError: a second start fails, or ends elsewhere.
    """
    start, data = JOBS[job], _data(folder)
    assert _in_a_fork(lambda: start(data, folder / "whole")) == 0
    whole = _result(job, folder / "whole")
    for kills, kill_at in enumerate(range(1, 1000, every)):
        output = folder / "out"

        def killed(output: Path = output, kill_at: int = kill_at) -> None:
            _watch(output, kill_at)
            start(data, output)

        code = _in_a_fork(killed)
        assert code in (0, -signal.SIGKILL), f"{job}: ended with {code} before kill {kill_at}"
        if code == 0:
            assert kills > 1, "nothing was killed"
            return kills
        left = sum(1 for _ in output.rglob("*")) if output.exists() else 0
        print(f"{job}: killed before change {kill_at}, which left {left} files and folders", flush=True)
        assert _in_a_fork(lambda output=output: start(data, output)) == 0, (
            f"{job}: no second start after kill {kill_at}"
        )
        again = _result(job, output)
        differ = [key for key in whole.keys() | again.keys() if whole.get(key) != again.get(key)]
        assert not differ, f"{job}: after kill {kill_at} other {', '.join(differ)}"
        rests = [path.name for path in output.rglob(".*")]
        assert not rests, f"{job}: after kill {kill_at} there is still {', '.join(rests)}"
        shutil.rmtree(output)
    raise AssertionError(f"{job}: no end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in _SHARED:
        importlib.import_module(module)
    name, every = sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 1
    print(f"{name}: {step_through(name, Path(sys.argv[2]), every)} kills, all taken up again")
