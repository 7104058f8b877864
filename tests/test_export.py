"""Exported files give what torch gives, for any batch size, or say why they cannot be made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, nn

import tsynd
from tsynd.ascent import AscentSettings
from tsynd.export import check, export_onnx
from tsynd.runtime import OnnxSynthesizer, read_metadata

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

SMALL: dict[str, Any] = {"image_shape": [1, 12, 12], "samples": 8, "latent_std": 0.4, "steps": 3}


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, **inputs: Tensor) -> list[Tensor]:
    arrays = {name: x.detach().contiguous().numpy() for name, x in inputs.items()}
    return [torch.from_numpy(array) for array in session(path).run(None, arrays)]


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


class Layers(nn.Module):
    """One of everything that has a derivative of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        middle: dict[str, list[nn.Module]] = {
            "max": [nn.MaxPool2d(3, 2, 1), nn.SiLU()],
            "average": [nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.GELU()],
            "adaptive": [nn.AdaptiveAvgPool2d((5, 7)), nn.LeakyReLU()],
            "group": [nn.GroupNorm(2, 8), nn.ELU()],
            "nearest": [nn.Upsample(scale_factor=2), nn.Hardtanh(), nn.InstanceNorm2d(8, affine=True)],
            "strided": [nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2), nn.Tanh()],
        }
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), *middle[kind], nn.Dropout2d(0.3), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.norm, self.alpha = nn.LayerNorm(8), nn.AlphaDropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.net(images).mean((2, 3)))
        return self.head(self.alpha(features)) * 4


