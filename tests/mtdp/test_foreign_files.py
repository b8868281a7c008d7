"""Files that others made, and that are not what they say: one line that names the file, exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hostile_models import endless_bundle

Make = Callable[..., Path]
ENDS_SOON = "import mtdp.bundle_features as b; b.LIMIT_S = 0.5; from mtdp.entry import main; main()"


def test_a_bundle_that_never_answers_is_ended(tmp_path: Path, make_task: Make) -> None:
    bundle, task = endless_bundle(tmp_path / "endless"), make_task(tmp_path / "task", per_class=2)
    command = [sys.executable, "-c", ENDS_SOON, "probe", "--task", str(task), "--init", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {bundle / 'model.fp32.onnx'}: one batch took more than 0.5 s",
        "hint: take bundles from people you trust",
    ]
