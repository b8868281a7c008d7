"""A run that slept past its claim and wakes spoils nothing of its successor's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_sleepers_that_wake_leave_no_row_in_their_successors_files(tmp_path: Path) -> None:
    """Real processes and signals; `takeovers.py --count 100` tries more."""
    script = Path(__file__).with_name("takeovers.py")
    command = [sys.executable, str(script), str(tmp_path), "--count", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["wrong"] == 0
    assert facts["taken_over"] >= 2
    assert "another process took it over" in result.stderr
