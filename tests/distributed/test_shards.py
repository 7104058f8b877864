"""Sharded synthesis: what is written, what damage does, who may write where, and who can read it."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from large import ENVIRONMENT, command, content, make_job, run, sample_ids

from tsynd.data.load import load_data
from tsynd.distributed.driver import synthesize_shards
from tsynd.distributed.pack import pack
from tsynd.distributed.shards import ShardFolder, plan_units
from tsynd.distributed.worker import ShardSettings
from tsynd.models.checkpoint import load_model, save_model
from tsynd.synthesis.api import synthesize
from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import seal

OPTIONS = {"samples": 8, "steps": 2, "shard_size": 16, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    threads = torch.get_num_threads()
    yield make_job(tmp_path_factory.mktemp("job"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """A finished job."""
    output = tmp_path_factory.mktemp("done") / "out"
    assert synthesize_shards(ShardSettings(**job, output=str(output), **OPTIONS), progress=False)["complete"]
    return output


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def _again(job, output, **options):
    said = []
    settings = ShardSettings(**(job | {"output": str(output)} | OPTIONS | options))
    manifest = synthesize_shards(settings, progress=False, say=said.append)
    return manifest, said


def test_shards_hold_what_synthesize_gives(job, done):
    with np.load(job["data"]) as file:
        images, labels = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"])
    models = load_model(job["autoencoder"]), load_model(job["classifier"])
    torch.set_num_threads(1)
    result = synthesize(*models, images, labels, samples=8, steps=2, progress=False)
    pack(done, done.parent / "packed.npz", progress=False)
    with np.load(done.parent / "packed.npz") as packed:
        assert np.array_equal(packed["images"], (result.images * 255).round().to(torch.uint8)[:, 0].numpy())
        assert np.array_equal(packed["labels"], labels.numpy())
        assert np.array_equal(packed["sample_ids"], np.arange(70))
        assert np.array_equal(packed["uncertainty"], result.uncertainty.numpy())
        assert np.array_equal(packed["initial_uncertainty"], result.initial_uncertainty.numpy())
    assert load_data(done.parent / "packed.npz").num_classes == 2
    pack(done, done.parent / "folders", progress=False)
    assert len(list((done.parent / "folders").glob("*/*.png"))) == 70
    assert load_data(done.parent / "folders").class_names == ("0", "1")
    with pytest.raises(InputError, match="exists already"):
        pack(done, done.parent / "folders", progress=False)


def test_a_float_image_survives_npy(job, tmp_path):
    _again(job, tmp_path / "npy", image_format="npy")
    with tarfile.open(tmp_path / "npy" / "shard-000000.tar") as archive:
        image = np.load(io.BytesIO(archive.extractfile("000000000000.npy").read()))
    assert image.dtype == np.float32
    assert image.shape == (1, 16, 16)
    pack(tmp_path / "npy", tmp_path / "npy.npz", progress=False)
    pack(tmp_path / "npy", tmp_path / "folders", progress=False)


def test_torchrun_ranks_write_the_same_bytes(job, done, tmp_path):
    call = command(job, tmp_path / "out")
    call[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    result = run(call)
    assert result.returncode == 0, result.stderr[-2000:]
    assert content(tmp_path / "out") == content(done)


def test_damage_is_told_and_repaired(job, done, copy):
    (copy / "shard-000001.tar").write_bytes((copy / "shard-000001.tar").read_bytes()[:-700])
    flipped = bytearray((copy / "shard-000002.tar").read_bytes())
    flipped[600] ^= 1
    (copy / "shard-000002.tar").write_bytes(flipped)
    (copy / "units" / "shard-000003.json").write_text('{"unit": 3, "sta')
    (copy / "index" / "shard-000000.parquet").unlink()
    (copy / "manifest.json").unlink()
    (copy / ".shard-000001-0badcafe.tar").write_bytes(b"left by a killed writer")
    manifest, said = _again(job, copy)
    assert manifest["complete"]
    text = "\n".join(said)
    for part in ("manifest.json was missing", "shard-000001.tar: ", "shard-000002.tar: its checksum", "shard-000003"):
        assert part in text
    assert "shard-000000.parquet: is gone" in text
    assert content(copy) == content(done)
    assert not list(copy.glob(".shard*"))
    before = {path: path.stat().st_mtime_ns for path in copy.glob("shard*")}
    assert _again(job, copy)[1] == []  # nothing to do, nothing touched
    assert {path: path.stat().st_mtime_ns for path in copy.glob("shard*")} == before


def test_packing_refuses_damage_and_unfinished_jobs(copy, tmp_path):
    (copy / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-000001\.tar is damaged"):
        pack(copy, tmp_path / "x.npz", progress=False)
    assert not (tmp_path / "x.npz").exists()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(InputError, match="not finished"):
        pack(copy, tmp_path / "x.npz", progress=False)
    with pytest.raises(InputError, match=r"holds no manifest.json"):
        pack(tmp_path, tmp_path / "x.npz", progress=False)


@pytest.mark.parametrize("manifest", [True, False])
def test_another_job_is_refused_with_the_difference(job, done, copy, manifest):
    if not manifest:
        (copy / "manifest.json").unlink()
    before = content(copy)
    with pytest.raises(InputError, match=r"radius 0.5 → 0.6, seed 0 → 1"):
        _again(job, copy, radius=0.6, seed=1)
    with pytest.raises(InputError, match="shard_size 16 → 8"):
        _again(job, copy, shard_size=8)
    assert content(copy) == before


def test_a_shard_of_another_job_is_not_believed(job, done, copy, tmp_path):
    other = tmp_path / "other"
    _again(job, other, seed=1)
    for name in ("shard-000001.tar", "index/shard-000001.parquet", "units/shard-000001.json"):
        shutil.copy(other / name, copy / name)
    manifest, said = _again(job, copy)
    assert manifest["complete"]
    assert said == ["shard-000001.json: the receipt is of another job (seed 1 → 0); made again"]
    assert content(copy) == content(done)


@pytest.mark.parametrize("name", ["manifest.json", "units/shard-000002.json"])
def test_a_changed_receipt_or_manifest_is_noticed(job, done, copy, name):
    text = (copy / name).read_text()
    changed = text.replace('"mean_uncertainty": 0.0', '"mean_uncertainty": 0.1', 1)
    assert changed != text
    (copy / name).write_text(changed)
    if name == "manifest.json":
        with pytest.raises(InputError, match=r"manifest\.json is damaged; run the same tsynd synthesize again"):
            pack(copy, copy.parent / "x.npz", progress=False)
    assert len(_again(job, copy)[1]) == 1
    assert content(copy) == content(done)


def test_a_manifest_that_was_lost_beside_a_first_shard_is_written_again(job, done, copy):
    for path in [*copy.glob("shard-00000[1-4].tar"), *copy.glob("units/*"), *copy.glob("index/*")]:
        path.unlink()
    (copy / "manifest.json").unlink()
    _again(job, copy)
    assert content(copy) == content(done)


def test_a_folder_that_is_removed_meanwhile_is_an_error(job, tmp_path, monkeypatch):
    made = ShardFolder.write

    def write(self, *arguments):
        receipt = made(self, *arguments)
        shutil.rmtree(self.folder)
        return receipt

    monkeypatch.setattr(ShardFolder, "write", write)
    with pytest.raises(InputError, match="was removed or emptied while the job was at work"):
        _again(job, tmp_path / "out")


def test_class_names_that_are_no_text(tmp_path):
    job, names = make_job(tmp_path / "job", 20), ["knot\udcff", "Zyste é"]
    save_model(load_model(job["classifier"]), job["classifier"], class_names=names)
    with np.load(job["data"]) as file:
        np.savez(job["data"], **file, class_names=np.array(names))
    manifest, _ = _again(job, tmp_path / "out")
    assert manifest["class_names"] == ["knot\\udcff", "Zyste é"]
    ShardFolder(tmp_path / "raw", manifest["fingerprint"], {"class_names": names}).open()
    assert json.loads((tmp_path / "raw" / "manifest.json").read_text())["class_names"] == names
    for output, read in ("x.npz", ("knot\\udcff", "Zyste é")), ("x", ("0_knot_udcff", "1_Zyste é")):
        pack(tmp_path / "out", tmp_path / output, progress=False)
        assert load_data(tmp_path / output).class_names == read


def test_packing_counts_what_it_reads(copy, tmp_path):
    """A shard whose checksum is right and whose samples are not those that the manifest says."""
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = manifest["shards"][4]
    shard["stop"] += 1
    manifest["images"] += 1
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    for output in ("x.npz", "x"):
        with pytest.raises(InputError, match=r"shard-000004\.tar ends before sample 70"):
            pack(copy, tmp_path / output, progress=False)
        assert not (tmp_path / output).exists()
    shard["start"] -= 1
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(InputError, match=r"shard-000004\.tar holds sample 64 out of its place"):
        pack(copy, tmp_path / "x.npz", progress=False)


def test_two_writers_of_a_job_do_not_meet(job, done, tmp_path):
    """Started together in one new folder: both end well, with the bytes of one."""
    calls = [subprocess.Popen(command(job, tmp_path / "out"), env=ENVIRONMENT, stderr=subprocess.PIPE) for _ in "ab"]
    for call in calls:
        _, errors = call.communicate(timeout=300)
        assert call.returncode == 0, errors
    assert content(tmp_path / "out") == content(done)
    assert not list((tmp_path / "out").rglob(".*"))


def test_other_data_are_another_job(job, copy, tmp_path):
    other = make_job(tmp_path / "other", 71)
    with pytest.raises(InputError, match=r"data '\w+' → '\w+', images 70 → 71"):
        _again(job | {"data": other["data"]}, copy)


def test_a_foreign_folder_is_left_alone(job, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds thesis.tex and no manifest.json"):
        _again(job, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_told_and_nothing_is_lost(job, done, copy):
    for name in ("shard-000001.tar", "shard-000003.tar"):
        (copy / name).unlink()
    limit = (copy / "shard-000000.tar").stat().st_size // 2
    full = run(command(job, copy), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 2
    assert "shard-000001.tar cannot be written (File too large); finished shards are kept" in full.stderr
    assert "Traceback" not in full.stderr
    kept = content(copy)
    assert all(kept[name] == value for name, value in content(done).items() if name in kept)
    assert not list(copy.glob(".shard*"))
    _again(job, copy)
    assert content(copy) == content(done)


def test_a_read_only_folder_is_told():
    fingerprint = {"images": 3, "shard_size": 2}
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own is closed to other users
        folder = Path(name) / "out"
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        root = os.geteuid() == 0  # who may write anywhere
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(InputError, match=r"cannot write in its folder \(Permission denied\)"):
                ShardFolder(folder, fingerprint, {}).open()
        finally:
            if root:
                os.seteuid(0)
        assert not list(folder.iterdir())


def test_bad_arguments_are_refused_by_name(job, tmp_path):
    for options, message in (
        ({"shard_size": 0}, "shard_size: got 0"),
        ({"image_format": "jpeg"}, "image_format: got 'jpeg'"),
        ({"split": "all"}, "split: got 'all'"),
        ({"threads": 0}, "threads: got 0"),
        ({"objective": "bald"}, "objective: got 'bald'"),
        ({"data": str(tmp_path / "none.npz")}, "is no file, folder or known name"),
    ):
        with pytest.raises(InputError, match=message):
            _again(job, tmp_path / "out", **options)
    with pytest.raises(InputError, match="workers: got 0"):
        synthesize_shards(ShardSettings(**job, output=str(tmp_path / "out"), **OPTIONS), workers=0)
    assert not (tmp_path / "out").exists()
    for more, message in (
        (["--verify", "luck"], "verify: got 'luck'"),
        (["--train-size", "9"], "train_size: not with shard_size"),
    ):
        result = run(command(job, tmp_path / "out", *more))
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr


def test_units_cover_every_id_once():
    for count, size in ((1, 1), (70, 16), (64, 16), (5, 100)):
        units = plan_units(count, size)
        assert [i for unit in units for i in range(unit.start, unit.stop)] == list(range(count))
    with pytest.raises(InputError, match=r"wanted 1 \.\. 2"):
        plan_units(0, 1)


def test_webdataset_hugging_face_and_parquet_read_the_shards(done, tmp_path, monkeypatch):
    webdataset, datasets = pytest.importorskip("webdataset"), pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tars = [str(path) for path in sorted(done.glob("shard-*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("l"))
    assert [item["json"]["sample_id"] for item in read] == list(range(70)) == sample_ids(done)
    assert read[5]["png"].shape == (16, 16)
    held = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path))
    assert len(held) == 70
    assert held[69]["json"]["sample_id"] == 69
    assert held[0]["png"].size == (16, 16)
    table = parquet.read_table(done / "index")
    assert table["sample_id"].to_pylist() == list(range(70))
    assert table["shard"].to_pylist()[-1] == "shard-000004.tar"
    assert table["label"].to_pylist() == [i % 2 for i in range(70)]
    rows = [item["json"] for item in read]
    assert [row["status"] for row in rows] == table["status"].to_pylist()


_RAY_DATA = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
from ray import data
data.DataContext.get_current().enable_progress_bars = False
rows = data.read_webdataset(sys.argv[1], include_paths=False, file_extensions=["tar"]).take_all()
index = data.read_parquet(sys.argv[1] + "/index").take_all()
print("ids", sorted(row["json"]["sample_id"] for row in rows) == sorted(row["sample_id"] for row in index), len(rows))
print("shape", rows[0]["png"].shape)
"""


def test_ray_data_reads_the_shards(done):
    pytest.importorskip("ray")
    result = subprocess.run(
        [sys.executable, "-c", _RAY_DATA, str(done)], env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert "ids True 70" in result.stdout, result.stderr[-3000:]
