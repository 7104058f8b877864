"""A small sharded job that several test files run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from tsynd.models.checkpoint import save_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def make_job(folder: Path, count: int = 70, channels: int = 1) -> dict[str, str]:
    """Models and images of a job; the arguments that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        coder, model = SmallAutoencoder(channels, 2, (4, 8)), SmallResNet(channels, 2, widths=(4, 8))
    coder.latent_std.fill_(1.0)
    with torch.no_grad():
        model.head.weight.mul_(5)
    save_model(coder, folder / "autoencoder")
    save_model(model, folder / "classifier", class_names=["0", "1"])
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    labels = np.arange(count) % 2
    np.savez(folder / "data.npz", images=pixels[..., 0] if channels == 1 else pixels, labels=labels)
    return {
        "data": str(folder / "data.npz"),
        "autoencoder": str(folder / "autoencoder.safetensors"),
        "classifier": str(folder / "classifier.safetensors"),
    }


def command(job: dict[str, str], output: Path, *more: str, shard_size: int = 16) -> list[str]:
    """The command line of the job."""
    named = [part for key, value in job.items() for part in (f"--{key}", value)]
    fixed = ["--shard-size", str(shard_size), "--samples", "8", "--steps", "2", "--threads", "1", "--device", "cpu"]
    return [sys.executable, "-m", "tsynd", "synthesize", *named, "--output", str(output), *fixed, "--quiet", *more]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a job's folder but the dotted ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def sample_ids(folder: Path) -> list[int]:
    """The ids in all shards, in order."""
    ids = []
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as archive:
            rows = [archive.extractfile(member) for member in archive if member.name.endswith(".json")]
            ids += [json.loads(row.read())["sample_id"] for row in rows]
    return ids
