"""Features of a frozen encoder, computed once for each image and kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsynd.models.pretrained import PretrainedClassifier
from tsynd.utils.fingerprint import hash_parts
from tsynd.utils.tensors import hash_tensors, read_tensors, write_tensors

__all__ = ["KeptFeatures"]

# Libraries pick their kernels by the size of a batch: with whole tiles an image's features do not depend on which
# others it is encoded with.
_TILE = 16
_KEY = 16  # bytes of an image's hash


class KeptFeatures:
    """Features by what an image holds, of one encoder as it is now.

    Args:
        classifier: with a frozen encoder.
        folder: of a file named by the encoder's weights, read if it is there and whole; None keeps them in memory.
    """

    def __init__(self, classifier: PretrainedClassifier, folder: Path | None = None) -> None:
        self._classifier = classifier
        self._rows: dict[bytes, int] = {}
        self._values: list[Tensor] = []
        self._path: Path | None = None
        self._saved = 0
        if folder is not None:
            self._path = folder / f"features-{_hash_encoder(classifier)[:16]}.safetensors"
            self._read(self._path)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, images: Tensor, keep: bool = True) -> Tensor:
        """Features [B, D] without gradient, on the images' device.

        Args:
            images: [B, 1 or 3, H, W] in [0, 1].
            keep: whether these images will be seen again.
        """
        if not keep:
            return self._encode(images)
        keys = [_hash_image(row) for row in images.detach().cpu().contiguous().numpy()]
        new = list({key: place for place, key in enumerate(keys) if key not in self._rows}.items())
        if new:
            for (key, _), value in zip(new, self._encode(images[[place for _, place in new]]), strict=True):
                self._rows[key] = len(self._values)
                self._values.append(value.cpu())
        return torch.stack([self._values[self._rows[key]] for key in keys]).to(images.device)

    def save(self) -> None:
        """Write what is new to the folder, whole or not at all."""
        if self._path is None or len(self._rows) == self._saved:
            return
        keys = torch.from_numpy(np.frombuffer(b"".join(self._rows), np.uint8).copy()).reshape(-1, _KEY)
        write_tensors(self._path, {"keys": keys, "features": torch.stack(self._values)})
        self._saved = len(self._rows)

    def _read(self, path: Path) -> None:
        """What a file holds; nothing of one that is not whole, for it can be made again."""
        held = read_tensors(path)
        if held is None:
            return
        self._rows = {key.tobytes(): row for row, key in enumerate(held["keys"].numpy())}
        self._values = list(held["features"])
        self._saved = len(self._rows)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        found = []
        for part in torch.split(images, _TILE):
            padded = part if len(part) == _TILE else part[torch.arange(_TILE).clamp_max(len(part) - 1)]
            found.append(self._classifier.features(padded)[: len(part)].float())
        return torch.cat(found)


def _hash_image(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=_KEY)
    digest.update(pixels.data)
    return digest.digest()


def _hash_encoder(classifier: PretrainedClassifier) -> str:
    """Of all that decides a feature: weights, pixels, size."""
    about = json.dumps({name: classifier.config[name] for name in ("source", "size", "mean", "std")})
    return hash_parts(about, hash_tensors(dict(classifier.encoder.state_dict())))
