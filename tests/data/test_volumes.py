"""Volumes through every part: phantom, networks, ascent, shifts, attacks, files, shards, reports, the job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tsynd
from tsynd.cli import app
from tsynd.data.formats import save_class_folders
from tsynd.data.load import load_data
from tsynd.data.phantom3d import CLASS_NAMES, phantom3d
from tsynd.distributed.driver import synthesize_shards
from tsynd.distributed.pack import pack
from tsynd.distributed.worker import ShardSettings
from tsynd.evaluation.attacks import parse_attacks, perturb
from tsynd.evaluation.shifts import SHIFTS, blur
from tsynd.fx.folding import folded_decoder
from tsynd.report.pictures import centre, draw_examples, focus, slices, views
from tsynd.study.arms import parse_arm
from tsynd.study.settings import StudySettings, check_study
from tsynd.synthesis.result import load_result
from tsynd.utils.errors import InputError

SIZE = 16


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return phantom3d(SIZE, train=24, val=8, test=16)


@pytest.fixture(scope="module")
def npz(arrays: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a MedMNIST3D file lies on the disk."""
    path = tmp_path_factory.mktemp("volumes") / "nodules.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    autoencoder = tsynd.SmallAutoencoder(1, 4, (8, 8), spatial_dims=3)
    classifier = tsynd.SmallResNet(1, 4, (8, 16), dropout="stages", spatial_dims=3)
    with torch.no_grad():
        autoencoder.latent_std.fill_(0.5)
        for norm in (m for m in [*autoencoder.modules(), *classifier.modules()] if isinstance(m, nn.BatchNorm3d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 2)
    return autoencoder.eval(), classifier.eval()


@pytest.fixture
def volumes() -> Tensor:
    return torch.rand(5, 1, 12, 16, 20, generator=torch.Generator().manual_seed(0))


# Data


def test_phantom_layout(arrays: dict[str, Any]) -> None:
    for split, count in (("train", 24), ("val", 8), ("test", 16)):
        assert arrays[f"{split}_images"].shape == (count, SIZE, SIZE, SIZE)
        assert arrays[f"{split}_images"].dtype == np.uint8
        assert arrays[f"{split}_labels"].shape == (count, 1)
    assert tuple(arrays["class_names"]) == CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    means = arrays["train_images"].mean(axis=(1, 2, 3))
    assert 20 < means.min() < means.max() < 140
    for bad in ({"size": 15}, {"size": 97}, {"val": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            phantom3d(**bad)


def test_a_volume_depends_on_its_seed_split_and_index_only(arrays: dict[str, Any]) -> None:
    longer = phantom3d(SIZE, train=40, val=8, test=2)
    np.testing.assert_array_equal(longer["train_images"][:24], arrays["train_images"])
    np.testing.assert_array_equal(longer["test_images"], arrays["test_images"][:2])
    assert not np.array_equal(longer["val_images"], arrays["test_images"][:8])
    other = phantom3d(SIZE, train=8, val=1, test=1, seed=1)
    assert not np.array_equal(other["train_images"], arrays["train_images"][:8])


def test_density_tells_classes_apart_only_in_part() -> None:
    arrays = phantom3d(SIZE, train=200, val=1, test=1)
    labels = arrays["train_labels"][:, 0]
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
    density = arrays["train_images"][:, middle, middle, middle].mean(axis=(1, 2, 3))
    glass, solid, calcified = (density[labels == CLASS_NAMES.index(n)] for n in ("ground-glass", "solid", "calcified"))
    assert np.median(glass) < np.median(solid) < np.median(calcified)
    assert np.quantile(solid, 0.9) > np.quantile(calcified, 0.1)


def test_sources_by_name_and_file(npz: Path) -> None:
    source = load_data(npz, train_size=12)
    assert source.image_shape == (1, SIZE, SIZE, SIZE)
    assert source.spatial_dims == 3
    assert load_data("phantom3d:16", train_size=8).image_shape == (1, 16, 16, 16)
    with pytest.raises(InputError, match="such as 'phantom3d:64'"):
        load_data("phantom3d:big")


# Networks


def test_networks_keep_their_shape_and_their_files(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    volumes = torch.rand(2, 1, 12, 16, 20)
    for model in models:
        tsynd.save_model(model, tmp_path / "model")
        again = tsynd.load_model(tmp_path / "model")
        with torch.no_grad():
            torch.testing.assert_close(again(volumes), model(volumes))
    autoencoder, classifier = models
    assert autoencoder.encode(volumes).shape == (2, 4, 3, 4, 5)
    assert autoencoder(volumes).shape == volumes.shape
    assert classifier(volumes).shape == (2, 4)
    assert any(isinstance(module, nn.Dropout3d) for module in classifier.modules())
    with pytest.raises(InputError, match="D, H and W to be multiples of 4"):
        autoencoder.encode(volumes[:, :, :10])
    with pytest.raises(InputError, match="spatial_dims"):
        tsynd.SmallResNet(spatial_dims=4)


def test_a_card_of_before_volumes_is_one_of_pictures(tmp_path: Path) -> None:
    path = tsynd.save_model(tsynd.SmallResNet(1, 3), tmp_path / "model")
    card = json.loads(path.with_suffix(".json").read_text())
    del card["config"]["spatial_dims"]
    path.with_suffix(".json").write_text(json.dumps(card))
    assert tsynd.load_model(path)(torch.rand(1, 1, 8, 8)).shape == (1, 3)


def test_batch_norm_of_volumes_is_folded(models: tuple[nn.Module, nn.Module]) -> None:
    latents = torch.randn(2, 4, 3, 3, 3)
    decode = folded_decoder(models[0], latents)
    assert not any(isinstance(m, nn.BatchNorm3d) for m in decode.modules())  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(decode(latents), models[0].decode(latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_ascent_of_volumes(models: tuple[nn.Module, nn.Module], volumes: Tensor, masks: str) -> None:
    options: dict[str, Any] = {"samples": 8, "steps": 3, "masks": masks, "progress": False}
    made = tsynd.synthesize(*models, volumes, torch.arange(5) % 4, **options)
    assert made.images.shape == volumes.shape
    assert bool((made.uncertainty > made.initial_uncertainty).all())
    order = torch.tensor([3, 1])
    part = tsynd.synthesize(*models, (volumes[order] * 255).round().byte(), sample_ids=order, **options)
    exact = tsynd.synthesize(*models, (volumes * 255).round().byte(), **options)
    assert torch.equal(part.images, exact.images[order])


# Shifts, attacks


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_of_volumes(kind: str, channels: int) -> None:
    volumes = torch.rand(3, channels, 12, 16, 20, generator=torch.Generator().manual_seed(1))
    shift = SHIFTS[kind][3]
    moved = shift(volumes, torch.arange(3), 0)
    assert moved.shape == volumes.shape
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert float((moved - volumes).abs().mean()) > 0.005
    alone = shift(volumes[1:2], torch.tensor([1]), 0)
    torch.testing.assert_close(alone, moved[1:2], rtol=0, atol=1e-6)


def test_blur_is_a_gaussian_in_space() -> None:
    from scipy.ndimage import gaussian_filter

    volume = torch.rand(1, 1, 12, 16, 20)
    wanted = gaussian_filter(volume[0, 0].numpy(), 1.0, mode="mirror", truncate=3)
    np.testing.assert_allclose(blur(volume, torch.arange(1), 0, sigma=1 / 12)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("attack", ["fgsm:4/255", "pgd:4/255", "square:8/255"])
def test_attacks_on_volumes(models: tuple[nn.Module, nn.Module], volumes: Tensor, attack: str) -> None:
    (parsed,) = parse_attacks([attack])
    if parsed.kind == "square":
        with pytest.raises(InputError, match="square on 16 x 20"):
            perturb(models[1], volumes, torch.arange(5) % 4, parsed)
        volumes = volumes[..., :16]
    found = perturb(models[1], volumes, torch.arange(5) % 4, parsed, steps=3)
    assert not torch.equal(found, volumes)
    assert found.shape == volumes.shape
    assert float((found - volumes).abs().max()) <= parsed.budget + 1e-6


# Slices


def test_planes_meet_where_volumes_differ_most() -> None:
    start = torch.zeros(1, 8, 10, 12)
    end = start.clone()
    end[0, 2, 3, 4] = 0.5
    end[0, 2, 3, 5] = 0.5
    end[0, 7, 9, 11] = 0.9  # a single voxel at the border counts for less than two neighbours
    z, y, x = focus(end - start)
    assert abs(z - 2) <= 1
    assert abs(y - 3) <= 1
    assert x in (4, 5)
    axial, coronal, sagittal = slices(end, (2, 3, 4))
    assert axial.shape == (1, 10, 12)
    assert coronal.shape == (1, 8, 12)
    assert sagittal.shape == (1, 8, 10)
    assert axial[0, 3, 4] == coronal[0, 8 - 1 - 2, 4] == sagittal[0, 8 - 1 - 2, 3] == 0.5  # the head is above
    shown = views([start, start, end])
    assert [title.split(",")[0] for title, _ in shown] == ["axial", "coronal", "sagittal"]
    assert [title for title, _ in views([torch.zeros(1, 4, 4)] * 3)] == [""]
    assert centre(start).shape == (1, 10, 12)


def test_examples_of_volumes_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    volumes = torch.rand(2, 1, 8, 8, 8)
    path = draw_examples(
        tmp_path / "examples.png", volumes, volumes, volumes.flip(2), torch.rand(2), torch.rand(2), ["a", "b"]
    )
    width, height = Image.open(path).size
    assert height > 1.4 * width  # six rows of four


# Files


def test_results_are_saved_as_npz_and_never_as_pictures(
    models: tuple[nn.Module, nn.Module], volumes: Tensor, tmp_path: Path
) -> None:
    made = tsynd.synthesize(*models, volumes, torch.arange(5) % 4, samples=4, steps=1, progress=False)
    again = load_result(made.save(tmp_path / "made.npz"))
    torch.testing.assert_close(again.images, made.images, rtol=0, atol=0.5 / 255 + 1e-6)
    with pytest.raises(InputError, match=r"5 volumes.*save volumes as \.npz"):
        made.save(tmp_path / "folder")
    with pytest.raises(InputError, match="volumes"):
        save_class_folders(tmp_path / "folder", volumes, torch.zeros(5, dtype=torch.int64), ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.croissant.json", "made.npz"]


def test_shards_of_volumes(models: tuple[nn.Module, nn.Module], npz: Path, tmp_path: Path) -> None:
    names = [str(tsynd.save_model(model, tmp_path / f"model{i}")) for i, model in enumerate(models)]
    job: dict[str, Any] = {"data": str(npz), "autoencoder": names[0], "classifier": names[1], "device": "cpu"}
    job |= {"samples": 4, "steps": 1, "shard_size": 10}
    with pytest.raises(InputError, match="png holds pictures, the data are volumes; use npy"):
        synthesize_shards(ShardSettings(**job, output=str(tmp_path / "no")), progress=False)
    shards = tmp_path / "shards"
    assert synthesize_shards(ShardSettings(**job, output=str(shards), image_format="npy"), progress=False)["complete"]
    with pytest.raises(InputError, match=r"the shards hold volumes; wanted an \.npz"):
        pack(shards, tmp_path / "folder", progress=False)
    assert pack(shards, tmp_path / "packed.npz", progress=False) == 24
    source = load_data(npz)
    made = tsynd.synthesize(*models, source.train, samples=4, steps=1, progress=False)
    with np.load(tmp_path / "packed.npz") as packed:
        assert packed["images"].shape == (24, SIZE, SIZE, SIZE)
        np.testing.assert_array_equal(packed["images"], (made.images[:, 0] * 255).round().byte().numpy())
    shard = tsynd.load_data(tmp_path / "packed.npz")
    assert shard.spatial_dims == 3


def test_a_volume_export_equals_torch(tmp_path: Path) -> None:
    from tsynd.export.torchscript import export_torchscript

    torch.manual_seed(0)
    autoencoder = tsynd.SmallAutoencoder(1, 2, (4, 4), spatial_dims=3).eval()
    classifier = tsynd.SmallResNet(1, 3, (4,), spatial_dims=3).eval()
    # the export itself compares what it wrote with torch
    path = export_torchscript(
        autoencoder, classifier, tmp_path / "s.pt", image_shape=[1, 8, 8, 8], samples=4, steps=2, latent_std=0.5
    )
    given = torch.rand(2, 1, 8, 8, 8)
    assert torch.jit.load(path)(given)[0].shape == given.shape
    with pytest.raises(InputError, match=r"wanted \[C, H, W\] or \[C, D, H, W\]"):
        export_torchscript(autoencoder, classifier, tmp_path / "s.pt", image_shape=[8, 8], latent_std=0.5)


def test_a_study_of_volumes_refuses_what_is_for_pictures(npz: Path) -> None:
    source = load_data(npz, train_size=12)
    arms = [parse_arm(name) for name in ("real", "adversarial", "mutual_information")]
    settings = StudySettings(autoencoder_widths=(4, 4), latent_channels=2, conditions=("clean", "jpeg:2"))
    check_study(settings, source, arms)
    with pytest.raises(InputError, match="arms: got randaugment for volumes"):
        check_study(settings, source, [*arms, parse_arm("randaugment")])


# The job


def test_whole_job_on_a_file_of_volumes(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--autoencoder-iterations", "30", "--iterations", "15", "--samples", "16", "--quiet"]
    line = [sys.executable, "-m", "tsynd", "run", "--data", str(npz), "--output", str(out), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = load_result(out / "synthetic.npz")
    assert result.images.shape == (24, 1, SIZE, SIZE, SIZE)
    assert float((result.uncertainty > result.initial_uncertainty).double().mean()) >= 0.95
    page = (out / "report.html").read_text()
    # twelve examples in three planes of four pictures
    assert page.count("<img") == 12 * 3 * 4
    assert all(f"{plane}, slice " in page for plane in ("axial", "coronal", "sagittal"))
    assert (out / "examples.png").stat().st_size > 10_000
    models = ["--autoencoder", out / "autoencoder.safetensors", "--classifier", out / "classifier.safetensors"]
    wanted = ["synthesize", "--data", npz, *models, "--output", tmp_path / "folder"]
    with pytest.raises(InputError, match=r"for volumes, wanted an \.npz file"):
        app([str(word) for word in wanted], standalone_mode=False)
    assert not (tmp_path / "folder").exists()
