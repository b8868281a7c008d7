"""The first moments of a command, and streams that nobody takes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from conftest import ROOT

# In place of what imports everything: it says that it was reached, and waits.
READY = """
import importlib, sys, types
entry = importlib.import_module(sys.argv[1])
command = types.ModuleType(sys.argv[2])
command.main = lambda: (print("ready", flush=True), input())
sys.modules[sys.argv[2]] = command
getattr(entry, sys.argv[3])()
"""
ENTRIES = {
    "extract": ("mtdp_runtime.commands.entry", "mtdp_runtime.commands.extract", "extract"),
    "bench": ("mtdp_runtime.commands.entry", "mtdp_runtime.commands.bench", "bench"),
    "doctor": ("mtdp_runtime.commands.entry", "mtdp_runtime.commands.doctor", "doctor"),
    "view": ("mtdp_runtime.commands.entry", "mtdp_runtime.commands.view", "view"),
    "export": ("mtdp_export.entry", "mtdp_export.cli", "main"),
    "train": ("mtdp.entry", "mtdp.cli", "main"),
}


@pytest.mark.parametrize("command", ENTRIES)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_any_work_is_the_exit_code_and_one_line(signum: int, code: int, command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", READY, *ENTRIES[command]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == code
    kept = "stopped: what was computed is kept; run the same command again to go on\n"
    assert errors == ("stopped\n" if command == "train" else kept)


@pytest.mark.parametrize("module", sorted({entry for entry, _, _ in ENTRIES.values()}))
def test_the_entry_imports_nothing_heavy_before_signals_are_heard(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'typer', 'numpy', 'torch'}} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"


def test_the_installed_commands_begin_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert {name.removeprefix("mtdp-"): target for name, target in scripts.items()} == {
        name: f"{entry}:{function}" for name, (entry, _, function) in ENTRIES.items()
    }


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library writes to the number 1 would go into a file of features."""
    code = (
        "from mtdp_runtime.commands.entry import prepare; prepare(); import os, sys; "
        f"file = os.open({str(tmp_path / 'f')!r}, os.O_CREAT | os.O_RDWR); print('x'); print('y', file=sys.stderr); "
        "os._exit(file > 2)"
    )
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], check=False)
    assert closed.returncode == 1
    assert (tmp_path / "f").stat().st_size == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_full_stdout_is_said_and_is_not_success() -> None:
    with Path("/dev/full").open("w") as full:
        code = "from mtdp_runtime.commands.entry import extract; extract()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "error: stdout cannot be written: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_training_says_that_its_results_could_not_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        code = "from mtdp.entry import main; main()"
        command = [sys.executable, "-c", code, "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["extract", "export", "train"])
def test_a_reader_that_is_gone_is_no_success_and_no_failure_of_a_slide(command: str) -> None:
    """As `mtdp-extract ... | head -1`: nothing is said, since nobody listens."""
    reading, writing = os.pipe()
    os.close(reading)
    module, _, function = ENTRIES[command]
    code = [sys.executable, "-c", f"from {module} import {function} as main; main()", "--help"]
    done = subprocess.run(code, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_limit_of_file_sizes_that_stdout_meets_is_said(tmp_path: Path, unbuffered: str) -> None:
    """Half a line fits; Python itself would lose the rest without a word where its streams are unbuffered."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, 100))
    with (tmp_path / "out.txt").open("w") as small:
        done = subprocess.run(
            [sys.executable, "-c", "from mtdp_runtime.commands.entry import extract; extract()", "--help"],
            stdout=small,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=limit,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, "error: stdout cannot be written: File too large\n")
