"""The ascent as ``synthesize`` runs it: T posterior samples against the same network without any, and memory.

``Y1``: dropout before the last layer. ``Y2``: also behind every stage. ``Y3``: uncertainty alone, no gradient.
``Y4``: peak memory of a whole ``synthesize`` beyond its result, each number of images in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, fx, nn

from benchmarks import peers
from benchmarks.harness import Row, check, describe_machine, measure
from tsynd.fx.folding import FoldedGraph, folded_decoder
from tsynd.fx.layout import LaidOut, channels_last
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.ops import reference
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import AscentSettings, ascend_latents

__all__ = ["SHAPES", "run", "summary"]

# dropout of the classifier, images of 28 x 28, T
SHAPES: dict[str, tuple[str, int, int]] = {
    "Y1": ("head", 64, 32),
    "Y2": ("stages", 32, 32),
    "Y3": ("head", 64, 32),
    "Y4": ("head", 10_000, 32),
    "GY1": ("head", 4096, 32),
    "GY2": ("stages", 512, 32),
    "GY3": ("head", 4096, 32),
}
_PIXELS, _CLASSES = 28, 4
_FLOOR, _PASS = "floor: ascent without dropout", "floor: one deterministic pass"
_SHARED, _INDEPENDENT = "tsynd, shared masks", "tsynd, independent masks"
_LOOP, _BATCH = "T passes, loop", "T passes, one batch"


def _label(name: str) -> str:
    dropout, images, samples = SHAPES[name]
    return f"{name} {dropout} {images}·{_PIXELS}²·{samples}"


class _Opaque(nn.Module):
    """A network that cannot be traced, so that it runs as a whole T times."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() < 0:  # control flow on data is what tracing stops at
            images = -images
        out: Tensor = self.network(images)
        return out


def _check_value(posterior: MCDropout, images: Tensor, ids: Tensor) -> None:
    """Value and gradient against the whole network run T times with the same masks, its logits in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole = MCDropout(_Opaque(posterior.classifier), posterior.samples, posterior.masks, posterior.seed)

    def both(value_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_(True)
        value = value_of(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    wanted = both(lambda x: reference.uncertainty_value(whole.logits(x, ids).double()))
    check(f"tsynd, {posterior.masks} masks", both(lambda x: posterior.uncertainty(x, ids)), wanted, 1e-3)


def _rows(name: str, device: str, seconds: float) -> list[Row]:
    dropout, count, samples = SHAPES[name]
    torch.manual_seed(0)
    network = SmallResNet(1, _CLASSES, dropout=dropout).to(device).eval()
    autoencoder = SmallAutoencoder(1).to(device).eval()
    network, autoencoder = (LaidOut(model, channels_last).module for model in (network, autoencoder))
    images = torch.rand(count, 1, _PIXELS, _PIXELS, device=device)
    ids = torch.arange(count, device=device)
    ours: dict[str, MCDropout] = {
        _SHARED: MCDropout(network, samples, "shared"),
        _INDEPENDENT: MCDropout(network, samples, "independent"),
    }
    usual: dict[str, Posterior] = {_LOOP: peers.PassesPosterior(network, samples, batched=False)}
    if dropout == "stages":
        usual[_BATCH] = peers.PassesPosterior(network, samples, batched=True)
    with ExitStack() as stack:
        stack.enter_context(frozen(network, autoencoder))
        for posterior in ours.values():
            stack.enter_context(posterior.frozen())
            stack.enter_context(posterior.folded())
        plain = peers.PlainPosterior(FoldedGraph(fx.symbolic_trace(network)).module)
        with torch.no_grad():
            source = autoencoder.encode(images)
            decode = folded_decoder(autoencoder, source[:2])
            few = decode(source[:16]).clamp(0, 1)
            for key, other in usual.items():
                peers.check_law(key, other.uncertainty(few), ours[_SHARED].uncertainty(few))
        for posterior in ours.values():
            _check_value(posterior, few, ids[:16])
        methods: dict[str, Callable[[], object]] = {}
        if name.endswith("Y3"):
            methods |= {_PASS: lambda: plain.logits(images)}
            methods |= {key: lambda p=p: p.uncertainty(images, ids) for key, p in {**ours, **usual}.items()}  # type: ignore[misc]
            methods |= peers.baal_network(network, images, samples)
            methods = {key: torch.no_grad()(run) for key, run in methods.items()}
        else:
            posteriors: dict[str, Posterior] = {_FLOOR: plain, **ours, **usual}
            methods = {
                key: lambda p=p: ascend_latents(p, decode, source, ids, AscentSettings(), 1.0)  # type: ignore[misc]
                for key, p in posteriors.items()
            }
        return measure(
            "synthesis",
            _label(name),
            methods,
            floor=next(iter(methods)),
            device=device,
            seconds=seconds,
            warmups=1,
            least_rounds=3 if name.endswith(("Y1", "Y2")) else 7,
        )


def _memory(name: str, device: str) -> list[Row]:
    """One process a number of images: memory that an earlier call left over would be reused."""
    rows: list[Row] = []
    for count in (1000, SHAPES[name][1]):
        command = [sys.executable, "-m", "benchmarks.memory", str(count), "--device", device]
        # large blocks go back when they are freed: the C library's fragments would be counted as the program's memory
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"benchmarks.memory: {done.stderr.strip().splitlines()[-1]}")
        told = json.loads(done.stdout.splitlines()[-1])
        milliseconds = told["seconds"] * 1e3
        rows.append(
            Row(
                "synthesis",
                _label(name),
                f"tsynd.synthesize, {count} images, memory beyond {told['result_bytes'] / 2**20:.0f} MiB of result",
                device,
                "float32",
                milliseconds,
                milliseconds,
                milliseconds,
                told["peak_bytes"],
                1.0 if not rows else milliseconds / rows[0].median_ms,
                describe_machine(device),
            )
        )
    return rows


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    if dtype != torch.float32:
        raise SystemExit("synthesis: wanted --dtype float32")
    rows: list[Row] = []
    for name in shapes:
        rows += _memory(name, device) if name == "Y4" else _rows(name, device, seconds)
    return rows


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    time = {(row.shape.split()[0], row.method): row.median_ms for row in rows}
    lines = []
    for shape in dict.fromkeys(row.shape.split()[0] for row in rows):
        floor = next(row for row in rows if row.shape.split()[0] == shape)
        for ours in (_SHARED, _INDEPENDENT):
            if (shape, ours) not in time:
                continue
            what = [f"{time[shape, ours] / floor.median_ms:.2f}× the {floor.method.removeprefix('floor: ')}"]
            others = [m for s, m in time if s == shape and m not in (floor.method, _SHARED, _INDEPENDENT)]
            what += [f"{time[shape, other] / time[shape, ours]:.1f}× faster than {other}" for other in others]
            lines.append(f"{shape}, {ours.removeprefix('tsynd, ')}: " + ", ".join(what))
    peaks = [row.peak_bytes for row in rows if "memory beyond" in row.method]
    if len(peaks) == 2 and peaks[0] is not None and peaks[1] is not None:
        sizes = " and ".join(f"{peak / 2**20:.0f}" for peak in peaks if peak is not None)
        lines.append(f"memory beyond the result: {sizes} MiB, ratio {peaks[1] / peaks[0]:.2f}")
    return lines
