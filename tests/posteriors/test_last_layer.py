"""Sampled last layers: Laplace, their files, and what they give to an ascent."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyClassifier
from torch import Tensor, nn

import tsynd
from tsynd.ops import reference
from tsynd.posteriors.laplace import STRUCTURES
from tsynd.posteriors.last_layer import HeadGaussian, SampledHead
from tsynd.utils.errors import InputError, MissingExtraError

QUIET = {"progress": False, "latent_std": 0.4}


class Opaque(TinyClassifier):
    """As TinyClassifier, but torch.fx cannot trace it."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > -1 else -images)


@pytest.fixture
def labels(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 3


def identity_gaussian(linear: nn.Linear, scale: float = 0.1) -> HeadGaussian:
    mean = torch.cat([p.detach().double().flatten() for p in linear.parameters()])
    return HeadGaussian("diag", {"mean": mean, "std": torch.full_like(mean, scale)})


# --- the Gaussian


def random_precision(size: int) -> Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return root @ root.t() / size


def test_full_samples_have_the_covariance() -> None:
    precision = random_precision(6)
    mean = torch.arange(6.0, dtype=torch.float64)
    gaussian = HeadGaussian("full", {"mean": mean, "cholesky": torch.linalg.cholesky(precision)})
    drawn = gaussian.draw(20000, 0)
    wanted = torch.linalg.inv(precision)
    assert (drawn.mean(0) - mean).abs().max() < 5 * float(wanted.diagonal().max() / 20000) ** 0.5
    torch.testing.assert_close(drawn.t().cov(), wanted, rtol=0, atol=0.06 * float(wanted.abs().max()))


def test_samples_are_addressed_by_seed_and_pass() -> None:
    gaussian = identity_gaussian(nn.Linear(5, 3))
    many = gaussian.draw(8, 3)
    assert torch.equal(gaussian.draw(3, 3), many[:3])
    assert not torch.equal(gaussian.draw(8, 4), many)
    assert torch.equal(gaussian.draw(8, 3 + 2**64), many)
    assert len(many.unique(dim=0)) == 8
    assert gaussian.draw(2, -1).isfinite().all()


def test_low_rank_samples_have_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    variance = torch.rand(6, generator=generator, dtype=torch.float64)
    gaussian = HeadGaussian("low_rank", {"mean": mean, "variance": variance, "deviations": rows})
    drawn, wanted = gaussian.draw(20000, 0), variance.diag() + rows.t() @ rows
    assert (drawn.mean(0) - mean).abs().max() < 5 * float(wanted.diagonal().max() / 20000) ** 0.5
    torch.testing.assert_close(drawn.t().cov(), wanted, rtol=0, atol=0.06 * float(wanted.abs().max()))


# --- laplace-torch


def fitted(structure: str, features: Tensor, labels: Tensor) -> object:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 5), act=nn.Tanh(), head=nn.Linear(5, 3)))
    found = laplace.Laplace(
        model,
        "classification",
        subset_of_weights="last_layer",
        hessian_structure=structure,
        last_layer_name="head",
        prior_precision=2.0,
    )
    found.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=64))
    return found


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 4, generator=generator), torch.randint(0, 3, (100,), generator=generator)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_laplace_is_read_as_it_is(structure: str, vectors: tuple[Tensor, Tensor]) -> None:
    found = fitted(structure, *vectors)
    posterior = tsynd.LaplaceHead(found, samples=6)
    assert posterior.gaussian.kind == structure
    drawn = posterior.gaussian.draw(6000, 0)
    theirs = found.sample(60000).double()  # type: ignore[attr-defined]
    spread = theirs.std(0)
    assert ((drawn.mean(0) - found.mean.double()).abs() < 5 * spread / 6000**0.5).all()  # type: ignore[attr-defined]
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.08, atol=0)
    largest = float(theirs.t().cov().abs().max())
    torch.testing.assert_close(drawn.t().cov(), theirs.t().cov(), rtol=0, atol=0.08 * largest)
    # logits of a sample are those of the network with that sample as its head
    logits = posterior.logits(vectors[0][:7])
    sample = posterior.gaussian.draw(6, 0)[2].float()
    model = found.model.model  # type: ignore[attr-defined]
    hidden = model.act(model.body(vectors[0][:7]))
    torch.testing.assert_close(logits[2], hidden @ sample[:15].reshape(3, 5).t() + sample[15:], rtol=1e-4, atol=1e-5)
    value = posterior.uncertainty(vectors[0][:7])
    torch.testing.assert_close(value.double(), reference.uncertainty_value(logits.double()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", [TinyClassifier, Opaque])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_laplace_fit(structure: str, network: type[nn.Module], images: Tensor, labels: Tensor) -> None:
    pytest.importorskip("laplace", reason="laplace-torch is not installed")
    torch.manual_seed(2)
    classifier = network().train()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    posterior = tsynd.LaplaceHead.fit(classifier, (images, labels), structure=structure, prior_precision=1.0, samples=8)
    assert classifier.training
    assert classifier.body[1].training
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert posterior.layer == "head"
    torch.testing.assert_close(posterior.gaussian.tensors["mean"][:384].float(), classifier.head.weight.flatten())
    # the same as laplace-torch on the whole network
    laplace = pytest.importorskip("laplace")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32)
    options = {"subset_of_weights": "last_layer", "hessian_structure": structure, "last_layer_name": "head"}
    whole = laplace.Laplace(classifier.eval(), "classification", prior_precision=1.0, **options)
    whole.fit(data)
    theirs = tsynd.LaplaceHead(whole, classifier, samples=8)
    if structure == "full":
        for name, value in posterior.gaussian.tensors.items():
            torch.testing.assert_close(value, theirs.gaussian.tensors[name], rtol=1e-3, atol=1e-3)
    ours, wanted = posterior.uncertainty(images), theirs.uncertainty(images)
    assert (ours > 0).all()
    if structure == "kron":  # eigenvectors have no sign: the samples differ, their law does not
        assert abs(float(ours.detach().mean() / wanted.detach().mean()) - 1) < 0.3
    else:
        torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-5)


