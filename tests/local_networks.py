"""Small pretrained networks as other libraries save them, where no network can be asked."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["Blocks", "local_networks", "save_bundle", "stand_in_for_timm"]


class Blocks(nn.Module):
    """A residual network in blocks, with dropouts of its own."""

    def __init__(self, width: int = 8, classes: int = 10, drop: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width),
                                                    nn.ReLU(inplace=True)) for _ in range(3)))  # fmt: skip
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.blocks(self.stem(x))).mean((2, 3))))


def stand_in_for_timm(monkeypatch: pytest.MonkeyPatch, name: str, asked: list[dict[str, Any]]) -> None:
    """A module of timm's face that knows one model."""

    def create_model(wanted: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append({"name": wanted, "pretrained": pretrained, **options})
        if wanted != name:
            raise RuntimeError(f"Unknown model ({wanted})")
        with torch.random.fork_rng():
            torch.manual_seed(7 if pretrained else 1)
            network: Any = Blocks(**options)
        network.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        return network

    module: Any = types.ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def save_bundle(folder: Path, change: dict[str, Any] | None = None, channels: int = 1) -> nn.Module:
    """A bundle as MONAI's model zoo lays it out: references beside expressions that need not be run."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    arguments = {"spatial_dims": 2, "in_channels": channels, "out_channels": channels, "channels": [8, 8],
                 "latent_channels": 3, "num_res_blocks": [1, 1], "norm_num_groups": 4,
                 "attention_levels": [False, False]}  # fmt: skip
    model: nn.Module = nets.AutoencoderKL(**arguments).eval()
    config = {
        "imports": ["$import torch"], "device": "$torch.device('cpu')", "dims": 2, "shared": {"colours": [channels]},
        "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **arguments, "spatial_dims": "@dims",
                            "in_channels": "@shared::colours::0", "out_channels": "@shared#colours#0"},
        "autoencoder": "$@autoencoder_def.to(@device)",
    } | (change or {})  # fmt: skip
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "models" / "autoencoder.pt")
    return model


def local_networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page of pretrained networks takes for granted: ``vit``, ``bundle``, and a timm without a hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=32, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    save_bundle(folder / "bundle")
    if importlib.util.find_spec("timm") is None:
        stand_in_for_timm(monkeypatch, "resnet50.a1_in1k", [])
    else:
        import timm

        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **k: create("resnet10t", **k))
