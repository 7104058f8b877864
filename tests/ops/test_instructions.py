"""The emulator's tensor-core instructions against other people's reading of the PTX ISA.

What the kernels' tests run on (``tests/cpp/emulator*.h``) is our own reading. Here the registers and the shared memory
of each instruction are laid out by ``tensor-layouts`` (the layouts of CUTLASS), its result is compared with that of
``mmasim`` (bit-accurate models of mma.sync and wgmma), and misreadings that are put in on purpose are found.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

mmasim = pytest.importorskip("mmasim.nv_ptx")
layouts = pytest.importorskip("tensor_layouts")
from tensor_layouts import atoms_nv  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPP = Path(__file__).parents[1] / "cpp"
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
Run = Callable[..., np.ndarray]

types = pytest.mark.parametrize("kind", TYPES)
# sums of whole numbers are exact in any order; others are held to a rounding of their terms
tiles = pytest.mark.parametrize("whole", [True, False], ids=["integers", "normal"])


def build(folder: Path, headers: Path) -> Run:
    """The program of single instructions, with the emulator that lies in ``headers``."""
    program = folder / "instructions"
    command = ["g++", "-std=gnu++17", "-O0", "-w", f"-I{headers}", str(CPP / "instructions.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)

    def run(instruction: str, kind: str, *inputs: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        raw = b"".join(np.ascontiguousarray(x).tobytes() for x in inputs)
        done = subprocess.run([program, instruction, kind], input=raw, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        return np.frombuffer(done.stdout, dtype)

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build(tmp_path_factory.mktemp("instructions"), CPP)


def matrix(rows: int, columns: int, kind: str, whole: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-8, 9, (rows, columns), generator=generator).to(TYPES[kind])
    return torch.randn(rows, columns, generator=generator).to(TYPES[kind])


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def places(layout: object, threads: int, values: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each thread's each value, of a layout (thread, value) -> column-major place."""
    at = np.array([[layout(t, v) for v in range(values)] for t in range(threads)])  # type: ignore[operator]
    return at % rows, at // rows


def assert_same(got: np.ndarray, wanted: torch.Tensor, a: torch.Tensor, b: torch.Tensor, whole: bool) -> None:
    exact = wanted.numpy()
    if whole:
        np.testing.assert_array_equal(got, exact)
        return
    # the hardware truncates what is aligned to the largest term; the emulator rounds every sum
    terms = (a.float().abs() @ b.float().abs()).numpy()
    assert (np.abs(got - exact) <= 2e-6 * terms + 1e-6).all()


@types
@tiles
@pytest.mark.parametrize("architecture", ["Ampere", "Hopper"])
def test_mma_sync(run: Run, kind: str, whole: bool, architecture: str) -> None:
    _check_mma_sync(run, kind, whole, architecture)


def _check_mma_sync(run: Run, kind: str, whole: bool, architecture: str) -> None:
    name = kind.upper()
    atom = getattr(atoms_nv, f"SM80_16x8x16_F32{name}{name}F32_TN")
    a, b = matrix(16, 16, kind, whole, 1), matrix(16, 8, kind, whole, 2)
    c = matrix(16, 8, kind, whole, 3).float()
    fragments = np.zeros((32, 10), np.uint32)
    row, k = places(atom.a_layout, 32, 8, 16)
    fragments[:, 0:4] = bits(a)[row, k].view(np.uint32)
    column, k = places(atom.b_layout, 32, 4, 8)
    fragments[:, 4:6] = bits(b)[k, column].view(np.uint32)
    row, column = places(atom.c_layout, 32, 4, 16)
    fragments[:, 6:10] = c.numpy()[row, column].view(np.uint32)
    got = np.zeros((16, 8), np.float32)
    got[row, column] = run("multiply_add", kind, fragments).reshape(32, 4)
    wanted = mmasim.MMA(architecture, f"m16n8k16.f32.{kind}.{kind}.f32")(a, b, c)
    assert_same(got, wanted, a, b, whole)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(run: Run, transposed: bool) -> None:
    _check_ldmatrix(run, transposed)


