"""Attacks against closed forms, and what they must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tsynd.evaluation.evaluate import evaluate, spread_indices
from tsynd.utils.errors import InputError

pytest.importorskip("art.attacks.evasion")
pytest.importorskip("torchmetrics")

from tsynd.evaluation.attacks import Attack, parse_attacks, perturb


class Linear(nn.Module):
    """Two or three logits, linear in the pixels: the strongest L∞ attack is known."""

    def __init__(self, classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.drop = nn.Dropout(0.9)  # would show if the attacked network were not the deterministic one
        self.head = nn.Linear(36, classes)
        with torch.no_grad():
            self.head.weight.copy_(scale * torch.randn(classes, 36, generator=generator))
            self.head.bias.zero_()

    def forward(self, images):
        return self.drop(self.head(images.flatten(1)))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return 0.3 + 0.4 * torch.rand(20, 1, 6, 6, generator=generator)


def best(model, images, labels, budget):
    """Of two classes, the loss only falls with (w_y − w_other)·x, so each pixel goes the whole budget against it."""
    weight = model.head.weight.detach()
    gap = (weight[labels] - weight[1 - labels]).reshape(images.shape)
    return (images - budget * gap.sign()).clamp(0, 1)


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
@pytest.mark.parametrize("budget", [1 / 255, 8 / 255])
def test_linear_model_has_a_closed_form(images, kind, budget):
    model = Linear()
    labels = torch.arange(20) % 2
    found = perturb(model, images, labels, Attack(kind, budget))
    torch.testing.assert_close(found, best(model, images, labels, budget), rtol=0, atol=1e-6)


def test_accuracy_under_attack_is_that_of_the_closed_form(images):
    model = Linear()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    result = evaluate(model, (images, labels), conditions=("clean",), attacks=("pgd:2/255", "pgd:20/255"))
    assert result["clean"]["accuracy"] == 1.0
    for name, budget in (("pgd:2/255", 2 / 255), ("pgd:20/255", 20 / 255)):
        with torch.no_grad():
            right = model(best(model, images, labels, budget)).argmax(1) == labels
        assert result[name]["accuracy"] == pytest.approx(float(right.float().mean()))
    assert result["pgd:20/255"]["accuracy"] < result["pgd:2/255"]["accuracy"] < 1


@pytest.mark.parametrize("budget", [1 / 255, 4 / 255, 8 / 255])
def test_autopgd_breaks_what_can_be_broken(images, budget):
    model = Linear()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    found = perturb(model, images, labels, Attack("apgd", budget))
    with torch.no_grad():
        left = model(found).argmax(1) == labels
        assert torch.equal(left, model(best(model, images, labels, budget)).argmax(1) == labels)
    assert left.any()


def test_deepfool_goes_straight_to_the_boundary(images):
    """Of a linear model the nearest boundary is |gap| / |w₀ − w₁| away."""
    model = Linear()
    with torch.no_grad():
        logits = model.eval()(images)
    labels = logits.argmax(1)
    labels[:4] = 1 - labels[:4]  # wrong before: of distance 0
    slope = (model.head.weight[0] - model.head.weight[1]).detach().norm()
    wanted = 1.02 * (logits[:, 0] - logits[:, 1]).abs() / slope
    found = perturb(model, images, labels, Attack("deepfool"))
    wanted[:4] = 0
    torch.testing.assert_close((found - images).flatten(1).norm(dim=1), wanted, rtol=1e-3, atol=1e-5)
    result = evaluate(model, (images, labels), conditions=("clean",), attacks=("deepfool",))["deepfool"]
    assert result["distance"] == pytest.approx(float(wanted.median()), rel=1e-3)


def test_worst_counts_what_survives_every_attack(images):
    """A staircase masks gradients, so that Square and PGD break different images."""
    model = Steps()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    names = ("square:12/255", "pgd:12/255", "fgsm:4/255")
    result = evaluate(model, (images, labels), conditions=(), attacks=names, query_images=15)
    assert "worst:4/255" not in result
    assert result["worst:12/255"]["images"] == 15
    assert result["worst:12/255"]["accuracy"] <= min(
        result["square:12/255"]["accuracy"], result["square:12/255"]["gradient_accuracy"]
    )
    assert 0 < result["worst:12/255"]["accuracy"] < 1


def test_more_queries_break_more(images):
    model = Steps()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    left = [
        evaluate(model, (images, labels), conditions=(), attacks=("square:12/255",), queries=n)["square:12/255"][
            "accuracy"
        ]
        for n in (1, 30, 1000)
    ]
    assert left[0] > left[1] > left[2]


def test_attacks_on_one_label_alone(images):
    labels = torch.ones(20, 3)
    for kind in ("apgd", "deepfool"):
        with pytest.raises(InputError, match=kind):
            perturb(Linear(3), images, labels, Attack(kind, 0.1), task="multilabel")


def test_multilabel_attack_climbs_the_loss_of_all_labels(images):
    model = Linear(3)
    labels = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).repeat(5, 1)
    found = perturb(model, images, labels, Attack("fgsm", 4 / 255), task="multilabel")
    # the gradient of the summed binary cross-entropy: (sigmoid − label) through the weights
    leaf = images.clone().requires_grad_()
    functional.binary_cross_entropy_with_logits(model.eval()(leaf), labels).backward()
    torch.testing.assert_close(found, (images + 4 / 255 * leaf.grad.sign()).clamp(0, 1), rtol=0, atol=1e-6)
    square = perturb(model, images, labels, Attack("square", 16 / 255), task="multilabel")
    with torch.no_grad():
        before, after = (((model(x) > 0) == (labels > 0.5)).all(1).sum() for x in (images, square))
    assert after <= before


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "apgd", "square"])
def test_budget_and_range_are_respected(kind):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(12, 1, 6, 6, generator=generator).round(decimals=1)  # many pixels at the ends of the range
    model, budget = Linear(), 8 / 255
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    found = perturb(model, images, labels, Attack(kind, budget))
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - images).abs().max() <= budget + 1e-7
    assert (found - images).abs().max() > 0.9 * budget  # it did go


class Steps(nn.Module):
    """The linear model behind a staircase: its gradient is zero everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, images):
        return (self.inner(images) * 50).round() / 50 + 0 * images.flatten(1).sum(1, keepdim=True)


