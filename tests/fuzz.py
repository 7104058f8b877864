"""Damages made files in every way and reads them: nothing but InputError may come of it (`make fuzz`, some minutes).

Each case is told by its number: ``python tests/fuzz.py --first 1234 --cases 1`` repeats one. A worker reads many and is
replaced where it dies; a file may take 20 seconds and 3 GiB.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SECONDS, BYTES, CHUNK = 20, 3 * 2**30, 400


def corpus(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """Name → content and how it is read."""
    from medical_files import dicom, nifti
    from PIL import Image

    import tsynd
    from tsynd.data.sources import open_source
    from tsynd.distributed.pack import read_manifest
    from tsynd.distributed.shards import ShardFolder
    from tsynd.jobs.job import Job
    from tsynd.posteriors.last_layer import HeadGaussian
    from tsynd.training.classifier import fit_classifier
    from tsynd.training.loop import Checkpoint
    from tsynd.utils.fingerprint import seal

    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (12, 14), np.uint8)
    rgb = rng.integers(0, 256, (12, 14, 3), np.uint8)

    def saved(pixels: Any, kind: str, **how: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **how)
        return buffer.getvalue()

    def as_table(path: Path) -> Any:
        rows = "\n".join(f"{path.name},{'ab'[i % 2]}" for i in range(8))
        (path.parent / "table.csv").write_text(f"path,label\n{rows}\n")
        return tsynd.load_data(path.parent / "table.csv", group="none", frames="split")

    def whole(path: Path) -> Any:
        source = open_source(str(path))
        return source.read(0, source.count)

    def both(path: Path) -> None:
        failed = 0
        for read in (tsynd.load_data, whole):
            try:
                read(path)
            except tsynd.InputError:
                failed += 1
        if failed:
            raise tsynd.InputError("as wanted")

    def npz(save: Any) -> bytes:
        buffer = io.BytesIO()
        labels = np.arange(20) % 2
        save(buffer, images=rng.integers(0, 256, (20, 6, 6), np.uint8), labels=labels, class_names=np.array(["a", "b"]))
        return buffer.getvalue()

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for index in range(4):
            content = {"png": saved(grey, "PNG"), "json": json.dumps({"label": index % 2}).encode()}
            for end, data in content.items():
                info = tarfile.TarInfo(f"{index}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for index in range(8):
        Image.fromarray(grey).save(folder / f"{index}.png")
    text = "path,label,split,patient\n" + "".join(
        f"{i}.png,{'ab'[i % 2]},{('train', 'val', 'test')[i % 3]},p{i}\n" for i in range(8)
    )
    (folder / "text.csv").write_text(text)
    import pyarrow
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_batches(arrow_csv.open_csv(folder / "text.csv")), table)
    frames = rng.integers(0, 4000, (3, 8, 8)).astype(np.uint16)
    volume = rng.integers(0, 900, (6, 7, 8)).astype(np.int16)
    network = tsynd.SmallResNet(1, 2, (4,))
    tsynd.save_model(network, folder / "model.safetensors")
    width = sum(value.numel() for value in network.head.parameters())
    gaussian = HeadGaussian("diag", {"mean": torch.zeros(width), "std": torch.ones(width)})
    tsynd.SampledHead(network, gaussian, samples=2).save(folder / "head.safetensors")
    few = tsynd.LabelledImages(torch.rand(4, 1, 8, 8), torch.arange(4) % 2)

    def resume(path: Path) -> None:
        settings = {"iterations": 1, "batch_size": 4, "device": "cpu", "progress": False}
        fit_classifier(tsynd.SmallResNet(1, 2, (4,)), few, **settings, checkpoint=Checkpoint(path, 1))

    resume(folder / "training.safetensors")
    job = {"seed": 0, "images": 4, "shard_size": 2}
    receipt = {"start": 0, "stop": 2, "images": 2, "files": {"shard-000000.tar": {"size": 1}}, "fingerprint": job}

    def shards(path: Path) -> None:
        (path.parent / "units").mkdir(exist_ok=True)
        path.replace(path.parent / "units" / "shard-000000.json")
        made = ShardFolder(path.parent, job, {})
        if len(made.missing(made.units)) == 2:
            raise tsynd.InputError("as wanted")

    deflated = dicom(frames[0], syntax="1.2.840.10008.1.2.1.99")
    manifest = {"format": 1, "complete": True, "images": 4, "shards": [{"images": 4, "files": {"a.tar": {"size": 1}}}]}
    return {
        "grey.png": (saved(grey, "PNG"), as_table),
        "rgb.jpg": (saved(rgb, "JPEG"), as_table),
        "deep.tif": (saved(frames[0], "TIFF"), as_table),
        "pages.tif": (saved(grey, "TIFF", save_all=True, append_images=[Image.fromarray(grey)] * 2), as_table),
        "rgb.bmp": (saved(rgb, "BMP"), as_table),
        "web.png": (saved(rgb, "WEBP", lossless=True), as_table),
        "plain.dcm": (dicom(frames[0], RescaleSlope=2, RescaleIntercept=-5, WindowCenter=9, WindowWidth=90), as_table),
        "frames.dcm": (dicom(frames, NumberOfFrames=3), as_table),
        "colour.dcm": (dicom(rgb, photometric="RGB"), as_table),
        "deflated.dcm": (deflated, as_table),
        "volume.nii": (nifti(volume), as_table),
        "volume.nii.gz": (gzip.compress(nifti(volume)), as_table),
        "stored.npz": (npz(np.savez), both),
        "packed.npz": (npz(np.savez_compressed), both),
        "samples.tar": (tar.getvalue(), whole),
        "text.csv": (text.encode(), tsynd.load_data),
        "rows.parquet": (table.getvalue(), tsynd.load_data),
        "model.safetensors": ((folder / "model.safetensors").read_bytes(), tsynd.load_model),
        "model.json": (
            (folder / "model.json").read_bytes(),
            lambda path: tsynd.load_model(path.with_suffix(".safetensors")),
        ),
        "head.safetensors": (
            (folder / "head.safetensors").read_bytes(),
            lambda path: tsynd.SampledHead.load(path, network),
        ),
        "training.safetensors": ((folder / "training.safetensors").read_bytes(), resume),
        "job.json": (
            json.dumps(seal({"fingerprint": job, "stages": {}, "files": {}})).encode(),
            lambda path: Job(path.parent, job).close(),
        ),
        "receipt.json": (json.dumps(seal(receipt)).encode(), shards),
        "manifest.json": (json.dumps(manifest).encode(), lambda path: read_manifest(path.parent)),
    }  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one to four faults."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(len(data), 400)))
        kind = rng.integers(8)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at : at + int(rng.integers(1, 64))] = bytes(int(rng.integers(1, 64)))
        elif kind == 4:  # numbers that lengths and counts break on
            word = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 2**24]).item()
            data[at : at + 4] = int(word).to_bytes(4, "little" if rng.random() < 0.5 else "big")
        elif kind == 5:
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        elif kind == 6:
            del data[at : at + int(rng.integers(1, 32))]
        else:
            data[at : at + 8] = rng.bytes(8)
    return bytes(data)


def work(first: int, cases: int) -> int:
    """Read damaged files; the first case that ends in something else than InputError is printed."""
    import tsynd

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        held = corpus(folder)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))

        def late(*_: Any) -> None:
            raise TimeoutError(f"took more than {SECONDS} s")

        signal.signal(signal.SIGALRM, late)
        for name, (content, read) in held.items():
            (folder / name).write_bytes(content)
            if name not in ("manifest.json", "receipt.json"):  # whose digest and files the packer and the job write
                read(folder / name)
        refused, slowest, names = 0, (0.0, first), list(held)
        for case in range(first, first + cases):
            name = names[case % len(names)]
            content, read = held[name]
            (folder / name).write_bytes(damaged(content, np.random.default_rng(case)))
            print(f"case {case}: {name}", flush=True)
            signal.alarm(SECONDS)
            start = time.monotonic()
            try:
                read(folder / name)
            except tsynd.InputError as error:
                refused += 1
                if "\n" in str(error):
                    print(f"FAILED {case}: several lines: {error}", flush=True)
                    return 1
            except BaseException:
                print(f"FAILED {case}: {traceback.format_exc()}", flush=True)
                return 1
            finally:
                signal.alarm(0)
                (folder / name).write_bytes(content)
            slowest = max(slowest, (time.monotonic() - start, case))
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        print(json.dumps({"refused": refused, "slowest": slowest, "mebibytes": largest / 2**10}), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--minutes", type=float, default=4)
    options = parser.parse_args()
    if options.cases is not None:
        return work(options.first, options.cases)
    start, case, faults = time.monotonic(), options.first, 0
    ended: list[dict[str, Any]] = []  # what the workers that ended well say
    while time.monotonic() - start < 60 * options.minutes:
        line = [sys.executable, __file__, "--first", str(case), "--cases", str(CHUNK)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        last = max((int(text.split()[1].rstrip(":")) for text in lines if text.startswith("case ")), default=case)
        if done.returncode:
            faults += 1
            failed = done.stdout[done.stdout.find("FAILED") :] if "FAILED" in done.stdout else done.stderr[-2000:]
            print(f"case {last}, exit {done.returncode}: {failed}")
        else:
            ended.append(json.loads(lines[-1]))
        case = last + 1
    refused = sum(one["refused"] for one in ended)
    print(f"{case - options.first} damaged files, {refused} refused in workers that ended well, {faults} faults")
    if ended:
        seconds, slow = max(one["slowest"] for one in ended)
        print(f"slowest {seconds:.2f} s (case {slow}), largest worker {max(one['mebibytes'] for one in ended):.0f} MiB")
    return int(faults > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
