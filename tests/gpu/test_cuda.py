"""The CUDA kernels on a GPU: every plan, streams, graphs, autocast, many rows. Skipped where there is none.

``tests/ops/test_operators.py`` holds every operator against its float64 twin over random shapes on every device
there is; here are the things that only a GPU has.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor

import tsynd
from tsynd import ops
from tsynd.ops import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, D, C, T: fused (each column count and class padding, both block sizes), general, block rows, streamed rows
HEADS = [
    *((1, 8, 1, 1), (70, 72, 3, 2), (130, 512, 8, 32), (20000, 64, 8, 16), (17, 136, 2, 100), (33, 200, 16, 16)),
    *((40, 264, 4, 31), (129, 80, 11, 7), (50, 30, 8, 32), (64, 128, 8, 64), (9, 64, 129, 6), (3, 48, 1000, 40)),
]
# by wgmma_head alone: half of the columns a warpgroup, clusters with and without idle blocks, few and many chunks
WGMMA_HEADS = [
    *((1, 8, 1, 1), (130, 512, 8, 32), (5000, 520, 8, 64), (300, 2048, 8, 64), (70, 136, 13, 18), (200, 80, 2, 200)),
    *((195, 336, 5, 40), (17, 136, 3, 20), (129, 80, 11, 7), (65, 200, 8, 33), (20000, 64, 8, 16), (3, 392, 4, 72)),
]
KERNELS = ["fused", "wgmma", "rows"]
DROPOUT_HEADS = [(1, 1, 1, 1), (33, 512, 8, 32), (17, 130, 2, 7), (40, 2048, 8, 64), (5, 300, 30, 40), (19, 45, 100, 9)]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def relative(actual: Tensor, exact: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double().cpu() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def assert_as_good(actual: Tensor, exact: Tensor, same: Tensor) -> None:
    """At most 1e-5 of the largest entry in float32, or twice the error of the same-dtype torch code on the GPU."""
    bound = 1e-5 if same.dtype == torch.float32 else 0.0
    assert relative(actual, exact) <= max(bound, 2 * relative(same, exact), 1e-6)


@pytest.fixture(autouse=True)
def exact_products() -> object:
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let head_uncertainty take at best this one."""
    if request.param == "wgmma":
        from tsynd.ops import _C

        if torch.cuda.get_device_capability() != (9, 0) or "90a" not in _C.build_info()["cuda_architectures"]:
            pytest.skip("needs a GPU of compute capability 9.0 and a build for sm_90a")
    monkeypatch.setenv("TSYND_CUDA_HEAD", request.param)
    return str(request.param)


# the smallest call of each operator and its twin on the CPU: what the ladder of gpu_check ends with
SMALLEST: dict[str, tuple[Any, ...]] = {
    "logits_uncertainty": (random(2, 1, 2).float(), "mutual_information", "multiclass"),
    "head_uncertainty": (random(1, 8).float(), random(2, 2, 8, seed=1).float(), None, "entropy", "multiclass"),
    "dropout_head_uncertainty": (
        *(random(1, 1).float(), random(1, 1, seed=1).float(), None, 0.5, 2, 1, 0, torch.tensor([3])),
        *("mutual_information", "multilabel"),
    ),
    "expected_information": (random(2, 1, 2).float(), random(2, 1, 2, seed=1).float(), "multiclass"),
    "dropout_mask": (16, 0.5, 1, 7, 0, torch.tensor([5])),
    "dropout_expand": (random(1, 1, 1).float(), 0.5, 2, 7, 0, torch.tensor([5]), False),
    "dropout_gather": (random(2, 1, 1).float(), 0.5, 2, 7, 0, torch.tensor([5]), False),
    "ascend_": (random(1, 1).float(), random(1, 1, seed=1).float(), random(1, 1, seed=2).float(), 0.1, 1.0, "l2"),
}


