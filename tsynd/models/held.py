"""Modes, gradients and layouts of networks that are others for a while, for several threads at once too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Held", "evaluating", "frozen"]


class Held:
    """An attribute of many objects that is another for a while.

    Whoever comes first notes what it was, and of those that overlap, in whatever order and thread, the last gives it
    back: so nobody takes another's change for the state to return to.

    Args:
        name: of the attribute.
    """

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.RLock()
        self._entries: dict[int, list[Any]] = {}  # id -> object, what it was, how many hold it

    @contextmanager
    def __call__(self, objects: Iterable[Any], value: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, each object's attribute is what ``value`` made of what it was."""
        taken: list[list[Any]] = []
        try:
            with self._lock:
                for one in objects:
                    entry = self._entries.setdefault(id(one), [one, getattr(one, self._name), 0])
                    taken.append(entry)
                    entry[2] += 1
                    if entry[2] == 1:
                        setattr(one, self._name, value(entry[1]))
            yield
        finally:
            with self._lock:
                for entry in taken:
                    entry[2] -= 1
                    if entry[2] <= 0:
                        setattr(entry[0], self._name, entry[1])
                        self._entries.pop(id(entry[0]), None)


_training, _gradient = Held("training"), Held("requires_grad")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode again afterwards."""
    with _training([part for module in modules for part in module.modules()], lambda was: False):
        yield


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the parameters, both as they were afterwards."""
    parameters = [p for module in modules for p in module.parameters()]
    with evaluating(*modules), _gradient(parameters, lambda was: False):
        yield
