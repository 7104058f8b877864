"""The command ``tsynd info``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tsynd.ops import registration
from tsynd.utils.version import __version__

__all__ = ["info"]

_OPTIONAL = """
monai accelerate torchmetrics kornia safetensors pillow pooch matplotlib adversarial-robustness-toolbox onnx
onnxscript onnxruntime scipy ray webdataset pyarrow fsspec aiohttp pydicom nibabel datasets transformers diffusers
laplace-torch
"""


def info(
    plan: Annotated[bool, typer.Option("--plan", help="Also which CUDA kernel serves which shape.")] = False,
) -> None:
    """Print versions, devices, operators and how they were built."""
    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("tsynd", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("threads", str(torch.get_num_threads()))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(names) or "none")
    if registration.compiled:
        from tsynd.ops import _C  # type: ignore[attr-defined]

        for key, value in _C.build_info().items():
            table.add_row(f"built with {key}" if key != "cpu_kernels" else "CPU kernels", value)
    else:
        table.add_row("operators", "plain torch: the compiled extension did not load")
    console.print(table)
    kernels = Table("operator", "CPU", "CUDA")
    for name, by in registration.served_by().items():
        kernels.add_row(name, by["CPU"], by["CUDA"])
    console.print(kernels)
    extras = Table("optional package", "version")
    for package in _OPTIONAL.split():
        try:
            extras.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            extras.add_row(package, "not installed")
    console.print(extras)
    if plan:
        from tsynd.ops.plans import describe_plans

        plans = Table("device", "shape", "operator", "kernel")
        for row in describe_plans():
            plans.add_row(*row)
        console.print(plans)
