"""The house: which room may import which, read from the sources (imports inside functions count); and its size.

docs/architecture.md shows it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tsynd"
Sources = dict[str, str]  # path below tsynd/, such as "ops/plans.py" -> text

# what each room stands on; what those stand on is theirs too
STANDS_ON = {
    "utils": (),
    "fx": ("utils",),
    "ops": ("utils",),
    "models": ("utils",),
    "data": ("utils",),
    "posteriors": ("ops", "models", "data", "fx"),
    "synthesis": ("posteriors",),
    "evaluation": ("posteriors",),
    "training": ("synthesis", "evaluation"),
    "export": ("synthesis",),
    "report": ("synthesis",),
    "distributed": ("synthesis",),
    "jobs": ("training", "report"),
    "study": ("jobs",),
    "cli": ("study", "distributed", "export"),
}
# import nothing, so that a module inside can be had without what its neighbours need
EMPTY = ("export/__init__.py", "distributed/__init__.py")

LINES, ARROWS, FLOORS = 25000, 90, 9
PARAMETERS = 12
# functions with more parameters: this list only shrinks; `synthesize` stays, as the public face of all settings
WIDE = {
    "synthesis/api.py:synthesize",
}


_parse = cache(ast.parse)


def sources() -> Sources:
    """The package as it is."""
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def _module(path: str) -> str:
    return ".".join(("tsynd", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def _room(path: str) -> str | None:
    """None for the root's own files."""
    parts = Path(path).parts
    return parts[0] if len(parts) > 1 else None


def imported(path: str, text: str, modules: set[str]) -> Iterator[tuple[str, int]]:
    """The modules of tsynd that a file imports, in functions and under TYPE_CHECKING too, and the line."""
    package = _module(path) if path.endswith("__init__.py") else _module(path).rpartition(".")[0]
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules - {"tsynd"}:
            names = [node.value]  # for import_module and the like
        else:
            continue
        for name in names:
            if name.split(".")[0] == "tsynd":
                yield name, node.lineno


def faults(files: Sources) -> list[str]:
    """Imports that the order forbids, one line each."""
    rooms = {room for path in files if (room := _room(path))}
    order = {room: set(STANDS_ON[room]) for room in STANDS_ON}
    for room in TopologicalSorter(order).static_order():
        order[room] |= {below for part in order[room] for below in order[part]}
    found = [f"{room}/: a room that tests/test_house.py does not know" for room in sorted(rooms - set(STANDS_ON))]
    modules = {_module(path) for path in files} | {"tsynd", *(f"tsynd.{room}" for room in rooms), "tsynd.ops._C"}
    for path, text in files.items():
        room = _room(path)
        for name, line in imported(path, text, modules):
            to = name.split(".")[1] if name.count(".") else None
            if path in EMPTY:
                found.append(f"{path}:{line} imports {name}; it holds a docstring alone")
            elif room is None:
                continue
            elif to is None:
                found.append(f"{path}:{line} imports the package's root")
            elif to != room and to not in order.get(room, ()):
                found.append(f"{path}:{line} imports {name}; {room} does not stand on {to}")
    try:
        graph = {_module(p): {n for n, _ in imported(p, t, modules)} - {_module(p)} for p, t in files.items()}
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        found.append(f"a circle of imports: {' → '.join(error.args[1])}")
    return found


def wide(files: Sources) -> set[str]:
    """Functions with too many parameters."""
    found = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}."
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                given = child.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > PARAMETERS:
                    found.add(prefix + child.name)
            walk(child, inner)

    for path, text in files.items():
        walk(_parse(text), f"{path}:")
    return found


def arrows(files: Sources) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    modules = {_module(path) for path in files}
    found = {(_room(p), name.split(".")[1]) for p, t in files.items() for name, _ in imported(p, t, modules | {"tsynd"})
             if _room(p) and name.count(".")}  # fmt: skip
    return {(a, b) for a, b in found if a is not None and a != b}


def heights(pairs: set[tuple[str, str]]) -> dict[str, int]:
    """Room -> rooms on its longest way down, itself included."""
    height: dict[str, int] = {}
    graph = {room: {b for a, b in pairs if a == room} for room in STANDS_ON}
    for room in TopologicalSorter(graph).static_order():
        height[room] = 1 + max((height[below] for below in graph[room]), default=0)
    return height


def test_imports_run_one_way() -> None:
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("utils/errors.py", "from tsynd.synthesis.api import synthesize", "utils does not stand on synthesis"),
        ("data/load.py", "def f():\n    from ..training import loop", "data does not stand on training"),
        ("models/networks.py", "import tsynd.data.load as data", "models does not stand on data"),
        ("study/cell.py", "if TYPE_CHECKING:\n    from tsynd.cli import app", "study does not stand on cli"),
        ("posteriors/laplace.py", "require('tsynd.export.runtime', 'onnx')", "posteriors does not stand on export"),
        ("ops/plans.py", "from tsynd import __version__", "imports the package's root"),
        ("jobs/run.py", "import tsynd", "imports the package's root"),
        ("export/__init__.py", "from tsynd.export.onnx import export_onnx", "holds a docstring alone"),
        ("kitchen/sink.py", "", "a room that tests/test_house.py does not know"),
        ("utils/atomic.py", "from tsynd.utils import progress\n", "a circle of imports"),
    ],
)
def test_a_planted_arrow_is_found(path: str, code: str, message: str) -> None:
    files = sources()
    if "circle" in message:
        files["utils/progress.py"] += "\nfrom tsynd.utils import atomic\n"
    files[path] = files.get(path, "") + f"\n{code}\n"
    found = faults(files)
    assert message in found[0]  # most upward arrows close a circle too


def test_the_house_stays_small() -> None:
    files = sources()
    lines = sum(text.count("\n") for text in files.values())
    assert lines <= LINES, f"{lines} lines under tsynd/"
    pairs = arrows(files)
    assert len(pairs) <= ARROWS, sorted(pairs)
    assert max(heights(pairs).values()) <= FLOORS


def test_the_drawings_show_the_house_as_it_is() -> None:
    from drawings import DRAWINGS, IMAGES

    for name, draw in DRAWINGS.items():
        assert (IMAGES / name).read_text() == draw(), "run python tests/drawings.py"


def test_no_function_takes_more_parameters_than_one_can_read() -> None:
    found = wide(sources())
    assert found - WIDE == set(), f"more than {PARAMETERS} parameters"
    assert WIDE - found == set(), "no longer so: take them off the list WIDE"
    assert wide({"a.py": "class A:\n def f(self, a, b, c, d, e, f, g, h, i, j, k, l, m): ..."}) == {"a.py:A.f"}
    assert wide({"a.py": "class A:\n def f(self, a, b, c, d, e, f, g, h, i, j, k, *, l): ..."}) == set()
