"""``python -m benchmarks.memory IMAGES``: peak memory of one ``synthesize`` beyond its result, as a line of JSON.

``--shape 3 224 224 --model kl --checkpointing`` and the like: large images or volumes, see ``docs/large_images.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import peak_bytes
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.synthesis.api import synthesize
from tsynd.synthesis.result import SynthesisResult
from tsynd.utils.errors import require

__all__ = ["main"]


class _Noise(torch.utils.data.Dataset[Tensor]):
    """Images made when they are asked for, so that none wait in memory."""

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self.count, self.shape = count, shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError
        return torch.rand(*self.shape, generator=torch.Generator().manual_seed(index))


def _autoencoder(model: str, channels: int, spatial_dims: int) -> nn.Module:
    if model == "small":
        return SmallAutoencoder(channels, spatial_dims=spatial_dims)
    return require("monai.networks.nets", "models").AutoencoderKL(  # type: ignore[no-any-return]
        spatial_dims=spatial_dims,
        in_channels=channels,
        out_channels=channels,
        channels=(128, 128, 256),
        latent_channels=4,
        num_res_blocks=2,
        attention_levels=(False, False, False),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("images", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--dropout", default="head", choices=["head", "stages"])
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 28, 28], metavar="SIZE")
    parser.add_argument("--model", default="small", choices=["small", "kl"], help="kl: MONAI's AutoencoderKL")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    channels, dims = arguments.shape[0], len(arguments.shape) - 1
    network = SmallResNet(channels, 4, dropout=arguments.dropout, spatial_dims=dims).to(arguments.device)
    autoencoder = _autoencoder(arguments.model, channels, dims).to(arguments.device)
    told: dict[str, float] = {}

    def made(count: int, samples: int, shape: Sequence[int]) -> SynthesisResult:
        return synthesize(
            autoencoder,
            network,
            _Noise(count, shape),
            samples=samples,
            steps=arguments.steps,
            latent_std=1.0,
            batch_size=arguments.batch_size,
            checkpointing=arguments.checkpointing,
            progress=False,
        )

    def run() -> None:
        start = time.perf_counter()
        result = made(arguments.images, arguments.samples, arguments.shape)
        told["seconds"] = time.perf_counter() - start
        fields = (getattr(result, name) for name in result.__dataclass_fields__)
        told["result_bytes"] = sum(x.nbytes for x in fields if isinstance(x, Tensor))

    made(16 if arguments.model == "small" else 1, 2, [channels] + [28] * dims)  # code, threads and their stacks
    peak = peak_bytes(run, arguments.device)
    # on a GPU the result is on the host, so nothing is taken off
    beyond = None if peak is None else peak - (int(told["result_bytes"]) if arguments.device == "cpu" else 0)
    print(json.dumps({**told, "peak_bytes": beyond}))


if __name__ == "__main__":
    main()
