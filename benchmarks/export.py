"""An exported synthesizer against eager torch on the same images: ONNX, TorchScript, and torch in both layouts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Row, label, measure
from tsynd.export.onnx import export_onnx
from tsynd.export.runtime import OnnxSynthesizer
from tsynd.export.torchscript import export_torchscript
from tsynd.fx.layout import LaidOut, contiguous
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import frozen
from tsynd.synthesis.api import synthesize
from tsynd.synthesis.ascent import AscentSettings, ascend_latents

__all__ = ["SHAPES", "run", "summary"]

# images; 28 x 28, default networks, T = 32, K = 5
SHAPES: dict[str, tuple[int]] = {"X1": (16,), "X2": (64,), "X3": (256,)}
FLOOR = "torch eager, tsynd.synthesize (channels-last)"


def _contiguous(autoencoder: SmallAutoencoder, classifier: SmallResNet, images: Tensor) -> Tensor:
    """The same work with the weights in torch's plain order."""
    autoencoder, classifier = (LaidOut(network, contiguous).module for network in (autoencoder, classifier))
    posterior = MCDropout(classifier)
    ids = torch.arange(len(images))
    with frozen(autoencoder), posterior.frozen():
        with torch.no_grad():
            source = autoencoder.encode(images)
        return ascend_latents(posterior, autoencoder.decode, source, ids, AscentSettings(), 0.4).images


def _methods(count: int, folder: Path) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    autoencoder, classifier = SmallAutoencoder(1), SmallResNet(1, 2)
    images = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    arrays = images.numpy()
    onnx, script = folder / "synthesizer.onnx", folder / "synthesizer.pt"
    if not onnx.exists():  # each export holds its file against torch
        export_onnx(autoencoder, classifier, onnx, image_shape=[1, 28, 28], latent_std=0.4)
        export_torchscript(autoencoder, classifier, script, image_shape=[1, 28, 28], latent_std=0.4)
    run_file, loaded = OnnxSynthesizer(onnx), torch.jit.load(str(script))  # type: ignore[no-untyped-call]

    def eager() -> Tensor:
        return synthesize(autoencoder, classifier, images, latent_std=0.4, batch_size=count, progress=False).images

    def scripted() -> Tensor:
        with torch.no_grad():
            out: Tensor = loaded(images)[0]
        return out

    wanted = eager()
    for name, got in (("onnx", torch.from_numpy(run_file(arrays).images)), ("torchscript", scripted())):
        error = float((got - wanted).abs().flatten(1).amax(1).median())
        if not error <= 1e-4:
            raise SystemExit(f"{name}: half of the images are off by more than {error:.1e}, not timed")
    return {
        FLOOR: eager,
        "torch eager, plain layout": lambda: _contiguous(autoencoder, classifier, images),
        "TorchScript file": scripted,
        "ONNX file, OnnxSynthesizer": lambda: run_file(arrays),
    }


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    if device != "cpu" or dtype != torch.float32:
        raise SystemExit("export: measured on the CPU in float32 alone")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            methods = _methods(SHAPES[name][0], Path(folder))
            rows += measure("export", label(name, SHAPES[name]), methods, floor=FLOOR, seconds=seconds)
    return rows


def summary(rows: list[Row]) -> list[str]:
    """The figures that the targets are about."""
    lines = []
    for method in ("ONNX file, OnnxSynthesizer", "TorchScript file", "torch eager, plain layout"):
        ratios = {row.shape.split()[0]: 1 / row.over_floor for row in rows if row.method == method}
        lines.append(f"{method}: times eager throughput " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items()))
    return lines
