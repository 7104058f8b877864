"""Scores and disturbed test sets."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from tsynd.utils.errors import InputError

pytest.importorskip("torchmetrics")
pytest.importorskip("kornia")

from tsynd.data.dataset import LabelledBatches
from tsynd.evaluation.corruptions import MEDMNIST_C, adjust_contrast, impulse_noise, pixelate, shot_noise, speckle_noise
from tsynd.evaluation.evaluate import (
    CONDITIONS,
    choose_conditions,
    conformal_metrics,
    evaluate,
    evaluate_uncertainty,
    gaussian_noise,
    rotation,
    scores,
)
from tsynd.evaluation.metrics import (
    conformal_coverage,
    conformal_limit,
    conformal_size,
    errors,
    survival,
    uncertainty_scores,
)
from tsynd.evaluation.shifts import SHIFTS, blur, brightness, contrast, jpeg, translation
from tsynd.posteriors.mc_dropout import MCDropout


class Brightness(nn.Module):
    """Logits from the mean intensity and its left half; dropout and batch norm would show a wrong mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.9)

    def forward(self, images):
        half = images.shape[-1] // 2
        return self.drop(self.norm(torch.stack([images.mean((1, 2, 3)), images[..., :half].mean((1, 2, 3))], 1)))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(41, 1, 12, 12, generator=generator), torch.randint(2, (41,), generator=generator)


def test_known_multiclass_scores():
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[2.0, 0], [1, 0], [0, 1], [0, 3]])
    result = scores(logits, labels)
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["accuracy"] == pytest.approx(3 / 4)
    assert result["auroc"] == pytest.approx(1.0)
    worse = scores(logits[[0, 1, 3, 2]], labels)
    assert worse["auroc"] == pytest.approx(2 / 3)
    assert worse["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_known_multilabel_scores():
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]])
    logits = torch.tensor([[3.0, -1], [-1, 2], [-2, -3], [-3, 1]])
    result = scores(logits, labels, "multilabel")
    # label 0: sensitivity 1/2, specificity 1; label 1: sensitivity 1, specificity 2/3
    assert result["balanced_accuracy"] == pytest.approx((3 / 4 + 5 / 6) / 2)
    assert result["accuracy"] == pytest.approx(6 / 8)
    assert result["auroc"] == pytest.approx((1 + 2 / 3) / 2)


def test_scores_that_clinics_ask_for():
    """F1, average precision, sensitivity at 90 % specificity and recalls, by hand for the cases above."""
    labels, logits = torch.tensor([0, 0, 0, 1]), torch.tensor([[2.0, 0], [1, 0], [0, 1], [0, 3]])
    result, worse = scores(logits, labels), scores(logits[[0, 1, 3, 2]], labels)
    names = ("f1", "average_precision", "sensitivity_at_90", "recall:0", "recall:1")
    assert [result[name] for name in names] == pytest.approx([(0.8 + 2 / 3) / 2, 1, 1, 2 / 3, 1])
    assert [worse[name] for name in names] == pytest.approx([(0.8 + 2 / 3) / 2, 1 / 2, 0, 2 / 3, 1])
    several = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]])
    result = scores(torch.tensor([[3.0, -1], [-1, 2], [-2, -3], [-3, 1]]), several, "multilabel")
    assert [result[name] for name in names] == pytest.approx([2 / 3, (1 + 1 / 2) / 2, 1 / 2, 1 / 2, 1])
    three = scores(torch.eye(3)[[0, 2, 1, 0]], torch.tensor([0, 2, 2, 0]))
    assert "recall:1" not in three
    assert three["average_precision"] == pytest.approx((1 + (1 + 2 / 4) / 2) / 2)  # three of four tie for class 2


