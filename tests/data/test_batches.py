"""One stream of labelled images whatever they come from: labels stay with their images, or the source is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tsynd.data.dataset import Batch, LabelledBatches
from tsynd.utils.errors import InputError

N = 12
LABELS = torch.arange(N) % 3
IMAGES = (torch.arange(N) / 20).reshape(N, 1, 1, 1).expand(N, 1, 4, 5).contiguous()


class Items(Dataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Stream(IterableDataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return (self.make(index) for index in range(N))


class Batched:
    """Neither Dataset nor DataLoader: gives batches, as loaders of other packages do."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return zip(IMAGES.split(4), LABELS.split(4), strict=True)


def pair(index: int) -> Any:
    return IMAGES[index], LABELS[index]


MAKERS: dict[str, Any] = {
    "pair": pair,
    "medmnist": lambda i: (IMAGES[i], np.array([int(LABELS[i])])),
    "mapping": lambda i: {"image": IMAGES[i], "label": LABELS[i], "name": str(i)},
    "other names": lambda i: {"pixel_values": IMAGES[i].numpy(), "labels": int(LABELS[i])},
    "three parts": lambda i: (IMAGES[i], LABELS[i], "more"),
}


def read(source: Any, size: int = 5, **options: Any) -> Batch:
    parts = list(LabelledBatches(source, **options).batches(size))
    assert all(len(part.images) == size for part in parts[:-1])
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat(labels) if labels else None,
        torch.cat([part.sample_ids for part in parts]),
    )


def number(images: Tensor) -> Tensor:
    return (images[:, 0, 0, 0] * 20).round().long()


def right(batch: Batch, count: int = N) -> bool:
    """Whether every label is its image's."""
    assert batch.labels is not None
    assert len(batch.images) == count
    assert batch.sample_ids.tolist() == list(range(count))
    return torch.equal(batch.labels, LABELS[number(batch.images)])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_items_of_every_kind_give_the_same(make: Any) -> None:
    loaders = [DataLoader(Items(make), 4), DataLoader(Items(make), 7), DataLoader(Stream(make), 5)]
    for source in (Items(make), *loaders, DataLoader(Items(make), batch_size=None), DataLoader(Stream(make), None)):
        whole = read(source)
        assert right(whole)
        assert torch.equal(whole.images, IMAGES)
        indexed = LabelledBatches(source, by_index=True)
        index = torch.tensor([7, 0, 7])
        assert torch.equal(indexed.at(index).images, IMAGES[index])
        assert torch.equal(indexed.labels(3), LABELS)


def test_arrays_pairs_and_loaders_of_batches() -> None:
    for source in ((IMAGES, LABELS), [IMAGES.numpy(), LABELS.numpy()[:, None]], Batched()):
        assert right(read(source))
        assert torch.equal(LabelledBatches(source, by_index=True).labels(3), LABELS)
    assert right(read(IMAGES, labels=LABELS))
    assert read(list(IMAGES)).labels is None
    volumes = [volume for volume in torch.rand(2, 1, 3, 4, 5)]  # two items, not images with labels
    assert read(volumes, size=2).images.shape == (2, 1, 3, 4, 5)
    single = DataLoader(TensorDataset(IMAGES[:, :, None], LABELS), batch_size=None)
    assert read(single).images.shape == (N, 1, 1, 4, 5)


def test_pillow_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 4, 5, 3), np.uint8)
    colour = read(Items(lambda i: (Image.fromarray(pixels[i]), 1)))
    assert torch.equal(colour.images, torch.from_numpy(pixels).movedim(-1, 1) / 255)
    grey = read(Items(lambda i: Image.fromarray(pixels[i, ..., 0])))
    assert grey.images.shape == (N, 1, 4, 5)
    with pytest.raises(InputError, match="mode CMYK; wanted L or RGB"):
        read(Items(lambda i: Image.fromarray(pixels[i]).convert("CMYK")))


def test_monais_tensors_stay_out_of_the_arithmetic() -> None:
    data = pytest.importorskip("monai.data")
    items = Items(lambda i: (data.MetaTensor(IMAGES[i], meta={"name": i}), LABELS[i]))
    for source in (items, data.DataLoader(items, batch_size=5), DataLoader(items, 5)):
        batch = read(source)
        assert right(batch)
        assert type(batch.images) is Tensor
    mapped = Items(lambda i: {"image": data.MetaTensor(IMAGES[i]), "label": LABELS[i]})
    assert type(read(data.DataLoader(mapped, batch_size=5)).images) is Tensor
    assert type(read(data.MetaTensor(IMAGES)).images) is Tensor


