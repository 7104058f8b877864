"""Extra images by the transformations that most trainings use, made by kornia."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsynd.training.extra_images import BatchAugmentation
from tsynd.utils.errors import check_choice, require

__all__ = ["FLIPS", "RandAugmentation", "StandardAugmentation"]

FLIPS = ("none", "horizontal", "both")

_GROUP = 8  # kornia draws one pair of operations per call; this many images share it


class StandardAugmentation(BatchAugmentation):
    """Turns of up to 10°, shifts of 5 % of the sides, scales of 0.9 to 1.1, and flips; volumes in the plane of H and W.

    Args:
        flip: ``none``, ``horizontal`` or ``both``: the flips that leave a picture possible, each by an even chance. (In
            a chest X-ray the heart lies left: ``none``.)
        ratio: extra images per real image of the batch, in (0, 1]; the batch's first are taken.
        every: only calls 0, n, 2n, ... give images, the others none.
        seed: call n draws from seed + n; torch's global state is left as it was.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(self, flip: str = "none", ratio: float = 1.0, every: int = 1, seed: int = 0) -> None:
        super().__init__(ratio, every, seed)
        check_choice("flip", flip, FLIPS)
        kornia = require("kornia.augmentation", "train")
        steps = [kornia.RandomAffine(10.0, (0.05, 0.05), (0.9, 1.1), padding_mode="border", p=1.0)]
        steps += [kornia.RandomHorizontalFlip(p=0.5)] if flip != "none" else []
        steps += [kornia.RandomVerticalFlip(p=0.5)] if flip == "both" else []
        self.augment = kornia.AugmentationSequential(*steps, data_keys=["input"])

    def make(self, classifier: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`BatchAugmentation.make`."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed + self.calls)
            flat = images.flatten(1, -3)  # a volume's slices as channels
            made: Tensor = self.augment(flat)
            return made.clamp(0, 1).reshape(images.shape)


class RandAugmentation(BatchAugmentation):
    """RandAugment (Cubuk et al. 2020): two operations of strength 10 of 30; grey pictures pass as RGB.

    Arguments are those of :class:`StandardAugmentation`, without ``flip``.
    """

    def __init__(self, ratio: float = 1.0, every: int = 1, seed: int = 0) -> None:
        super().__init__(ratio, every, seed)
        self.augment = require("kornia.augmentation.auto", "train").RandAugment(n=2, m=10)

    def make(self, classifier: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`BatchAugmentation.make`."""
        grey = images.shape[1] == 1
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed + self.calls)
            coloured = images.expand(-1, 3, -1, -1) if grey else images
            made = torch.cat([self.augment(part) for part in torch.split(coloured, _GROUP)]).clamp(0, 1)
        return made.mean(1, keepdim=True) if grey else made
