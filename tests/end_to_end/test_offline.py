"""docs/offline.md runs as printed: a wheelhouse is made with a network, and installed from without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs/offline.md").read_text(encoding="utf-8")
STEPS = dict(re.findall(r"<!-- run: (with a network|without one) -->\n```sh\n(.*?)```", TEXT, re.DOTALL))
NOWHERE = "http://127.0.0.1:9"  # the port "discard", where nobody listens
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def without_a_network() -> tuple[list[str], dict[str, str]]:
    """What a command is begun with so that it reaches no network: a namespace of its own, or proxies to nowhere."""
    closed = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and subprocess.run([*closed, "true"], capture_output=True, check=False).returncode == 0:
        return closed, {}
    proxies = {name: NOWHERE for one in ("http_proxy", "https_proxy", "all_proxy") for name in (one, one.upper())}
    return [], {**proxies, "no_proxy": "", "NO_PROXY": ""}


def run(
    code: str, folder: Path, before: tuple[list[str], dict[str, str]] = ([], {})
) -> subprocess.CompletedProcess[str]:
    command, environment = before
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL_ENV"))}
    own |= environment | {"PIP_NO_COMPILE": "1"}  # what is not run need not be compiled
    return subprocess.run(
        [*command, "bash", "-euc", code], cwd=folder, env=own, capture_output=True, text=True, check=False
    )


def test_a_wheelhouse_installs_and_works_without_a_network(tmp_path: Path) -> None:
    assert list(STEPS) == ["with a network", "without one"]
    made = tmp_path / "online"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(made)], check=True)
    online = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # how pip gets out here
    # The test's own environment may have no pip; a user's has.
    own = sys.executable if importlib.util.find_spec("pip") else sys._base_executable  # type: ignore[attr-defined]
    tool = f"{own} -m pip"
    assert "python3 -m pip" in STEPS["with a network"]
    result = run(STEPS["with a network"].replace("python3 -m pip", f"{tool} -q"), made, ([], online))
    if result.returncode and not os.environ.get("CI"):
        pytest.skip(f"needs a network once, to make the wheelhouse: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    target = tmp_path / "hospital"
    target.mkdir()
    (made / "wheelhouse").rename(target / "wheelhouse")
    closed = without_a_network()
    reached = "import urllib.request; urllib.request.urlopen('http://example.org', timeout=5)"
    assert run(f"{sys.executable} -c {json.dumps(reached)}", target, closed).returncode, "the network is not closed"
    result = run(STEPS["without one"].replace("python3 -m venv", f"{sys._base_executable} -m venv"), target, closed)  # type: ignore[attr-defined]
    assert result.returncode == 0, result.stdout + result.stderr
    assert "self-test       openvino" in result.stdout
    assert "self-test       onnxruntime" in result.stdout


# The pack


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_wheel(folder: Path, name: str, needs: str = "") -> None:
    """A wheel with nothing in it but its name, and what it needs."""
    facts = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "x = 1\n" * 100)
        require = f"Requires-Dist: {needs}\n" if needs else ""
        wheel.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{require}")
        wheel.writestr(
            f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{facts}/RECORD", f"{name}.py,,\n{facts}/METADATA,,\n{facts}/WHEEL,,\n{facts}/RECORD,,\n")


def test_what_has_no_wheel_is_built_with_what_it_names_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = script("gpu_pack")

    def download(requirement: list[str], wheels: Path, python: str, deps: bool) -> str:
        if requirement == ["libs"]:
            write_wheel(wheels, "libs")
            return ""
        return f"No matching distribution found for {requirement[0]}"

    def build(requirement: str, wheels: Path, python: str) -> Path | None:
        if requirement not in ("names", "half"):
            return None
        write_wheel(wheels, requirement, needs="libs" if requirement == "names" else "absent")
        return wheels / f"{requirement}-1.0-py3-none-any.whl"

    monkeypatch.setattr(pack, "download", download)
    monkeypatch.setattr(pack, "build", build)
    assert pack.fetch("names", tmp_path, HERE, True) == []
    assert {wheel.name.split("-")[0] for wheel in tmp_path.glob("*.whl")} == {"names", "libs"}
    lacks = ["absent is left out: No matching distribution found for absent"]
    assert pack.fetch("half", tmp_path, HERE, True) == pack.fetch("absent", tmp_path, HERE, True) == lacks


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys._base_executable, "-m", "venv", str(folder)], check=True)  # type: ignore[attr-defined]
    return folder / "bin" / "python"


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack of two wheels in pieces of 700 bytes; one of them needs what is not in it."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "first")
    write_wheel(wheels, "second", needs="torch")
    return write_pack(tmp_path, wheels)


def write_pack(tmp_path: Path, wheels: Path, **facts: Any) -> Path:
    lacks = ["tensorrt>=11 is left out: No matching distribution found"]
    stated = {"python": HERE, "install": ["first"], "install_alone": ["second"], "lacks": lacks, **facts}
    count = script("gpu_pack").write_pack(wheels, tmp_path / "pack", 700, stated)
    assert count == len(list((tmp_path / "pack").glob("pack.*"))) > 3
    return tmp_path / "pack"


def install(environment: Path, pack: Path) -> subprocess.CompletedProcess[str]:
    return run(f"{environment} {pack / 'install.py'}", pack, without_a_network())


def test_a_pack_installs_without_a_network_and_says_what_it_lacks(environment: Path, pack: Path) -> None:
    result = install(environment, pack)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "installed: first, second",
        "tensorrt>=11 is left out: No matching distribution found",
    ]
    assert run(f"{environment} -c 'import first, second'", pack).returncode == 0


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_piece_that_did_not_arrive_is_named(environment: Path, pack: Path, damage: str) -> None:
    piece = pack / "pack.002"
    content = piece.read_bytes()
    piece.unlink()
    if damage == "cut":
        piece.write_bytes(content[:-1])
    line = refusal(install(environment, pack))
    assert f"{piece}: this piece is {'missing' if damage == 'missing' else 'damaged'}" in line
    assert line.endswith("Copy it again.")


def test_another_python_and_a_pack_without_its_list_are_refused(environment: Path, pack: Path) -> None:
    manifest = json.loads((pack / "manifest.json").read_text())
    (pack / "manifest.json").write_text(json.dumps({**manifest, "python": "3.99"}))
    assert f"this pack is for Python 3.99, this is {HERE}" in refusal(install(environment, pack))
    (pack / "manifest.json").write_text("{")
    assert "manifest.json: cannot be read" in refusal(install(environment, pack))


def test_a_wheel_that_is_missing_is_named(environment: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "third", needs="absent-thing")
    pack = write_pack(tmp_path, wheels, install=["third"], install_alone=[])
    line = refusal(install(environment, pack))
    assert "a wheel is missing in the pack: No matching distribution found for absent-thing" in line
    assert line.endswith("Make it again with gpu_pack.py for this machine.")
