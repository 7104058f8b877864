"""The operators: ``torch.ops.tsynd``, their documented faces, their plain-torch twins and their launch plans."""

from tsynd.ops.operators import (
    ascend_,
    dropout_expand,
    dropout_gather,
    dropout_head_uncertainty,
    dropout_mask,
    expected_information,
    head_uncertainty,
    logits_uncertainty,
)
from tsynd.ops.registration import compiled, library_path, served_by

__all__ = [
    "ascend_",
    "compiled",
    "dropout_expand",
    "dropout_gather",
    "dropout_head_uncertainty",
    "dropout_mask",
    "expected_information",
    "head_uncertainty",
    "library_path",
    "logits_uncertainty",
    "served_by",
]
