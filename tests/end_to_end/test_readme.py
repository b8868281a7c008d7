"""Every command of the README works as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(mark: str) -> list[str]:
    blocks = re.findall(rf"<!-- run: {mark} -->\n```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user would stand: with a slide, a folder of slides, tasks and a pool."""
    folder = tmp_path_factory.mktemp("user")
    slide = data_dir / "slides" / "CMU-1-Small-Region.svs"
    (folder / "slides").mkdir()
    shutil.copy(slide, folder / "slide.svs")
    shutil.copy(slide, folder / "slides" / "another.svs")
    tasks = data_dir / "tasks"
    (folder / "tasks").symlink_to(tasks)
    (folder / "pool.toml").write_text(
        "".join(f'[[task]]\nname = "{name}"\npath = "{tasks / name}"\n' for name in ("lung", "wbc_jiangxi"))
    )
    return folder


@pytest.mark.parametrize("command", commands("commands"))
def test_a_command_works_as_printed(folder: Path, command: str) -> None:
    """The commands build on each other: they run in the order of the README."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_two_commands_that_ci_runs_are_there() -> None:
    assert len(commands("demo")) == 1
    assert len(commands("test")) == 1
