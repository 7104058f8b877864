"""Nothing that says who a patient is reaches any file or any line that tsynd writes."""

from __future__ import annotations

import base64
import io
import logging
import re
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

import nibabel
import pydicom
from helpers import in_process, run_tsynd
from medical_files import save, write
from PIL import Image, PngImagePlugin

HEADER = {
    "PatientName": "ZQNAME{}^Given",
    "PatientID": "ZQPID{}",
    "PatientBirthDate": "19430217",
    "PatientBirthTime": "073159.443322",
    "PatientAddress": "ZQSTREET{}",
    "OtherPatientIDs": "ZQOTHER{}",
    "PatientComments": "ZQCOMMENT{}",
    "AccessionNumber": "ZQACC{}",
    "InstitutionName": "ZQHOSPITAL{}",
    "InstitutionAddress": "ZQTOWN{}",
    "ReferringPhysicianName": "ZQREFERRER{}",
    "PerformingPhysicianName": "ZQPERFORMER{}",
    "OperatorsName": "ZQOPERATOR{}",
    "StationName": "ZQSTATION{}",
    "StudyID": "ZQSTUDY{}",
    "StudyDescription": "ZQSTUDYTEXT{}",
    "SeriesDescription": "ZQSERIESTEXT{}",
    "ProtocolName": "ZQPROTOCOL{}",
    "DeviceSerialNumber": "ZQSERIAL{}",
    "ImageComments": "ZQREMARK{}",
    "StudyDate": "19871103",
    "ContentDate": "19881209",
    "StudyInstanceUID": "1.2.826.777001.{}",
    "SeriesInstanceUID": "1.2.826.777002.{}",
    "FrameOfReferenceUID": "1.2.826.777003.{}",
    "SOPInstanceUID": "1.2.826.777004.{}",
}
MARKS = [text.split("{}")[0] for text in HEADER.values()] + ["ZQPRIVATE", "ZQNESTED", "ZQFILE", "ZQFOLDER", "ZQNIFTI"]
PATIENTS = 8


def marked(number: int, label: int) -> bytes:
    """A cell of the phantom as a DICOM file whose every identifying element is a marker."""
    dataset = pydicom.Dataset()
    for keyword, text in HEADER.items():
        setattr(dataset, keyword, text.format(number % PATIENTS))
    block = dataset.private_block(0x0099, "ZQPRIVATE", create=True)
    block.add_new(1, "LO", f"ZQPRIVATE{number}")
    nested = pydicom.Dataset()
    nested.PatientID = nested.CodeMeaning = f"ZQNESTED{number}"
    dataset.RequestAttributesSequence = [nested]
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.SourceApplicationEntityTitle = "ZQSTATION"
    pixels = np.random.default_rng(number).integers(0, 600, (16, 16)).astype(np.uint16)
    pixels[4:8, 4:8] += 1500 * label
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 16, 16, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return save(dataset)


