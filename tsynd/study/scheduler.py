"""Tasks of a study over worker processes."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from tsynd.utils.errors import InputError

__all__ = []


@dataclass
class _Task:
    """One piece of work for a process, and the pieces that must be finished before it."""

    name: str
    work: Callable[[], Any]
    needs: tuple[str, ...] = ()
    is_cell: bool = True


@dataclass
class _Progress:
    """Cells done and time left, from the mean pace so far."""

    report: Callable[[int, str], None]
    total: int
    tasks: Sequence[_Task]
    start: float = field(default_factory=time.monotonic)
    done: int = 0

    def __post_init__(self) -> None:
        self.left = sum(task.is_cell for task in self.tasks)
        self.report(self.total - self.left, "" if self.left else "all were finished")

    def finished(self, task: _Task) -> None:
        """Count a task."""
        self.done += 1
        remaining = (time.monotonic() - self.start) / self.done * (len(self.tasks) - self.done)
        left = f", about {math.ceil(remaining / 60)} min left" if remaining else ""
        self.report(int(task.is_cell), f"last {task.name}{left}")


def _work(tasks: Sequence[_Task], workers: int, threads: int | None, progress: _Progress) -> None:
    """Do all tasks, each after those it needs."""
    if workers == 1:
        with _threads(threads):
            for task in tasks:
                task.work()
                progress.finished(task)
        return
    waiting, running = list(tasks), dict[Future[Any], _Task]()
    # a fresh interpreter each: forking after torch has started its threads may hang
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())  # the caller's own
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads,))
    try:
        while waiting or running:
            open_ = {task.name for task in waiting} | {task.name for task in running.values()}
            for task in [task for task in waiting if not open_ & set(task.needs)][: workers - len(running)]:
                waiting.remove(task)
                running[pool.submit(task.work)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                future.result()
                progress.finished(task)
    except BrokenProcessPool:
        raise InputError(
            "workers: a process was killed, perhaps for want of memory; wanted fewer --workers. The same command"
            " goes on behind the finished cells"
        ) from None
    finally:
        children = set(multiprocessing.active_children()) - others if waiting or running else set()
        pool.shutdown(wait=not children, cancel_futures=True)
        for child in children:
            child.terminate()
            child.join()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker(threads: int | None) -> None:
    """In a new process: so many threads, deaf to Ctrl-C (the parent ends it), gone when the parent is."""
    torch.set_num_threads(threads or torch.get_num_threads())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the attacks' progress bars would make a semaphore between processes, which the killed leave behind
    with contextlib.suppress(ImportError):
        importlib.import_module("tqdm.std").tqdm.set_lock(threading.RLock())
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