def test_absent_classes_do_not_count():
    labels = torch.tensor([0, 2, 2, 0])
    logits = torch.eye(3)[[0, 2, 1, 0]]
    result = scores(logits, labels)
    assert result["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert math.isnan(scores(logits[:1], labels[:1])["auroc"])
    one = scores(torch.tensor([[1.0, 1], [-1, 1]]), torch.tensor([[1, 1], [0, 1]]), "multilabel")
    assert one["balanced_accuracy"] == one["auroc"] == pytest.approx(1.0)


def test_result_does_not_depend_on_the_batch_size(data):
    model = Brightness()
    whole = evaluate(model, data)
    assert list(whole) == ["clean", "noise", "rotation"]
    for size in (1, 7, 41):
        assert evaluate(model, data, batch_size=size) == whole
    assert evaluate(model, data, seed=1)["noise"] != whole["noise"]
    assert evaluate(model, data, seed=1)["clean"] == whole["clean"]


@pytest.mark.parametrize("name", ["noise", "rotation"])
def test_disturbance_belongs_to_the_image(data, name):
    images, indices = data[0], torch.arange(41)
    state = torch.get_rng_state()
    whole = CONDITIONS[name](images, indices, 5)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.tensor([40, 3, 3, 17])
    torch.testing.assert_close(CONDITIONS[name](images[order], order, 5), whole[order])
    assert not torch.allclose(CONDITIONS[name](images, indices, 6), whole)
    assert not torch.allclose(CONDITIONS[name](images[:1], indices[1:2], 5), whole[:1])
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_disturbances_have_the_size_they_say():
    flat = torch.full((200, 1, 20, 20), 0.5)
    noisy = gaussian_noise(flat, torch.arange(200), 0)
    assert (noisy - 0.5).std().item() == pytest.approx(0.05, rel=0.03)
    torch.testing.assert_close(rotation(flat, torch.arange(200), 0), flat)
    dot = torch.zeros(200, 1, 41, 41)
    dot[..., 20, 35:38] = 1  # right of the centre
    turned = rotation(dot, torch.arange(200), 0, degrees=15)
    rows = (turned[:, 0].sum(2) * torch.arange(41)).sum(1) / turned[:, 0].sum((1, 2))
    angles = torch.rad2deg(torch.asin((rows - 20) / 16))
    assert angles.abs().max() < 15.5
    assert angles.std().item() == pytest.approx(15 / 3**0.5, rel=0.15)
    assert angles.mean().abs() < 2


def test_modes_come_back_and_only_they_change(data):
    model = Brightness().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, data, conditions=("clean",))
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert evaluate(model.eval(), data, conditions=("clean",)) == first


def test_own_conditions(data):
    severe = {
        "none": functools.partial(gaussian_noise, sigma=0.0),
        "much": functools.partial(rotation, degrees=90),
    }
    result = evaluate(Brightness(), data, conditions=severe)
    assert list(result) == ["none", "much"]
    assert result["none"] == evaluate(Brightness(), data, conditions=("clean",))["clean"]


def test_all_kinds_of_data_read_alike(data):
    images, labels = data
    whole = (images * 255).round().to(torch.uint8)
    pairs = torch.utils.data.TensorDataset(whole, labels)

    class Fast:
        def __init__(self) -> None:
            self.labels = labels

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index):
            raise AssertionError("batch is there")

        def batch(self, indices):
            return whole[indices].float() / 255, labels[indices]

    indices = torch.tensor([5, 1])
    for source in (pairs, Fast(), (whole, labels)):
        batches = LabelledBatches(source)
        got = batches.at(indices)
        assert torch.equal(got.images, whole[indices].float() / 255)
        assert torch.equal(got.labels, labels[indices])
        assert torch.equal(batches.labels(2), labels)
    assert LabelledBatches(whole).at(indices).labels is None
    assert [part.tolist() for part in LabelledBatches(whole[:3]).chunks(2)] == [[0, 1], [2]]


@pytest.mark.parametrize("name", list(choose_conditions(["shifts", "medmnist_c"])))
@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_do_not_depend_on_the_batch(name, channels):
    generator = torch.Generator().manual_seed(9)
    images, indices = torch.rand(70, channels, 12, 16, generator=generator), torch.arange(70)
    shift = CONDITIONS[name]
    whole = shift(images, indices, 3)
    assert whole.shape == images.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert not torch.equal(whole, images)
    for size in (1, 7, 64):
        parts = torch.cat([shift(images[part], part, 3) for part in indices.split(size)])
        if "blur" in name:  # torch picks another convolution for single images
            torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
        else:
            assert torch.equal(parts, whole)


