"""Something of every extra, for ``make lowest``: ``python tests/extras.py`` runs these tests on the tsynd installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# extra: tests that use the packages it brings
EXTRAS = {
    "data": ["data/test_load.py::test_folder_of_class_folders", "data/test_load.py::test_download_once"],
    "tables": ["data/readers/test_readers.py::test_tables"],
    "medical": [
        "data/readers/test_dicom.py::test_signed_sixteen_bits_with_rescale_and_window",
        "data/readers/test_readers.py::test_a_volume_is_laid_out_alike_whatever_its_axes",
    ],
    "dicom-codecs": ["data/readers/test_dicom.py::test_jpeg_and_jpeg_2000"],
    "huggingface": [
        "data/readers/test_readers.py::test_datasets_objects",
        "models/test_adapters.py::test_diffusers",
        "test_examples.py::test_example[transformers_models]",
    ],
    "models": ["models/test_adapters.py::test_monai", "models/test_checkpoint.py"],
    "train": ["training/test_training.py::test_classifier_learns_and_reports", "evaluation/test_evaluate.py"],
    "robustness": ["evaluation/test_attacks.py::test_budget_and_range_are_respected"],
    "cli": ["jobs/test_run.py::test_files_and_metrics", "jobs/test_run.py::test_bad_input_on_the_command_line"],
    "onnx": ["export/test_export.py::test_any_run_gives_the_same_bits", "export/test_export.py::test_without_torch"],
    "big": [
        "distributed/test_shards.py::test_shards_hold_what_synthesize_gives",
        "distributed/test_shards.py::test_webdataset_hugging_face_and_parquet_read_the_shards",
        "distributed/test_shards.py::test_ray_data_reads_the_shards",
    ],
    "pretrained": [
        "models/test_pretrained.py::test_timm",
        # transformers' ViT of the lowest version is not traced: its whole network runs for each sample, with a word
        "models/test_pretrained.py::test_hugging_face_from_a_folder[ResNet-options1-None]",
        "models/test_pretrained.py::test_hugging_face_from_a_folder[Swin-options2-None]",
    ],
    "laplace": ["test_examples.py::test_example[laplace_head]"],
}


class _Skipped:
    """Counts what was skipped: here, a package that is missing."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.skipped

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.count += report.outcome == "skipped"


def main() -> int:
    """Run them; a skipped one counts as failed."""
    skipped = _Skipped()
    tests = [f"{ROOT}/tests/{test}" for extra in EXTRAS.values() for test in extra]
    options = ["-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={ROOT}/tests", "-rs", "-m", "not study"]
    return int(pytest.main([*options, *tests], plugins=[skipped])) or int(skipped.count > 0)


if __name__ == "__main__":
    sys.exit(main())
