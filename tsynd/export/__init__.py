"""Files that run elsewhere: ONNX and TorchScript."""

from tsynd.export.onnx_export import export_onnx

__all__ = ["export_onnx"]
