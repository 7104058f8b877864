"""Memory for time: networks in stages whose activations are made again in the backward pass (Chen et al., 2016).

A traced network is cut wherever a single tensor passes from what comes before to what comes after. What its parts would
keep for the backward pass is measured on one image; the cuts are those with the least left to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tsynd.fx.tracing import subgraph

__all__ = ["Staged", "kept_per_image", "staged"]

Found = TypeVar("Found")


@dataclass
class _Kept:
    """Memory that autograd holds for the backward pass.

    Attributes:
        storages: id -> bytes.
    """

    storages: dict[int, int] = field(default_factory=dict)

    def watch(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context that notes what is saved inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda x: x)

    def _note(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.storages.setdefault(storage._cdata, storage.nbytes())
        return x  # held by the graph, so that no other storage takes its place

    def total(self) -> int:
        """Bytes in all."""
        return sum(self.storages.values())


def kept_per_image(run: Callable[[Tensor], Any], one: Tensor) -> int:
    """Bytes that each image adds to what ``run`` keeps: those of two images less those of one, so without weights.

    Args:
        run: differentiable.
        one: [1, ...], what a single image starts from.
    """

    def kept(count: int, one: Tensor) -> int:
        ledger, leaf = _Kept(), torch.cat([one] * count).requires_grad_(True)
        with torch.enable_grad(), ledger.watch():
            out = run(leaf)
        del out
        return ledger.total()

    return _imagined(lambda x: max(kept(2, x) - kept(1, x), one.nbytes), one)


def _imagined(measure: Callable[[Tensor], Found], one: Tensor) -> Found:
    """What is measured on a tensor without values or memory; on the real one where code looks at values."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return measure(mode.from_tensor(one.detach()))
    except Exception:  # whatever a model's own code raises without values
        return measure(one.detach())


@dataclass(frozen=True)
class Staged:
    """Functions one after another that keep nothing but what they are given; backward runs each again.

    Attributes:
        stages: of one tensor; they draw nothing at random.
        heaviest: bytes that an image takes while the heaviest stage is run again.
        keep_last: the last stage keeps its activations, for a network whose backward pass begins at once.
    """

    stages: Sequence[Callable[[Tensor], Any]]
    heaviest: int
    keep_last: bool = False

    def __call__(self, x: Any) -> Any:
        """The same values as without stages, bit for bit."""
        for number, stage in enumerate(self.stages):
            last = number == len(self.stages) - 1
            if torch.is_grad_enabled() and not (last and self.keep_last):
                x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = stage(x)
        return x


def staged(run: Callable[[Tensor], Any], one: Tensor, keep_last: bool = False) -> Staged:
    """A frozen network in stages; one that is not traced is a single stage.

    Args:
        run: of one tensor; in eval mode.
        one: [1, ...], an input to measure with.
        keep_last: see :class:`Staged`.
    """
    if not isinstance(run, fx.GraphModule) or len(run.graph.find_nodes(op="placeholder")) != 1:
        return Staged([run], kept_per_image(run, one), keep_last)

    def weigh(x: Tensor) -> _Weighing:
        weighing = _Weighing(run)
        with torch.enable_grad():
            weighing.run(x.requires_grad_(True))
        return weighing

    weighing = _imagined(weigh, one)
    pieces, heaviest = _cut(run, weighing)
    return Staged(pieces, heaviest, keep_last)


class _Weighing(fx.Interpreter):
    """Runs a graph and notes for every node what it gives and what autograd keeps for it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.given: dict[fx.Node, int] = {}
        self.kept: dict[fx.Node, int] = {}
        weights = [*module.parameters(), *module.buffers()]
        self._ledger = _Kept({x.untyped_storage()._cdata: 0 for x in weights})

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        before = self._ledger.total()
        with self._ledger.watch():
            out = super().run_node(n)
        self.kept[n] = self._ledger.total() - before
        if isinstance(out, Tensor):
            self.given[n] = out.nbytes
        return out


def _cut(module: fx.GraphModule, weighing: _Weighing) -> tuple[list[fx.GraphModule], int]:
    """The stages with the least sum of all boundaries and the heaviest stage's activations, and the latter."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    entry = next(node for node in module.graph.nodes if node.op == "placeholder")
    place = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((place.get(user, len(nodes)) for user in node.users), default=-1) for node in [entry, *nodes]}
    ends, live = [], {entry}
    for index, node in enumerate(nodes[:-1]):
        live = {x for x in live | {node} if last_use[x] > index}
        if live == {node} and node in weighing.given:
            ends.append(index)
    best, chosen, top = float("inf"), [len(nodes) - 1], 0
    total = sum(weighing.kept[node] for node in nodes)
    for limit in (total * share / 64 for share in range(1, 65)):
        picked, heaviest, weight, start = [], 0, 0, 0
        for number, index in enumerate([*ends, len(nodes) - 1]):
            added = sum(weighing.kept[node] for node in nodes[start : index + 1])
            if weight and weight + added > limit:
                picked.append(ends[number - 1])
                heaviest, weight = max(heaviest, weight), 0
            weight, start = weight + added, index + 1
        heaviest = max(heaviest, weight)
        cost = heaviest + sum(weighing.given[nodes[index]] for index in picked)
        if cost < best:
            best, chosen, top = cost, [*picked, len(nodes) - 1], heaviest
    output = next(node for node in module.graph.nodes if node.op == "output")
    pieces = []
    for index in chosen:
        pieces.append(subgraph(module, [entry], output.args[0] if index == len(nodes) - 1 else nodes[index]))
        entry = nodes[index]
    return pieces, top
