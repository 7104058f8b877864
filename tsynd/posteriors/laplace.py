"""Last-layer Laplace approximation (Daxberger et al., 2021) of laplace-torch as posterior samples of the head."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.posteriors.last_layer import HeadGaussian, SampledHead, training_features
from tsynd.utils.errors import InputError, check_choice, require

__all__ = ["STRUCTURES", "LaplaceHead"]

STRUCTURES = ("full", "kron", "diag")


class LaplaceHead(SampledHead):
    """A fitted last-layer Laplace approximation of laplace-torch as a posterior.

    Only its numbers are read (``mean`` and ``posterior_precision``), so tsynd needs laplace-torch for :meth:`fit`
    alone.

    Args:
        laplace: what ``laplace.Laplace(model, "classification", subset_of_weights="last_layer", ...)`` gives, after
            ``fit``; hessian_structure ``full``, ``kron`` or ``diag``.
        classifier: the network it was fitted on; None takes the copy that it holds.
        samples: T, at least 1.
        seed: of the samples.

    Raises:
        InputError: another object, one that is not fitted, or not for classification.
    """

    def __init__(self, laplace: Any, classifier: nn.Module | None = None, *, samples: int = 32, seed: int = 0) -> None:
        extractor: Any = getattr(laplace, "model", None)
        layer = getattr(extractor, "_last_layer_name", None)
        if layer is None or not hasattr(extractor, "last_layer"):
            raise InputError(
                f"laplace: got {type(laplace).__name__}, wanted a fitted last-layer Laplace of laplace-torch "
                "(subset_of_weights='last_layer')"
            )
        likelihood = str(getattr(laplace, "likelihood", "classification"))
        if "classification" not in likelihood:
            raise InputError(f"laplace: got one for {likelihood}, wanted Laplace(model, 'classification', ...)")
        network = extractor.model if classifier is None else classifier
        super().__init__(network, _gaussian(laplace), layer, samples, seed)

    @classmethod
    def fit(
        cls,
        classifier: nn.Module,
        data: Any,
        *,
        structure: str = "kron",
        prior_precision: float | None = None,
        layer: str | None = None,
        samples: int = 32,
        seed: int = 0,
        batch_size: int = 256,
    ) -> LaplaceHead:
        """Fit a Laplace approximation around the classifier's last layer as it stands; nothing is changed.

        Args:
            classifier: trained; see :class:`tsynd.SampledHead`.
            data: its training images and class numbers, as :func:`tsynd.fit_classifier` takes them.
            structure: of the Hessian: ``full``, ``kron`` or ``diag``.
            prior_precision: of the weights; None maximises the marginal likelihood.
            layer: name of the layer; None takes the last linear one.
            samples: T.
            seed: of the samples.
            batch_size: images at once.

        Raises:
            InputError: an argument does not fit.
            MissingExtraError: laplace-torch is not installed.
        """
        check_choice("structure", structure, STRUCTURES)
        if prior_precision is not None and not prior_precision > 0:
            raise InputError(f"prior_precision: got {prior_precision!r}, wanted a number above 0, or None")
        make = require("laplace", "laplace").Laplace
        features, labels, name, linear = training_features(classifier, data, layer, batch_size)
        # the layer's Hessian asks for its inputs alone: the trunk runs once, and any kind of network will do. In
        # float32: half precision has no decompositions
        head = nn.Sequential(OrderedDict(trunk=nn.Identity(), head=copy.deepcopy(linear).float()))
        features = features.float()
        head.requires_grad_(True)
        found = make(
            head,
            "classification",
            subset_of_weights="last_layer",
            hessian_structure=structure,
            last_layer_name="head",
            prior_precision=1.0 if prior_precision is None else float(prior_precision),
        )
        with torch.enable_grad():
            found.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size))
            if prior_precision is None:
                with warnings.catch_warnings():  # about a link function, which a marginal likelihood does not have
                    warnings.simplefilter("ignore", UserWarning)
                    found.optimize_prior_precision(method="marglik")
        made = cls.__new__(cls)
        SampledHead.__init__(made, classifier, _gaussian(found), name, samples, seed)
        return made


def _gaussian(laplace: Any) -> HeadGaussian:
    def plain(value: Any) -> Tensor:
        return torch.as_tensor(value).detach().to("cpu", torch.float64)

    mean = getattr(laplace, "mean", None)
    try:
        precision = laplace.posterior_precision
    except AttributeError as error:  # laplace-torch's way of saying so
        raise InputError(f"laplace: {type(laplace).__name__} is not fitted ({error}), wanted fit(...) before") from None
    if not isinstance(mean, Tensor) or mean.dim() != 1:
        raise InputError(f"laplace: {type(laplace).__name__} is not fitted, wanted fit(...) before")
    tensors = {"mean": plain(mean)}
    if isinstance(precision, Tensor) and precision.dim() == 2:
        factor, wrong = torch.linalg.cholesky_ex(plain(precision))
        if int(wrong):
            raise InputError(
                "laplace: its posterior precision is not positive definite, wanted a larger prior_precision"
            )
        return HeadGaussian("full", tensors | {"cholesky": factor})
    if isinstance(precision, Tensor) and precision.dim() == 1:
        return HeadGaussian("diag", tensors | {"std": plain(precision).rsqrt()})
    if getattr(precision, "damping", False) or not hasattr(precision, "eigenvectors"):
        raise InputError(
            f"laplace: got {type(laplace).__name__}, wanted hessian_structure 'full', 'diag', or 'kron' without damping"
        )
    blocks = zip(precision.eigenvectors, precision.eigenvalues, precision.deltas, strict=True)
    for number, (vectors, values, delta) in enumerate(blocks):
        tensors[f"delta_{number}"] = plain(delta)
        for factor_number, (turn, value) in enumerate(zip(vectors, values, strict=True)):
            tensors[f"vectors_{number}_{factor_number}"] = plain(turn)
            tensors[f"values_{number}_{factor_number}"] = plain(value)
    return HeadGaussian("kron", tensors)