def _check_ldmatrix(run: Run, transposed: bool) -> None:
    memory = np.random.default_rng(0).integers(0, 2**16, 2048, dtype=np.uint16)
    rows = np.random.default_rng(1).permutation(memory.size // 8)[:32].astype(np.uint32)  # of 16 bytes, anywhere
    name = "load_matrices_transposed" if transposed else "load_matrices"
    got = run(name, "f16", memory, rows * 16, dtype=np.uint16).reshape(32, 8)
    atom = atoms_nv.SM75_U16x8_LDSM_T if transposed else atoms_nv.SM75_U32x4_LDSM_N
    # lane t's value v comes from this bit of the 32 rows end to end
    rows_end_to_end = memory.reshape(-1, 8)[rows].reshape(-1)
    wanted = [[rows_end_to_end[atom.dst_layout_bits(t, 16 * v) // 16] for v in range(8)] for t in range(32)]
    np.testing.assert_array_equal(got, np.array(wanted))


def swizzled(tile: np.ndarray) -> np.ndarray:
    """Rows of 64 values as they lie in 128-byte swizzled shared memory: Swizzle<3, 4, 3> on bytes."""
    swizzle = layouts.Swizzle(3, 4, 3)
    out = np.zeros(tile.size, np.uint16)
    out[[swizzle(2 * i) // 2 for i in range(tile.size)]] = tile.reshape(-1)
    return out


def k_major(matrix_bits: np.ndarray) -> np.ndarray:
    """[rows, 64 of k] by CUTLASS's Layout_K_SW128_Atom, (8, 64) : (64, 1), atoms side by side along the rows."""
    rows = matrix_bits.shape[0]
    layout = layouts.Layout(((8, rows // 8), 64), ((64, 512), 1))
    flat = np.zeros(matrix_bits.size, np.uint16)
    for row in range(rows):
        flat[[layout(row, k) for k in range(64)]] = matrix_bits[row]
    return swizzled(flat)


def mn_major(matrix_bits: np.ndarray) -> np.ndarray:
    """[64 of k, 64 columns] by CUTLASS's Layout_MN_SW128_Atom, (64, 8) : (1, 64), atoms side by side along k."""
    layout = layouts.Layout((64, (8, 8)), (1, (64, 512)))
    flat = np.zeros(matrix_bits.size, np.uint16)
    for k in range(64):
        flat[[layout(column, k) for column in range(64)]] = matrix_bits[k]
    return swizzled(flat)


def product(shape: str, kind: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Four steps of 16 of k by mmasim's wgmma."""
    operation = mmasim.WGMMA("Hopper", f"{shape}.f32.{kind}.{kind}")
    out = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, 64, 16):
        out = operation(a[:, k : k + 16], b[k : k + 16], out)
    return out


@types
@tiles
@pytest.mark.parametrize("columns", [128, 256])
def test_wgmma_of_two_tiles(run: Run, kind: str, whole: bool, columns: int) -> None:
    _check_tiles(run, kind, whole, columns)


def _check_tiles(run: Run, kind: str, whole: bool, columns: int) -> None:
    a, b = matrix(64, 64, kind, whole, 1), matrix(64, columns, kind, whole, 2)
    memory = np.concatenate([k_major(bits(a)), k_major(bits(b.t()))])
    values = columns // 2
    row, column = places(atoms_nv.gmma_c_layout(columns), 128, values, 64)
    got = np.zeros((64, columns), np.float32)
    got[row, column] = run(f"tiles{columns}", kind, memory).reshape(128, values)
    assert_same(got, product(f"m64n{columns}k16", kind, a, b), a, b, whole)


@types
@tiles
def test_wgmma_of_registers_and_a_tile(run: Run, kind: str, whole: bool) -> None:
    _check_slopes(run, kind, whole)


def _check_slopes(run: Run, kind: str, whole: bool) -> None:
    a, b = matrix(64, 64, kind, whole, 1), matrix(64, 64, kind, whole, 2)
    # a warp has 16 rows, with the fragments of mma.sync (PTX ISA: the same figure)
    row, k = places(atoms_nv.SM80_16x8x16_F32F16F16F32_TN.a_layout, 32, 8, 16)
    fragments = np.zeros((128, 4, 4), np.uint32)
    for warp in range(4):
        for step in range(4):
            part = bits(a)[16 * warp : 16 * warp + 16, 16 * step : 16 * step + 16]
            fragments[32 * warp : 32 * warp + 32, step] = np.ascontiguousarray(part[row, k]).view(np.uint32)
    row, column = places(atoms_nv.gmma_c_layout(64), 128, 32, 64)
    got = np.zeros((64, 64), np.float32)
    got[row, column] = run("slopes", kind, mn_major(bits(b)), fragments).reshape(128, 32)
    assert_same(got, product("m64n64k16", kind, a, b), a, b, whole)


@pytest.mark.parametrize("at", [(0, 0, 0), (64, 3, 1), (128, 9, 2), (0, -1, 0)])
def test_box_of_a_turned_tensor(run: Run, at: tuple[int, int, int]) -> None:
    _check_box(run, at)


def _check_box(run: Run, at: tuple[int, int, int]) -> None:
    """[pass, class, unit] weights as [unit, pass, class]: strides that fall, and zeros outside."""
    units, passes, classes = 136, 11, 3
    weights = np.random.default_rng(0).integers(1, 2**16, (passes, classes, units), dtype=np.uint16)
    line = 2 * units
    numbers = np.zeros(16, np.int64)
    numbers[:11] = [units, passes, classes, line * classes, line, 64, 8, 4, *at]
    got = run("box", "bf16", numbers, weights, dtype=np.uint16)
    wanted = np.zeros((4, 8, 64), np.uint16)
    for c in range(4):
        for t in range(8):
            for d in range(64):
                unit, number, kind = at[0] + d, at[1] + t, at[2] + c
                if 0 <= unit < units and 0 <= number < passes and 0 <= kind < classes:
                    wanted[c, t, d] = weights[number, kind, unit]
    np.testing.assert_array_equal(got, swizzled(wanted))


# file, what stands there, a misreading of it, and the check that must notice
MISREADINGS = {
    "a swapped swizzle bit": ("emulator_hopper.h", "(address >> 7 & 7) << 4", "(address >> 8 & 7) << 4", "tiles"),
    "a swizzle one bit wide of its place": (
        *("emulator_hopper.h", "(address >> 7 & 7) << 4", "(address >> 7 & 7) << 5", "slopes"),
    ),
    "no swizzle in boxes": (
        "emulator_hopper.h",
        "there->shared_begin + swizzle(offset)",
        "there->shared_begin + offset",
        "box",
    ),
    "leading and stride offset exchanged, K-major": (
        *("emulator_hopper.h", "mn % 8 * 128 + mn / 8 * stride", "mn % 8 * 128 + mn / 8 * leading", "tiles"),
    ),
    "leading offset where the stride offset stands, MN-major": (
        *("emulator_hopper.h", "k % 8 * 128 + k / 8 * stride", "k % 8 * 128 + k / 8 * leading", "slopes"),
    ),
    "a stride offset in other units": ("emulator_hopper.h", ">> 32 & 0x3FFF) << 4", ">> 32 & 0x3FFF) << 3", "tiles"),
    "K- and MN-major exchanged": (
        "emulator_hopper.h",
        "swizzle(mn_major ? start",
        "swizzle(!mn_major ? start",
        "slopes",
    ),
    "accumulators' rows exchanged": (
        *(
            "emulator_hopper.h",
            "const unsigned row = lane / 4 + 8 * (i / 2),",
            "const unsigned row = lane / 4 + 8 * (i % 2),",
        ),
        "tiles",
    ),
    "accumulators' columns in another order": (
        "emulator_hopper.h",
        "2 * (lane % 4) + i % 2;",
        "lane % 4 + 4 * (i % 2);",
        "tiles",
    ),
    "a warp's rows in turns": ("emulator_hopper.h", "16 * (warp % 4) + row", "4 * row + warp % 4", "tiles"),
    "registers of the first operand exchanged": (
        *("emulator_hopper.h", "[row / 8 + 2 * (k / 8)]", "[2 * (row / 8) + k / 8]", "slopes"),
    ),
    "mma.sync's first operand": (
        "emulator.h",
        "reader, row / 8 + 2 * (k / 8), k)",
        "reader, 2 * (row / 8) + k / 8, k)",
        "mma",
    ),
    "mma.sync's second operand": (
        "emulator.h",
        "4 * column + reader, 4 + k / 8, k",
        "4 * column + reader, 5 - k / 8, k",
        "mma",
    ),
    "mma.sync's accumulators": (
        "emulator.h",
        "row = lane / 4 + 8 * (i / 2), column",
        "row = lane / 4 + 8 * (i % 2), column",
        "mma",
    ),
    "ldmatrix not transposed": (
        "emulator.h",
        "transposed ? 2 * (lane % 4) + e : lane / 4,",
        "2 * (lane % 4) + e,",
        "ldmatrix",
    ),
    "ldmatrix by lanes": ("emulator.h", "all + (8 * m + r) * kSlotBytes", "all + (4 * r + m) * kSlotBytes", "ldmatrix"),
}
CHECKS: dict[str, Callable[[Run], object]] = {
    "mma": lambda run: _check_mma_sync(run, "bf16", True, "Hopper"),
    "ldmatrix": lambda run: [_check_ldmatrix(run, transposed) for transposed in (False, True)],
    "tiles": lambda run: _check_tiles(run, "bf16", True, 128),
    "slopes": lambda run: _check_slopes(run, "bf16", True),
    "box": lambda run: _check_box(run, (0, 0, 0)),
}


AT_ONCE = ("a swapped swizzle bit", "leading offset where the stride offset stands, MN-major")


@pytest.mark.parametrize(
    "name", [*AT_ONCE, *(pytest.param(name, marks=pytest.mark.slow) for name in MISREADINGS if name not in AT_ONCE)]
)
def test_a_misreading_is_found(name: str, tmp_path: Path) -> None:
    file, stands, misread, check = MISREADINGS[name]
    headers = tmp_path / "headers"
    headers.mkdir()
    for header in CPP.glob("*.h"):
        text = header.read_text()
        if header.name == file:
            flat = " ".join(text.split())
            assert flat.count(" ".join(stands.split())) == 1, f"{file} no longer says {stands!r} in one place"
            text = _replace(text, stands, misread)
        (headers / header.name).write_text(text)
    mistaken = build(tmp_path, headers)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[check](mistaken)


def _replace(text: str, stands: str, misread: str) -> str:
    """``stands`` by ``misread``, wherever lines are broken."""
    pattern = r"\s+".join(re.escape(word) for word in stands.split())
    return re.sub(pattern, lambda _: misread, text, count=1)