@pytest.mark.parametrize("kind", [*SHIFTS, *MEDMNIST_C])
def test_higher_severity_moves_images_further(kind):
    generator = torch.Generator().manual_seed(9)
    size = 28 if kind != "pixelate" else 224  # blocks of small images fall unevenly
    smooth = torch.nn.functional.interpolate(torch.rand(30, 1, 7, 7, generator=generator), size, mode="bilinear")
    far = [
        float((shift(smooth, torch.arange(30), 0) - smooth).square().mean()) for shift in {**SHIFTS, **MEDMNIST_C}[kind]
    ]
    assert len(far) == 5
    assert far == sorted(far)
    assert far[0] > 0


def test_named_shifts_keep_their_meaning(data):
    images, indices = data[0], torch.arange(41)
    assert torch.equal(CONDITIONS["noise"](images, indices, 2), CONDITIONS["noise:2"](images, indices, 2))
    assert torch.equal(CONDITIONS["rotation"](images, indices, 2), CONDITIONS["rotation:5"](images, indices, 2))


def test_shifts_against_hand_made_ones():
    image = torch.linspace(0.2, 0.6, 64).reshape(1, 1, 8, 8)
    index = torch.tensor([0])
    for number in range(8):  # both directions occur
        index = torch.tensor([number])
        bright = brightness(image, index, 0, up=1.5, down=0.5)
        assert any(torch.allclose(bright, (image * factor).clamp(0, 1)) for factor in (1.5, 0.5))
        stretched = contrast(image, index, 0, up=1.2, down=0.5)
        mean = image.mean()
        assert any(torch.allclose(stretched, mean + factor * (image - mean), atol=1e-6) for factor in (1.2, 0.5))
    many = brightness(image.expand(400, -1, -1, -1), torch.arange(400), 0)
    assert 0.4 < float((many.mean((1, 2, 3)) > image.mean()).double().mean()) < 0.6
    dot = torch.zeros(1, 1, 29, 29)
    dot[..., 14, 14] = 1
    spot = blur(dot, index, 0, sigma=2 / 29)[0, 0]
    assert float(spot.sum()) == pytest.approx(1, abs=1e-4)
    positions = torch.arange(29.0) - 14
    assert float((spot.sum(0) * positions**2).sum()) == pytest.approx(4, rel=0.05)
    flat = torch.full((2, 3, 16, 16), 0.5)
    assert (jpeg(flat, torch.arange(2), 0, quality=7) - 0.5).abs().max() < 0.02
    moved = translation(dot.expand(300, -1, -1, -1), torch.arange(300), 0, share=0.2)[:, 0]
    sides = torch.arange(29.0) - 14
    x, y = (moved.sum(1) * sides).sum(1), (moved.sum(2) * sides).sum(1)
    for shift in (x, y):
        assert shift.abs().max() <= 0.2 * 29 + 1e-3
        assert shift.std().item() == pytest.approx(0.2 * 29 / 3**0.5, rel=0.15)


def test_corruptions_against_known_moments():
    grey = torch.full((200, 1, 20, 20), 0.4)
    index = torch.arange(200)
    assert speckle_noise(grey, index, 0, sigma=0.2).std().item() == pytest.approx(0.08, rel=0.02)
    shot = shot_noise(grey, index, 0, photons=100)
    assert shot.mean().item() == pytest.approx(0.4, rel=0.01)
    assert shot.var().item() == pytest.approx(0.4 / 100, rel=0.02)
    salted = impulse_noise(grey, index, 0, amount=0.06)
    assert float((salted == 0).double().mean()) == pytest.approx(0.03, rel=0.05)
    assert float((salted == 1).double().mean()) == pytest.approx(0.03, rel=0.05)
    colours = torch.tensor([0.2, 0.5, 0.8]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    mean = 0.299 * 0.2 + 0.587 * 0.5 + 0.114 * 0.8  # the grey value of a colour
    wanted = mean + 0.5 * (colours - mean)
    torch.testing.assert_close(adjust_contrast(colours, index[:1], 0, factor=0.5), wanted)
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4)[None, None]
    assert (pixelate(board, index[:1], 0, share=0.5) * 255).round().unique().tolist() in ([127.0], [128.0])
    assert len(MEDMNIST_C) == 13


