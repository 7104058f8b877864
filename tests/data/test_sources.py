"""Sources that are read by ranges: every kind gives the same images, labels and ids, from any start."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tsynd.data.sources import open_source
from tsynd.utils.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
LABELS = np.arange(10) % 3


def _png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path, numbers, extra=()) -> None:
    with tarfile.open(path, "w") as archive:
        for index in numbers:
            parts = {
                "png": _png(PIXELS[index]), "json": json.dumps({"label": int(LABELS[index])}).encode(), "txt": b"seen"
            }  # fmt: skip
            for end, content in parts.items():
                info = tarfile.TarInfo(f"./{index:04d}.{end}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _tars(folder) -> None:
    folder.mkdir()
    _tar(folder / "a-000.tar", range(4))
    _tar(folder / "a-001.tar", range(4, 10))


def _check(source, order=None) -> None:
    order = np.arange(10) if order is None else order
    assert source.count == 10
    for start, stop in ((0, 10), (3, 5), (9, 10), (0, 1)):
        batch = source.read(start, stop)
        assert batch.sample_ids.tolist() == list(range(start, stop))
        wanted = torch.from_numpy(PIXELS[order[start:stop]]).permute(0, 3, 1, 2) / 255
        assert torch.equal(batch.images, wanted)
        assert batch.labels.tolist() == LABELS[order[start:stop]].tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_mapped_where_it_lies_or_unpacked(tmp_path, save):
    save(tmp_path / "x.npz", train_images=PIXELS, train_labels=LABELS[:, None], class_names=np.array(["a", "b", "c"]))
    source = open_source(str(tmp_path / "x.npz"))
    assert source.class_names == ("a", "b", "c")
    _check(source)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    _check(open_source(f"file://{tmp_path}/x.npz"))  # behind fsspec nothing can be mapped where it lies
    with pytest.raises(InputError, match="has no val split"):
        open_source(str(tmp_path / "x.npz"), "val")


def test_class_folders_tars_patterns_and_addresses(tmp_path):
    for index in range(10):
        folder = tmp_path / "classes" / "abc"[LABELS[index]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(_png(PIXELS[index]))
    order = np.argsort(LABELS, kind="stable")
    _tars(tmp_path / "tars")
    for prefix in ("", "file://"):
        _check(open_source(f"{prefix}{tmp_path}/classes"), order)
        _check(open_source(f"{prefix}{tmp_path}/tars"))
        _check(open_source(f"{prefix}{tmp_path}/tars/a-*.tar"))
        _check(open_source(f"{prefix}{tmp_path}/tars/a-{{000..001}}.tar"))
    assert open_source(str(tmp_path / "tars/a-000.tar")).count == 4
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in sorted((tmp_path / "tars").iterdir()):
        memory.pipe(f"/sets/{path.name}", path.read_bytes())
    _check(open_source("memory://sets"))


def test_identity_follows_the_content(tmp_path):
    _tars(tmp_path / "tars")
    before = open_source(str(tmp_path / "tars")).identity
    assert open_source(str(tmp_path / "tars")).identity == before
    changed = bytearray((tmp_path / "tars" / "a-001.tar").read_bytes())
    changed[530] ^= 1
    (tmp_path / "tars" / "a-001.tar").write_bytes(changed)
    assert open_source(str(tmp_path / "tars")).identity != before


def test_damage_is_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(InputError, match=r"bad\.npz: damaged or no \.npz"):
        open_source(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "objects.npz", images=np.array([{}]), labels=np.array([1]))
    with pytest.raises(InputError, match=r"objects\.npz"):
        open_source(str(tmp_path / "objects.npz"))
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="damaged or no tar"):
        open_source(str(tmp_path / "bad.tar"))
    with pytest.raises(InputError, match="matches no file"):
        open_source(str(tmp_path / "none-*.tar"))
    with pytest.raises(InputError, match="fsspec cannot use"):
        open_source("nonsense://x")
    _tars(tmp_path / "tars")
    source = open_source(str(tmp_path / "tars" / "a-001.tar"))
    content = (tmp_path / "tars" / "a-001.tar").read_bytes()
    (tmp_path / "tars" / "a-001.tar").write_bytes(content[:1500])
    with pytest.raises(InputError, match=r"truncated|unreadable"):
        source.read(0, source.count)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="0 class folders"):
        open_source(str(tmp_path / "empty"))