class Unpooled(nn.Module):
    """Holds a layer without a counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.FractionalMaxPool2d(2, output_size=4), nn.Flatten())
        self.dropout, self.head = nn.Dropout(), nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.net(images)))


@pytest.mark.parametrize(
    ("early", "task", "objective"),
    [(False, "multiclass", "mutual_information"), (True, "multilabel", "entropy")],
)
def test_synthesizer_is_synthesize(
    autoencoder: nn.Module, tmp_path: Path, early: bool, task: str, objective: str
) -> None:
    torch.manual_seed(2)
    classifier = TinyClassifier(early=early)
    options: dict[str, Any] = {"task": task, "objective": objective, "samples": 8, "latent_std": 0.4, "seed": 5}
    path = export_onnx(classifier, autoencoder, tmp_path / "s.onnx", image_shape=[1, 12, 12], **options)
    run_file = OnnxSynthesizer(path)
    assert run_file.metadata["seed"] == 5
    images = torch.rand(64, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    for count in (1, 5, 64):
        wanted = tsynd.synthesize(autoencoder, classifier, images[:count], progress=False, **options)
        got = run_file(images[:count].numpy())
        close(torch.from_numpy(got.images), wanted.images, 1e-4)
        close(torch.from_numpy(got.latents), wanted.latents, 1e-4)
        close(torch.from_numpy(got.uncertainty), wanted.uncertainty)
        close(torch.from_numpy(got.initial_uncertainty), wanted.initial_uncertainty)
        assert np.array_equal(got.status, wanted.status.numpy())
    assert (got.status == tsynd.Status.RAISED).mean() > 0.9


def test_other_settings_reach_the_file(autoencoder: nn.Module, classifier: nn.Module, tmp_path: Path) -> None:
    images = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    for steps, rule in ((1, "linf"), (2, "l2")):
        options: dict[str, Any] = {"steps": steps, "rule": rule, "radius": 1.5, "step_size": 1.0, "samples": 4}
        options["latent_std"] = 0.4
        path = export_onnx(classifier, autoencoder, tmp_path / "s.onnx", image_shape=[1, 12, 12], **options)
        wanted = tsynd.synthesize(autoencoder, classifier, images, progress=False, **options)
        close(torch.from_numpy(OnnxSynthesizer(path)(images.numpy()).images), wanted.images, 1e-4)


def test_classifier_and_step(autoencoder: TinyAutoencoder, classifier: nn.Module, tmp_path: Path) -> None:
    posterior = tsynd.MCDropout(classifier, 8, seed=3)
    images = torch.rand(7, 1, 12, 12)
    path = export_onnx(posterior, None, tmp_path / "c.onnx", "classifier", image_shape=[1, 12, 12], class_names="abc")
    metadata = read_metadata(session(path))
    assert (metadata["class_names"], metadata["seed"], metadata["samples"]) == (["a", "b", "c"], 3, 8)
    with posterior.frozen(), tsynd.posterior.frozen(autoencoder):
        for got, wanted in zip(run(path, images=images), classify(posterior, images, "multiclass"), strict=True):
            close(got, wanted)
        path = export_onnx(posterior, autoencoder, tmp_path / "t.onnx", "step", **SMALL)
        origins = autoencoder.encode(images)
        latents = origins + 0.1
        settings = AscentSettings(steps=3)
        climb = Climb(posterior, autoencoder, settings, 0.4, 36)
        moved, value = run(path, latents=latents, origins=origins)
        wanted_moved, wanted_value = climb.step(latents, origins)
    close(value, wanted_value)
    close(moved, wanted_moved, 1e-4)
    assert float((moved - origins).flatten(1).norm(dim=1).max()) <= settings.radius * 0.4 * math.sqrt(36) * 1.0001


def test_encoder_and_decoder_need_no_classifier(autoencoder: TinyAutoencoder, tmp_path: Path) -> None:
    images = torch.rand(7, 1, 12, 12)
    path = export_onnx(None, autoencoder, tmp_path / "e.onnx", "encoder", image_shape=[1, 12, 12])
    latents = autoencoder.encode(images)
    close(run(path, images=images)[0], latents)
    path = export_onnx(None, autoencoder, tmp_path / "d.onnx", "decoder", image_shape=[1, 12, 12])
    close(run(path, latents=latents)[0], autoencoder.decode(latents))


@pytest.mark.parametrize("kind", ["max", "average", "adaptive", "group", "nearest", "strided"])
def test_layers_and_their_derivatives(autoencoder: nn.Module, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(4)
    export_onnx(Layers(kind), autoencoder, tmp_path / "s.onnx", "step", **SMALL)  # checks itself


@pytest.mark.parametrize("dropout", ["head", "stages"])
def test_default_networks(tmp_path: Path, dropout: str) -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    classifier = tsynd.SmallResNet(1, 2, widths=(4, 8), dropout=dropout)
    autoencoder = tsynd.SmallAutoencoder(1, 2, widths=(4, 8))
    path = export_onnx(classifier, autoencoder, tmp_path / "s.onnx", **SMALL)
    images = torch.rand(5, 1, 12, 12)
    wanted = tsynd.synthesize(autoencoder, classifier, images, samples=8, latent_std=0.4, steps=3, progress=False)
    got = OnnxSynthesizer(path)(images.numpy())
    close(torch.from_numpy(got.images), wanted.images, 1e-4)
    close(torch.from_numpy(got.uncertainty), wanted.uncertainty)


def test_monai_autoencoder_and_ensemble(classifier: nn.Module, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = nets.AutoencoderKL(
        2, channels=(4, 8), latent_channels=2, num_res_blocks=1, norm_num_groups=2, attention_levels=(False, True)
    )
    ensemble = tsynd.Ensemble([classifier, TinyClassifier()])
    path = export_onnx(ensemble, model, tmp_path / "s.onnx", **SMALL)
    images = torch.rand(5, 1, 12, 12)
    wanted = tsynd.synthesize(model, ensemble, images, latent_std=0.4, steps=3, progress=False)
    got = OnnxSynthesizer(path)(images.numpy())
    close(torch.from_numpy(got.images), wanted.images, 1e-4)
    close(torch.from_numpy(got.uncertainty), wanted.uncertainty)


def test_non_finite_gradients_freeze_their_image_alone(classifier: nn.Module, tmp_path: Path) -> None:
    class Fragile(TinyAutoencoder):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) + 100 * (images.amin((1, 2, 3), keepdim=True) > 0.99)

        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + 0 * (latents.amax((1, 2, 3), keepdim=True) / 10) ** 100

    torch.manual_seed(1)
    autoencoder = Fragile()
    images = torch.rand(4, 1, 12, 12)
    images[2] = 1
    wanted = tsynd.synthesize(autoencoder, classifier, images, samples=8, latent_std=0.4, steps=3, progress=False)
    got = OnnxSynthesizer(export_onnx(classifier, autoencoder, tmp_path / "s.onnx", **SMALL))(images.numpy())
    assert got.status[2] == tsynd.Status.NON_FINITE
    assert np.array_equal(got.status, wanted.status.numpy())
    others = [0, 1, 3]
    close(torch.from_numpy(got.images)[others], wanted.images[others], 1e-4)
    assert np.isfinite(got.uncertainty[others]).all()


def test_what_cannot_be_exported(autoencoder: nn.Module, classifier: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "s.onnx"
    independent = tsynd.MCDropout(classifier, 4, masks="independent")
    with pytest.raises(tsynd.InputError, match="masks: got 'independent', wanted 'shared'"):
        export_onnx(independent, autoencoder, path, **SMALL)
    with pytest.raises(tsynd.InputError, match=r"net\.1 \(FractionalMaxPool2d\) uses the operator aten\.\w+"):
        export_onnx(Unpooled(), None, path, "classifier", image_shape=[1, 12, 12])
    with pytest.raises(tsynd.InputError, match="latent_std: got None"):
        export_onnx(classifier, autoencoder, path, image_shape=[1, 12, 12])
    with pytest.raises(tsynd.InputError, match="kind: got 'loop'"):
        export_onnx(classifier, autoencoder, path, "loop", image_shape=[1, 12, 12])
    with pytest.raises(tsynd.InputError, match="image_shape"):
        export_onnx(classifier, autoencoder, path, image_shape=[12, 12])
    with pytest.raises(tsynd.InputError, match="classifier: got None"):
        export_onnx(None, autoencoder, path, image_shape=[1, 12, 12])
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_deleted(
    autoencoder: nn.Module, classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "classify", lambda *a: tuple(x + 0.001 for x in classify(*a)))
    with pytest.raises(tsynd.InputError, match="probabilities of the exported file differs from torch's by 0.00"):
        export_onnx(classifier, None, tmp_path / "c.onnx", "classifier", image_shape=[1, 12, 12])
    assert list(tmp_path.iterdir()) == []