def test_families_and_single_severities():
    assert list(choose_conditions(["clean", "medmnist_c:3"])) == ["clean", *(f"{kind}:3" for kind in MEDMNIST_C)]
    assert len(choose_conditions(["shifts", "medmnist_c"])) == 35 + 65


@pytest.mark.parametrize(("count", "classes"), [(19, 2), (100, 3)])
def test_conformal_sets_cover_as_promised(count, classes):
    """Exactly ceil(0.9 (n + 1)) / (n + 1) of exchangeable images, for a classifier that is no good."""
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(300):
        logits = torch.randn(count + 200, classes, generator=generator)
        labels = torch.randint(classes, (count + 200,), generator=generator)
        chances = logits.softmax(1)
        limit = conformal_limit(chances[:count], labels[:count])
        covered.append(conformal_coverage(chances[count:], labels[count:], limit))
    wanted = math.ceil(0.9 * (count + 1)) / (count + 1)
    assert sum(covered) / len(covered) == pytest.approx(wanted, abs=0.012)


def test_conformal_sizes_and_survival_by_hand():
    chances = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert conformal_coverage(chances, torch.tensor([0, 1, 0]), 0.35) == pytest.approx(2 / 3)
    assert conformal_size(chances, torch.tensor([0, 1, 0]), 0.35) == pytest.approx(4 / 3)
    assert conformal_limit(chances, torch.tensor([0, 0, 0])) == 0  # three images promise nothing at 90 %
    many = torch.linspace(0.05, 0.95, 19)
    both = torch.stack([many, 1 - many], 1)
    assert conformal_limit(both, torch.zeros(19, dtype=torch.int64)) == pytest.approx(0.1)  # the second of 19
    right = torch.tensor([True, True, False, True])
    found = survival(right, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx({"balanced_accuracy": (2 / 3 + 1) / 2, "accuracy": 0.75, "images": 4})


def test_conformal_metrics_of_a_classifier(data):
    images, labels = data
    model = Brightness()
    metrics = conformal_metrics(model, (images[20:], labels[20:]))
    assert model.training
    result = evaluate(model, (images[20:], labels[20:]), conditions=("clean", "blur:3"), metrics=metrics)
    # on the calibration images themselves: all but the one of 21 below the limit
    assert result["clean"]["conformal_coverage"] == pytest.approx(20 / 21)
    for row in result.values():
        assert 0 < row["conformal_coverage"] <= 1 <= row["conformal_size"] <= 2


def test_known_calibration_error_and_likelihood():
    # four predictions of class 0 at 0.9 (three right) and four at 0.6 (one right): gaps 0.15 and 0.35
    chances = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 4)
    labels = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    result = scores(chances.log(), labels)
    assert result["ece"] == pytest.approx((0.15 + 0.35) / 2, abs=1e-6)
    nll = -(3 * math.log(0.9) + math.log(0.1) + math.log(0.6) + 3 * math.log(0.4)) / 8
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert scores(chances.log() + 7, labels)["nll"] == pytest.approx(nll, rel=1e-5)
    many = scores(torch.tensor([[math.log(9.0), -math.log(9.0)]]), torch.tensor([[1, 1]]), "multilabel")
    assert many["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1)) / 2, rel=1e-5)
    assert many["ece"] == pytest.approx((0.1 + 0.9) / 2, abs=1e-6)


def test_known_uncertainty_quality():
    wrong = torch.tensor([False, False, True, False, True])
    uncertainty = torch.tensor([0.0, 0.2, 0.3, 0.4, 5.0])
    result = uncertainty_scores(uncertainty, wrong)
    assert result["error_auroc"] == pytest.approx(5 / 6)  # of 2 · 3 pairs one is the wrong way round
    assert result["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert result["error_rate"] == pytest.approx(0.4)
    curve = dict(zip(result["coverage"], result["selective_accuracy"], strict=True))
    assert curve[0.2] == curve[0.4] == 1
    assert curve[0.6] == pytest.approx(2 / 3)
    assert curve[1.0] == pytest.approx(0.6)
    assert math.isnan(uncertainty_scores(uncertainty, wrong & False)["error_auroc"])
    assert errors(torch.tensor([[1.0, -1], [1, 1]]), torch.tensor([[1, 0], [1, 0]]), "multilabel").tolist() == [
        False,
        True,
    ]


def test_uncertainty_of_a_classifier(classifier, images):
    labels = torch.arange(23) % 3
    result = evaluate_uncertainty(classifier.train(), (images, labels), samples=16)
    assert classifier.training
    assert result["mean_uncertainty"] > 0
    posterior = MCDropout(classifier.eval(), 16)
    with torch.no_grad():
        right = classifier(images).argmax(1) == labels
        assert result["mean_uncertainty"] == pytest.approx(float(posterior.uncertainty(images).mean()), rel=1e-4)
    assert result["error_rate"] == pytest.approx(1 - float(right.double().mean()))
    small = evaluate_uncertainty(classifier, (images, labels), samples=16, batch_size=5)
    assert small["error_auroc"] == pytest.approx(result["error_auroc"])
    assert small["mean_uncertainty"] == pytest.approx(result["mean_uncertainty"], rel=1e-4)


def test_multilabel_conditions_and_attacks():
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.rand(20, 1, 12, 12, generator=generator), torch.randint(2, (20, 2), generator=generator)
    result = evaluate(Brightness().eval(), (images, labels), task="multilabel", conditions=("clean", "blur:3"))
    assert list(result) == ["clean", "blur:3"]
    assert all(math.isfinite(value) for row in result.values() for value in row.values())


def test_shifts_stands_for_all(data):
    result = evaluate(Brightness(), data, conditions=("shifts",))
    assert list(result) == list(choose_conditions(["shifts"]))
    assert len(result) == 35


IMAGES, LABELS = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (3, {}, "data: got int"),
        ((IMAGES, LABELS[:2]), {}, "4 images but 2 labels"),
        ((IMAGES[:0], LABELS[:0]), {}, "holds no images"),
        ((IMAGES[0], LABELS[:1]), {}, r"data: shape \[1, 8, 8\]"),
        ((IMAGES * 255, LABELS), {}, r"wanted \[0, 1\]"),
        ((IMAGES * math.nan, LABELS), {}, r"wanted \[0, 1\]"),
        (IMAGES, {}, "no labels"),
        ((IMAGES, LABELS + 1), {}, "values from 1 to 2; wanted 0 to 1 .the classifier gives 2 logits"),
        ((IMAGES, LABELS - 1), {}, "values from -1 to 0"),
        ((IMAGES, LABELS.float()), {}, "wanted integers"),
        ((IMAGES, LABELS), {"task": "multilabel"}, r"wanted \[4, L\]"),
        ((IMAGES, torch.full((4, 2), 0.5)), {"task": "multilabel"}, "values other than 0 and 1"),
        ((IMAGES, LABELS), {"task": "regression"}, "task: got 'regression'"),
        ((IMAGES, LABELS), {"conditions": ("clean", "fog")}, "conditions: got 'fog', wanted some of clean"),
        ((IMAGES, LABELS), {"conditions": ("noise:6",)}, "conditions: got 'noise:6'"),
        ((IMAGES, LABELS), {"attacks": ("pgd:2",)}, "attacks: got 'pgd:2'"),
        ((IMAGES, LABELS), {"attack_images": 0}, "attack_images: got 0"),
        ((IMAGES, LABELS), {"batch_size": 0}, "batch_size: got 0"),
        ((IMAGES, LABELS), {"queries": 0}, "queries: got 0"),
        ((IMAGES, LABELS), {"conditions": ("medmnist_c:6",)}, "conditions: got"),
    ],
)
def test_bad_input_is_refused_by_name(data, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(Brightness(), data, **options)
