"""``make sanitize``: the operators' tests on the extension that is built with the sanitizers, in the folder given.

The folder holds ``_C`` alone; the rest of the package comes from the source tree, ahead of any installed one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def main() -> int:
    """Import tsynd around the sanitized extension and run pytest with the remaining arguments."""
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    root = Path(__file__).resolve().parents[1]
    # an editable install answers for the package before sys.path does
    sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
    sys.path.insert(0, str(root))
    (extension,) = folder.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("tsynd.ops._C", extension)
    assert spec is not None
    assert spec.loader is not None
    import torch  # the extension's symbols

    module = importlib.util.module_from_spec(spec)
    sys.modules["tsynd.ops._C"] = module
    spec.loader.exec_module(module)
    from tsynd import ops

    assert ops.compiled
    assert Path(sys.modules["tsynd.ops._C"].__file__ or "").parent == folder
    print(
        f"{extension.name} of {folder}, {torch.get_num_threads()} threads, {module.build_info()['cpu_kernels']} kernels"
    )
    return int(pytest.main(["-q", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