SHUFFLED = {
    "shuffle": lambda data: DataLoader(data, 4, shuffle=True),
    "repeats": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, replacement=True, num_samples=20)),
    "weights": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * N, 9)),
    "subset": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(5))),
    "order": lambda data: DataLoader(data, 4, sampler=[3, 1, 2, 2]),
    "batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 5, False)),
    "lists": lambda data: DataLoader(data, batch_sampler=[[3, 4], [5], [3, 3, 3]]),
    "shares": lambda data: DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0)),
    "singles": lambda data: DataLoader(data, batch_size=None, shuffle=True),
    "last": lambda data: DataLoader(data, 5, shuffle=True, drop_last=True),
}
COUNTS = dict.fromkeys(SHUFFLED, N) | {"repeats": 20, "weights": 9, "subset": 5, "order": 4, "lists": 6, "last": 10}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_labels_of_a_loader_that_shuffles(kind: str) -> None:
    make = SHUFFLED[kind]
    assert right(read(make(Items(pair))), COUNTS[kind])
    indexed = LabelledBatches(make(Items(pair)), by_index=True)
    all_ = indexed.at(torch.arange(len(indexed)))
    assert torch.equal(indexed.labels(3), LABELS[number(all_.images)])
    for items in (Items(pair), Items(lambda i: IMAGES[i])):
        with pytest.raises(InputError, match="labels: got some beside a DataLoader that shuffles or draws"):
            read(make(items), labels=LABELS)
        with pytest.raises(InputError, match="sample_ids: got some beside a DataLoader that shuffles or draws"):
            read(make(items), sample_ids=torch.arange(N))


def test_labels_of_a_loader_in_order() -> None:
    items = Items(lambda i: IMAGES[i])
    ordered = BatchSampler(SequentialSampler(items), 5, False)
    one = DistributedSampler(items, num_replicas=1, rank=0, shuffle=False)
    loaders = [DataLoader(items, 4), DataLoader(items, batch_sampler=ordered), DataLoader(Stream(items.make), 5)]
    loaders += [DataLoader(items, 4, sampler=range(N)), DataLoader(items, 5, sampler=one)]
    loaders += [DataLoader(items, batch_sampler=[list(range(7)), list(range(7, N))])]
    for source in (items, *loaders):
        assert right(read(source, labels=LABELS))
        ids = read(source, labels=LABELS, sample_ids=torch.arange(N) + 100).sample_ids
        assert ids.tolist() == list(range(100, 100 + N))


def test_what_cannot_be_read_is_one_error() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Items(lambda i: IMAGES[i] * 255 if i == 9 else IMAGES[i]), {}, "images 5 .. 9: images: values from"),
        (DataLoader(Items(lambda i: IMAGES[i] * (255 if i == 9 else 1)), 3), {}, "images 9 .. 11: images: values from"),
        (Items(lambda i: IMAGES[i][..., : 3 + (i > 6)]), {}, "item 2 is .*, others are"),
        (Items(lambda i: (IMAGES[i], LABELS[i]) if i < 8 else IMAGES[i]), {}, "some have a label and some have none"),
        (Items(lambda i: {"picture": IMAGES[i]}), {}, "a mapping of picture; wanted the key image"),
        (Items(lambda i: (IMAGES[i], "cat")), {}, "wanted a tensor or array of numbers"),
        (Items(lambda i: ()), {}, r"an empty tuple; wanted \(image, label\)"),
        (DataLoader(Items(pair), 5), {"labels": LABELS[:4]}, "labels: shape"),
        ((image for image in IMAGES), {}, "images: got generator"),
        ({"images": IMAGES}, {}, "images: got dict"),
        (DataLoader(Items(lambda i: IMAGES[i][..., : 3 + (i > 6)]), 1), {}, "batches of several image sizes"),
    ]
    for source, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            read(source, **options)
        assert "\n" not in str(caught.value)


def test_labels_that_nobody_asks_for_are_not_looked_at() -> None:
    strange = TensorDataset(IMAGES, torch.rand(N, 2, 2))
    assert read(strange, task=None).labels is None
    with pytest.raises(InputError, match="labels: shape"):
        read(strange)
