"""``tsynd.export_onnx``: classifier, autoencoder, one step or the whole synthesis as an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsynd.export.check import check_results
from tsynd.export.onnx_operators import decompositions
from tsynd.export.programs import Program, prepare, write_path
from tsynd.export.runtime import NO_DIGEST, sealed
from tsynd.export.tracing import layer_of, quiet, record, to_program
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.ascent import AscentOptions, AscentSettings, ascent_settings
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, first_line, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["OPSET", "export_onnx"]

OPSET = 18
_IR_VERSION = 10  # the exporter's for this opset; onnxruntime reads it from 1.18 on


def export_onnx(
    autoencoder: Any,
    classifier: nn.Module | Posterior | None,
    path: str | Path,
    kind: str = "synthesizer",
    *,
    image_shape: Sequence[int],
    settings: AscentSettings | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    **ascent: Unpack[AscentOptions],
) -> Path:
    """Write an ONNX file that gives what torch gives, and check that it does.

    The kinds, all for any batch size B:

    - ``classifier``: images -> probabilities [B, classes] (mean over the posterior samples),
      mutual_information [B] and entropy [B] in nats.
    - ``encoder``: images -> latents. ``decoder``: latents -> images in [0, 1].
    - ``step``: latents, origins -> next_latents, value [B] (the uncertainty of the given latents).
    - ``synthesizer``: images -> targeted [B, C, H, W], latents, initial_uncertainty [B], uncertainty [B] in nats and
      status [B] int8 (:class:`tsynd.Status`): :func:`tsynd.synthesize` with the same seed, all steps in the file.
      :class:`tsynd.OnnxSynthesizer` runs it without torch.

    The file is deterministic: the posterior samples are constants in it, no random node is. onnx.checker and a run in
    onnxruntime against torch belong to the export; where they fail, no file is left.

    Args:
        autoencoder: as for :func:`tsynd.synthesize`, on the CPU; None for ``classifier``.
        classifier: a module with active dropout or a :class:`tsynd.Posterior` with masks shared by all images (then
            ``samples`` and ``seed`` are its own), on the CPU; None for ``encoder`` and ``decoder``.
        path: the ``.onnx`` file to write; replaced if it exists.
        kind: see above.
        image_shape: [C, H, W]; the file is for this one.
        settings: of the ascent and of its posterior samples, None for the defaults; ``masks`` are shared, and a file
            has no labels, so no ``label_consistency``.
        seed: of the posterior samples.
        class_names: kept in the file.
        ascent: fields of the settings, instead of those given there.

    Returns:
        The path.

    Raises:
        InputError: an argument does not fit, a layer has no counterpart (it and its operator are named), or the
            file's results differ from torch's.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    chosen = ascent_settings(settings, ascent)
    target = write_path(path, ".onnx")
    onnx, runtime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    require("onnxscript", "onnx")
    with prepare(kind, classifier, autoencoder, image_shape, chosen, seed, class_names) as program:
        file = _convert(program)
        properties = {f"tsynd.{key}": json.dumps(value) for key, value in program.metadata.items()}
        properties["tsynd.sha256"] = json.dumps(NO_DIGEST)
        onnx.helper.set_model_props(file, properties)
        file.producer_name, file.producer_version = "tsynd", program.metadata["version"]
        with atomic_path(target) as temporary:
            temporary.write_bytes(sealed(file.SerializeToString()))
            try:
                onnx.checker.check_model(str(temporary), full_check=True)
                session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            except Exception as error:  # both raise classes of their own
                raise InputError(
                    f"model: the exported file is not valid, it was deleted: {first_line(error)}"
                ) from error
            check_results(program, partial(_run, session, program.outputs))
    return target


def _convert(program: Program) -> Any:
    """The program as an ``onnx.ModelProto``."""
    exported = to_program(record(program, decompositions()), program)
    axes = tuple({0: "batch"} for _ in program.inputs)
    try:
        with quiet():
            converted = torch.onnx.export(
                exported,
                tuple(program.examples(2).values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                dynamic_shapes=axes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(_unsupported(error, program)) from error
    assert converted is not None
    file = converted.model_proto
    file.ir_version = _IR_VERSION
    return file


def _unsupported(error: BaseException, program: Program) -> str:
    """Which layer and which operator of it stopped the exporter."""
    cause: BaseException | None = error
    while cause is not None:
        for word in str(cause).replace("'", " ").split():
            if word.startswith(("aten.", "prims.", "tsynd.")) or word.startswith("OpOverload(op="):
                layer = layer_of(word, program.warm, program.modules)
                return f"model: layer {layer} uses the operator {word}, wanted one that can be written as ONNX"
        cause = cause.__cause__
    return f"model: cannot be written as ONNX: {first_line(error)}"


def _run(session: Any, outputs: Sequence[str], given: Mapping[str, Tensor]) -> list[Tensor]:
    arrays = {name: x.contiguous().numpy() for name, x in given.items()}
    return [torch.from_numpy(array) for array in session.run(list(outputs), arrays)]
