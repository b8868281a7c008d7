"""faults.c for tests: built once, and loaded into processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PREAMBLE = f"""
import ctypes, errno, os, sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
def arm(folder, call, number, error, lose=False):
    ctypes.CDLL(None).fault_arm(str(folder).encode(), call.encode(), ctypes.c_long(number), error, int(lose))
def disarm():
    ctypes.CDLL(None).fault_disarm()
def seen():
    return int(ctypes.CDLL(None).fault_seen())
"""


def build_shim(folder: Path) -> Path:
    """Build faults.c into a folder."""
    shim = folder / "faults.so"
    source = TESTS / "reliability" / "faults.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl", "-lpthread"], check=True)
    return shim


def under_shim(shim: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which `arm(folder, call, number, error, lose)` makes a call fail once."""
    return subprocess.run(
        ["env", f"LD_PRELOAD={shim}", sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
