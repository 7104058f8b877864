"""Files appear whole or not at all; what dead processes left goes, what others write stays; one owner per folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tsynd.utils.atomic import FolderLock, atomic_path, clear_leftovers
from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import is_sealed, seal

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
_WRITER = """
import os, sys, time
from pathlib import Path
from tsynd.utils.atomic import FolderLock, atomic_path
lock = FolderLock(Path(sys.argv[1]))
with atomic_path(Path(sys.argv[1]) / "a.txt") as temporary:
    temporary.write_text("half")
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path):
    """Another process that holds the folder and is in the middle of a file."""
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_has_one_owner_and_a_killed_one_leaves_nothing(writer, tmp_path: Path) -> None:
    (temporary,) = tmp_path.glob(".a-*.txt")
    with pytest.raises(InputError, match=rf"process {writer.pid} on .* is at work in {tmp_path}; wanted one process"):
        FolderLock(tmp_path)
    clear_leftovers(tmp_path)
    assert temporary.exists()  # its writer lives
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    lock = FolderLock(tmp_path)
    clear_leftovers(tmp_path, "b")
    assert temporary.exists()  # of another file
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    lock.close()
    lock.close()
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_stays(tmp_path: Path) -> None:
    old = tmp_path / ".photo-0123abcd-17-0badcafe.png"  # of another machine, just now
    for path in (old, tmp_path / ".photo-20240101.png", tmp_path / ".hidden", tmp_path / "a-0123abcd-1-0badcafe.png"):
        path.write_text("x")
    clear_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    os.utime(old, (0, 0))
    clear_leftovers(tmp_path)
    assert not old.exists()
    assert len(list(tmp_path.iterdir())) == 3
    clear_leftovers(tmp_path / "none")


def test_owners_take_turns(tmp_path: Path) -> None:
    """A lock that is given back while another asks for it is never held twice."""
    inside, most, refused = [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                lock = FolderLock(tmp_path)
            except InputError:
                refused[0] += 1
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            lock.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert refused[0] < 800
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_seal_breaks_with_any_change() -> None:
    content = seal({"a": [1, 2.5, None], "b": {"c": "é"}})
    assert is_sealed(content)
    assert not is_sealed(content | {"a": [1, 2.5]})
    assert not is_sealed({key: value for key, value in content.items() if key != "digest"})
    assert not is_sealed([content])
    assert seal(content) == content
