"""Targeted synthetic data generation (TSynD): useful extra images for small medical image sets.

``import tsynd`` needs torch and numpy alone; everything else is imported where it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from tsynd.version import __version__

_HOME = {
    "Ascent": "ascent",
    "AscentSettings": "ascent",
    "Autoencoder": "autoencoder",
    "DataSource": "data",
    "Ensemble": "posterior",
    "InputError": "errors",
    "LabelledImages": "data",
    "LaplaceHead": "laplace",
    "MCDropout": "mc_dropout",
    "OnnxSynthesizer": "runtime",
    "Posterior": "posterior",
    "ReadOptions": "readers.options",
    "RoundsReport": "rounds",
    "SWAGHead": "swag",
    "SampledHead": "head_posterior",
    "SmallAutoencoder": "networks",
    "SmallResNet": "networks",
    "Status": "ascent",
    "SynthesisResult": "synthesis",
    "TargetedAugmentation": "augmentation",
    "as_autoencoder": "autoencoder",
    "as_classifier": "classifier",
    "evaluate": "evaluation",
    "export_aoti": "export",
    "export_onnx": "export",
    "export_torchscript": "export",
    "fit_autoencoder": "training",
    "fit_classifier": "training",
    "fit_rounds": "rounds",
    "load_data": "data",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "synthesize": "synthesis",
    "uncertainty": "synthesis",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from tsynd.ascent import Ascent, AscentSettings, Status
    from tsynd.augmentation import TargetedAugmentation
    from tsynd.autoencoder import Autoencoder, as_autoencoder
    from tsynd.checkpoint import load_model, save_model
    from tsynd.classifier import as_classifier
    from tsynd.data import DataSource, LabelledImages, load_data
    from tsynd.errors import InputError
    from tsynd.evaluation import evaluate
    from tsynd.export import export_aoti, export_onnx, export_torchscript
    from tsynd.head_posterior import SampledHead
    from tsynd.laplace import LaplaceHead
    from tsynd.mc_dropout import MCDropout
    from tsynd.networks import SmallAutoencoder, SmallResNet
    from tsynd.posterior import Ensemble, Posterior
    from tsynd.readers.options import ReadOptions
    from tsynd.rounds import RoundsReport, fit_rounds
    from tsynd.runtime import OnnxSynthesizer
    from tsynd.swag import SWAGHead
    from tsynd.synthesis import SynthesisResult, synthesize, uncertainty
    from tsynd.training import fit_autoencoder, fit_classifier


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tsynd' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"tsynd.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"tsynd.{name} needs torch, which is not installed; without it there is tsynd.OnnxSynthesizer alone"
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# the operators register themselves at once, for torch.ops.tsynd and for scripted or exported programs; without
# torch the package still imports, for what needs none
if importlib.util.find_spec("torch") is not None:
    importlib.import_module("tsynd.ops")
