"""The ascent at the size and with the networks that people use: a frozen pretrained encoder, 128 and 224 pixels.

``P1``, ``P2``: EfficientNet-Lite0 with its ImageNet weights at 128 and 224 pixels, one step of the ascent. ``P3``: one
training step of the head. ``P4``: a whole ``synthesize`` by its phases, and its memory under a limit. ``GP1``, ``GP2``:
ResNet-50 and ViT-B/16 with random weights, for a GPU.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers
from benchmarks.harness import Row, describe_machine, label, measure, peak_bytes
from benchmarks.pretrained_study import encoder
from tsynd.fx.folding import folded_decoder
from tsynd.fx.layout import LaidOut, channels_last
from tsynd.models.features import KeptFeatures
from tsynd.models.named import classifier
from tsynd.models.networks import SmallAutoencoder
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.api import synthesize
from tsynd.synthesis.ascent import AscentSettings, ascend_latents
from tsynd.utils.errors import require
from tsynd.utils.timing import Phases

__all__ = ["SHAPES", "run", "summary"]

# images at once, their side, T
SHAPES: dict[str, tuple[int, int, int]] = {
    "P1": (4, 128, 32),
    "P2": (4, 224, 32),
    "P3": (64, 128, 1),
    "P4": (16, 128, 32),
    "GP1": (64, 224, 32),
    "GP2": (64, 224, 32),
}
_FLOOR, _OURS, _LOOP = "floor: ascent without dropout", "tsynd, T passes of the head", "T passes of the network, loop"
_THROUGH, _KEPT = "floor: step through the encoder", "tsynd, step on kept features"
_LIMIT = 0.25  # GiB


def _network(name: str) -> PretrainedClassifier:
    if not name.startswith("G"):
        return encoder(3)
    library = require("transformers", "huggingface")
    kind = {"GP1": "ResNet", "GP2": "ViT"}[name]
    with tempfile.TemporaryDirectory() as folder:  # random weights: there may be no network to fetch others
        made = getattr(library, f"{kind}ForImageClassification")(getattr(library, f"{kind}Config")())
        made.save_pretrained(folder)
        found = classifier(f"hf:{folder}", 3)
    assert isinstance(found, PretrainedClassifier)
    return found


class _Head(peers.PlainPosterior):
    """The deterministic network as one sample, its encoder as tsynd runs it: what any ascent costs."""

    def __init__(self, posterior: MCDropout, network: PretrainedClassifier) -> None:
        super().__init__(network)
        self.posterior, self.head = posterior, network.head

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [1, B, classes]."""
        out: Tensor = self.head(self.posterior.features(images))
        return out[None]


def _ascent(name: str, device: str, seconds: float) -> list[Row]:
    count, side, samples = SHAPES[name]
    torch.manual_seed(0)
    network = _network(name).to(device).eval()
    autoencoder = SmallAutoencoder(1).to(device).eval()
    network, autoencoder = (LaidOut(model, channels_last).module for model in (network, autoencoder))
    images, ids = torch.rand(count, 1, side, side, device=device), torch.arange(count, device=device)
    ours = MCDropout(network, samples)
    with ExitStack() as stack:
        stack.enter_context(frozen(network, autoencoder))
        stack.enter_context(ours.frozen())
        stack.enter_context(ours.folded())
        with torch.no_grad():
            source = autoencoder.encode(images)
            decode = folded_decoder(autoencoder, source[:1])
        loop = peers.PassesPosterior(network, samples, batched=False)
        posteriors: dict[str, Posterior] = {_FLOOR: _Head(ours, network), _OURS: ours, _LOOP: loop}
        settings = AscentSettings(steps=1, samples=samples)
        methods: dict[str, Callable[[], object]] = {
            key: lambda p=p: ascend_latents(p, decode, source, ids, settings, 1.0)  # type: ignore[misc]
            for key, p in posteriors.items()
        }
        return measure(
            "pretrained", _label(name), methods, floor=_FLOOR, device=device, seconds=seconds, warmups=1, least_rounds=5
        )


def _label(name: str) -> str:
    count, side, samples = SHAPES[name]
    return label(name, (count, side, side, samples))


def _steps(name: str, device: str, seconds: float) -> list[Row]:
    count, side, _ = SHAPES[name]
    torch.manual_seed(0)
    network = _network(name).to(device).eval()
    images, labels = torch.rand(count, 1, side, side, device=device), torch.arange(count, device=device) % 3
    kept = KeptFeatures(network)
    optimizer = torch.optim.AdamW(network.head.parameters())

    def step(features: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network.head(features()), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    methods: dict[str, Callable[[], object]] = {
        _THROUGH: lambda: step(lambda: kept(images, keep=False)),
        _KEPT: lambda: step(lambda: kept(images)),
    }
    if not torch.equal(kept(images), kept(images, keep=False)):
        raise SystemExit("pretrained: kept features are not those of the encoder, not timed")
    return measure("pretrained", _label(name), methods, floor=_THROUGH, device=device, seconds=seconds, warmups=1)


def _whole(name: str, device: str) -> list[Row]:
    """A whole ``synthesize``: per image, by its phases; and its memory under a limit."""
    count, side, samples = SHAPES[name]
    torch.manual_seed(0)
    network, autoencoder = _network(name).to(device), SmallAutoencoder(1).to(device)
    images, phases = torch.rand(count, 1, side, side), Phases()

    def made(**options: object) -> None:
        synthesize(autoencoder, network, images, samples=samples, latent_std=1.0, progress=False, **options)  # type: ignore[arg-type]

    made(steps=1)
    peak = peak_bytes(lambda: made(memory_limit=_LIMIT), device)
    made(phases=phases)
    machine, spent = describe_machine(device), phases.rounded()
    total = sum(spent.values())
    rows = []
    for key, value in {"all phases": total, **{key: value for key, value in spent.items() if value}}.items():
        each, held = value / count * 1e3, peak if key == "all phases" else None
        method = f"synthesize, 5 steps, per image: {key}" + (f", memory_limit {_LIMIT:g} GiB" if held else "")
        rows.append(
            Row("pretrained", _label(name), method, device, "float32", each, each, each, held, value / total, machine)
        )
    return rows


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    if dtype != torch.float32:
        raise SystemExit("pretrained: wanted --dtype float32")
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in shapes:
            if name == "P3":
                rows += _steps(name, device, seconds)
            else:
                rows += _whole(name, device) if name == "P4" else _ascent(name, device, seconds)
    return rows


def summary(rows: list[Row]) -> list[str]:
    """What the table says in words."""
    lines = []
    by = {(row.shape, row.method): row for row in rows}
    for shape in dict.fromkeys(row.shape for row in rows):
        if (shape, _OURS) in by:
            ours, loop, floor = (by[shape, method] for method in (_OURS, _LOOP, _FLOOR))
            lines.append(
                f"{shape}: T passes cost {ours.median_ms / floor.median_ms:.2f} × the deterministic ascent, the loop "
                f"{loop.median_ms / ours.median_ms:.1f} × as much as tsynd"
            )
        if (shape, _KEPT) in by:
            ratio = by[shape, _THROUGH].median_ms / by[shape, _KEPT].median_ms
            lines.append(f"{shape}: a step of the head on kept features is {ratio:.0f} × faster, bit-equal in features")
    for row in rows:
        if "memory_limit" in row.method and row.peak_bytes is not None:
            lines.append(
                f"{row.shape}: synthesize under memory_limit={_LIMIT:g} ({_LIMIT * 2**10:.0f} MiB) took at most "
                f"{row.peak_bytes / 2**20:.0f} MiB"
            )
    return lines
