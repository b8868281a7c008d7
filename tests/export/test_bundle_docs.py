"""The commands of docs/bundle.md that need no GPU work as printed; the options of the others exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from mtdp_export.cli import app as export_app
from mtdp_export.cli import main
from mtdp_runtime.backends import BACKENDS
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.commands.extract import app as extract_app
from support import in_this_process

TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "bundle.md").read_text(encoding="utf-8")


def commands(mark: str) -> list[str]:
    blocks = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_commands_on_engines_work_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    assert len(commands("run: engines")) == 3
    for command in commands("run: engines"):
        program, *arguments = shlex.split(command)
        assert program == "mtdp-export"
        code, shown, errors = in_this_process(main, *arguments)
        assert code == 0, f"{command}\n{shown}{errors}"
    keys = [engine.key for engine in load_bundle(tmp_path / "B").manifest.engines]
    assert [(key.precision, key.capabilities) for key in keys] == [("fp32", ("8.0+",)), ("fp16", ("8.0+",))]
    for key in keys:
        assert (tmp_path / "B" / "engines" / f"{key.stem}.json").is_file()
    (key,) = [engine.key for engine in load_bundle(tmp_path / "C").manifest.engines]
    assert (key.capabilities, key.batch) == (("8.9",), (1, 16, 64))


def test_every_option_that_is_named_exists() -> None:
    options = {
        name for app in (export_app, extract_app) for parameter in get_command(app).params for name in parameter.opts
    }
    used = {
        word for line in commands("run: engines") + commands("needs a GPU") for word in re.findall(r"--[\w-]+", line)
    }
    assert len(used) > 8
    assert used <= options


def test_the_ladder_is_the_one_that_is_climbed() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*pip install", TEXT, re.MULTILINE)
    assert rows == [name for name in BACKENDS if name != "onnxruntime-tensorrt"]
