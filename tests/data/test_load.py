from __future__ import annotations

import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsynd.data import medmnist
from tsynd.data.checks import check_images, check_labels
from tsynd.data.dataset import LabelledImages
from tsynd.data.formats import save_class_folders, to_uint8
from tsynd.data.load import load_data
from tsynd.utils.atomic import atomic_path, save_npz
from tsynd.utils.errors import InputError

Arrays = dict[str, Any]


def made_up(counts: dict[str, int], classes: int = 3, shape: tuple[int, ...] = (8, 8), seed: int = 0) -> Arrays:
    """Arrays of a MedMNIST-style file with uneven classes, every one present."""
    rng = np.random.default_rng(seed)
    out: Arrays = {}
    for prefix, n in counts.items():
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes) // 2])
        out[f"{prefix}images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        out[f"{prefix}labels"] = rng.permutation(labels).astype(np.uint8)[:, None]
    return out


SPLITS = {"train_": 60, "val_": 12, "test_": 20}


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Write a file from the made-up splits with some keys changed (None: left out)."""

    def write(**changes: Any) -> Path:
        arrays = {k: v for k, v in {**made_up(SPLITS), **changes}.items() if v is not None}
        np.savez(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"

    return write


@pytest.fixture(scope="module")
def pneumonia() -> Path:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("TSYND_TEST_DATA") or root.parent / "shared" / "data")
    if not (folder / "pneumoniamnist.npz").is_file():
        pytest.skip("no real images: set TSYND_TEST_DATA to the folder of pneumoniamnist.npz")
    return folder / "pneumoniamnist.npz"


# Files


def test_npz_splits(npz: Callable[..., Path]) -> None:
    arrays = made_up(SPLITS)
    source = load_data(npz(extra=np.zeros(3), train_group=np.array(["a"])))
    assert (source.name, source.task, source.class_names) == ("set", "multiclass", ("0", "1", "2"))
    assert (source.image_shape, source.channels, source.num_classes) == ((1, 8, 8), 1, 3)
    assert [len(s) for s in (source.train, source.val, source.test)] == [60, 12, 20]
    assert torch.equal(source.test.images[:, 0], torch.from_numpy(arrays["test_images"]))
    assert source.test.labels.dtype == torch.int64
    assert source.test.labels.tolist() == arrays["test_labels"][:, 0].tolist()
    assert source.train_indices.tolist() == list(range(60))


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_npz_volumes(npz: Callable[..., Path], channels: tuple[int, ...]) -> None:
    arrays = made_up(SPLITS, shape=(6, 8, 4, *channels))
    source = load_data(npz(**arrays))
    assert source.image_shape == ((channels or (1,))[0], 6, 8, 4)
    assert source.spatial_dims == 3
    wanted = torch.from_numpy(arrays["val_images"]).reshape(12, 6, 8, 4, -1).movedim(-1, 1)
    assert torch.equal(source.val.images, wanted)
    assert source.val.images.is_contiguous()
    assert torch.equal(source.val[3][0], wanted[3] / 255)
    back = to_uint8(source.val.pixels())
    assert np.array_equal(back.reshape(arrays["val_images"].shape), arrays["val_images"])


def test_npz_colour_is_channels_first_and_names_are_read(npz: Callable[..., Path]) -> None:
    arrays = made_up(SPLITS, shape=(8, 6, 3))
    source = load_data(npz(**arrays, class_names=np.array(["a", "b", "c", "none here"])))
    assert source.image_shape == (3, 8, 6)
    assert source.class_names == ("a", "b", "c", "none here")
    assert torch.equal(source.val.images, torch.from_numpy(arrays["val_images"]).permute(0, 3, 1, 2))


def test_npz_multilabel(npz: Callable[..., Path]) -> None:
    labels = {f"{k}labels": np.random.default_rng(n).integers(0, 2, (n, 5), dtype=np.uint8) for k, n in SPLITS.items()}
    source = load_data(npz(**labels), train_size=7)
    assert (source.task, source.num_classes, len(source.train)) == ("multilabel", 5, 7)
    assert source.train.labels.dtype == torch.float32
    assert torch.equal(source.train.labels, source.unlabelled.labels[source.train_indices])


def test_npz_without_val_carves_it_from_train(npz: Callable[..., Path]) -> None:
    path = npz(val_images=None, val_labels=None)
    source, again, other = load_data(path), load_data(path), load_data(path, seed=1)
    assert (len(source.unlabelled), len(source.val), len(source.test)) == (51, 9, 20)
    assert torch.equal(source.val.images, again.val.images)
    assert not torch.equal(source.val.images, other.val.images)
    whole = torch.from_numpy(made_up(SPLITS)["train_images"]).flatten(1).tolist()
    parts = torch.cat([source.unlabelled.images, source.val.images]).flatten(1).tolist()
    assert sorted(whole) == sorted(parts)


def test_npz_without_splits_is_divided_with_the_class_shares(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [160, 40])
    images = np.arange(200 * 16).astype(np.uint8).reshape(200, 4, 4)
    save_npz(tmp_path / "one.npz", images=images, labels=torch.from_numpy(labels), status=np.zeros(200))
    source = load_data(tmp_path / "one.npz")
    assert [len(s) for s in (source.train, source.val, source.test)] == [140, 30, 30]
    for part in (source.train, source.val, source.test):
        assert part.labels.float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_npz_class_names_of_a_known_set(tmp_path: Path) -> None:
    save_npz(tmp_path / "pneumoniamnist.npz", **made_up(SPLITS, classes=2))
    assert load_data(tmp_path / "pneumoniamnist.npz").class_names == ("normal", "pneumonia")


def test_real_images(pneumonia: Path) -> None:
    source = load_data(pneumonia, train_size=200)
    assert source.class_names == ("normal", "pneumonia")
    assert [len(s) for s in (source.train, source.unlabelled, source.val, source.test)] == [
        200,
        4708,
        524,
        624,
    ]
    assert source.train.labels.bincount().tolist() == [52, 148]  # 1214 and 3494 of 4708


BAD_FILES: list[tuple[str, Arrays, str]] = [
    ("missing key", {"test_labels": None}, "missing test_labels"),
    ("no test", {"test_labels": None, "test_images": None}, "missing test_images, test_labels"),
    ("half a val split", {"val_labels": None}, "missing val_labels"),
    ("float images", {"train_images": np.zeros((60, 8, 8))}, "float64.*wanted uint8"),
    ("channels first", {"train_images": np.zeros((60, 3, 8, 8), np.uint8)}, r"wanted uint8 \[N, H, W\]"),
    ("transparency", {"train_images": np.zeros((60, 16, 16, 4), np.uint8)}, r"wanted uint8 \[N, H, W\]"),
    ("too few labels", {"train_labels": np.zeros((59, 1), np.uint8)}, "train_labels.*for 60 images"),
    ("negative label", {"train_labels": np.arange(60) % 3 - 1}, "values from -1"),
    ("float label", {"train_labels": (np.arange(60) % 3) + 0.5}, "wanted integers"),
    ("text labels", {"train_labels": np.array(["a"] * 60)}, "wanted a tensor or array of numbers"),
    (
        "unknown class in test",
        {"test_labels": np.arange(20)},
        "test_labels: values from 0 to 19; wanted 0 to 2",
    ),
    (
        "empty split",
        {"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros((0, 1), int)},
        "N > 0",
    ),
    ("class missing", {"train_labels": np.arange(60) % 3 + 1}, "class 0 has no training image"),
    ("huge class", {"train_labels": np.where(np.arange(60), 10**15, 0)}, "class 1 has no training image"),
    ("one class", {f"{k}labels": np.zeros(n, int) for k, n in SPLITS.items()}, "one class only"),
    ("not 0 or 1", {"train_labels": np.full((60, 4), 2)}, "values other than 0 and 1"),
    ("label counts differ", {"train_labels": np.eye(60, 4, dtype=int)}, "val_labels"),
    ("sizes differ", {"test_images": np.zeros((20, 9, 9), np.uint8)}, "one size in all splits"),
    ("pickle needed", {"train_labels": np.array([None] * 60)}, "never loads pickle"),
    ("too few names", {"class_names": np.array(["a", "b"])}, "wanted 3 distinct strings"),
    ("names no strings", {"class_names": np.arange(3)}, "wanted 3 distinct strings"),
]


@pytest.mark.parametrize(("changes", "message"), [b[1:] for b in BAD_FILES], ids=[b[0] for b in BAD_FILES])
def test_bad_npz_is_refused_by_name(npz: Callable[..., Path], changes: Arrays, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_data(npz(**changes))
    assert "set.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(npz: Callable[..., Path], tmp_path: Path) -> None:
    raw = npz().read_bytes()
    cut, flipped, pickled = tmp_path / "cut.npz", tmp_path / "flipped.npz", tmp_path / "p.npz"
    cut.write_bytes(raw[: len(raw) // 2])
    flipped.write_bytes(raw[:300] + bytes(200) + raw[500:])
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "p.npy").rename(pickled)
    (tmp_path / "empty.npz").touch()
    for path in (cut, flipped, pickled, tmp_path / "empty.npz"):
        with pytest.raises(InputError, match="damaged"):
            load_data(path)
    with pytest.raises(InputError, match="never loads pickle"):
        load_data(pickled)


def test_too_few_images_to_split(tmp_path: Path) -> None:
    save_npz(tmp_path / "few.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.array([0, 1, 0]))
    with pytest.raises(InputError, match="3 images are too few"):
        load_data(tmp_path / "few.npz")


# The labelled subset


def test_train_size_is_stratified_seeded_and_nested(npz: Callable[..., Path]) -> None:
    labels = np.repeat([0, 1, 2], [40, 18, 2])
    path = npz(train_labels=labels)
    small, again = load_data(path, train_size=10, seed=3), load_data(path, train_size=10, seed=3)
    assert torch.equal(small.train_indices, again.train_indices)
    assert not torch.equal(small.train_indices, load_data(path, train_size=10, seed=4).train_indices)
    assert torch.equal(small.train.images, small.unlabelled.images[small.train_indices])
    before: set[int] = set()
    for size in (3, 10, 11, 30, 59, 60):
        source = load_data(path, train_size=size, seed=3)
        counts = source.train.labels.bincount(minlength=3)
        assert len(source.train) == size
        assert int(counts.min()) >= 1
        shares = torch.tensor([40, 18, 2]) / 60 * size
        assert (counts - shares).abs().max() <= (2 if size == 3 else 1.01)
        assert before <= set(source.train_indices.tolist())
        before = set(source.train_indices.tolist())


@pytest.mark.parametrize("size", [-1, 0, 2, 61])
def test_train_size_out_of_range(npz: Callable[..., Path], size: int) -> None:
    with pytest.raises(InputError, match=f"train_size: {size}; wanted 3 .* to 60"):
        load_data(npz(), train_size=size)


def test_global_random_state_is_left_alone(npz: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_data(npz(), train_size=10)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(InputError, match="seed"):
        load_data("phantom", seed=-1)


# Folders


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    image = pytest.importorskip("PIL.Image")
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = np.random.default_rng([i, len(name)]).integers(0, 256, shape, dtype=np.uint8)
            image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


def test_folder_of_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "cells", {"b": 20, "a": 40, ".hidden": 1}, mode="RGB")
    (tmp_path / "cells" / "a" / "notes.txt").write_text("no picture")
    source = load_data(tmp_path / "cells", train_size=6)
    assert (source.name, source.class_names, source.channels) == ("cells", ("a", "b"), 3)
    assert [len(s) for s in (source.unlabelled, source.val, source.test)] == [42, 9, 9]
    assert source.train.labels.bincount().tolist() == [4, 2]


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 4), ("test", 6)):
        write_folder(tmp_path / split, {"healthy": count, "ill": count // 2})
    source = load_data(str(tmp_path))
    assert [len(s) for s in (source.train, source.val, source.test)] == [30, 6, 9]
    assert source.val.labels.tolist() == [0] * 4 + [1] * 2
    write_folder(tmp_path / "test", {"other": 1})
    with pytest.raises(InputError, match="class folder 'other' that train has not"):
        load_data(tmp_path)


def test_folder_bad_pictures_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": 9, "b": 9})
    write_folder(tmp_path / "odd", {"x": 1}, size=(10, 6))
    write_folder(tmp_path / "odd", {"yy": 1}, mode="RGB")
    bad = root / "b" / "04.png"
    bad.write_bytes((tmp_path / "odd" / "x" / "00.png").read_bytes())
    with pytest.raises(InputError, match=r"04.png: 10x6 grey, while 00.png is 8x8 grey.*image_size"):
        load_data(root)
    assert load_data(root, image_size=5).image_shape == (1, 5, 5)
    bad.write_bytes((tmp_path / "odd" / "yy" / "00.png").read_bytes())
    with pytest.raises(InputError, match=r"04.png: 8x8 RGB"):
        load_data(root)
    for content in (b"", b"not a picture", (root / "a" / "00.png").read_bytes()[:60]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"04.png: unreadable picture"):
            load_data(root)


def test_folder_resizing_antialiases(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
            image.fromarray(stripes).save(tmp_path / name / f"{i}.png")
    pixels = load_data(tmp_path, image_size=8).train.pixels()
    assert (pixels - 0.5).abs().max() < 0.1  # plain subsampling would give 0 or 1


def test_folder_without_classes_or_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 class folders"):
        load_data(tmp_path)
    write_folder(tmp_path, {"a": 3})
    with pytest.raises(InputError, match="1 class folders"):
        load_data(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="b: no picture"):
        load_data(tmp_path)
    write_folder(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(InputError, match="wanted train and test"):
        load_data(tmp_path)


# Names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pneumonimnist", "did you mean pneumoniamnist"),
        ("bloodmnist_32", "did you mean bloodmnist"),
        ("phantom:big", "such as 'phantom:64'"),
        ("phantom:4", "from 16 to 256"),
        ("nowhere/set.npz", "no file, folder or known name"),
        (Path("bloodmnist"), "no file, folder or known name"),
    ],
)
def test_unknown_sources(source: str | Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(source)


def test_image_size_is_for_folders(npz: Callable[..., Path]) -> None:
    for source in (npz(), "phantom"):
        with pytest.raises(InputError, match="image_size"):
            load_data(source, image_size=8)


def test_phantom_does_not_depend_on_the_seed_of_the_draw() -> None:
    one, two = load_data("phantom", train_size=40), load_data("phantom", train_size=40, seed=1)
    assert torch.equal(one.unlabelled.images, two.unlabelled.images)
    assert not torch.equal(one.train_indices, two.train_indices)
    assert (one.name, one.image_shape, len(one.unlabelled)) == ("phantom", (1, 28, 28), 2000)


# Downloads: a server on this machine stands in for the real one


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("pooch")
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}/{{}}.npz?download=1"
        monkeypatch.setattr(medmnist, "URL", address)
        monkeypatch.setenv("TSYND_DATA", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield folder
        web.shutdown()


def test_download_once(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_npz(server / "breastmnist.npz", **made_up(SPLITS, classes=2))
    md5 = hashlib.md5((server / "breastmnist.npz").read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.MD5, "breastmnist", md5)
    source = load_data("BreastMNIST")
    assert (source.name, source.class_names) == ("breastmnist", ("malignant", "normal, benign"))
    (server / "breastmnist.npz").unlink()
    assert len(load_data("breastmnist", train_size=5).train) == 5
    (tmp_path / "cache" / "breastmnist.npz").write_bytes(b"damaged since")
    with pytest.raises(InputError, match=r"breastmnist.npz: md5 .*remove it"):
        load_data("breastmnist")


def test_download_with_another_md5_is_refused_and_not_kept(server: Path, tmp_path: Path) -> None:
    save_npz(server / "bloodmnist_64.npz", **made_up(SPLITS, classes=8))
    with pytest.raises(InputError, match="has not the md5 2b94928a2ae4916078ca51e05b6b800b"):
        load_data("bloodmnist_64")
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_failure_says_what_to_do(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (medmnist.URL, "http://127.0.0.1:9/{}.npz"):
        monkeypatch.setattr(medmnist, "URL", address)
        with pytest.raises(InputError, match=r"download failed.*by hand and put it at") as caught:
            load_data("chestmnist")
        assert str(tmp_path / "cache" / "chestmnist.npz") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_table_of_known_sets() -> None:
    assert len(medmnist.CLASS_NAMES) == 18
    assert len(set(medmnist.MD5.values())) == len(medmnist.MD5) == 12 * 4 + 6 * 2
    assert all(len(md5) == 32 and set(md5) <= set("0123456789abcdef") for md5 in medmnist.MD5.values())
    counts = {name: len(classes) for name, classes in medmnist.CLASS_NAMES.items()}
    assert (counts["pathmnist"], counts["chestmnist"], counts["tissuemnist"]) == (9, 14, 8)
    assert medmnist.CLASS_NAMES["pathmnist"][7:] == (
        "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    )


# In memory


def test_labelled_images_as_a_dataset() -> None:
    pixels = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 2, 2)
    items = LabelledImages(pixels, torch.arange(5))
    image, label = items[-1]
    assert image.dtype == torch.float32
    assert torch.equal(image, pixels[4] / 255)
    assert int(label) == 4
    images, labels = items.batch(torch.tensor([3, 0]))
    assert torch.equal(images, pixels[[3, 0]] / 255)
    assert labels.tolist() == [3, 0]
    assert len(items.subset(torch.tensor([1, 2]))) == 2
    loader = torch.utils.data.DataLoader(items, batch_size=2)
    assert [len(batch[0]) for batch in loader] == [2, 2, 1]
    assert torch.equal(items.pixels(), pixels / 255)
    with pytest.raises(IndexError):
        items[5]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3)),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int64), torch.zeros(3)),
        (torch.zeros(3, 1, 4, 4), torch.zeros(2)),
    ],
)
def test_labelled_images_refuses(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(InputError):
        LabelledImages(images, labels)


def test_check_images_accepts() -> None:
    grey = np.arange(2 * 16, dtype=np.uint8).reshape(2, 1, 4, 4)
    wanted = torch.from_numpy(grey) / 255
    variants = [grey, torch.from_numpy(grey), grey / 255, (grey / 255).astype(">f4"), wanted.double()]
    flipped = np.flip(np.flip(grey, 3).copy(), 3)  # negative strides
    frozen = grey.copy()
    frozen.flags.writeable = False
    for images in [*variants, flipped, frozen]:
        checked = check_images(images)
        assert checked.dtype == torch.float32
        torch.testing.assert_close(checked, wanted, rtol=0, atol=1e-7)
    near = check_images(torch.tensor([-5e-5, 1 + 5e-5]).reshape(2, 1, 1, 1))
    assert near.flatten().tolist() == [0, 1]


ONE = torch.full((3, 1, 4, 4), 0.5)


def spoiled(value: float) -> torch.Tensor:
    images = ONE.clone()
    images[1, 0, 2, 2] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (ONE[0], r"shape \[1, 4, 4\]; wanted \[N, C, H, W\].*unsqueeze"),
        (ONE[:0], "N > 0"),
        (ONE[None, None], "shape"),
        (torch.zeros(2, 28, 28, 3), "channels-last"),
        (torch.zeros(2, 8, 8, 8, 1), r"channels-last; wanted \[N, C, D, H, W\]"),
        (ONE.long(), "dtype torch.int64"),
        (ONE.bool().numpy(), "dtype torch.bool"),
        (spoiled(float("nan")), "image 1 is not finite"),
        (spoiled(float("inf")), "image 1 is not finite"),
        (ONE * 255, r"values from 127.5 to 127.5; wanted \[0, 1\]"),
        (ONE - 1, "values from -0.5"),
        (np.array(["a"]), "wanted a tensor or array of numbers"),
        ([[1, 2], [3]], "wanted a tensor or array of numbers"),
        (None, "NoneType"),
    ],
)
def test_check_images_refuses(images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_images(images)


def test_check_labels_accepts() -> None:
    for labels in (
        [0, 2, 1],
        np.array([[0], [2], [1]], np.uint8),
        torch.tensor([0, 2, 1], dtype=torch.int16),
    ):
        checked = check_labels(labels, 3, "multiclass", 3)
        assert checked.dtype == torch.int64
        assert checked.tolist() == [0, 2, 1]
    for labels in (np.eye(3, dtype=bool), torch.eye(3), np.eye(3, dtype=np.uint16)):
        checked = check_labels(labels, 3, "multilabel", 3)
        assert checked.dtype == torch.float32
        assert torch.equal(checked, torch.eye(3))


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([0, 1, 3], "multiclass", "values from 0 to 3; wanted 0 to 2"),
        ([0, -1, 2], "multiclass", "values from -1 to 2"),
        ([0, 1], "multiclass", "for 3 images"),
        ([0.0, 1.0, 2.0], "multiclass", "wanted integers"),
        (np.eye(3, dtype=int), "multiclass", "shape"),
        (["a", "b", "c"], "multiclass", "wanted a tensor or array of numbers"),
        ([0, 1, 0], "multilabel", r"wanted \[3, L\]"),
        (np.eye(3, 2), "multilabel", "2 labels per image; wanted 3"),
        (np.eye(3) * 2, "multilabel", "other than 0 and 1"),
        (np.full((3, 3), np.nan), "multilabel", "other than 0 and 1"),
        ([0, 1, 2], "regression", "task: 'regression'"),
    ],
)
def test_check_labels_refuses(labels: object, task: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(labels, 3, task, 3)


# Writing


def test_save_npz_round_trip_through_load_data(tmp_path: Path) -> None:
    images = torch.from_numpy(np.random.default_rng(0).random((40, 3, 8, 8), dtype=np.float32))
    path = tmp_path / "new" / "out.npz"
    save_npz(path, images=to_uint8(images), labels=torch.arange(40) % 2, class_names=("x", "y"))
    assert [p.name for p in path.parent.iterdir()] == ["out.npz"]
    source = load_data(path)
    assert source.class_names == ("x", "y")
    first = source.train.pixels()[0]
    assert min((first - image).abs().max().item() for image in images) <= 0.5 / 255 + 1e-6


def test_save_npz_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.npz"
    save_npz(path, a=np.ones(3))
    with pytest.raises(InputError, match="b: an array of Python objects"):
        save_npz(path, b=np.array([None]))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save_npz(path, a=np.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    with np.load(path) as archive:
        assert archive["a"].tolist() == [1, 1, 1]


def test_atomic_path_needs_a_writable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot write in its folder"),
        atomic_path(tmp_path / "file" / "x.npz"),
    ):
        pytest.fail("the body must not run")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be replaced"), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_text("a file")
    with pytest.raises(InputError, match="cannot be replaced"), atomic_path(tmp_path / "gone"):
        pass  # nothing was written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_atomic_path_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write in its folder"), atomic_path(tmp_path / "x.npz"):
        pytest.fail("the body must not run")
    tmp_path.chmod(0o700)


def test_class_folders_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 6, 6), dtype=np.uint8)
    labels = np.arange(30) % 3
    save_class_folders(tmp_path / "out", pixels, labels, ["zebra", "a/b", "../c"])
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["0_zebra", "1_a_b", "2__._c"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    source = load_data(tmp_path / "out")
    stored = {im.numpy().tobytes(): int(y) for im, y in zip(source.test.images, source.test.labels, strict=True)}
    for image, label in zip(pixels, labels, strict=True):
        assert stored.get(image.tobytes(), label) == label
    assert len(stored) == 4


def test_class_folders_refuses(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    images, labels = np.zeros((4, 3, 6, 6), np.uint8), np.arange(4) % 2
    save_class_folders(tmp_path / "out", images, labels, ["a", "b"])
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*")) == [
        os.path.join("a", "000000.png"),
        os.path.join("a", "000002.png"),
        os.path.join("b", "000001.png"),
        os.path.join("b", "000003.png"),
    ]
    with pytest.raises(InputError, match="not an empty folder"):
        save_class_folders(tmp_path / "out", images, labels, ["a", "b"])
    with pytest.raises(InputError, match="multilabel"):
        save_class_folders(tmp_path / "new", images, np.eye(4), ["a", "b", "c", "d"])
    with pytest.raises(InputError, match="5 channels"):
        save_class_folders(tmp_path / "new", np.zeros((4, 5, 6, 6), np.uint8), labels, ["a", "b"])
    with pytest.raises(InputError, match="wanted 0 to 0"):
        save_class_folders(tmp_path / "new", images, labels, ["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    save_class_folders(tmp_path / "empty", images, labels, ["a", "b"])
    assert len(list((tmp_path / "empty").glob("*/*.png"))) == 4
