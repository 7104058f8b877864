"""A job's folder: whose it is, what a kill or damage does to it, and what the next start makes of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tsynd.jobs.job import Job
from tsynd.utils.errors import InputError

FINGERPRINT = {"seed": 0, "sizes": [1, 2]}


def stages(folder: Path, made: list[str]) -> None:
    def make(path: Path) -> dict[str, Any]:
        made.append(path.stem)
        path.write_text(path.name, encoding="utf-8")
        path.with_suffix(".json").write_text("{}")
        return {"name": path.stem}

    with Job(folder, FINGERPRINT) as job:
        for name in ("one", "two", "three"):
            assert job.stage(name, f"{name}.bin", make)["name"] == name


def test_what_is_damaged_is_made_again_with_what_came_after(tmp_path: Path) -> None:
    made: list[str] = []
    stages(tmp_path, made)
    stages(tmp_path, made)
    assert made == ["one", "two", "three"]
    for damaged in ("two.bin", "two.json"):
        made.clear()
        (tmp_path / damaged).write_text("x")
        with pytest.warns(UserWarning, match=r"two\.bin is gone or damaged: made again, and what came after it"):
            stages(tmp_path, made)
        assert made == ["two", "three"]
    made.clear()
    (tmp_path / "one.bin").unlink()
    with pytest.warns(UserWarning, match="gone or damaged"):
        stages(tmp_path, made)
    assert made == ["one", "two", "three"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[1]", b'{"fingerprint": 1}', b"\xff\xfe", None])
def test_a_damaged_job_says_what_to_do_and_doing_it_works(tmp_path: Path, content: bytes | None) -> None:
    folder, made = tmp_path / "out", list[str]()
    stages(folder, made)
    file = folder / "job.json"
    if content is None:  # a value that was changed
        state = json.loads(file.read_text())
        state["stages"]["one"]["seconds"] += 1
        content = json.dumps(state).encode()
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"job\.json is damaged.*; delete the folder {folder} and start again"):
        stages(folder, made)
    shutil.rmtree(folder)
    stages(folder, made)


def test_hidden_rests_do_not_close_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".job-0123abcd-1-0badcafe.json").write_text("{")  # killed before the rename
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    stages(tmp_path, [])
    (tmp_path / "job.json").unlink()
    with pytest.raises(InputError, match="is not empty and holds no tsynd run"):
        stages(tmp_path, [])
    with pytest.raises(InputError, match="is a file"):
        stages(tmp_path / "one.bin", [])


def test_a_second_process_is_told(tmp_path: Path) -> None:
    with Job(tmp_path, FINGERPRINT):
        with pytest.raises(InputError, match="is at work in"):
            Job(tmp_path, FINGERPRINT)
        Job(tmp_path, FINGERPRINT, alone=False).close()  # another process of the same job
    with pytest.raises(InputError, match=r"other settings \(seed 0 → 1\)"):
        Job(tmp_path, FINGERPRINT | {"seed": 1})
    stages(tmp_path, [])  # the refused one holds nothing


def test_a_folder_that_is_removed_meanwhile_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def make(path: Path) -> dict[str, Any]:
        shutil.rmtree(folder)
        return {}

    with Job(folder, FINGERPRINT) as job, pytest.raises(InputError, match="was removed or emptied while the job"):
        job.stage("one", "one.bin", make)
    assert not folder.exists()
