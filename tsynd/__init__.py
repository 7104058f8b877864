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
    "Autoencoder": "models.autoencoder",
    "DataSource": "data",
    "Ensemble": "posteriors.posterior",
    "InputError": "errors",
    "LabelledImages": "data",
    "LaplaceHead": "posteriors.laplace",
    "MCDropout": "posteriors.mc_dropout",
    "OnnxSynthesizer": "runtime",
    "Posterior": "posteriors.posterior",
    "ReadOptions": "readers.options",
    "RoundsReport": "rounds",
    "SWAGHead": "posteriors.swag",
    "SampledHead": "posteriors.head_posterior",
    "SmallAutoencoder": "models.networks",
    "SmallResNet": "models.networks",
    "Status": "ascent",
    "SynthesisResult": "synthesis",
    "TargetedAugmentation": "augmentation",
    "as_autoencoder": "models.autoencoder",
    "as_classifier": "posteriors.classifier",
    "evaluate": "evaluation",
    "export_aoti": "export",
    "export_onnx": "export",
    "export_torchscript": "export",
    "fit_autoencoder": "training",
    "fit_classifier": "training",
    "fit_rounds": "rounds",
    "load_data": "data",
    "load_model": "models.checkpoint",
    "save_model": "models.checkpoint",
    "synthesize": "synthesis",
    "uncertainty": "synthesis",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from tsynd.ascent import Ascent, AscentSettings, Status
    from tsynd.augmentation import TargetedAugmentation
    from tsynd.data import DataSource, LabelledImages, load_data
    from tsynd.errors import InputError
    from tsynd.evaluation import evaluate
    from tsynd.export import export_aoti, export_onnx, export_torchscript
    from tsynd.models.autoencoder import Autoencoder, as_autoencoder
    from tsynd.models.checkpoint import load_model, save_model
    from tsynd.models.networks import SmallAutoencoder, SmallResNet
    from tsynd.posteriors.classifier import as_classifier
    from tsynd.posteriors.head_posterior import SampledHead
    from tsynd.posteriors.laplace import LaplaceHead
    from tsynd.posteriors.mc_dropout import MCDropout
    from tsynd.posteriors.posterior import Ensemble, Posterior
    from tsynd.posteriors.swag import SWAGHead
    from tsynd.readers.options import ReadOptions
    from tsynd.rounds import RoundsReport, fit_rounds
    from tsynd.runtime import OnnxSynthesizer
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
