"""The launch plans: what the launchers decide is what people are shown."""

from __future__ import annotations

import itertools

import pytest

from tsynd import ops

pytestmark = pytest.mark.skipif(not ops.compiled, reason="plans are the compiled extension's")

HOPPER, SMALL = (227 * 1024, 132), (64 * 1024, 20)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSYND_CUDA_HEAD", raising=False)


def test_fused_where_it_fits() -> None:
    from tsynd.ops import _C

    fused = _C.plan_head(65536, 512, 8, 32, "multiclass", True, *HOPPER)
    assert (fused["kernel"], fused["images_per_block"], fused["columns"], fused["stages"]) == ("fused", 128, 256, 3)
    few = _C.plan_head(64, 512, 8, 32, "multiclass", True, *HOPPER)
    assert few["images_per_block"] == 64  # small batches: smaller blocks, more of them
    for units, classes, samples, task, narrow in (
        (512, 8, 33, "multiclass", True),  # 36 passes of 8 classes are more than 256 columns
        (512, 17, 2, "multiclass", True),
        (510, 8, 32, "multiclass", True),  # rows that are not whole 16-byte pieces
        (512, 8, 32, "multilabel", True),
        (512, 8, 32, "multiclass", False),
    ):
        plan = _C.plan_head(65536, units, classes, samples, task, narrow, *HOPPER)
        assert plan["kernel"].startswith("product, "), (units, classes, samples, task, narrow)
    assert _C.plan_head(65536, 512, 8, 32, "multiclass", True, *SMALL)["kernel"].startswith("product, ")


def test_wgmma_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsynd.ops import _C

    def kernel(size: tuple[int, int, int, int], capability: int = 90, **more: str) -> dict[str, object]:
        return _C.plan_head(*size, "multiclass", True, *HOPPER, capability, **more)

    g1, g2 = (65536, 512, 8, 32), (65536, 2048, 8, 64)
    assert kernel(g1)["kernel"] == "fused"
    assert kernel(g2)["kernel"] == "product, registers rows, product"
    assert kernel(g1, best="rows")["kernel"] == "product, registers rows, product"
    monkeypatch.setenv("TSYND_CUDA_HEAD", "wgmma")
    assert kernel(g1) == {
        "kernel": "wgmma",
        "images_per_block": 128,
        "columns": 256,
        "stages": 4,
        "blocks_per_cluster": 2,
        "shared_bytes": 4 * 48 * 1024 + 64,
    }
    wide = kernel(g2)
    assert (wide["kernel"], wide["images_per_block"], wide["columns"], wide["stages"]) == ("wgmma", 64, 512, 3)
    assert wide["blocks_per_cluster"] == 4
    assert "blocks_per_cluster" not in kernel((64, 512, 8, 64))  # one block has nobody to share with
    assert kernel(g1, 80)["kernel"] == "fused"  # no other device has the instructions, not even later ones
    assert kernel(g1, 100)["kernel"] == "fused"
    assert kernel((65536, 2048, 8, 65))["kernel"].startswith("product, ")  # 72 passes of 8 classes are too many
    assert kernel(g1, best="fused")["kernel"] == "fused"


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tsynd.cli import app
    from tsynd.ops import _C
    from tsynd.ops.plans import describe_plans
    from tsynd.utils.errors import InputError

    wanted = "TSYND_CUDA_HEAD: got 'fast', wanted 'wgmma', 'fused' or 'rows'"
    with pytest.raises(ValueError, match=wanted):
        _C.plan_head(64, 64, 2, 8, "multiclass", True, *HOPPER, best="fast")
    monkeypatch.setenv("TSYND_CUDA_HEAD", "fast")
    with pytest.raises(InputError, match=wanted):
        describe_plans()
    done = CliRunner().invoke(app, ["info", "--plan"], env={"COLUMNS": "200"})
    assert isinstance(done.exception, InputError)  # which the command line turns into exit code 2


@pytest.mark.parametrize(("shared", "multiprocessors"), [HOPPER, SMALL])
def test_shared_memory_is_never_exceeded(shared: int, multiprocessors: int) -> None:
    from tsynd.ops import _C

    limits = (shared, multiprocessors)
    refused = 0
    grid = itertools.product((16, 512, 8192), (1, 2, 8, 12, 32, 33, 1000, 50000), (1, 7, 32, 300, 20000), (True, False))
    for units, classes, samples, narrow in grid:
        size = (4096, units, classes, samples, "multiclass", narrow, *limits)
        for plan, arguments in (
            (_C.plan_head, size),
            (_C.plan_head, (*size, 90, "wgmma")),
            (_C.plan_dropout_head, (units, classes, samples, narrow, *limits)),
            (_C.plan_logits, (samples, classes, "multiclass", *limits)),
            (_C.plan_logits, (samples, classes, "multilabel", *limits)),
            (_C.plan_information, (4096, 64, classes, samples, "multiclass", shared)),
        ):
            if 2 * samples + classes > shared // 4 - 8 and plan is not _C.plan_dropout_head:
                refused += 1
                with pytest.raises(
                    ValueError, match=f"got {samples} and {classes}, wanted 2 samples \\+ classes of at"
                ):
                    plan(*arguments)
            else:
                assert plan(*arguments).get("shared_bytes", 0) <= shared
    assert refused > 0


def test_information_is_cut_to_bounded_parts() -> None:
    from tsynd.ops import _C

    for images, targets, classes, samples in ((4096, 64, 8, 32), (10**7, 500, 10, 20), (64, 10**5, 1000, 16)):
        plan = _C.plan_information(images, targets, classes, samples, "multiclass", HOPPER[0])
        at_once, columns = plan["images_at_once"], plan["columns_at_once"]
        assert 1 <= at_once <= images
        assert columns <= targets * classes
        assert at_once == 1 or at_once * classes * columns <= 2**26
        assert at_once == 1 or at_once * classes * samples <= 2**28
    assert _C.plan_information(4096, 64, 8, 32, "multiclass", HOPPER[0])["images_at_once"] == 4096  # one part


def test_info_shows_the_plans() -> None:
    from typer.testing import CliRunner

    from tsynd.cli import app

    done = CliRunner().invoke(app, ["info", "--plan"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "fused: columns 256, images per block 128" in done.stdout
    assert "with TSYND_CUDA_HEAD=wgmma" in done.stdout
    assert "wgmma: blocks per cluster 4, columns 512" in done.stdout
    assert "tensor cores" in done.stdout