def test_prior_precision_is_found(images: Tensor, labels: Tensor) -> None:
    pytest.importorskip("laplace", reason="laplace-torch is not installed")
    posterior = tsynd.LaplaceHead.fit(TinyClassifier(), (images, labels), structure="diag")
    fixed = tsynd.LaplaceHead.fit(TinyClassifier(), (images, labels), structure="diag", prior_precision=1e-3)
    assert not torch.equal(posterior.gaussian.tensors["std"], fixed.gaussian.tensors["std"])


def test_without_laplace_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, images: Tensor, labels: Tensor) -> None:
    monkeypatch.setitem(__import__("sys").modules, "laplace", None)
    with pytest.raises(MissingExtraError, match=r"tsynd\[laplace\]"):
        tsynd.LaplaceHead.fit(TinyClassifier(), (images, labels))


@pytest.mark.parametrize(
    "thing", [3, nn.Linear(2, 2), SimpleNamespace(model=nn.Linear(2, 2)), SimpleNamespace(model=None)]
)
def test_what_is_no_last_layer_laplace_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match=r"laplace: got .*last_layer"):
        tsynd.LaplaceHead(thing)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_unfitted_laplace_is_refused(structure: str) -> None:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 5), head=nn.Linear(5, 3)))
    for name in (None, "head"):
        found = laplace.Laplace(model, "classification", "last_layer", structure, last_layer_name=name)
        with pytest.raises(InputError, match=r"laplace: .*wanted"):
            tsynd.LaplaceHead(found)


# --- as a posterior


