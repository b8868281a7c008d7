"""mtdp-view as a person starts it: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import warm
from mtdp_runtime import extract
from support import one_error, pyramid, stained, write_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = "from mtdp_runtime.commands.view import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides, and features of the first."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "slides").mkdir()
    for name in "ab":
        pyramid(stained(448, 640), folder / "slides" / f"{name}.tiff", 0.5)
    bundle = write_tiny_bundle(folder / "tiny")
    extract(folder / "slides" / "a.tiff", folder / "features", model=bundle, backend="onnxruntime", threads=1)
    return folder


def view(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm.run(CODE, *arguments, env=os.environ | environment)


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[tuple[warm.Process | subprocess.Popen[str], str, str]]:
    """The running command, what it printed, and the address."""
    process = warm.start(CODE, *arguments, env=os.environ | environment)
    assert process.stdout is not None
    said = ""
    while not said.splitlines()[-1:] or not said.splitlines()[-1].startswith("http"):
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    try:
        yield process, said, said.splitlines()[-1]
    finally:
        process.kill()
        process.communicate()


def names(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}api/session", timeout=20) as answer:
        return [slide["name"] for slide in json.load(answer)["slides"]]


def test_it_serves_on_this_machine_alone_and_ctrl_c_ends_it(folder: Path) -> None:
    with started(folder / "features") as (process, said, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", address)
        assert "Ctrl+C" in said
        assert names(address) == ["a"]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.replace(address.split("/")[3], "wrong"), timeout=20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert out.strip() == "closed"
        assert err == ""


def test_a_folder_of_slides_and_features_of_some(folder: Path) -> None:
    with started(folder / "slides", "--features", folder / "features", "--no-browser") as (_, said, address):
        assert said.startswith("2 slides")
        assert names(address) == ["a", "b"]
        for number, has in enumerate([True, False]):
            with urllib.request.urlopen(f"{address}api/slides/{number}", timeout=20) as answer:
                assert ("features" in json.load(answer)) == has


def test_over_ssh_it_prints_the_line_of_the_tunnel(folder: Path) -> None:
    ssh = {"SSH_CONNECTION": "10.0.0.1 5555 192.0.2.7 2222", "USER": "anna", "LOGNAME": "anna"}
    with started(folder / "slides/a.tiff", **ssh) as (_, said, address):
        port = address.split(":")[2].split("/")[0]
        assert f"ssh -N -L {port}:127.0.0.1:{port} -p 2222 anna@192.0.2.7" in said


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = view(folder / "slides/a.tiff", "--port", taken.getsockname()[1])
    assert result.returncode == 2
    assert "--port" in one_error(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to look at was named"),
        (["missing.svs"], "missing.svs: does not exist"),
        (["slides/a.tiff", "--scores", "missing.csv"], "missing.csv: does not exist"),
        (["slides/a.tiff", "--features", "missing"], "missing: does not exist"),
        (["tiny"], "tiny: no slides in this folder"),
        (["--report", "missing"], "missing: no such folder"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    result = view(*arguments)
    assert result.returncode == 2
    assert said in one_error(result)


def test_without_its_libraries_it_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError('no', name='starlette')")
    result = view(folder / "slides/a.tiff", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "mtdp-view needs starlette, which is not installed" in one_error(result)
    assert "pip install 'mtdp[view]'" in result.stderr


def test_the_page_of_a_run_is_made_anew(folder: Path) -> None:
    page = folder / "features/report/index.html"
    page.unlink(missing_ok=True)
    result = view(folder / "features", "--report")
    assert (result.returncode, result.stdout.strip()) == (0, str(page))
    assert json.loads(view(folder / "features", "--report", "--json").stdout) == {"reports": [str(page)]}
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_wheel_has_all_that_the_page_needs(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        wheel = hatchling.build_wheel(str(tmp_path))
    finally:
        os.chdir(here)
    packed = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    static = ROOT / "runtime/mtdp_runtime/view/static"
    wanted = {f"mtdp_runtime/view/static/{path.relative_to(static)}" for path in static.rglob("*") if path.is_file()}
    assert len(wanted) > 15
    assert wanted <= packed
    assert any("openseadragon" in name and "LICENSE" in name for name in packed)
    assert not [name for name in packed if "axe" in name]