def test_square_needs_no_gradient_and_breaks_what_masks_it(images):
    model = Steps()
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    result = evaluate(model, (images, labels), conditions=(), attacks=("square:20/255", "pgd:20/255"))
    assert result["pgd:20/255"]["accuracy"] > result["square:20/255"]["accuracy"]
    assert result["square:20/255"]["gradient_accuracy"] == pytest.approx(result["pgd:20/255"]["accuracy"])


def test_random_start_follows_the_seed(images):
    """Where the gradient is zero PGD stays at its start."""
    labels, attack = torch.arange(20) % 2, Attack("pgd", 8 / 255)
    np.random.seed(7)
    first = np.random.rand()
    np.random.seed(7)
    runs = [perturb(Steps(), images, labels, attack, seed=seed) for seed in (3, 3, 4)]
    assert np.random.rand() == first
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert (runs[0] - images).std() == pytest.approx(8 / 255 / 3**0.5, rel=0.1)  # uniform in the box
    assert torch.equal(perturb(Steps(), images, labels, attack, seed=3, batch_size=7), runs[0])


def test_modes_and_parameters_come_back(images):
    model = Linear().train()
    model.head.bias.requires_grad_(False)
    perturb(model, images, torch.arange(20) % 2, Attack("pgd", 8 / 255))
    assert model.training
    assert model.drop.training
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad
    assert model.head.weight.grad is None


def test_names():
    assert [attack.name for attack in parse_attacks(["pgd", "fgsm:3/255", "pgd:2/255", "square:0.1", "deepfool"])] == [
        "pgd:1/255",
        "pgd:2/255",
        "pgd:4/255",
        "pgd:8/255",
        "fgsm:3/255",
        "square:0.1",
        "deepfool",
    ]
    assert parse_attacks(["pgd:2/255"])[0].budget == pytest.approx(2 / 255)
    for bad in ("cw", "pgd:0", "pgd:300/255", "pgd:a", "pgd:1/0", "fgsm:-1", "deepfool:0.1"):
        with pytest.raises(InputError, match="attacks: got"):
            parse_attacks([bad])


def test_attacked_images_keep_the_class_shares():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    chosen = spread_indices(labels, 20)
    assert labels[chosen].bincount().tolist() == [12, 6, 2]
    assert torch.equal(spread_indices(labels, None), torch.arange(100))
    assert torch.equal(chosen, chosen.unique())
