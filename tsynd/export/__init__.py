"""Files that run elsewhere: ONNX, TorchScript and AOTInductor."""

from tsynd.export.aoti_export import export_aoti
from tsynd.export.onnx_export import export_onnx
from tsynd.export.torchscript_export import export_torchscript

__all__ = ["export_aoti", "export_onnx", "export_torchscript"]
