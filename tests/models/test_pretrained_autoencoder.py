"""Pretrained autoencoders by name, on local weights: no network is asked."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from local_networks import save_bundle
from torch import Tensor, nn

import tsynd
from tsynd.models.pretrained_autoencoder import PretrainedAutoencoder

KL = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "norm_num_groups": 4,
      "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}  # fmt: skip
VQ = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
      "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "num_vq_embeddings": 16}  # fmt: skip
IMAGES = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def diffusers_model(kind: str, folder: Path, options: dict[str, Any]) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options).eval()
    model.save_pretrained(folder)
    return model


def made(name: str, **options: Any) -> PretrainedAutoencoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tsynd.autoencoder(name, **options)
    assert isinstance(found, PretrainedAutoencoder)
    return found


@pytest.mark.parametrize(("kind", "options"), [("AutoencoderKL", KL), ("AutoencoderTiny", TINY), ("VQModel", VQ)])
def test_diffusers_from_a_folder(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain: Any = diffusers_model(kind, tmp_path / "vae", options)
    found = made(f"diffusers:{tmp_path},subfolder=vae")
    colour = IMAGES.expand(-1, 3, -1, -1) * 2 - 1
    with torch.no_grad():
        code = plain.encode(colour)
        code = code.latent_dist.mode() if kind == "AutoencoderKL" else code.latents
        wanted = ((plain.decode(code).sample + 1) / 2).mean(1, keepdim=True).clamp(0, 1)
        assert torch.allclose(found(IMAGES), wanted, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    report = tsynd.fit_autoencoder(found, IMAGES, iterations=5, progress=False, device="cpu")
    assert report.iterations == 0  # frozen: the latents are measured alone
    with torch.no_grad():
        assert torch.allclose(found(IMAGES), wanted, atol=1e-4)
        latents = found.encode(IMAGES).flatten(1)
    assert float(found.latent_std) == pytest.approx(float(latents.var(0).mean().sqrt()), rel=1e-4)
    tsynd.save_model(found, tmp_path / "saved", image_shape=[1, 32, 32])
    again = tsynd.autoencoder(tmp_path / "saved.safetensors")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), found(IMAGES))
    assert again.latent_std == found.latent_std


def test_monai_bundle(tmp_path: Path) -> None:
    plain: Any = save_bundle(tmp_path)
    found = made(f"monai-bundle:{tmp_path}")
    with torch.no_grad():
        assert torch.allclose(found(IMAGES), plain.decode(plain.encode(IMAGES)[0]).clamp(0, 1), atol=1e-5)
    tsynd.save_model(found, tmp_path / "saved")
    (tmp_path / "configs" / "inference.json").unlink()  # the file knows the definition
    with torch.no_grad():
        assert torch.equal(tsynd.load_model(tmp_path / "saved")(IMAGES), found(IMAGES))  # type: ignore[operator]


@pytest.mark.parametrize("trains", ["decoder", "all"])
def test_fine_tuning_reconstructs_better(trains: str, tmp_path: Path) -> None:
    save_bundle(tmp_path)
    found = made(f"monai-bundle:{tmp_path}", trains=trains)
    before = {name: value.clone() for name, value in found.state_dict().items()}

    def error() -> Tensor:
        with torch.no_grad():
            return (found(IMAGES) - IMAGES).square().mean()

    first = error()
    tsynd.fit_autoencoder(found, IMAGES, iterations=20, batch_size=6, progress=False, device="cpu")
    assert float(error()) < 0.8 * float(first)
    moved = {name.split(".")[2] for name, value in found.state_dict().items()
             if name.startswith("adapter.model.") and not torch.equal(value, before[name])}  # fmt: skip
    assert ("encoder" in moved) == (trains == "all")
    assert {"decoder", "post_quant_conv"} <= moved
    assert 0 < float(found.latent_std) < 100


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    save_bundle(grey)
    save_bundle(colour, channels=3)
    for name, change in {
        "expression": {"autoencoder_def": {"_target_": "monai.networks.nets.VQVAE", "channels": "$[1] * 9"}},
        "foreign": {"autoencoder_def": {"_target_": "subprocess.call", "args": ["true"]}},
        "circle": {"dims": "@dims"},
        "lost": {"dims": "@nowhere"},
        "other": {"dims": 3},
        "none": {"autoencoder_def": 3},
    }.items():
        save_bundle(tmp_path / name, change)
    torn = tmp_path / "torn"
    save_bundle(torn)
    (torn / "models" / "autoencoder.pt").write_bytes(b"PK\x03\x04")
    empty = tmp_path / "empty"
    save_bundle(empty)
    (empty / "models" / "autoencoder.pt").unlink()
    for words, name, options in [
        ("takes images of 1 channels, but these have 3", f"monai-bundle:{grey}", {"channels": 3}),
        ("is an expression, which is not run", f"monai-bundle:{tmp_path / 'expression'}", {}),
        ("holds a call, wanted one of AutoencoderKL", f"monai-bundle:{tmp_path / 'foreign'}", {}),
        ("circle", f"monai-bundle:{tmp_path / 'circle'}", {}),
        ("nothing is called @nowhere", f"monai-bundle:{tmp_path / 'lost'}", {}),
        ("is not of AutoencoderKL|wanted .* of the AutoencoderKL", f"monai-bundle:{tmp_path / 'other'}", {}),
        ("defines none of", f"monai-bundle:{tmp_path / 'none'}", {}),
        ("defines none of mine", f"monai-bundle:{grey},key=mine", {}),
        ("torn, or not weights alone", f"monai-bundle:{torn}", {}),
        ("holds none of models/autoencoder", f"monai-bundle:{empty}", {}),
        ("no MONAI bundle", f"monai-bundle:{tmp_path / 'nowhere'}", {}),
        ("cannot be had .* wanted a model's name", "diffusers:nobody/nothing", {}),
        ("wanted diffusers:NAME", "timm:resnet50", {}),
        ("autoencoder_trains", f"monai-bundle:{grey}", {"trains": "encoder"}),
    ]:
        with pytest.raises(tsynd.InputError, match=words) as caught:
            made(name, **options)
        assert "\n" not in str(caught.value)
    assert made(f"monai-bundle:{colour}")(IMAGES).shape == IMAGES.shape  # three channels take grey images
    tsynd.save_model(made(f"monai-bundle:{grey}"), tmp_path / "saved")
    with pytest.raises(tsynd.InputError, match="takes images of 1 channels, wanted 3"):
        tsynd.autoencoder(tmp_path / "saved.safetensors", channels=3)
