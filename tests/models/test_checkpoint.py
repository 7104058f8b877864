"""Saving and loading models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tsynd.utils.errors import InputError

pytest.importorskip("monai")
pytest.importorskip("safetensors")

from tsynd.models.checkpoint import load_model, read_card, save_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet


def _classifier():
    torch.manual_seed(0)
    model = SmallResNet(1, 3, (8, 16), "stages", 0.3)
    model(torch.rand(8, 1, 16, 16))  # batch norm's statistics must come back too
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    save_model(_classifier(), tmp_path / "model", class_names=["a", "b", "c"], image_shape=(1, 16, 16))
    return tmp_path


def _own(width: int, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, classes))


def test_any_module_by_a_name(tmp_path):
    torch.manual_seed(0)
    model = _own(5)
    path = save_model(model, tmp_path / "own", name="mlp", config={"width": 5}, task="multiclass")
    loaded = load_model(path, builders={"mlp": _own})
    images = torch.rand(4, 1, 4, 4)
    assert torch.equal(loaded(images), model.eval()(images))
    assert read_card(path, ["mlp"]).task == "multiclass"
    with pytest.raises(InputError, match=r"own\.json: model 'mlp', wanted one of SmallResNet, SmallAutoencoder"):
        load_model(path)
    with pytest.raises(InputError, match="does not fit the mlp"):
        load_model(path, builders={"mlp": lambda width: _own(width + 1)})
    with pytest.raises(InputError, match="name: got 'SmallResNet', which is tsynd's own"):
        save_model(model, tmp_path / "no", name="SmallResNet")
    with pytest.raises(InputError, match=r"config: .* wanted JSON values"):
        save_model(model, tmp_path / "no", name="mlp", config={"width": nn.ReLU})
    with pytest.raises(InputError, match="for others give a name"):
        save_model(model, tmp_path / "no")


def test_weights_that_are_no_finite_numbers_are_refused(tmp_path):
    model = _own(5)
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    path = save_model(model, tmp_path / "broken", name="mlp", config={"width": 5})
    with pytest.raises(InputError, match=r"1.weight holds values that are not finite"):
        load_model(path, builders={"mlp": _own})
    whole = _own(5)
    whole[1].weight = nn.Parameter(torch.ones(5, 16, dtype=torch.int64), requires_grad=False)
    path = save_model(whole, tmp_path / "whole", name="mlp", config={"width": 5})
    with pytest.raises(InputError, match=r"1.weight holds torch.int64, wanted torch.float32"):
        load_model(path, builders={"mlp": _own})


@pytest.mark.parametrize("names", ['"abc"', "[1, 2]", "{}"])
def test_class_names_that_are_no_list_of_names(saved, names):
    sheet = saved / "model.json"
    sheet.write_text(json.dumps(json.loads(sheet.read_text()) | {"class_names": json.loads(names)}))
    with pytest.raises(InputError, match=r"class_names .*, wanted a list of names or null"):
        read_card(saved / "model")
    sheet.write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_card(saved / "model")


def test_outputs_are_the_same_after_a_round_trip(saved):
    images = torch.rand(4, 1, 16, 16)
    state = torch.get_rng_state()
    loaded = load_model(saved / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert torch.equal(loaded(images), _classifier()(images))
    assert torch.equal(load_model(saved / "model.safetensors")(images), loaded(images))


def test_autoencoder_keeps_its_latent_std(tmp_path):
    coder = SmallAutoencoder(1, 2, (8, 16)).eval()
    coder.latent_std.fill_(0.7)
    written = save_model(coder, tmp_path / "deep" / "v1.5")
    assert written.name == "v1.5.safetensors"
    loaded = load_model(tmp_path / "deep" / "v1.5")
    assert loaded.latent_std.item() == pytest.approx(0.7)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded(images), coder(images))


def test_card_tells_the_rest(saved):
    card = read_card(saved / "model")
    assert (card.model, card.class_names, card.image_shape) == ("SmallResNet", ["a", "b", "c"], [1, 16, 16])
    assert card.config == _classifier().config
    assert card.task is None
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_a_module_that_cannot_be_rebuilt_is_refused(tmp_path):
    class Other(SmallResNet):
        pass

    for module in (nn.Linear(2, 2), Other()):
        with pytest.raises(InputError, match="module: got"):
            save_model(module, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def _edit(saved, **changes):
    path = saved / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "model.json").unlink(), "model.json: no such file"),
        (lambda at: (at / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
        (lambda at: (at / "model.json").write_text("{"), "cannot be read as JSON"),
        (lambda at: (at / "model.json").write_text("[1]"), "lacks class_names"),
        (lambda at: (at / "model.json").write_text('{"model": "SmallResNet"}'), "lacks class_names, config"),
        (lambda at: _edit(at, model="os.system"), "wanted one of SmallResNet"),
        (lambda at: _edit(at, model=["SmallResNet"]), "wanted one of SmallResNet"),
        (lambda at: _edit(at, config=[]), "config is a list"),
        (lambda at: _edit(at, config={"depth": 3}), "does not fit the SmallResNet"),
        (lambda at: _edit(at, config={"widths": [8, 8]}), "does not fit the SmallResNet"),
        (lambda at: (at / "model.safetensors").write_bytes(b"x" * 99), "truncated"),
    ],
)
def test_bad_files_are_named(saved, spoil, message):
    spoil(saved)
    with pytest.raises(InputError, match=message):
        load_model(saved / "model")


def test_every_truncation_is_noticed(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="truncated"):
            load_model(saved / "model")


def test_weights_of_another_save_are_noticed(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    save_model(SmallResNet(1, 3, (8, 16), "stages", 0.3), other / "model")
    (other / "model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(InputError, match=r"not the file that model\.json describes"):
        load_model(saved / "model")


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_a_failed_save_leaves_the_old_model_and_no_litter(saved, monkeypatch, method):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    write = getattr(Path, method)

    def failing(path, content, **options):
        write(path, content[:10], **options)
        raise OSError("disk full")

    monkeypatch.setattr(Path, method, failing)
    with pytest.raises(OSError, match="disk full"):
        save_model(SmallResNet(), saved / "model")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
