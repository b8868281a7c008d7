"""The steps of a page of docs/ that are marked `<!-- run -->` or `<!-- run: WHAT -->`, and a user who gives them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
STEP = re.compile(r"<!-- run(?:: (\w+))? -->\n```(sh|python)\n(.*?)```", re.DOTALL)


def steps_of(page: str) -> list[tuple[str, str, str]]:
    """Return what a step needs, its language and its code, in the order of the page."""
    return STEP.findall((DOCS / page).read_text(encoding="utf-8"))


def give(language: str, code: str, folder: Path) -> str:
    """Run a step as printed in a folder; return what it printed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