@pytest.mark.parametrize("network", [TinyClassifier, Opaque])
def test_it_is_a_posterior(network: type[nn.Module], autoencoder: nn.Module, images: Tensor) -> None:
    torch.manual_seed(2)
    classifier = network()
    posterior = SampledHead(classifier, identity_gaussian(classifier.head), samples=9, seed=4)
    leaf = images.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(posterior.uncertainty(leaf).sum(), leaf)
    value = reference.uncertainty_value(posterior.logits(leaf))
    (wanted,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    plain = posterior.uncertainty(images)
    with posterior.frozen(), posterior.folded():
        torch.testing.assert_close(posterior.uncertainty(images), plain, rtol=1e-3, atol=1e-5)
    with posterior.frozen(), posterior.staged(images[:1]) as heaviest:
        assert heaviest > 0
        (got,) = torch.autograd.grad(posterior.uncertainty(leaf).sum(), leaf)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    result = tsynd.synthesize(autoencoder, posterior, images, **QUIET)  # type: ignore[arg-type]
    assert (result.uncertainty > result.initial_uncertainty).float().mean() > 0.9
    assert classifier.training


def test_the_layers_own_weights_do_not_matter_and_the_trunk_is_followed(images: Tensor) -> None:
    classifier = TinyClassifier()
    posterior = SampledHead(classifier, identity_gaussian(classifier.head))
    before = posterior.uncertainty(images)
    with torch.no_grad():
        classifier.head.weight.zero_()
    assert torch.equal(posterior.uncertainty(images), before)
    with torch.no_grad():
        classifier.body[0].weight.mul_(2)
    assert not torch.equal(posterior.uncertainty(images), before)


def test_a_layer_that_is_not_the_last_is_refused(images: Tensor) -> None:
    class Sharpened(TinyClassifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 3

    network = Sharpened()
    with pytest.raises(InputError, match=r"logits are not the output of layer 'head'.*layer="):
        SampledHead(network, identity_gaussian(network.head)).uncertainty(images)
    unused = TinyClassifier()
    unused.extra = nn.Linear(4, 4)
    with pytest.raises(InputError, match="is not called"):
        SampledHead(unused, identity_gaussian(unused.extra)).uncertainty(images)
    assert SampledHead(unused, identity_gaussian(unused.head), "head").uncertainty(images).shape == (23,)
    with pytest.raises(InputError, match=r"layer: got None.*nn\.Linear at its end"):
        SampledHead(nn.Conv2d(1, 1, 1), identity_gaussian(unused.head))
    with pytest.raises(InputError, match="over 387 parameters, wanted the 20"):
        SampledHead(unused, identity_gaussian(unused.head))


# --- files


@pytest.mark.parametrize("kind", ["diag", "full", "kron", "low_rank"])
def test_save_and_load(kind: str, tmp_path: Path, images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(2)
    classifier = TinyClassifier()
    if kind == "low_rank":
        mean, rows = torch.randn(387, dtype=torch.float64), torch.randn(4, 387, dtype=torch.float64)
        gaussian = HeadGaussian("low_rank", {"mean": mean, "variance": mean.square(), "deviations": rows / 5})
        posterior: SampledHead = SampledHead(classifier, gaussian, samples=7, seed=3)
    else:
        pytest.importorskip("laplace", reason="laplace-torch is not installed")
        data = (images, labels)
        posterior = tsynd.LaplaceHead.fit(classifier, data, structure=kind, prior_precision=1.0, samples=7, seed=3)
    path = posterior.save(tmp_path / "head.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    content = path.read_bytes()
    for at in (-5, content.index(b"samples") + 11):  # a bit of a tensor, a digit of the settings
        (tmp_path / "bit").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at:][1:])
        with pytest.raises(InputError, match="is damaged or holds something else"):
            SampledHead.load(tmp_path / "bit", classifier)
    read = SampledHead.load(path, classifier)
    assert (read.samples, read.seed, read.layer, read.gaussian.kind) == (7, 3, "head", kind)
    assert torch.equal(read.uncertainty(images), posterior.uncertainty(images))
    with torch.no_grad():
        classifier.head.weight.zero_()
    SampledHead.load(path, classifier)
    with torch.no_grad():
        classifier.body[0].weight.zero_()
    with pytest.raises(InputError, match="classifier: its weights are not those"):
        SampledHead.load(path, classifier)


def test_other_files_are_refused(tmp_path: Path, classifier: TinyClassifier) -> None:
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04junk")
    for name in ("other", "junk", "missing"):
        with pytest.raises(InputError, match=r"path: .*wanted a file of SampledHead\.save"):
            SampledHead.load(tmp_path / f"{name}.safetensors", classifier)
