"""Small damage within one compressed tile: no row is good where a strict decoder warned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_no_row_is_good_where_a_strict_decoder_warned(tmp_path: Path) -> None:
    """Four readers; `micro_mutants.py --count 300` tries more."""
    script = Path(__file__).with_name("micro_mutants.py")
    command = [sys.executable, str(script), str(tmp_path), "--count", "24", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tallies = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tallies) == 4
    assert not [tally for tally in tallies if "WRONG" in tally]
    of_jpeg = [tally for tally in tallies if not tally["reader"].endswith("2000")]  # its judge is everywhere
    assert all(tally["judge warned"] <= tally["flagged"] < 24 for tally in of_jpeg)