def contents(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and those of everything packed inside it."""
    yield name, content
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                yield from contents(f"{name}/{member.filename}", archive.read(member) + member.comment + member.extra)
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for entry in archive:
                yield from contents(f"{name}/{entry.name}", archive.extractfile(entry).read())
    elif content.startswith(b"\x89PNG"):
        at = 8
        while at < len(content):
            (size,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
            body = content[at + 8 : at + 8 + size]
            if kind in (b"zTXt", b"iTXt", b"iCCP"):
                for start in [m.start() for m in re.finditer(b"\x78", body)]:
                    try:
                        yield f"{name}/{kind.decode()}", zlib.decompress(body[start:])
                    except zlib.error:
                        continue
            at += 12 + size
    elif name.endswith(".parquet"):
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(content))
        yield f"{name}/rows", repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
    for index, found in enumerate(re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)):
        yield from contents(f"{name}/{index}", base64.b64decode(found))


def stands_in(mark: str, content: bytes) -> bool:
    """Whether a marker is there in any encoding; one of digits alone, not as part of another number."""
    if mark.isdecimal():
        return re.search(rb"(?<![\d.])" + mark.encode() + rb"(?!\d)", content) is not None
    return any(mark.encode(kind) in content for kind in ("utf-8", "utf-16-le", "utf-32-le"))


def leaks(folder: Path) -> list[str]:
    """Where below a folder a marker stands: in a name, or in a file."""
    found = [f"{path} (its name)" for path in folder.rglob("*") for mark in MARKS if mark in path.name]
    for path in folder.rglob("*"):
        if path.is_file():
            for name, content in contents(path.name, path.read_bytes()):
                found += [f"{name}: {mark}" for mark in MARKS if stands_in(mark, content)]
    return found


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "ZQPID3", zip=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png", pnginfo=text)
    picture = base64.b64encode((tmp_path / "x.png").read_bytes()).decode()
    (tmp_path / "x.html").write_text(f"<img src='data:image/png;base64,{picture}'>")
    np.savez_compressed(tmp_path / "x.npz", names=np.array(["ZQNAME"]))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "x.npz", "inner.npz")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": ["ZQFILE"] * 9}), tmp_path / "x.parquet")
    found = leaks(tmp_path)
    for wanted in ("png/zTXt: ZQPID", "html/0/zTXt", "x.npz/names.npy: ZQNAME", "inner.npz/names.npy", "rows: ZQFILE"):
        assert any(wanted in line for line in found), (wanted, found)


PRINTED: list[str] = []


def command(*line: Any) -> None:
    done = run_tsynd(*line)
    PRINTED.append(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr


def test_no_identifier_of_a_dicom_header_is_in_any_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data, output = tmp_path / "scans", tmp_path / "written"
    for number in range(32):
        label = number % PATIENTS % 2
        folder = data / ("ill" if label else "well") / f"ZQFOLDER{number % PATIENTS}"
        write(folder / f"ZQFILE{number}.dcm", marked(number, label))
    caplog.clear()  # of what writing them said
    capfd.readouterr()
    PRINTED.clear()
    run = output / "run"
    tiny = ["--autoencoder-iterations", "3", "--iterations", "3", "--samples", "4", "--steps", "1"]
    common = ["--data", data, "--window", "1000", "2000", "--quiet"]
    command("run", *common, "--output", run, *tiny)
    models = ["--autoencoder", run / "autoencoder.safetensors", "--classifier", run / "classifier.safetensors"]
    synthesize = ["synthesize", *common, *models, "--samples", "4", "--steps", "1"]
    command(*synthesize, "--output", output / "more.npz")
    command(*synthesize, "--output", output / "pictures")
    command(*synthesize, "--output", output / "shards", "--shard-size", "16")
    command("pack", output / "shards", "--output", output / "packed.npz", "--quiet")
    command("train", *common, "--output", output / "model", "--iterations", "2", "--batch-size", "8")
    score = ["--classifier", run / "classifier.safetensors", "--conditions", "clean", "--samples", "4"]
    command("evaluate", *common[:-1], *score, "--json", output / "scores.json")
    # commands that fail say the path of a file, and nothing of its header
    (data / "ill" / "ZQFOLDER1" / "cut.dcm").write_bytes(marked(1, 1)[:-100])
    code, errors = in_process(["run", *common, "--output", output / "none"])
    assert code == 2
    assert "cut.dcm: truncated or damaged pixel data" in errors
    assert not (output / "none").exists()

    names = {path.suffix for path in output.rglob("*") if path.is_file()}
    assert names >= {".npz", ".png", ".json", ".html", ".safetensors", ".tar", ".parquet"}
    assert leaks(output) == []
    out, err = capfd.readouterr()
    out += "".join(PRINTED)
    printed = out + err + caplog.text + errors.replace("ZQFOLDER1/cut.dcm", "")
    assert "report.html" in out.replace("\n", "")
    assert [mark for mark in MARKS if stands_in(mark, printed.encode())] == []
    assert len(leaks(data)) > 500  # they are there to be found


def test_nor_of_a_nifti_header(tmp_path: Path) -> None:
    for number in range(14):
        values = np.random.default_rng(number).integers(0, 100, (16, 16, 4)).astype(np.int16)
        values[4:8, 4:8] += 400 * (number % 2)
        image = nibabel.Nifti1Image(values, np.eye(4))
        image.header["descrip"], image.header["db_name"] = b"ZQNIFTI text", b"ZQNIFTI base"
        image.header["aux_file"], image.header["intent_name"] = b"ZQNIFTI file", b"ZQNIFTI name"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"ZQNIFTI comment"))
        write(tmp_path / "scans" / "ab"[number % 2] / f"ZQFILE{number}.nii", image.to_bytes())
    tiny = ["--autoencoder-iterations", "2", "--iterations", "2", "--samples", "2", "--steps", "1", "--quiet"]
    output = tmp_path / "written" / "run"
    command("run", "--data", tmp_path / "scans", "--slices", "axial", "--output", output, *tiny)
    assert leaks(tmp_path / "written") == []
    assert len(leaks(tmp_path / "scans")) > 14


def every_tag(number: int) -> bytes:
    """A scan with a marker in every text element of the standard, of the right kind or not."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}"
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    values = np.random.default_rng(number).integers(0, 4000, (16, 16)).astype("<u2")
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    kinds = {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
    for tag, (kind, *_) in pydicom.datadict.DicomDictionary.items():
        group = tag >> 16
        if kind in kinds and group not in (0x0000, 0x0002, 0x0004, 0x0028):
            value = b"ZQANY%d%06d" % (number % 10, tag % 10**6)
            raw = pydicom.dataelem.RawDataElement(
                pydicom.tag.Tag(tag), kind, len(value), value, 0, False, True, True, "LO"
            )
            dataset._dict[pydicom.tag.Tag(tag)] = raw
    return save(dataset)


def test_markers_in_every_tag_reach_no_stream(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "scans" / "ab"[number % 2] / f"{number}.dcm", every_tag(number))
    held = (tmp_path / "scans" / "a" / "0.dcm").read_bytes()
    assert held.count(b"ZQANY") > 2000
    with pytest.warns(UserWarning, match="ZQANY"):  # pydicom quotes them
        str(pydicom.dcmread(io.BytesIO(held)).StudyInstanceUID)
    tiny = ["--autoencoder-iterations", "1", "--iterations", "1", "--samples", "2", "--steps", "1"]
    line = ["run", *tiny, "--data", str(tmp_path / "scans"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-W", "always", "-m", "tsynd", *line], capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert b"ZQ" not in done.stdout + done.stderr
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        assert not any(b"ZQANY" in content for _, content in contents(path.name, path.read_bytes())), path
    (tmp_path / "scans" / "a" / "0.dcm").write_bytes(held[:-200])
    done = subprocess.run(
        [sys.executable, "-W", "always", "-m", "tsynd", "train", "--data", str(tmp_path / "scans"), "--output", "x"],
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2
    assert b"ZQ" not in done.stdout + done.stderr


def test_other_threads_keep_their_logs_and_warnings_come_back() -> None:
    from tsynd.data.readers.pixels import quietly

    logger, heard = logging.getLogger("pydicom"), []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    before, inside, leave = list(warnings.filters), threading.Event(), threading.Event()

    def read() -> None:
        with quietly():
            logger.warning("of the reader")
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=read)
    try:
        thread.start()
        assert inside.wait(10)
        with quietly():  # this one comes later and goes earlier
            logger.warning("of the other reader")
        logger.warning("of somebody else")
        leave.set()
        thread.join()
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in heard] == ["of somebody else"]
    assert warnings.filters == before
