"""mtdp-doctor --preflight: what a run would meet, said before it is queued."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import warm
from support import one_error


def doctor(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nfrom mtdp_runtime.commands.doctor import main; main()"
    return warm.run(code, *arguments)


@pytest.fixture
def asked(make_slide: Callable[..., Path], tiny_bundle: Path, tmp_path: Path) -> tuple[object, ...]:
    return (make_slide("a.tiff").parent, "--preflight", "--model", tiny_bundle, "--out", tmp_path / "o")


def test_what_would_fail_is_named_and_nothing_is_extracted(asked: tuple[object, ...], tmp_path: Path) -> None:
    good = doctor(*asked)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("1 slides: 1 can be done, 0 would fail; about ")
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    result = doctor(*asked)
    assert result.returncode == 1
    assert "would fail: " in result.stderr
    assert "bad.svs" in result.stderr
    assert "2 slides: 1 can be done, 1 would fail" in result.stdout
    facts = json.loads(doctor(*asked, "--json").stdout)
    assert (facts["slides"], len(facts["would_fail"]), facts["tiles"]) == (2, 1, 144)
    assert facts["bytes"] == 144 * (4 * 12 + 21)
    assert list((tmp_path / "o").iterdir()) == []


def test_too_little_space_is_a_problem(asked: tuple[object, ...]) -> None:
    full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=100)"
    result = doctor(*asked, before=full)
    assert result.returncode == 1
    assert "the features need" in result.stderr


def test_a_preflight_needs_slides_and_slides_a_preflight(tmp_path: Path) -> None:
    assert "no slide was named" in one_error(doctor("--preflight"))
    assert "--preflight alone" in one_error(doctor("a.svs"))
