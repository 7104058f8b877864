"""Augmentations of the real images themselves, before extra ones are made of them."""

from __future__ import annotations

from torch import Tensor, nn

from tsynd.training.extra_images import BatchAugmentation, Extra, ExtraFunction, Parts, as_augmentation
from tsynd.utils.errors import InputError

__all__ = ["InPlace"]


class InPlace(Parts):
    """Every batch of real images is changed, also during the warm-up, and extra images are made of what it became.

    Over several processes each changes its own images.

    Args:
        change: makes an image of every one, as :class:`StandardAugmentation` with ``ratio=1, every=1`` does.
        extra: makes the extra images.

    Raises:
        InputError: a change that would leave images out, or extra images that cannot be asked for.
    """

    def __init__(self, change: BatchAugmentation, extra: ExtraFunction) -> None:
        if not isinstance(change, BatchAugmentation) or (change.ratio, change.every) != (1.0, 1):
            raise InputError("change: wanted an augmentation of a batch with ratio=1 and every=1")
        self.change, self.extra = self.parts = change, as_augmentation(extra)

    def transform(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The changed images [B, C, H, W] and their labels; called before each step's other calls."""
        return self.change.give(None, images, labels)

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
        """Extra images of changed ones."""
        return self.extra(classifier, images, labels)

    def check(self, classifier: nn.Module, steps: int) -> None:
        """See :meth:`Augmentation.check`."""
        self.extra.check(classifier, steps)

    def set_ids(self, ids: Tensor) -> None:
        """See :meth:`Augmentation.set_ids`."""
        self.extra.set_ids(ids)

    def set_rows(self, rows: Tensor, total: int) -> Tensor | None:
        """See :meth:`Augmentation.set_rows`."""
        return self.extra.set_rows(rows, total)
