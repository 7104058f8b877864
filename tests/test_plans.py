"""The launch plans: what the launchers decide is what people are shown."""

from __future__ import annotations

import pytest

from tsynd import ops

pytestmark = pytest.mark.skipif(not ops.compiled, reason="plans are the compiled extension's")

HOPPER, SMALL = (227 * 1024, 132), (64 * 1024, 20)


def test_fused_where_it_fits() -> None:
    from tsynd import _C

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


def test_shared_memory_is_never_exceeded() -> None:
    from tsynd import _C

    for limits in (HOPPER, SMALL):
        for units in (16, 512, 2048, 8192):
            for classes in (1, 2, 8, 12, 32, 33, 1000):
                for samples in (1, 7, 32, 300):
                    for narrow in (True, False):
                        plans = [
                            _C.plan_head(4096, units, classes, samples, "multiclass", narrow, *limits),
                            _C.plan_dropout_head(units, classes, samples, narrow, *limits),
                            _C.plan_logits(samples, classes, "multiclass", *limits),
                            _C.plan_logits(samples, classes, "multilabel", *limits),
                        ]
                        assert all(plan.get("shared_bytes", 0) <= limits[0] for plan in plans)


def test_info_shows_the_plans() -> None:
    from typer.testing import CliRunner

    from tsynd.cli import app

    done = CliRunner().invoke(app, ["info", "--plan"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "fused: columns 256, images per block 128" in done.stdout
    assert "tensor cores" in done.stdout
