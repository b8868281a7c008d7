"""The wheel: with the averaging in C where there is a compiler, pure Python elsewhere; its features are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "mtdp_runtime/slide/libmtdp_average.so"
AVERAGE = """
import hashlib
import numpy as np
from mtdp_runtime.slide.compiled import described
from mtdp_runtime.slide.resample import resample_into
source = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
out = np.zeros((64, 64, 3), np.uint8)
resample_into(out, source, 2.035, 0.3, 0.7)
print(described().split(",")[0], hashlib.sha256(out).hexdigest(), sep="\\n")
"""
needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A wheel made from the source distribution, as pip makes one, and what the build said."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("sdist")
    sdist = build("sdist", ROOT, folder)[0]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tree = folder / sdist.name.removesuffix(".tar.gz")

    def make(compiler: str) -> tuple[Path, str]:
        return build("wheel", tree, tmp_path_factory.mktemp("wheel"), compiler)

    return make


def build(what: str, tree: Path, folder: Path, compiler: str = "") -> tuple[Path, str]:
    code = f"from hatchling import build; print(build.build_{what}({str(folder)!r}))"
    own = {name: value for name, value in os.environ.items() if name != "CC"} | ({"CC": compiler} if compiler else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=own, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1], done.stdout + done.stderr


def tag_and_files(wheel: Path) -> tuple[list[str], set[str]]:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (facts,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        lines = opened.read(facts).decode().splitlines()
    return [line for line in lines if line.startswith(("Tag", "Root"))], names


def averaged(wheel: Path, folder: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{AVERAGE}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


@needs_a_compiler
def test_a_wheel_is_for_its_platform_or_for_any_and_averages_to_the_same_bits(
    built: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    with_one, said = built("")
    assert "not compiled" not in said
    facts, names = tag_and_files(with_one)
    assert LIBRARY in names
    assert facts[0] == "Root-Is-Purelib: false"
    assert facts[1].startswith("Tag: py3-none-linux_"), "C without Python: one wheel for every version"
    assert with_one.stem.endswith(facts[1].removeprefix("Tag: "))

    without, said = built("/nonexistent/cc")
    assert "averaging is not compiled, and NumPy does it, more slowly: no C compiler (/nonexistent/cc)" in said
    facts, names = tag_and_files(without)
    assert LIBRARY not in names
    assert facts == ["Root-Is-Purelib: true", "Tag: py3-none-any"]

    compiled, by_numpy = averaged(with_one, tmp_path / "compiled"), averaged(without, tmp_path / "pure")
    assert (compiled[0], by_numpy[0]) == ("compiled", "by NumPy")
    assert compiled[1] == by_numpy[1]


def test_a_compiler_that_fails_leaves_a_pure_wheel_and_says_what_it_said(
    built: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho stdint.h: No such file >&2\nexit 1\n")
    compiler.chmod(0o755)
    wheel, said = built(str(compiler))
    assert "NumPy does it, more slowly: stdint.h: No such file" in said
    assert wheel.name.endswith("-py3-none-any.whl")
