"""What a wheel promises: the version from git, torch's stable symbols alone, types, and an sdist that is whole."""

import importlib.util
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import tsynd
from tsynd import ops

ROOT = Path(__file__).parent.parent


def _program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "packaging" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


git_version, lowest = _program("git_version"), _program("lowest")


@pytest.mark.parametrize(
    ("described", "version"),
    [
        ("v1.2.3-0-gabc1234", "1.2.3"),
        ("v1.2.3rc1-0-gabc1234", "1.2.3rc1"),
        ("v1.2.3-4-gabc1234", "1.2.4.dev4+gabc1234"),
        ("v1.2.3-0-gabc1234-dirty", "1.2.4.dev0+gabc1234.dirty"),
        ("v1.2.3rc1-2-gabc1234", "1.2.3.dev2+gabc1234"),
        ("v0.1.0.dev0-70-gabc1234", "0.1.0.dev70+gabc1234"),
    ],
)
def test_version_from_git(described: str, version: str) -> None:
    assert git_version.from_describe(described) == version


def test_version_of_a_strange_tag() -> None:
    with pytest.raises(ValueError, match=r"'vnext-3-gabc'; wanted a tag such as v1\.2\.3"):
        git_version.from_describe("vnext-3-gabc")


def test_version_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_version, "_ROOT", tmp_path)
    monkeypatch.delenv("TSYND_VERSION", raising=False)
    assert git_version.dynamic_metadata("version") == "0.0.0+unknown"
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: tsynd\nVersion: 1.2.3\n\nVersion: no\n")
    assert git_version.dynamic_metadata("version") == "1.2.3"
    monkeypatch.setenv("TSYND_VERSION", "4.5.6")
    assert git_version.dynamic_metadata("version") == "4.5.6"


def test_version_is_the_installed_one() -> None:
    assert re.match(r"\d+\.\d+\.\d+", tsynd.__version__)


def _undefined(library: Path, weak: bool) -> tuple[set[str], set[str]]:
    """What a library wants from others: names without a version (torch's, Python's), and the versions of the rest."""
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines if weak or line.split()[-2] == "U"]
    return {name for name in names if "@" not in name}, {name.split("@")[-1] for name in names if "@" in name}


_WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}  # the compiler's own, optional


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.skipif(not ops.compiled, reason="the extension is not built")
def test_operators_use_stable_symbols_alone() -> None:
    """Every symbol from torch is declared in the headers whose functions torch promises to keep."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = [include / "stable" / "c" / "shim.h", include / "inductor" / "aoti_torch" / "c" / "shim.h"]
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", "".join(header.read_text() for header in headers)))
    aten = include / "inductor" / "aoti_torch" / "generated" / "c_shim_aten.h"
    declared |= set(re.findall(r"aoti_torch_aten_\w+", aten.read_text()))
    # written by macros: aoti_torch_dtype_##name and the like
    families = ("aoti_torch_dtype_", "aoti_torch_device_type_", "aoti_torch_layout_", "aoti_torch_memory_format_")
    wanted, versions = _undefined(Path(ops.library_path()), weak=True)
    strange = {name for name in wanted - _WEAK - declared if not name.startswith((*families, "torch_dtype_"))}
    assert not strange, strange
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert all(re.match(r"(GLIBC|GLIBCXX|CXXABI|GCC|OMP|GOMP)_", version) for version in versions), versions


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.skipif(not ops.compiled, reason="the extension is not built")
def test_the_module_asks_torch_for_nothing() -> None:
    """`_C` is Python's and the operator library's alone, so only its Python version ties it down."""
    from tsynd.ops import _C

    wanted, _ = _undefined(Path(_C.__file__), weak=False)
    assert {name for name in wanted if not re.match(r"_?Py|_ZNSt|.*tsynd", name)} == set()


def test_the_package_is_typed() -> None:
    assert (Path(tsynd.__file__).parent / "py.typed").exists()


def test_sdist_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a build needs, and the version it had."""
    backend = pytest.importorskip("scikit_build_core.build")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    tree = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("TSYND_VERSION", "1.2.3")
    archive = backend.build_sdist(str(tmp_path))
    assert archive == "tsynd-1.2.3.tar.gz"
    with tarfile.open(tmp_path / archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert names >= {
        "PKG-INFO",
        "CMakeLists.txt",
        "csrc/ops.cpp",
        "tsynd/py.typed",
        "packaging/git_version.py",
        "LICENSE",
    }
    assert not any(name.startswith(".ci/") for name in names)


def _project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def test_every_extra_has_tests_that_the_lowest_versions_must_pass() -> None:
    from extras import EXTRAS

    groups = {"all", "test", "docs", "dev", "onnx-gpu"}  # of other extras, of no code, of a GPU
    assert set(EXTRAS) == set(_project()["optional-dependencies"]) - groups
    for tests in EXTRAS.values():
        for test in tests:
            file, _, name = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}(" in text if name else text


def test_lowest_versions_are_those_declared() -> None:
    project = {
        "dependencies": ["torch>=2.11", "numpy>=1.26"],
        "optional-dependencies": {"a": ["x[y]>=1.2", "tsynd[b]"], "b": ["x[y]>=1.10", "z>=3"], "c": ["z"]},
    }
    assert lowest.lowest(["a"], project) == ["numpy==1.26", "torch==2.11", "x[y]==1.10", "z==3"]
    with pytest.raises(ValueError, match="'z': wanted NAME>=VERSION"):
        lowest.lowest(["c"], project)
    lowest.lowest(["dev", "laplace", "dicom-codecs", "onnx-gpu"], _project())  # every bound is one
