"""``python -m benchmarks.memory IMAGES``: peak memory of one ``synthesize`` beyond its result, as a line of JSON."""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from benchmarks.harness import peak_bytes
from tsynd.networks import SmallAutoencoder, SmallResNet
from tsynd.synthesis import SynthesisResult, synthesize

__all__ = ["main"]


class _Noise(torch.utils.data.Dataset[Tensor]):
    """Images made when they are asked for, so that none wait in memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError
        return torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(index))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("images", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--dropout", default="head", choices=["head", "stages"])
    parser.add_argument("--batch-size", type=int, default=None)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = SmallResNet(1, 4, dropout=arguments.dropout).to(arguments.device)
    autoencoder = SmallAutoencoder(1).to(arguments.device)
    told: dict[str, float] = {}

    def made(count: int, samples: int) -> SynthesisResult:
        return synthesize(
            autoencoder,
            network,
            _Noise(count),
            samples=samples,
            steps=1,
            latent_std=1.0,
            batch_size=arguments.batch_size,
            progress=False,
        )

    def run() -> None:
        start = time.perf_counter()
        result = made(arguments.images, arguments.samples)
        told["seconds"] = time.perf_counter() - start
        fields = (getattr(result, name) for name in result.__dataclass_fields__)
        told["result_bytes"] = sum(x.nbytes for x in fields if isinstance(x, Tensor))

    made(16, 2)  # code, threads and their stacks
    peak = peak_bytes(run, arguments.device)
    # on a GPU the result is on the host, so nothing is taken off
    beyond = None if peak is None else peak - (int(told["result_bytes"]) if arguments.device == "cpu" else 0)
    print(json.dumps({**told, "peak_bytes": beyond}))


if __name__ == "__main__":
    main()
