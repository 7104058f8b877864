"""Targeted synthetic data generation (TSynD): useful extra images for small medical image sets.

``import tsynd`` needs torch and numpy alone; everything else is imported where it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from tsynd.utils.version import __version__

_HOME = {
    "Alternation": "training.extra_images",
    "Ascent": "synthesis.ascent",
    "AscentSettings": "synthesis.ascent",
    "Augmentation": "training.extra_images",
    "Autoencoder": "models.autoencoder",
    "DataSource": "data.dataset",
    "Ensemble": "posteriors.posterior",
    "ExtraImages": "training.extra_images",
    "InputError": "utils.errors",
    "LabelledImages": "data.dataset",
    "LaplaceHead": "posteriors.laplace",
    "MCDropout": "posteriors.mc_dropout",
    "Mixture": "training.extra_images",
    "OfflineRounds": "training.rounds",
    "OnnxSynthesizer": "export.runtime",
    "PixelAdversarial": "training.pixels",
    "PixelConsistency": "training.pixels",
    "Posterior": "posteriors.posterior",
    "ReadOptions": "data.readers.options",
    "SampledHead": "posteriors.last_layer",
    "SmallAutoencoder": "models.networks",
    "SmallResNet": "models.networks",
    "StandardAugmentation": "training.standard",
    "Status": "synthesis.ascent",
    "SynthesisResult": "synthesis.result",
    "TargetedAugmentation": "training.augmentation",
    "as_autoencoder": "models.autoencoder",
    "as_classifier": "models.classifier",
    "autoencoder": "models.named",
    "classifier": "models.named",
    "evaluate": "evaluation.evaluate",
    "export_aoti": "export.aoti",
    "export_onnx": "export.onnx",
    "export_torchscript": "export.torchscript",
    "fit_autoencoder": "training.autoencoder",
    "fit_classifier": "training.classifier",
    "load_data": "data.load",
    "load_model": "models.checkpoint",
    "measure_latent_std": "synthesis.api",
    "predict": "evaluation.predict",
    "recipe": "training.recipe",
    "save_model": "models.checkpoint",
    "synthesize": "synthesis.api",
    "uncertainty": "synthesis.api",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from tsynd.data.dataset import DataSource, LabelledImages
    from tsynd.data.load import load_data
    from tsynd.data.readers.options import ReadOptions
    from tsynd.evaluation.evaluate import evaluate
    from tsynd.evaluation.predict import predict
    from tsynd.export.aoti import export_aoti
    from tsynd.export.onnx import export_onnx
    from tsynd.export.runtime import OnnxSynthesizer
    from tsynd.export.torchscript import export_torchscript
    from tsynd.models.autoencoder import Autoencoder, as_autoencoder
    from tsynd.models.checkpoint import load_model, save_model
    from tsynd.models.classifier import as_classifier
    from tsynd.models.named import autoencoder, classifier
    from tsynd.models.networks import SmallAutoencoder, SmallResNet
    from tsynd.posteriors.laplace import LaplaceHead
    from tsynd.posteriors.last_layer import SampledHead
    from tsynd.posteriors.mc_dropout import MCDropout
    from tsynd.posteriors.posterior import Ensemble, Posterior
    from tsynd.synthesis.api import measure_latent_std, synthesize, uncertainty
    from tsynd.synthesis.ascent import Ascent, AscentSettings, Status
    from tsynd.synthesis.result import SynthesisResult
    from tsynd.training.augmentation import TargetedAugmentation
    from tsynd.training.autoencoder import fit_autoencoder
    from tsynd.training.classifier import fit_classifier
    from tsynd.training.extra_images import Alternation, Augmentation, ExtraImages, Mixture
    from tsynd.training.pixels import PixelAdversarial, PixelConsistency
    from tsynd.training.recipe import recipe
    from tsynd.training.rounds import OfflineRounds
    from tsynd.training.standard import StandardAugmentation
    from tsynd.utils.errors import InputError


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