def _on(device: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> list[Any]:
    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return [move(x).clone() if isinstance(x, Tensor) else x for x in arguments]


def _call(name: str, arguments: list[Any], twin: bool = False) -> list[Tensor]:
    run = getattr(reference, name) if twin else getattr(torch.ops.tsynd, name)
    out = run(*arguments)
    if out is None:
        return [arguments[0]]  # ascend_
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALLEST)
def test_smallest(name: str, dtype: torch.dtype, device: str) -> None:
    """Also on a device that is not the current one."""
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip(f"no {device}")
    actual = _call(name, _on(device, dtype, SMALLEST[name]))
    wanted = _call(name, _on("cpu", torch.float64, SMALLEST[name]), twin=True)
    for a, w in zip(actual, wanted, strict=True):
        assert str(a.device) == device
        close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-3}
        torch.testing.assert_close(a.cpu().double(), w.double(), **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_with_an_offset(dtype: torch.dtype, kernel: str) -> None:
    """Tensors that start anywhere in their storage: what wants 16 bytes must see that it has them not."""
    storage = random(1 + 301 * 64).to("cuda", dtype)
    heads = random(1 + 8 * 4 * 64, seed=1).to("cuda", dtype)
    ids = torch.arange(301, device="cuda")[1:]
    for start in (0, 1):
        features = storage[start : start + 300 * 64].view(300, 64)
        weight = heads[start : start + 8 * 4 * 64].view(8, 4, 64)
        got = _all_operators(features, weight, ids)
        for a, b in zip(got, _all_operators(features.clone(), weight.clone(), ids.clone()), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_images(dtype: torch.dtype, kernel: str) -> None:
    heads = random(8, 4, 64, seed=1).to("cuda", dtype)
    out = _all_operators(heads.new_empty(0, 64), heads, torch.empty(0, dtype=torch.int64, device="cuda"))
    assert all(x.numel() == 0 for x in out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", reference.TASKS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (33, 7, 8, 32), (130, 64, 3, 20), (5, 30, 129, 6), (3, 3000, 5, 9)], ids=str
)
def test_expected_information(shape: tuple[int, int, int, int], task: str, dtype: torch.dtype) -> None:
    images, count, classes, samples = shape
    logits, targets = random(samples, images, classes).to(dtype), random(samples, count, classes, seed=1).to(dtype)
    exact = reference.expected_information(logits.double(), targets.double(), task)
    same = reference.expected_information(logits.cuda(), targets.cuda(), task)
    actual = ops.expected_information(logits.cuda(), targets.cuda(), task)
    for a, e, s in zip(actual, exact, same, strict=True):
        assert_as_good(a, e, s)


def test_every_operator_has_a_kernel() -> None:
    assert {by["CUDA"] for by in ops.served_by().values()} == {"compiled"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize(("objective", "task"), [("mutual_information", "multiclass"), ("entropy", "multilabel")])
def test_head(shape: tuple[int, int, int, int], dtype: torch.dtype, objective: str, task: str) -> None:
    _check_head(shape, dtype, objective, task)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", HEADS[:10], ids=str)
def test_head_by_torch_products(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSYND_CUDA_HEAD", "rows")
    _check_head(shape, dtype, "entropy", "multiclass")


@pytest.mark.parametrize("kernel", ["wgmma"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", WGMMA_HEADS, ids=str)
@pytest.mark.parametrize("objective", ["mutual_information", "entropy"])
def test_head_by(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, objective: str) -> None:
    from tsynd.ops import _C

    images, units, classes, samples = shape
    limits: Any = torch.cuda.get_device_properties(0)
    shared = getattr(limits, "shared_memory_per_block_optin", 227 * 1024)
    size = (images, units, classes, samples, "multiclass", True, shared, limits.multi_processor_count)
    assert _C.plan_head(*size, 90)["kernel"] == kernel
    _check_head(shape, dtype, objective, "multiclass")


def _check_head(shape: tuple[int, int, int, int], dtype: torch.dtype, objective: str, task: str) -> None:
    images, units, classes, samples = shape
    features = random(images, units).to(dtype).cuda()
    weight = random(samples, classes, units, seed=1, scale=2 / math.sqrt(units)).to(dtype).cuda()
    bias = random(samples, classes, seed=2).to(dtype).cuda()
    wide = [x.double().cpu() for x in (features, weight, bias)]
    exact = reference.head_uncertainty(*wide, objective, task)
    same = reference.head_uncertainty(features, weight, bias, objective, task)
    actual = ops.head_uncertainty(features, weight, bias, objective, task)
    for a, e, s in zip(actual, exact, same, strict=True):
        assert_as_good(a, e, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DROPOUT_HEADS, ids=str)
@pytest.mark.parametrize(("objective", "task"), [("mutual_information", "multiclass"), ("entropy", "multilabel")])
def test_dropout_head(shape: tuple[int, int, int, int], dtype: torch.dtype, objective: str, task: str) -> None:
    images, units, classes, samples = shape
    features = random(images, units).to(dtype).cuda()
    weight = random(classes, units, seed=1, scale=2 / math.sqrt(units)).to(dtype).cuda()
    bias = random(classes, seed=2).to(dtype).cuda()
    ids = torch.randint(0, 2**32, (images,), generator=torch.Generator().manual_seed(3))
    address = (0.4, samples, -(2**62) + 5, 2)
    wide = [x.double().cpu() for x in (features, weight, bias)]
    exact = reference.dropout_head_uncertainty(*wide, *address, ids, objective, task)
    same = reference.dropout_head_uncertainty(features, weight, bias, *address, ids.cuda(), objective, task)
    actual = ops.dropout_head_uncertainty(features, weight, bias, *address, ids.cuda(), objective, task)
    for a, e, s in zip(actual, exact, same, strict=True):
        assert_as_good(a, e, s)


@pytest.mark.parametrize("units", [1, 16, 333, 4096])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.97])
def test_mask_bits_equal_those_of_the_cpu(units: int, p: float) -> None:
    ids = torch.randint(0, 2**32, (9,), generator=torch.Generator().manual_seed(units))
    on_gpu = ops.dropout_mask(units, p, 11, 2**63 - 1, 2**32 - 1, ids.cuda())
    assert torch.equal(on_gpu.cpu(), ops.dropout_mask(units, p, 11, 2**63 - 1, 2**32 - 1, ids))


def _all_operators(features: Tensor, heads: Tensor, ids: Tensor) -> list[Tensor]:
    value, gradient = ops.head_uncertainty(features, heads)
    own, own_gradient = ops.dropout_head_uncertainty(features, heads[0], None, 0.5, 8, 1, 0, ids)
    logits = torch.einsum("bd,tcd->tbc", features, heads)
    direct, slope = ops.logits_uncertainty(logits)
    shared, pull = ops.expected_information(logits, heads[:, :, :4].contiguous())
    spread = ops.dropout_expand(features[..., None], 0.5, 8, 1, 0, ids)
    back = ops.dropout_gather(spread, 0.5, 8, 1, 0, ids)
    latents = features.clone()
    ops.ascend_(latents, gradient, features, 0.1, 1.0)
    return [value, gradient, own, own_gradient, direct, slope, shared, pull, spread, back, latents]


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_stream(dtype: torch.dtype, kernel: str) -> None:
    """Work goes to the current stream: what a side stream prepares late is what the operators read."""
    heads = random(8, 4, 64, seed=1).to("cuda", dtype)
    ids = torch.arange(300, device="cuda")
    real, filler = random(300, 64).to("cuda", dtype), torch.randn(4096, 4096, device="cuda")
    wanted = _all_operators(real, heads, ids)
    features = torch.full_like(real, math.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            filler = filler @ filler * 1e-3
        features.copy_(real)
        got = _all_operators(features, heads, ids)
    side.synchronize()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_capture(dtype: torch.dtype, kernel: str) -> None:
    heads = random(8, 4, 64, seed=1).to("cuda", dtype)
    features, ids = random(300, 64).to("cuda", dtype), torch.arange(300, device="cuda")
    _all_operators(features, heads, ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _all_operators(features, heads, ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _all_operators(features, heads, ids)
    features.copy_(random(300, 64, seed=9).to(dtype))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, _all_operators(features, heads, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_hidden_synchronisation(kernel: str) -> None:
    dtype = torch.float32 if kernel == "rows" else torch.bfloat16
    heads, features = random(8, 4, 64, seed=1).to("cuda", dtype), random(300, 64).to("cuda", dtype)
    ids = torch.arange(300, device="cuda")
    _all_operators(features, heads, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _all_operators(features, heads, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_leaves_the_dtype_alone() -> None:
    heads, features = random(8, 4, 64, seed=1).float().cuda(), random(30, 64).float().cuda()
    wanted = ops.head_uncertainty(features, heads)
    with torch.autocast("cuda", torch.bfloat16):
        got = ops.head_uncertainty(features, heads)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_synthesis_on_the_gpu(masks: str, precision: str) -> None:
    """Eager and compiled with graph replay climb alike, and float32 as the CPU does."""
    torch.manual_seed(0)
    autoencoder, classifier = TinyAutoencoder(), TinyClassifier()
    images = torch.rand(150, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"steps": 2, "samples": 8, "latent_std": 1.0, "masks": masks, "progress": False}
    on_cpu = tsynd.synthesize(autoencoder, classifier, images, device="cpu", **options)
    options |= {"device": "cuda", "batch_size": 64, "precision": precision}
    eager = tsynd.synthesize(autoencoder, classifier, images, **options)
    fast = tsynd.synthesize(autoencoder, classifier, images, compile=True, **options)
    close = {"rtol": 1e-2, "atol": 1e-3} if precision == "float32" else {"rtol": 0.2, "atol": 2e-2}
    torch.testing.assert_close(fast.uncertainty.mean(), eager.uncertainty.mean(), **close)
    torch.testing.assert_close(eager.uncertainty.mean(), on_cpu.uncertainty.mean(), **close)
    assert (fast.uncertainty >= fast.initial_uncertainty).all()
    assert torch.equal(fast.sample_ids, eager.sample_ids)


def test_more_than_two_billion_logits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, has {free >> 30}")
    samples, images, classes = 33, 2**23, 8  # 2.2e9
    logits = torch.randn(samples, images, classes, device="cuda", dtype=torch.bfloat16)
    value, gradient = ops.logits_uncertainty(logits)
    some = torch.tensor([0, images // 2, images - 1], device="cuda")
    exact = reference.logits_uncertainty(logits[:, some].double().cpu())
    torch.testing.assert_close(value[some].cpu().double(), exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[:, some].cpu().double(), exact[1], rtol=2e-2, atol=1e-4)
