"""Targeted images of 224 x 224 RGB pixels: on a GPU where there is one, else on a CPU within a limit of memory.

python examples/large_images.py                     # untrained networks and noise: does it fit, how long does it take?
python examples/large_images.py bloodmnist_224 --iterations 2000 --output targeted.npz
"""

from __future__ import annotations

import argparse
import time

import torch

import tsynd


def main() -> None:
    """Train where there are data, synthesise, say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="anything that tsynd.load_data takes")
    parser.add_argument("--train-size", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=0, help="of both trainings")
    parser.add_argument("--images", type=int, default=16, help="how many to make")
    parser.add_argument("--memory-limit", type=float, help="GiB of activations")
    parser.add_argument("--output", help="new .npz")
    chosen = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16" if device == "cuda" else "float32"
    if chosen.data is None:
        images, labels, classes = torch.rand(chosen.images, 3, 224, 224), None, 8
    else:
        source = tsynd.load_data(chosen.data, train_size=chosen.train_size)
        images, labels = source.train.images[: chosen.images], source.train.labels[: chosen.images]
        classes = source.num_classes
    channels = images.shape[1]
    # or any model of your own: MONAI's AutoencoderKL is cut into stages as well
    autoencoder = tsynd.SmallAutoencoder(channels, widths=(64, 128)).to(device)
    classifier = tsynd.SmallResNet(channels, classes, widths=(32, 64, 128, 256)).to(device)
    if chosen.data is not None and chosen.iterations:
        options = {"iterations": chosen.iterations, "batch_size": 16, "device": device, "precision": precision}
        tsynd.fit_autoencoder(autoencoder, source.unlabelled, **options)
        tsynd.fit_classifier(classifier, source.train, **options)

    start = time.perf_counter()
    result = tsynd.synthesize(
        autoencoder,
        classifier,
        images,
        labels,
        device=device,
        precision=precision,
        compile=device == "cuda",  # worth its minute for some thousand images
        memory_limit=chosen.memory_limit,
    )
    seconds = time.perf_counter() - start
    before, after = result.initial_uncertainty.mean(), result.uncertainty.mean()
    print(f"{len(result)} images on {device}: {len(result) / seconds:.2f} a second, {before:.4f} -> {after:.4f} nats")
    if chosen.output:
        print("written:", result.save(chosen.output))


if __name__ == "__main__":
    main()
