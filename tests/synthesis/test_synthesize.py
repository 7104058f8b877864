"""``synthesize``: the same images however they are batched, honest status, clear refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tsynd
from tsynd import Status
from tsynd.synthesis import synthesizer
from tsynd.synthesis.ascent import AscentOptions, AscentSettings, ascent_settings

QUIET: dict[str, Any] = {"progress": False, "samples": 8}


@pytest.fixture
def labels(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 3


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("early", [False, True])
def test_same_images_for_any_batch_size_and_order(
    autoencoder: nn.Module, images: Tensor, labels: Tensor, masks: str, early: bool
) -> None:
    torch.manual_seed(2)
    classifier = TinyClassifier(early=early)
    options = {**QUIET, "masks": masks, "seed": 5}
    whole = tsynd.synthesize(autoencoder, classifier, images, labels, batch_size=64, **options)
    for size in (1, 7):
        part = tsynd.synthesize(autoencoder, classifier, images, labels, batch_size=size, **options)
        assert torch.equal(part.images, whole.images)
        assert torch.equal(part.uncertainty, whole.uncertainty)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = tsynd.synthesize(
        autoencoder, classifier, images[order], labels[order], batch_size=7, sample_ids=order, **options
    )
    assert torch.equal(mixed.images, whole.images[order])
    assert torch.equal(mixed.labels, whole.labels[order])
    if masks == "independent":
        other = tsynd.synthesize(autoencoder, classifier, images, labels, sample_ids=order, **options)
        assert (other.images - whole.images).abs().max() > 1e-3


@pytest.mark.parametrize("objective", ["mutual_information", "entropy"])
@pytest.mark.parametrize("rule", ["l2", "linf"])
def test_uncertainty_rises_within_the_ball(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, objective: str, rule: str
) -> None:
    result = tsynd.synthesize(
        autoencoder, classifier, images, objective=objective, rule=rule, steps=6, latent_std=0.4, **QUIET
    )
    assert len(result) == len(images)
    assert (result.uncertainty >= result.initial_uncertainty).all()
    assert (result.status == Status.RAISED).float().mean() > 0.9
    assert result.trajectory.shape == (len(images), 7)
    torch.testing.assert_close(result.uncertainty, result.trajectory.amax(1))
    torch.testing.assert_close(result.initial_uncertainty, result.trajectory[:, 0])
    offset = (result.latents - result.source_latents).flatten(1)
    limit = 0.5 * 0.4 * (math.sqrt(offset.shape[1]) if rule == "l2" else 1.0)
    length = offset.norm(dim=1) if rule == "l2" else offset.abs().amax(1)
    assert (length <= limit * (1 + 1e-4)).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.decode(result.latents), result.images, rtol=0, atol=1e-5)
    value = tsynd.uncertainty(classifier, result.images, objective=objective, samples=8)
    torch.testing.assert_close(value, result.uncertainty, rtol=1e-3, atol=1e-5)


def test_multilabel(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    labels = torch.randint(0, 2, (len(images), 3))
    result = tsynd.synthesize(
        autoencoder, classifier, images, labels, task="multilabel", label_consistency=0.05, **QUIET
    )
    assert result.labels is not None
    assert result.labels.shape == (len(images), 3)
    assert (result.uncertainty > result.initial_uncertainty).float().mean() > 0.5


def test_every_kind_of_source(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    data = TensorDataset(images, labels)
    wanted = tsynd.synthesize(autoencoder, classifier, images, labels, latent_std=0.4, **QUIET)
    eight_bit = (images * 255).round().to(torch.uint8)
    rounded = tsynd.synthesize(autoencoder, classifier, eight_bit.float() / 255, labels, latent_std=0.4, **QUIET)
    sources: list[tuple[Any, Any, tsynd.SynthesisResult]] = [
        (images.numpy(), labels.numpy(), wanted),
        (eight_bit.numpy(), labels, rounded),
        (data, None, wanted),
        (tsynd.LabelledImages(eight_bit, labels), None, rounded),
        (DataLoader(data, batch_size=5), None, wanted),
        (DataLoader(images, batch_size=9), labels, wanted),
    ]
    for source, given, same in sources:
        result = tsynd.synthesize(autoencoder, classifier, source, given, latent_std=0.4, **QUIET)
        torch.testing.assert_close(result.images, same.images, rtol=0, atol=1e-5)
        assert torch.equal(result.labels, labels)
        assert torch.equal(result.sample_ids, torch.arange(len(images)))


def test_label_consistency_holds(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    posterior = tsynd.MCDropout(classifier, 8)
    with torch.no_grad():
        labels = posterior.probabilities(autoencoder.decode(autoencoder.encode(images))).argmax(1)

    def kept(result: tsynd.SynthesisResult) -> Tensor:
        with torch.no_grad():
            return posterior.probabilities(result.images).gather(1, labels[:, None])[:, 0]

    def run(**options: Any) -> tsynd.SynthesisResult:
        return tsynd.synthesize(autoencoder, posterior, images, labels, latent_std=1.0, **options, **QUIET)

    start, free = kept(run(radius=1e-6)), run(radius=2.0)
    least = float(kept(free).median())
    assert (start > least).all()
    held = run(radius=2.0, label_consistency=least)
    moved, limited = held.status == Status.RAISED, held.status == Status.LABEL_LIMIT
    assert limited.any()
    assert (kept(held)[moved | limited] >= least - 1e-5).all()
    assert (kept(free) < least).sum() > (kept(held) < least).sum()
    assert held.uncertainty.mean() <= free.uncertainty.mean()


class Cracked(TinyAutoencoder):
    """Decodes bright sources to NaN once their latent has moved."""

    def encode(self, images: Tensor) -> Tensor:
        z = super().encode(images)
        self.home = z.detach().clone()
        self.bad = images.flatten(1).mean(1) > 0.75
        return z

    def decode(self, latents: Tensor) -> Tensor:
        out = super().decode(latents)
        if len(latents) != len(self.home):
            return out
        moved = (latents.detach() - self.home).flatten(1).abs().amax(1) > 0
        factor = torch.where(moved & self.bad, math.nan, 1.0)
        return out * factor[:, None, None, None]


def test_a_broken_image_harms_no_other(classifier: nn.Module, images: Tensor) -> None:
    torch.manual_seed(1)
    cracked = Cracked()
    images = images.clone()
    images[4] = 0.9
    result = tsynd.synthesize(cracked, classifier, images, latent_std=0.4, **QUIET)
    images[4] = 0.5
    whole = tsynd.synthesize(cracked, classifier, images, latent_std=0.4, **QUIET)
    assert result.status[4] == Status.NON_FINITE
    assert result.images.isfinite().all()
    torch.testing.assert_close(result.uncertainty[4], result.initial_uncertainty[4])
    rest = torch.arange(len(images)) != 4
    assert torch.equal(result.images[rest], whole.images[rest])
    assert (result.status[rest] == Status.RAISED).float().mean() > 0.8


def test_out_of_memory_halves_the_batch(classifier: nn.Module, images: Tensor) -> None:
    torch.manual_seed(1)
    seen: list[int] = []

    class Greedy(TinyAutoencoder):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(len(latents))
            if len(latents) > 16:
                raise torch.OutOfMemoryError("too much")
            return super().decode(latents)

    greedy = Greedy()
    result = tsynd.synthesize(greedy, classifier, images, latent_std=0.4, batch_size=23, **QUIET)
    assert max(seen) == 32  # 23 in whole tiles
    wanted = tsynd.synthesize(greedy, classifier, images, latent_std=0.4, batch_size=5, **QUIET)
    torch.testing.assert_close(result.images, wanted.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.00 GiB"),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_in_other_words(classifier: nn.Module, images: Tensor, error: Exception) -> None:
    class Greedy(TinyAutoencoder):
        def decode(self, latents: Tensor) -> Tensor:
            if len(latents) > 16:
                raise error
            return super().decode(latents)

    result = tsynd.synthesize(Greedy(), classifier, images, latent_std=0.4, batch_size=23, steps=1, **QUIET)
    assert len(result) == len(images)

    class Broken(TinyAutoencoder):
        def decode(self, latents: Tensor) -> Tensor:
            if len(latents) > 16:
                raise RuntimeError("shapes cannot be multiplied")
            return super().decode(latents)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tsynd.synthesize(Broken(), classifier, images, latent_std=0.4, batch_size=23, steps=1, **QUIET)


def test_large_images_go_in_tiles_of_one_size(
    classifier: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks at its batch, as kernels chosen by its size do, sees the same one whatever the batch is."""
    monkeypatch.setattr(synthesizer, "_TILE_BYTES", 2**17)
    seen: list[int] = []

    class Watching(TinyAutoencoder):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) * (1 + len(images) / 100)

        def decode(self, latents: Tensor) -> Tensor:
            seen.append(len(latents))
            return super().decode(latents) * (1 - len(latents) / 100)

    torch.manual_seed(1)
    watching = Watching()
    options = {**QUIET, "steps": 2, "latent_std": 0.4}
    wanted = tsynd.synthesize(watching, classifier, images, batch_size=1, **options)
    tile = seen[-1]
    assert 1 < tile < 16
    for size in (3, 16, 23):
        seen.clear()
        result = tsynd.synthesize(watching, classifier, images, batch_size=size, **options)
        assert set(seen[-9:]) == {tile}
        assert torch.equal(result.images, wanted.images)
        assert torch.equal(result.latents, wanted.latents)


