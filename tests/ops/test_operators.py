"""Every operator against its float64 twin, the twin against autograd."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsynd import ops
from tsynd.ops import reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CHOICES = [(o, t) for o in reference.OBJECTIVES for t in reference.TASKS]
SEARCH = os.environ.get("HYPOTHESIS_PROFILE") == "search"
FAST = settings(max_examples=1000 if SEARCH else 40, deadline=None)

choices = pytest.mark.parametrize(("objective", "task"), CHOICES)
devices = pytest.mark.parametrize("device", DEVICES)
KINDS = [
    (d, t) for d in DEVICES for t in (torch.float32, torch.bfloat16, torch.float16) if (d, t) != ("cpu", torch.float16)
]
kinds = pytest.mark.parametrize(("device", "dtype"), KINDS)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def gap(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    return float((actual.double().cpu() - exact).abs().max()) if exact.numel() else 0.0


def assert_close(actual: Tensor, exact: Tensor, same: Tensor, terms: float = 0.0) -> None:
    """Relative error (to the largest entry) at most 1e-5 in float32, one rounding in narrower types; or else at
    most twice the error of the same-dtype torch code. Below 2e-7, a rounding of a log-probability of order one,
    or 1e-6 of the ``terms`` that a cancelling sum is made of, there is nothing to compare.
    """
    narrow = actual.dtype if actual.dtype != torch.float32 else same.dtype
    relative = 1e-5 if narrow == torch.float32 else torch.finfo(narrow).eps
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    assert gap(actual, exact) <= max(relative * largest, 2 * gap(same, exact), 2e-7, 1e-6 * terms)


def assert_pairs_close(*pairs: tuple[Tensor, Tensor], terms: float = 0.0) -> None:
    for number, (actual, exact, same) in enumerate(zip(*pairs, strict=True)):
        assert_close(actual, exact, same, terms if number else 0.0)


def size_of_terms(features: Tensor, weight: Tensor, slope: Tensor) -> float:
    """Largest sum of absolute values that a features' gradient is made of, more where a rounding of the logits'
    own terms (1e-7 of their size) changes probabilities by more than 1e-6.
    """
    reach = (features.abs().double() @ weight.abs().double().transpose(-1, -2)).max()
    terms = (slope.abs().double() @ weight.abs().double()).sum(0).max()
    return float(terms) * max(1.0, 0.1 * float(reach))


dims = st.tuples(
    st.sampled_from([1, 2, 5, 17, 33]),  # images
    st.sampled_from([1, 3, 16, 45, 130]),  # units
    st.sampled_from([1, 2, 3, 8, 40]),  # classes
    st.sampled_from([1, 2, 7, 20, 64]),  # samples
)


@kinds
@choices
@FAST
@given(shape=dims, scale=st.sampled_from([0.1, 1.0, 8.0]), seed=st.integers(0, 99), strided=st.booleans())
def test_logits_uncertainty(
    shape: tuple[int, int, int, int],
    scale: float,
    seed: int,
    strided: bool,
    dtype: torch.dtype,
    objective: str,
    task: str,
    device: str,
) -> None:
    images, _, classes, samples = shape
    logits = random(samples, images, classes, seed=seed, scale=scale).to(dtype)
    given_logits = logits.to(device)
    if strided:
        given_logits = given_logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    actual = ops.logits_uncertainty(given_logits, objective, task)
    exact = reference.logits_uncertainty(logits.double(), objective, task)
    assert_pairs_close(actual, exact, reference.logits_uncertainty(logits, objective, task))
    assert (actual[0] >= 0).all()
    if objective == "mutual_information":
        bound = math.log(classes) if task == "multiclass" else classes * math.log(2)
        assert (actual[0].cpu() <= bound + 1e-5).all()


@kinds
@pytest.mark.parametrize("task", reference.TASKS)
@FAST
@given(
    shape=dims,
    count=st.sampled_from([1, 2, 7, 30]),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_expected_information(
    shape: tuple[int, int, int, int],
    count: int,
    scale: float,
    seed: int,
    strided: bool,
    dtype: torch.dtype,
    task: str,
    device: str,
) -> None:
    images, _, classes, samples = shape
    logits = random(samples, images, classes, seed=seed, scale=scale).to(dtype)
    targets = random(samples, count, classes, seed=seed + 1, scale=scale).to(dtype)
    given_logits, given_targets = logits.to(device), targets.to(device)
    if strided:
        given_logits = given_logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        given_targets = given_targets.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    actual = ops.expected_information(given_logits, given_targets, task)
    exact = reference.expected_information(logits.double(), targets.double(), task)
    assert_pairs_close(actual, exact, reference.expected_information(logits, targets, task))
    assert (actual[0] >= 0).all()
    most = reference.uncertainty_value(logits.double(), "mutual_information", task)
    assert (actual[0].cpu() <= most + 1e-5).all()


@kinds
@choices
@FAST
@given(shape=dims, bias=st.booleans(), seed=st.integers(0, 99), strided=st.booleans())
def test_head_uncertainty(
    shape: tuple[int, int, int, int],
    bias: bool,
    seed: int,
    strided: bool,
    dtype: torch.dtype,
    objective: str,
    task: str,
    device: str,
) -> None:
    images, units, classes, samples = shape
    features = random(images, units, seed=seed).to(dtype)
    weight = random(samples, classes, units, seed=seed + 1, scale=2 / math.sqrt(units)).to(dtype)
    offset = random(samples, classes, seed=seed + 2).to(dtype) if bias else None
    given_features, given_weight = features.to(device), weight.to(device)
    if strided:
        given_features = given_features.t().contiguous().t()
        given_weight = given_weight.transpose(1, 2).contiguous().transpose(1, 2)
    given_offset = None if offset is None else offset.to(device)
    actual = ops.head_uncertainty(given_features, given_weight, given_offset, objective, task)
    wide = None if offset is None else offset.double()
    exact = reference.head_uncertainty(features.double(), weight.double(), wide, objective, task)
    logits = torch.einsum("bd,tcd->tbc", features.double(), weight.double())
    slope = reference.logits_uncertainty(logits if wide is None else logits + wide[:, None], objective, task)[1]
    same = reference.head_uncertainty(features, weight, offset, objective, task)
    assert_pairs_close(actual, exact, same, terms=size_of_terms(features, weight, slope))


@kinds
@choices
@FAST
@given(shape=dims, bias=st.booleans(), p=st.sampled_from([0.0, 0.1, 0.5, 0.93]), seed=st.integers(-99, 99))
def test_dropout_head_uncertainty(
    shape: tuple[int, int, int, int],
    bias: bool,
    p: float,
    seed: int,
    dtype: torch.dtype,
    objective: str,
    task: str,
    device: str,
) -> None:
    images, units, classes, samples = shape
    features = random(images, units, seed=abs(seed)).to(dtype)
    weight = random(classes, units, seed=abs(seed) + 1, scale=2 / math.sqrt(units)).to(dtype)
    offset = random(classes, seed=abs(seed) + 2).to(dtype) if bias else None
    ids = torch.randint(0, 2**32, (images,), generator=torch.Generator().manual_seed(abs(seed)))
    on = [None if x is None else x.to(device) for x in (features, weight, offset)]
    actual = ops.dropout_head_uncertainty(*on, p, samples, seed, 3, ids.to(device), objective, task)
    wide = None if offset is None else offset.double()
    exact = reference.dropout_head_uncertainty(
        features.double(), weight.double(), wide, p, samples, seed, 3, ids, objective, task
    )
    same = reference.dropout_head_uncertainty(features, weight, offset, p, samples, seed, 3, ids, objective, task)
    mask = reference.dropout_mask(units, p, samples, seed, 3, ids) * (256 / reference.keep_count(p))
    logits = (features.double() * mask) @ weight.double().t() + (0.0 if wide is None else wide)
    slope = reference.logits_uncertainty(logits, objective, task)[1]
    assert_pairs_close(actual, exact, same, terms=size_of_terms(features * mask, weight, slope) * float(mask.max()))


@choices
@pytest.mark.parametrize("classes", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 9])
def test_twin_gradient_is_the_derivative(classes: int, samples: int, objective: str, task: str) -> None:
    logits = random(samples, 6, classes, seed=classes, scale=2.0).requires_grad_(True)
    value = reference.uncertainty_value(logits, objective, task)
    (wanted,) = torch.autograd.grad(value.sum(), logits)
    got_value, got = reference.logits_uncertainty(logits.detach(), objective, task)
    torch.testing.assert_close(got_value, value.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)


@choices
def test_twin_heads_gradient_is_the_derivative(objective: str, task: str) -> None:
    features = random(5, 13).requires_grad_(True)
    heads, bias = random(4, 3, 13, seed=1), random(4, 3, seed=2)
    value, gradient = reference.head_uncertainty(features, heads, bias, objective, task)
    (wanted,) = torch.autograd.grad(value.sum(), features)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)
    ids = torch.arange(5)
    value, gradient = reference.dropout_head_uncertainty(
        features, heads[0], bias[0], 0.4, 6, 1, 2, ids, objective, task
    )
    (wanted,) = torch.autograd.grad(value.sum(), features)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)


def double_sum(logits: Tensor, targets: Tensor, task: str) -> Tensor:
    """Expected information as its definition says, a target and a pair of outcomes at a time."""
    if task == "multilabel":  # each label by itself, with the outcomes 1 and 0
        split = [torch.stack([x, torch.zeros_like(x)], -1).unbind(2) for x in (logits, targets)]
        return torch.stack([double_sum(*pair, "multiclass") for pair in zip(*split, strict=True)]).sum(0)
    p, q = logits.softmax(-1), targets.softmax(-1)
    total = torch.zeros(p.shape[1], dtype=p.dtype)
    for m in range(q.shape[1]):
        for c in range(p.shape[2]):
            for k in range(q.shape[2]):
                joint = (p[:, :, c] * q[:, m, None, k]).mean(0)
                total = total + joint * torch.log(joint / (p[:, :, c].mean(0) * q[:, m, k].mean()))
    return total / q.shape[1]


@pytest.mark.parametrize("task", reference.TASKS)
@pytest.mark.parametrize(("classes", "samples", "count"), [(1, 3, 2), (2, 2, 1), (3, 1, 4), (4, 9, 5)])
def test_twin_of_expected_information_is_the_double_sum(classes: int, samples: int, count: int, task: str) -> None:
    logits = random(samples, 6, classes, seed=classes, scale=2.0).requires_grad_(True)
    targets = random(samples, count, classes, seed=1, scale=2.0)
    value = double_sum(logits, targets, task)
    (wanted,) = torch.autograd.grad(value.sum(), logits)
    got_value, got = reference.expected_information(logits.detach(), targets, task)
    torch.testing.assert_close(got_value, value.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)


@kinds
@pytest.mark.parametrize("task", reference.TASKS)
def test_known_expected_information(task: str, dtype: torch.dtype, device: str) -> None:
    def value(logits: Tensor, targets: Tensor) -> Tensor:
        return ops.expected_information(logits.to(device, dtype), targets.to(device, dtype), task)[0].cpu()

    logits, target = random(8, 5, 3, scale=2.0), random(8, 1, 3, seed=1, scale=2.0)
    # a target whose samples agree has nothing to learn: exactly 0, and so is an image's
    assert torch.equal(value(logits, target[:1].expand(8, 1, 3)), torch.zeros(5))
    assert torch.equal(value(logits[:1].expand(8, 5, 3), target), torch.zeros(5))
    # targets said again, in any order, change nothing
    several = random(8, 4, 3, seed=2)
    torch.testing.assert_close(value(logits, several[:, [2, 0, 1, 3, 3, 1, 0, 2]]), value(logits, several))
    # an image and a target that vary independently over the samples
    apart = [x.repeat_interleave(8, 0) if first else x.repeat(8, 1, 1) for first, x in ((1, logits), (0, target))]
    assert (value(*apart) < (1e-9 if dtype == torch.float32 else 1e-4)).all()
    # samples that are sure of themselves: label and target's label tell the sample alike, so that the information
    # that they share is all that the label has about the sample, the mutual information, the entropy of the mean
    sure = torch.full((4, 1, 3), -40.0, dtype=torch.float64)
    sure[[0, 1, 2, 3], 0, [0, 0, 1, 2]] = 40.0
    both = (
        math.log(4) - 0.5 * math.log(2)
        if task == "multiclass"
        else math.log(2) + 2 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    )
    torch.testing.assert_close(value(sure, sure), torch.tensor([both], dtype=torch.float32))
    # and otherwise less: a label is a noisy word about its sample
    exact = reference.uncertainty_value(logits.to(dtype).double(), "mutual_information", task)
    for image in range(5):
        own = logits[:, image : image + 1]
        assert 0 < value(own, own) < exact[image]


@devices
@pytest.mark.parametrize("task", reference.TASKS)
@pytest.mark.parametrize("sure", [8.0, 14.0, 30.0])
def test_tiny_expected_information_keeps_its_digits(sure: float, task: str, device: str) -> None:
    """Of confident predictions, where every probability is 0 or 1 to seven digits and the ascent needs a direction."""
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    logits = (sure * signs + random(16, 6, 3)).float()
    targets = (sure * signs.flip(0) + random(16, 9, 3, seed=1)).float()
    value, gradient = ops.expected_information(logits.to(device), targets.to(device), task)
    exact_value, exact = reference.expected_information(logits.double(), targets.double(), task)
    torch.testing.assert_close(value.cpu().double(), exact_value, rtol=1e-4, atol=1e-37)
    largest = exact.abs().amax((0, 2))
    assert ((gradient.cpu() - exact).abs().amax((0, 2)) <= 1e-4 * largest + 1e-37).all()


def test_mutual_information_is_entropy_of_the_mean_minus_mean_entropy() -> None:
    p = random(7, 5, 4).softmax(-1)
    value = reference.uncertainty_value(p.log())
    entropy = torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
    torch.testing.assert_close(value, entropy)


@kinds
@choices
def test_saturated_logits(dtype: torch.dtype, objective: str, task: str, device: str) -> None:
    signs = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    logits = signs.expand(5, 4, 3).clone()
    logits[::2, 0] = signs[1]  # the samples disagree with full confidence
    value, gradient = ops.logits_uncertainty(logits.to(device), objective, task)
    exact = reference.logits_uncertainty(logits.double(), objective, task)
    assert_pairs_close((value, gradient), exact, reference.logits_uncertainty(logits, objective, task))


@devices
@choices
def test_masked_classes_and_not_a_number(objective: str, task: str, device: str) -> None:
    logits = random(6, 4, 5).float()
    logits[:, 1, 2] = -math.inf  # a class ruled out everywhere
    logits[3, 2, 1] = math.nan
    value, gradient = ops.logits_uncertainty(logits.to(device), objective, task)
    sound = torch.tensor([0, 1, 3])
    assert value[2].isnan()
    assert value.cpu()[sound].isfinite().all()
    assert gradient.cpu()[:, sound].isfinite().all()
    exact = reference.logits_uncertainty(logits.double(), objective, task)
    same = reference.logits_uncertainty(logits, objective, task)
    assert_close(value.cpu()[sound], exact[0][sound], same[0][sound])
    assert_close(gradient.cpu()[:, sound], exact[1][:, sound], same[1][:, sound])


@pytest.mark.parametrize("task", reference.TASKS)
def test_no_images(task: str) -> None:
    value, gradient = ops.logits_uncertainty(torch.empty(4, 0, 3), "entropy", task)
    assert (value.shape, gradient.shape) == ((0,), (4, 0, 3))
    value, gradient = ops.expected_information(torch.empty(4, 0, 3), torch.ones(4, 2, 3), task)
    assert (value.shape, gradient.shape) == ((0,), (4, 0, 3))
    value, gradient = ops.head_uncertainty(torch.empty(0, 7), torch.ones(4, 3, 7), None, "entropy", task)
    assert (value.shape, gradient.shape) == ((0,), (0, 7))
    ids = torch.empty(0, dtype=torch.int64)
    value, gradient = ops.dropout_head_uncertainty(
        torch.empty(0, 7), torch.ones(3, 7), None, 0.5, 4, 0, 0, ids, "entropy", task
    )
    assert (value.shape, gradient.shape) == ((0,), (0, 7))
    assert ops.dropout_mask(7, 0.5, 4, 0, 0, ids).shape == (4, 0, 7)


@kinds
@pytest.mark.parametrize("rule", reference.RULES)
@FAST
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (5, 2, 3, 3), (9, 4, 7, 7), (2, 1000)]),
    step=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    radius=st.sampled_from([0.0, 0.5, 10.0]),
    seed=st.integers(0, 99),
)
def test_ascend(
    shape: tuple[int, ...], step: float, radius: float, seed: int, rule: str, dtype: torch.dtype, device: str
) -> None:
    origin = random(*shape, seed=seed).to(dtype)
    latents = (origin + random(*shape, seed=seed + 1, scale=0.1)).to(dtype)
    tiny = 1e-5 if dtype == torch.float16 else 1e-22  # a confident classifier's
    gradient = random(*shape, seed=seed + 2, scale=tiny).to(dtype)
    gradient.view(-1)[-1] = math.nan if seed % 3 == 0 else float(gradient.view(-1)[0])
    gradient[0] = 0
    actual, exact, same = latents.to(device, copy=True), latents.double(), latents.clone()
    ops.ascend_(actual, gradient.to(device), origin.to(device), step, radius, rule)
    actual = actual.cpu()
    reference.ascend_(exact, gradient.double(), origin.double(), step, radius, rule)
    reference.ascend_(same, gradient, origin, step, radius, rule)
    assert_close(actual, exact, same)
    torch.testing.assert_close(actual[0], latents[0], rtol=0, atol=0)
    if seed % 3 == 0:
        torch.testing.assert_close(actual[-1], latents[-1], rtol=0, atol=0)


def test_ascend_writes_through_strides() -> None:
    latents = random(4, 6, 5).float().transpose(1, 2)
    gradient, origin = random(4, 5, 6, seed=1).float(), latents.clone()
    wanted = latents.clone()
    reference.ascend_(wanted, gradient, origin, 0.3, 0.2)
    ops.ascend_(latents, gradient, origin, 0.3, 0.2)
    torch.testing.assert_close(latents, wanted)


def test_philox_known_answers() -> None:
    known = {
        (10, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (10, 0xFFFFFFFF): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (7, 0): "5f6fb709 0d893f64 4f121f81 4f730a48",
        (7, 0xFFFFFFFF): "5207ddc2 45165e59 4d8ee751 8c52f662",
    }
    for (rounds, word), text in known.items():
        wanted = [int(x, 16) for x in text.split()]
        assert reference.philox4x32(torch.tensor([word] * 4), (word, word), rounds).tolist() == wanted
        if ops.compiled:
            from tsynd.ops import _C

            assert _C.philox4x32([word] * 4, [word, word], rounds) == wanted


@devices
@FAST
@given(
    units=st.integers(1, 700),
    p=st.sampled_from([0.0, 0.001, 0.2, 0.5, 0.999]),
    samples=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
    layer=st.integers(0, 2**32 - 1),
    ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
)
def test_mask_bits_equal_the_twin(
    units: int, p: float, samples: int, seed: int, layer: int, ids: list[int], device: str
) -> None:
    arguments = (units, p, samples, seed, layer, torch.tensor(ids))
    actual = ops.dropout_mask(*arguments[:-1], arguments[-1].to(device))
    assert torch.equal(actual.cpu(), reference.dropout_mask(*arguments))


@kinds
@pytest.mark.parametrize("passes", [False, True])
@FAST
@given(
    images=st.integers(1, 4),
    units=st.sampled_from([1, 5, 16, 33, 64, 200]),
    inner=st.sampled_from([1, 2, 9, 49]),
    samples=st.sampled_from([1, 2, 7]),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.93]),
    shared=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_dropout_expand_and_its_transpose(
    images: int,
    units: int,
    inner: int,
    samples: int,
    p: float,
    shared: bool,
    seed: int,
    passes: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    ids = torch.randint(0, 2**32, (1 if shared else images,), generator=torch.Generator().manual_seed(units))
    rows = images * (samples if passes else 1)
    x, g = random(rows, units, inner).to(dtype), random(samples * images, units, inner, seed=1).to(dtype)
    address = (p, samples, seed, 5)
    out = ops.dropout_expand(x.to(device), *address, ids.to(device), passes)
    exact = reference.dropout_expand(x.double(), *address, ids, passes)
    assert_close(out.cpu(), exact, reference.dropout_expand(x, *address, ids, passes))
    assert torch.equal(out.cpu() == 0, exact.to(dtype) == 0)
    back = ops.dropout_gather(g.to(device), *address, ids.to(device), passes)
    exact = reference.dropout_gather(g.double(), *address, ids, passes)
    assert_close(back.cpu(), exact, reference.dropout_gather(g, *address, ids, passes))


def test_dropout_expand_is_differentiable() -> None:
    x, ids = random(3, 20, 4).requires_grad_(True), torch.tensor([5, 0, 9])
    wanted = torch.autograd.grad(reference.dropout_expand(x, 0.4, 6, 1, 2, ids).square().sum(), x)[0]
    small = x.detach().float().requires_grad_(True)
    got = torch.autograd.grad(ops.dropout_expand(small, 0.4, 6, 1, 2, ids).square().sum(), small)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    infinite = torch.full((1, 64, 1), math.inf)
    out = ops.dropout_expand(infinite, 0.5, 1, 1, 2, torch.tensor([0]))
    assert set(out.unique().tolist()) == {0.0, math.inf}  # dropped is 0, whatever it was


def test_mask_depends_on_its_address_alone() -> None:
    ids = torch.tensor([7, 3, 2**32 - 1, 0, 12345])
    whole = ops.dropout_mask(333, 0.3, 11, 42, 2, ids)
    order = torch.tensor([4, 0, 3, 1, 2])
    assert torch.equal(ops.dropout_mask(333, 0.3, 11, 42, 2, ids[order]), whole[:, order])
    one_by_one = torch.cat([ops.dropout_mask(333, 0.3, 11, 42, 2, ids[i : i + 1]) for i in range(5)], 1)
    assert torch.equal(one_by_one, whole)
    assert torch.equal(ops.dropout_mask(333, 0.3, 5, 42, 2, ids), whole[:5])
    assert torch.equal(ops.dropout_mask(100, 0.3, 11, 42, 2, ids), whole[..., :100])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert torch.equal(ops.dropout_mask(333, 0.3, 11, 42, 2, ids), whole)
    finally:
        torch.set_num_threads(threads)
    for other in ((43, 2), (42, 3)):
        assert not torch.equal(ops.dropout_mask(333, 0.3, 11, *other, ids), whole)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    mask = ops.dropout_mask(4096, p, 16, 99, 0, torch.arange(16))
    keep, count = reference.keep_count(p) / 256, mask.numel()
    assert abs(float(mask.double().mean()) - keep) <= 4 * math.sqrt(keep * (1 - keep) / count)
    per_pass = mask.double().mean((1, 2))
    assert (per_pass - keep).abs().max() <= 5 * math.sqrt(keep * (1 - keep) / mask[0].numel())


def _images_first(logits: Tensor, heads: Tensor) -> list[Tensor]:
    value, gradient = ops.expected_information(logits, heads[:, :, :5].contiguous())
    return [value, gradient.transpose(0, 1)]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_results_do_not_depend_on_threads_or_batch(count: int) -> None:
    features, weight = random(50, 70).float(), random(5, 70, seed=1).float()
    heads = random(9, 5, 70, seed=2).float()
    ids = torch.arange(50)

    def run(part: slice) -> list[Tensor]:
        own = ops.dropout_head_uncertainty(
            features[part], weight, None, 0.5, 9, 1, 0, ids[part], "mutual_information", "multiclass"
        )
        logits = torch.einsum("bd,tcd->tbc", features[part], heads)
        return [*own, *ops.head_uncertainty(features[part], heads), *_images_first(logits, heads)]

    whole = run(slice(None))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        again = run(slice(None))
        parts = [torch.cat(x) for x in zip(run(slice(0, 13)), run(slice(13, 50)), strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])  # independent masks: bit for bit
    for a, b, c in zip(whole, again, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-6)


def _samples() -> dict[str, tuple[object, ...]]:
    ids = torch.arange(4)
    features = random(4, 6).float().requires_grad_(True)
    logits = random(3, 4, 5).float().requires_grad_(True)
    return {
        "logits_uncertainty": (logits, "mutual_information", "multiclass"),
        "expected_information": (logits, random(3, 2, 5, seed=1).float(), "multilabel"),
        "head_uncertainty": (
            features,
            random(3, 5, 6).float(),
            random(3, 5).float(),
            "entropy",
            "multilabel",
        ),
        "dropout_head_uncertainty": (
            *(features, random(5, 6).float(), None, 0.5, 3, 1, 0, ids),
            *("mutual_information", "multiclass"),
        ),
        "dropout_mask": (20, 0.5, 3, 1, 0, ids),
        "dropout_expand": (random(4, 6, 2).float().requires_grad_(True), 0.5, 3, 1, 0, ids, False),
        "dropout_gather": (random(12, 6, 2).float().requires_grad_(True), 0.5, 3, 1, 0, ids, False),
        "ascend_": (random(4, 6).float(), random(4, 6).float(), random(4, 6).float(), 0.1, 0.5, "l2"),
    }


@pytest.mark.parametrize("name", list(_samples()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.tsynd, name).default, _samples()[name])


@choices
def test_backward_is_the_returned_gradient(objective: str, task: str) -> None:
    logits = random(3, 4, 5).float().requires_grad_(True)
    value, gradient = ops.logits_uncertainty(logits, objective, task)
    assert not gradient.requires_grad
    scale = torch.arange(1.0, 5.0)
    (got,) = torch.autograd.grad((value * scale).sum(), logits)
    torch.testing.assert_close(got, gradient * scale[:, None])


@pytest.mark.parametrize("task", reference.TASKS)
def test_backward_of_expected_information(task: str) -> None:
    logits, targets = (random(3, n, 5, seed=n).float().requires_grad_(True) for n in (4, 2))
    value, gradient = ops.expected_information(logits, targets, task)
    scale = torch.arange(1.0, 5.0)
    got, none = torch.autograd.grad((value * scale).sum(), [logits, targets], allow_unused=True)
    torch.testing.assert_close(got, gradient * scale[:, None])
    assert none is None  # a target is fixed


def _values(features: Tensor) -> dict[str, Tensor]:
    heads, ids = random(3, 5, 6, seed=1).float(), torch.arange(4)
    logits = torch.einsum("bd,tcd->tbc", features, heads)
    return {
        "logits_uncertainty": ops.logits_uncertainty(logits)[0],
        "expected_information": ops.expected_information(logits, heads[:, :, :5].contiguous())[0],
        "head_uncertainty": ops.head_uncertainty(features, heads)[0],
        "dropout_head_uncertainty": ops.dropout_head_uncertainty(features, heads[0], None, 0.5, 3, 1, 0, ids)[0],
    }


@pytest.mark.parametrize("name", _values(torch.ones(4, 6)))
def test_a_second_derivative_is_an_error(name: str) -> None:
    """Even where the rest of a loss has one, which alone would be silently wrong."""
    features = random(4, 6).float().requires_grad_(True)
    loss = _values(features)[name].square().sum() + features.square().sum()
    (first,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), features)


def test_ascend_counts_its_change() -> None:
    latents = random(4, 6).float()
    version = latents._version
    ops.ascend_(latents, latents.clone(), latents.clone(), 0.1, 1.0)
    assert latents._version == version + 1
    weight = torch.ones(4, 6, requires_grad=True)
    product = (latents * weight).sum()  # whose gradient is the latents as they were
    ops.ascend_(latents, torch.ones(4, 6), latents.clone(), 0.1, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        inside = torch.zeros(2, 3)
        ops.ascend_(inside, torch.ones(2, 3), inside.clone(), 0.1, 1.0)
        assert (inside > 0).all()


def test_compile_and_script() -> None:
    def step(features: Tensor, heads: Tensor) -> Tensor:
        value, gradient = torch.ops.tsynd.head_uncertainty(features, heads, None, "mutual_information", "multiclass")
        latents = features.clone()
        torch.ops.tsynd.ascend_(latents, gradient, features, 0.1, 1.0, "l2")
        return latents + value.unsqueeze(1)

    features, heads = random(6, 8).float(), random(3, 4, 8, seed=1).float()
    wanted = step(features, heads)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, heads), wanted)
    exported = torch.export.export(_Uncertainty(), (features, heads)).module()
    torch.testing.assert_close(exported(features, heads), ops.head_uncertainty(features, heads)[0])
    torch.testing.assert_close(
        torch.jit.script(_Uncertainty())(features, heads), ops.head_uncertainty(features, heads)[0]
    )


class _Uncertainty(torch.nn.Module):
    def forward(self, features: Tensor, heads: Tensor) -> Tensor:
        out = torch.ops.tsynd.head_uncertainty(features, heads, None, "mutual_information", "multiclass")
        return out[0]


_F, _W, _H, _I = torch.ones(4, 6), torch.ones(3, 6), torch.ones(2, 3, 6), torch.arange(4)
_T = torch.ones(3, 4, 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.logits_uncertainty(torch.ones(3, 4)), ["logits", "[3, 4]", "samples, images, classes"]),
        (lambda: ops.logits_uncertainty(torch.ones(0, 4, 5)), ["samples", "0", "at least 1"]),
        (lambda: ops.logits_uncertainty(torch.ones(3, 4, 5).double()), ["logits", "float32"]),
        (lambda: ops.logits_uncertainty(torch.ones(3, 4, 5), "bald"), ["objective", "bald", "mutual_inf"]),
        (lambda: ops.logits_uncertainty(torch.ones(3, 4, 5), "entropy", "binary"), ["task", "binary"]),
        (lambda: ops.expected_information(torch.ones(3, 4), _T), ["logits", "[3, 4]"]),
        (lambda: ops.expected_information(_T, torch.ones(4, 5)), ["targets", "[4, 5]"]),
        (lambda: ops.expected_information(_T, torch.ones(3, 2, 6)), ["targets", "[3, 2, 6]", "[3, targets, 5]"]),
        (lambda: ops.expected_information(_T, torch.ones(2, 2, 5)), ["targets", "[2, 2, 5]"]),
        (lambda: ops.expected_information(_T, torch.ones(3, 0, 5)), ["targets", "at least one"]),
        (lambda: ops.expected_information(_T, _T.bfloat16()), ["targets", "dtype", "logits"]),
        (lambda: ops.expected_information(_T, _T, "binary"), ["task", "binary"]),
        (lambda: ops.head_uncertainty(_F, torch.ones(2, 3, 7)), ["weight", "[2, 3, 7]", "6"]),
        (lambda: ops.head_uncertainty(_F, _H, torch.ones(3)), ["bias", "[3]", "[2, 3]"]),
        (lambda: ops.head_uncertainty(_F, _H.bfloat16()), ["weight", "dtype", "features"]),
        (lambda: ops.dropout_head_uncertainty(_F, _W, None, 1.0, 2, 0, 0, _I), ["p", "1", "[0, 1)"]),
        (lambda: ops.dropout_head_uncertainty(_F, _W, None, 0.5, 0, 0, 0, _I), ["samples", "0"]),
        (lambda: ops.dropout_head_uncertainty(_F, _W, None, 0.5, 2, 0, -1, _I), ["layer", "-1"]),
        (lambda: ops.dropout_head_uncertainty(_F, _W, None, 0.5, 2, 0, 0, _I[:3]), ["sample_ids", "[3]"]),
        (lambda: ops.dropout_mask(8, 0.5, 2, 0, 0, _I.float()), ["sample_ids", "int64"]),
        (lambda: ops.dropout_mask(8, 0.5, 2**58, 0, 0, _I), ["samples", str(2**58), "2^31"]),
        (lambda: ops.dropout_mask(2**58, 0.5, 2, 0, 0, _I), ["mask", f"2 x 4 x {2**58}", "2^46"]),
        (lambda: ops.dropout_mask(2**24, 0.5, 2**30, 0, 0, _I), ["mask", "2^46"]),
        (lambda: ops.dropout_head_uncertainty(_F, _W, None, 0.5, 2**58, 0, 0, _I), ["samples", str(2**58)]),
        (lambda: ops.dropout_expand(_F[..., None], 0.5, 2**58, 0, 0, _I), ["samples", str(2**58)]),
        (lambda: ops.dropout_gather(_F[..., None], 0.5, 2**62, 0, 0, _I), ["samples", str(2**62)]),
        (lambda: ops.dropout_expand(_F[:, :1, None].expand(4, 2**20, 2**30), 0.5, 8, 0, 0, _I), ["samples", "2^46"]),
        (lambda: ops.dropout_mask(8, -0.1, 2, 0, 0, _I), ["p", "-0.1"]),
        (lambda: ops.dropout_expand(_F, 0.5, 2, 0, 0, _I), ["input", "[4, 6]", "images, units"]),
        (lambda: ops.dropout_gather(_F[:3, :, None], 0.5, 2, 0, 0, _I), ["gradient", "[3, 6, 1]", "samples 2"]),
        (lambda: ops.dropout_expand(_F[..., None], 0.5, 2, 0, 0, _I[:3]), ["sample_ids", "[3]"]),
        (lambda: ops.ascend_(_F.clone(), _F, _W, 0.1, 0.5), ["origin", "[3, 6]", "[4, 6]"]),
        (lambda: ops.ascend_(_F.clone(), _F, _F, 0.1, -0.5), ["radius", "-0.5"]),
        (lambda: ops.ascend_(_F.clone(), _F, _F, math.nan, 0.5), ["step", "nan"]),
        (lambda: ops.ascend_(_F.clone(), _F, _F, 0.1, 0.5, "l1"), ["rule", "l1"]),
    ],
)
@pytest.mark.skipif(not ops.compiled, reason="the messages are those of the compiled operators")
def test_bad_arguments(call: object, words: list[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        call()  # type: ignore[operator]
    line = str(caught.value).splitlines()[0]
    assert all(word in line for word in words), line
