"""``tsynd.export_aoti``: encoder, decoder or features compiled ahead of time (AOTInductor)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsynd.export.check import check_results
from tsynd.export.programs import prepare, write_path
from tsynd.export.tracing import quiet, record, to_program
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.ascent import AscentSettings
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, first_line

__all__ = ["AOTI_KINDS", "export_aoti"]

AOTI_KINDS = ("encoder", "decoder", "features")


def export_aoti(
    autoencoder: Any,
    classifier: nn.Module | Posterior | None,
    path: str | Path,
    kind: str,
    *,
    image_shape: Sequence[int],
) -> Path:
    """Write a compiled ``.pt2`` package that gives what eager torch gives, and check that it does.

    ``torch._inductor.aoti_load_package(path)`` loads it in Python, ``torch::inductor::AOTIModelPackageLoader`` in
    C++. The package is for processors like this one's and needs a C++ compiler to be made, none to be run. Give it
    contiguous tensors (``x.contiguous()``): compiled code takes the strides for granted and reads channels-last
    ones, as torch's convolutions often return them, wrongly and without a word.

    Args:
        autoencoder: for ``encoder`` and ``decoder``, see :func:`tsynd.export_onnx`; else None.
        classifier: for ``features``; else None.
        path: the ``.pt2`` file to write; replaced if it exists.
        kind: ``encoder``: images [B, C, H, W] -> latents. ``decoder``: latents -> images in [0, 1]. ``features``:
            images -> [B, D], what enters the classifier's first dropout. Any batch size B.
        image_shape: [C, H, W].

    Returns:
        The path.

    Raises:
        InputError: an argument does not fit, the model cannot be compiled, or the results differ from eager torch's.
    """
    target = write_path(path, ".pt2")
    inductor = torch._inductor
    settings = AscentSettings(samples=1)
    with prepare(kind, classifier, autoencoder, image_shape, settings, 0, None, AOTI_KINDS) as program:
        exported = to_program(record(program, {}), program)
        with atomic_path(target) as temporary:
            try:
                with quiet():
                    inductor.aoti_compile_and_package(exported, package_path=str(temporary))
            except Exception as error:  # the compiler's errors share no class
                raise InputError(f"model: cannot be compiled: {first_line(error)}") from error
            loaded = inductor.aoti_load_package(str(temporary))
            check_results(program, lambda given: loaded(*given.values()))
    return target
