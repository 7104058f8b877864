"""Several threads at once, and what is left behind: nothing."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, nn

import tsynd
from tsynd.fx.layout import LaidOut, channels_last

QUIET: dict[str, Any] = {"progress": False, "latent_std": 0.4, "samples": 4, "steps": 2}
THREADS = 8


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    torch.set_num_threads(before)


class Attends(nn.Module):
    """Runs as a whole, in part in training mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.2, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images.flatten(1, 2)).mean(1) if images.sum() > -1 else images)


class Hidden(TinyClassifier):
    """Cannot be traced, but has a head."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > -1 else -images)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "fused head": TinyClassifier,
    "batched tail": lambda: TinyClassifier(early=True),
    "whole network": Attends,
    "hooked": Hidden,
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(2)
    return KINDS[kind]().train()


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What the work gives in every thread, all begun together."""
    barrier, found, errors = threading.Barrier(THREADS), [None] * THREADS, []

    def run(number: int) -> None:
        try:
            barrier.wait()
            found[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def state(*networks: nn.Module) -> list[Any]:
    """What a call must leave as it was: torch's classes, the thread's modes, the networks'."""
    classes = [dict(vars(kind)) for kind in (nn.Module, nn.Linear, nn.Conv2d, nn.Dropout, nn.Sequential, Tensor)]
    mine = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    own = [
        (
            type(module),
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for network in networks
        for module in network.modules()
    ]
    flags = [(p.requires_grad, p.stride(), p.data_ptr()) for network in networks for p in network.parameters()]
    return [classes, mine, own, flags]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["nothing", "networks", "posterior"])
def test_threads_give_what_one_gives(kind: str, share: str, images: Tensor) -> None:
    autoencoder, classifier = TinyAutoencoder(), made(kind)
    posterior = tsynd.MCDropout(classifier, 4)
    wanted = tsynd.synthesize(autoencoder, classifier, images, **QUIET)
    values = tsynd.uncertainty(classifier, images, samples=4)
    before = state(autoencoder, classifier)

    def work(number: int) -> list[Tensor]:
        own: Any = [autoencoder, posterior if share == "posterior" else classifier]
        if share == "nothing":
            own = copy.deepcopy(own)
        found = []
        for turn in range(2):
            options = QUIET | {"checkpointing": bool((turn + number) % 2)}
            found.append(tsynd.synthesize(*own, images, **options).images)
            found.append(tsynd.uncertainty(own[1], images, samples=4))
        return found

    for found in in_threads(work):
        for one in found[::2]:
            assert torch.equal(one, wanted.images)
        for one in found[1::2]:
            assert torch.equal(one, values)
    assert state(autoencoder, classifier) == before


@pytest.mark.parametrize("kind", ["fused head", "hooked"])
def test_networks_can_be_used_while_others_work_on_them(kind: str, images: Tensor) -> None:
    autoencoder, classifier = TinyAutoencoder().eval(), made(kind).eval()
    wanted = classifier(images).detach(), autoencoder.decode(autoencoder.encode(images)).detach()

    def work(number: int) -> list[tuple[Tensor, Tensor]]:
        if number % 2:
            tsynd.synthesize(autoencoder, classifier, images, **QUIET)
            tsynd.uncertainty(classifier, images, samples=4)
            return []
        return [
            (classifier(images).detach(), autoencoder.decode(autoencoder.encode(images)).detach()) for _ in range(40)
        ]

    for found in in_threads(work)[::2]:
        for one in found:
            assert all(map(torch.equal, one, wanted))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in KINDS for name in ("synthesize", "checkpointing", "uncertainty")),
        *((kind, name) for kind in ("fused head", "batched tail") for name in ("export_torchscript", "export_onnx")),
    ],
)
def test_weights_stay_in_their_memory_during_calls(kind: str, name: str, images: Tensor, tmp_path: Path) -> None:
    if name == "export_onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    autoencoder, classifier = TinyAutoencoder(), made(kind)
    weights = [*autoencoder.parameters(), *classifier.parameters()]
    seen: list[list[Any]] = []

    def look(*_: object) -> None:
        seen.append([(p.data_ptr(), p.stride(), p._version) for p in weights])

    look()
    classifier.register_forward_pre_hook(look)
    autoencoder.up.register_forward_pre_hook(look)
    CALLS[name](autoencoder, classifier, images, tmp_path)
    assert len(seen) > 1
    assert all(one == seen[0] for one in seen)


class StopError(Exception):
    pass


def failing(error: type[BaseException], after: int) -> nn.Module:
    """A classifier that raises at one of its calls."""

    class Fails(TinyClassifier):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            Fails.calls += 1
            if Fails.calls > after:
                raise error("stop")
            return super().forward(images)

    torch.manual_seed(2)
    return Fails().train()


CALLS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Path], Any]] = {
    "synthesize": lambda a, c, x, path: tsynd.synthesize(a, c, x, **QUIET),
    "checkpointing": lambda a, c, x, path: tsynd.synthesize(a, c, x, checkpointing=True, **QUIET),
    "uncertainty": lambda a, c, x, path: tsynd.uncertainty(c, x, samples=4),
    "evaluate": lambda a, c, x, path: tsynd.evaluate(c, (x, torch.arange(len(x)) % 3), conditions=("clean",)),
    "posterior": lambda a, c, x, path: tsynd.MCDropout(c, 4).logits(x).sum().backward(),
    "ensemble": lambda a, c, x, path: tsynd.Ensemble([c, copy.deepcopy(c)]).uncertainty(x),
    "export_torchscript": lambda a, c, x, path: tsynd.export_torchscript(
        a, c, path / "c.pt", "synthesizer", image_shape=(1, 12, 12), samples=2, latent_std=0.4
    ),
    "export_onnx": lambda a, c, x, path: tsynd.export_onnx(
        None, c, path / "c.onnx", "classifier", image_shape=(1, 12, 12), samples=2
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", [None, StopError, KeyboardInterrupt])
def test_calls_leave_everything_as_it_was(
    name: str, error: type[BaseException] | None, images: Tensor, tmp_path: Path
) -> None:
    if name == "export_onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    counts = [0] if error is None else [0, 1, 3, 6, 9]
    for after in counts:
        torch.manual_seed(1)
        autoencoder = TinyAutoencoder().train()
        classifier = made("batched tail") if error is None else failing(error, after)
        classifier.body[1].eval()  # modes of its own
        classifier.head.bias.requires_grad_(False)
        before = state(autoencoder, classifier)
        try:
            CALLS[name](autoencoder, classifier, images, tmp_path)
        except (StopError, KeyboardInterrupt, tsynd.InputError):
            assert error is not None
        for parameter in classifier.parameters():
            parameter.grad = None
        assert state(autoencoder, classifier) == before


def test_weights_that_are_exchanged_while_they_are_laid_out() -> None:
    """As by a thread that folds the same network: it puts equal weights in their place."""
    network = nn.Conv2d(2, 3, 3)

    def order(weight: Tensor) -> Tensor:
        network.weight = nn.Parameter(network.weight.detach().clone())
        return channels_last(weight)

    x = torch.rand(1, 2, 5, 5)
    torch.testing.assert_close(LaidOut(network, order).module(x), network(x))
