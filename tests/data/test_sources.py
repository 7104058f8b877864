"""Sources that are read by ranges: every kind gives the same images, labels and ids, from any start."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tsynd.data.load import load_data
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
    save(tmp_path / "f.npz", images=np.asfortranarray(PIXELS), labels=LABELS)
    _check(open_source(str(tmp_path / "f.npz")))
    (tmp_path / "f.npz").unlink()
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


def test_a_web_server_may_not_send_us_elsewhere_nor_fail_unclearly(monkeypatch):
    buffer, hosts = io.BytesIO(), set()
    np.savez(buffer, images=PIXELS, labels=LABELS)
    content = buffer.getvalue()

    class Server(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            hosts.add(self.headers["Host"].partition(":")[0])
            name, status, headers, body = self.path[1:], 404, {}, b""
            if name.startswith(("near", "away")):
                status, there = 302, "" if name.startswith("near") else f"http://localhost:{web.server_port}"
                headers = {"Location": f"{there}/x.npz"}
            elif name == "x.npz":
                first, last = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
                status, body = 206, content[int(first) : int(last) + 1]
                end = int(first) + len(body) - 1
                headers = {"Content-Range": f"bytes {first}-{end}/{len(content)}", "Accept-Ranges": "bytes"}
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (their name)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as web:
        address = f"http://127.0.0.1:{web.server_port}"
        threading.Thread(target=web.serve_forever, daemon=True).start()
        _check(open_source(f"{address}/x.npz"))
        _check(open_source(f"{address}/near.npz"))
        for name in ("away.npz", "away/", "away/*.tar", "away-{0..1}.tar"):
            with pytest.raises(InputError, match=r"cannot be read \(the server points to http://localhost"):
                open_source(f"{address}/{name}")
        with pytest.raises(InputError, match="was not found"):
            open_source(f"{address}/none.npz")
        web.shutdown()
    with pytest.raises(InputError, match=r"x\.npz: cannot be read"):
        open_source(f"{address}/x.npz")
    assert hosts == {"127.0.0.1"}


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


def _members(path, members, **how) -> str:
    with tarfile.open(path, "w", **how) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def _samples(names):
    return [
        part for i, n in enumerate(names) for part in ((f"{n}.png", _png(PIXELS[i])), (f"{n}.cls", b"%d" % LABELS[i]))
    ]


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}" for i in range(10)],
        [f"1.2.840.{i}" for i in range(10)],
        [f"p{i}{'.left' if i % 2 else ''}" for i in range(10)],
        [f"p{i // 2}{'.left' if i % 2 else ''}" for i in range(10)],
        [f"x.y/1.2.{i}" for i in range(10)],
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_names_with_dots_lose_no_sample(tmp_path, names, grouped):
    members = _samples(names)
    if grouped:  # all pictures first
        members.sort(key=lambda member: member[0].endswith(".cls"))
    _check(open_source(_members(tmp_path / "x.tar", members)))


def test_samples_of_several_images_and_left_out_members(tmp_path):
    second = [("a.png", _png(PIXELS[0])), ("a.depth.png", _png(PIXELS[1])), ("a.cls", b"0")]
    with pytest.warns(UserWarning, match="1 second images of a sample"):
        assert open_source(_members(tmp_path / "a.tar", second)).count == 1
    both = [("a.left.png", _png(PIXELS[0])), ("a.right.png", _png(PIXELS[1])), ("a.cls", b"0")]
    with pytest.raises(InputError, match=r"sample 'a' holds several images \(.left.png, .right.png\)"):
        open_source(_members(tmp_path / "b.tar", both))
    other = [*_samples(["a", "b"]), ("c.webp", b"RIFF"), ("c.cls", b"1")]
    with pytest.warns(UserWarning, match=r"left out of the tars: 1 \.webp, 1 \.cls"):
        assert open_source(_members(tmp_path / "c.tar", other)).count == 2


def test_classes_by_name_and_what_is_no_label(tmp_path):
    text = [(name, b"cat\n" if c == b"0" else b"ant" if c == b"1" else b"dog") if name.endswith("cls") else (name, c)
            for name, c in _samples([str(i) for i in range(10)])]  # fmt: skip
    source = open_source(_members(tmp_path / "x.tar", text))
    assert source.class_names == ("ant", "cat", "dog")
    assert source.read(0, 10).labels.tolist() == [[1, 0, 2][label] for label in LABELS]
    mixed = _samples([str(i) for i in range(10)])
    mixed[3] = ("1.cls", b"cat")
    with pytest.raises(InputError, match="a label is text, the first one a number"):
        open_source(_members(tmp_path / "y.tar", mixed)).read(0, 10)
    for bad in (b"[" * 100_000, b"[]", b'{"label": {"a": 1}}', b"\xff"):
        with pytest.raises(InputError, match="json"):
            open_source(_members(tmp_path / "z.tar", [("a.png", _png(PIXELS[0])), ("a.json", bad)]))


def test_tars_named_after_splits(tmp_path):
    for split, names in (("train", ["a", "b", "c"]), ("valid", ["d"]), ("test", ["e", "f"])):
        _members(tmp_path / f"{split}-000.tar", _samples(names))
    assert [open_source(str(tmp_path), split).count for split in ("train", "val", "test")] == [3, 1, 2]
    assert open_source(str(tmp_path / "test-000.tar")).count == 2  # without others it is the whole


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path):
    whole = open(_members(tmp_path / "x.tar", _samples(["a", "b", "c"])), "rb").read()  # noqa: SIM115
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for stop in range(512, end + 1, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:stop])
        with pytest.raises(InputError, match=r"truncated|damaged"):
            open_source(str(tmp_path / "cut.tar"))
    third = whole.find(b"b.png")
    (tmp_path / "hole.tar").write_bytes(whole[:third] + bytes(512) + whole[third + 512 :])
    with pytest.raises(InputError, match="goes on behind its end mark"):
        open_source(str(tmp_path / "hole.tar"))
    (tmp_path / "two.tar").write_bytes(whole + whole)
    with pytest.raises(InputError, match="goes on behind its end mark"):
        open_source(str(tmp_path / "two.tar"))
    (tmp_path / "short.tar").write_bytes(whole[: end + 1024])  # the two blocks of the standard and no more
    assert open_source(str(tmp_path / "short.tar")).count == 3


def test_counts_are_held_against_the_packers_manifest(tmp_path):
    _members(tmp_path / "000.tar", _samples(["a", "b", "c"]))
    shards = [{"images": 3, "files": {"000.tar": {}, "000.parquet": {}}}]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    assert open_source(str(tmp_path)).count == 3
    shards[0]["images"] = 4
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    with pytest.raises(InputError, match=r"holds 3 samples, manifest\.json says 4"):
        open_source(str(tmp_path))
    for other in ('{"shards": 3}', "[]", "no json"):
        (tmp_path / "manifest.json").write_text(other)
        assert open_source(str(tmp_path)).count == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_changed_array_is_refused_and_never_the_same(tmp_path, save, prefix):
    path = tmp_path / "x.npz"
    save(path, train_images=PIXELS, train_labels=LABELS)
    before = open_source(f"{prefix}{path}").identity
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x20
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"x\.npz"):
        open_source(f"{prefix}{path}")
    save(path, train_images=PIXELS ^ 1, train_labels=LABELS)
    assert open_source(f"{prefix}{path}").identity != before


def test_an_array_shorter_than_its_header_says(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": PIXELS.shape})
    labels = io.BytesIO()
    np.save(labels, LABELS)
    for shape in (PIXELS[:5], np.concatenate([PIXELS, PIXELS])):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("images.npy", header.getvalue() + shape.tobytes())
            archive.writestr("labels.npy", labels.getvalue())
        with pytest.raises(InputError, match="it is truncated"):
            open_source(str(tmp_path / "x.npz"))


def test_damaged_containers_are_one_error(tmp_path):
    np.savez(tmp_path / "good.npz", images=PIXELS, labels=LABELS)
    good = (tmp_path / "good.npz").read_bytes()
    locked, odd = bytearray(good), bytearray(good)
    for mark, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        at = good.find(mark)
        while at >= 0:
            locked[at + flags] |= 1  # says that it is encrypted
            odd[at + method] = 77  # a compression that nobody knows
            at = good.find(mark, at + 4)
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("images.npy", good)
        archive.writestr("labels.npy", good)
    huge = b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"{" * 64
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", huge)
        archive.writestr("labels.npy", huge)
    kinds = {"locked": locked, "odd": odd, "nested": nested.getvalue(), "cut": good[: len(good) // 2]}
    kinds["huge"] = (tmp_path / "huge.npz").read_bytes()
    for name, content in kinds.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        for read in (open_source, load_data):
            with pytest.raises(InputError, match=rf"{name}\.npz") as caught:
                read(str(tmp_path / f"{name}.npz"))
            assert "\n" not in str(caught.value)
    looped = tarfile.TarInfo("a.png")
    looped.type, looped.linkname = tarfile.LNKTYPE, "a.png"
    with tarfile.open(tmp_path / "loop.tar", "w") as archive:
        archive.addfile(looped)
    with pytest.raises(InputError, match="no sample with an image"):
        open_source(str(tmp_path / "loop.tar"))
    negative = bytearray(open(_members(tmp_path / "n.tar", _samples(["a"])), "rb").read())  # noqa: SIM115
    negative[124:136] = b"\xff" * 12  # a size below zero in base 256
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + 8 * 32 + sum(negative[156:512]))
    (tmp_path / "n.tar").write_bytes(negative)
    with pytest.raises(InputError, match=r"n\.tar"):
        open_source(str(tmp_path / "n.tar"))