def test_the_callers_context_does_not_leak_in(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    options = {**QUIET, "steps": 2}
    wanted = tsynd.synthesize(autoencoder, classifier, images, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = tsynd.synthesize(autoencoder, classifier, images, **options)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        inferred = tsynd.synthesize(autoencoder, classifier, images + 0, **options)
        assert torch.is_inference_mode_enabled()
    for result in (cast, inferred):
        assert torch.equal(result.images, wanted.images)
        assert torch.equal(result.uncertainty, wanted.uncertainty)


def test_bfloat16(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    result = tsynd.synthesize(autoencoder, classifier, images, precision="bfloat16", latent_std=0.4, **QUIET)
    assert result.images.dtype == torch.float32
    assert (result.uncertainty > result.initial_uncertainty).float().mean() > 0.8


def test_models_are_left_as_they_were(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    classifier.train()
    models = (classifier, autoencoder)
    state = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    places = [(p.data_ptr(), p.stride()) for model in models for p in model.parameters()]
    rng = torch.get_rng_state()
    tsynd.synthesize(autoencoder, classifier, images, **QUIET)
    assert all(torch.equal(v, state[i][k]) for i, model in enumerate(models) for k, v in model.state_dict().items())
    assert [(p.data_ptr(), p.stride()) for model in models for p in model.parameters()] == places
    assert classifier.training
    assert all(p.requires_grad for p in (*classifier.parameters(), *autoencoder.parameters()))
    assert all(p.grad is None for p in (*classifier.parameters(), *autoencoder.parameters()))
    assert torch.equal(rng, torch.get_rng_state())


def test_save_npz_and_folders(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    result = tsynd.synthesize(autoencoder, classifier, images, labels, **QUIET)
    path = result.save(tmp_path / "out.npz", class_names=("a", "b", "c"))
    with np.load(path, allow_pickle=False) as file:
        assert file["images"].shape == (len(images), 12, 12)
        assert file["images"].dtype == np.uint8
        np.testing.assert_allclose(file["uncertainty"], result.uncertainty)
    assert tsynd.load_data(path).class_names == ("a", "b", "c")
    folder = result.save(tmp_path / "folders", class_names=("a", "b", "c"))
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c", "croissant.json"]
    assert sum(1 for _ in folder.rglob("*.png")) == len(images)
    unlabelled = tsynd.synthesize(autoencoder, classifier, images, **QUIET)
    with pytest.raises(tsynd.InputError, match="labels"):
        unlabelled.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def with_nan(images: Tensor) -> Tensor:
    images = images.clone()
    images[7, 0, 3, 3] = math.nan
    return images


class Lossy(TinyAutoencoder):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[..., :-1]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"images": torch.rand(5, 12, 12)}, r"images: shape \[5, 12, 12\]"),
    ({"images": torch.rand(0, 1, 12, 12)}, "images: shape"),
    ({"images": torch.rand(5, 1, 12, 12) * 255}, "images: values from"),
    ({"images": "somewhere"}, "images"),
    ({"images": []}, "images: got an empty list"),
    ({"images": with_nan}, "image 7 is not finite"),
    ({"images": torch.rand(5, 3, 12, 12)}, "autoencoder: failed on images"),
    ({"labels": [0, 1]}, "labels"),
    ({"labels": [5] * 23}, "labels: values from 5 to 5; wanted 0 to 2"),
    ({"labels": [-1] * 23}, "labels"),
    ({"labels": [0.5] * 23}, "labels"),
    ({"autoencoder": object()}, "autoencoder: got object"),
    ({"autoencoder": Lossy()}, "autoencoder.decode"),
    ({"classifier": nn.Sequential(nn.Flatten(), nn.Linear(144, 3))}, "no active dropout"),
    ({"classifier": nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(99, 3))}, "classifier: failed"),
    ({"objective": "bald"}, "objective: got 'bald'"),
    ({"task": "binary"}, "task: got 'binary'"),
    ({"steps": 0}, "steps: got 0"),
    ({"radius": -0.5}, "radius: got -0.5"),
    ({"radius": math.nan}, "radius: got nan"),
    ({"step_size": 0.0}, "step_size: got 0.0"),
    ({"samples": 0}, "samples: got 0"),
    ({"masks": "none"}, "masks: got 'none'"),
    ({"batch_size": 0}, "batch_size: got 0"),
    ({"label_consistency": 1.5, "labels": [0] * 23}, "label_consistency: got 1.5"),
    ({"label_consistency": 0.5}, "labels: got None"),
    ({"latent_std": -1.0}, "latent_std: got -1.0"),
    ({"sample_ids": [1, 2]}, "sample_ids"),
    ({"sample_ids": [-1] * 23}, "sample_ids: got -1"),
    ({"precision": "float16"}, "precision: got 'float16' on a CPU"),
    ({"precision": "int8"}, "precision: got 'int8'"),
    ({"device": "gpu"}, "device: got 'gpu'"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_before_work(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, change: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"autoencoder": autoencoder, "classifier": classifier, "images": images}
    arguments |= QUIET | {k: v(images) if v is with_nan else v for k, v in change.items()}
    with pytest.raises(tsynd.InputError, match=words) as caught:
        tsynd.synthesize(**arguments)
    assert "\n" not in str(caught.value)


def test_settings_lengths() -> None:
    assert AscentSettings(steps=5, radius=0.5).lengths(2.0, 16) == (0.25 * 8, 0.5 * 8)
    assert AscentSettings(radius=0.5, step_size=0.1, rule="linf").lengths(2.0, 16) == (0.2, 1.0)


def test_settings_from_keywords() -> None:
    names = [field.name for field in dataclasses.fields(AscentSettings)]
    assert list(AscentOptions.__annotations__) == names
    assert ascent_settings(None, {}) == AscentSettings()
    assert ascent_settings(AscentSettings(steps=2, samples=4), {"steps": 7}) == AscentSettings(steps=7, samples=4)
    with pytest.raises(tsynd.InputError, match="stepz: is no setting of the ascent, wanted one of objective, task"):
        ascent_settings(None, {"stepz": 7})
    with pytest.raises(tsynd.InputError, match="steps: got 0"):
        ascent_settings(AscentSettings(), {"steps": 0})


def test_uncertainty_takes_settings_or_keywords(classifier: nn.Module, images: Tensor) -> None:
    plain = tsynd.uncertainty(classifier, images, objective="entropy", samples=8, masks="independent")
    settings = AscentSettings(objective="entropy", samples=8, masks="independent")
    assert torch.equal(tsynd.uncertainty(classifier, images, settings=settings), plain)
    assert not torch.equal(tsynd.uncertainty(classifier, images, settings=settings, masks="shared"), plain)
    with pytest.raises(tsynd.InputError, match="sample: is no setting"):
        tsynd.uncertainty(classifier, images, sample=8)  # type: ignore[call-arg]


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = """
import sys, torch, numpy
own = lambda: {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
before = own()
import tsynd, tsynd.synthesis.api, tsynd.training.augmentation
assert own() - before == {"tsynd"}, own() - before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extension_the_twins_serve() -> None:
    """Same operators, same images, one warning."""
    import subprocess
    import sys

    code = """
import sys, warnings
if sys.argv[1] == "off":
    sys.modules["tsynd.ops._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, tsynd
    from tsynd import ops
assert ops.compiled == (sys.argv[1] == "on")
assert len([w for w in caught if "did not load" in str(w.message)]) == (sys.argv[1] == "off")
torch.manual_seed(0)
classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 3))
images = torch.rand(20, 1, 8, 8)
for masks in ("shared", "independent"):
    pair = (torch.nn.Identity(), torch.nn.Identity())
    result = tsynd.synthesize(pair, classifier, images, masks=masks, samples=8, progress=False)
    print(*[f"{x:.4f}" for x in result.uncertainty.tolist()])
"""
    runs = [
        subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, timeout=120)
        for mode in ("on", "off")
    ]
    assert all(run.returncode == 0 for run in runs), [run.stderr for run in runs]
    values = [torch.tensor([[float(x) for x in line.split()] for line in run.stdout.splitlines()]) for run in runs]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=2e-4)
