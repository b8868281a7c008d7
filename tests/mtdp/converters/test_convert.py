"""What every conversion promises: determinism, no half task, and errors that name the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from converter_support import content, loaded, plain, write
from mtdp.catalogue import catalogue
from mtdp.cli import app
from mtdp.converters import convert
from mtdp.converters.convert import CONVERTERS
from mtdp.errors import MtdpError, TaskError, UsageError


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """The smallest: invasive ductal carcinoma, 9 patients of 4 images."""
    for patient in range(9):
        for label in (0, 1):
            for x in (1, 51):
                name = f"{100 + patient}_idx5_x{x}_y1_class{label}.png"
                plain(tmp_path / "in" / str(100 + patient) / str(label) / name, 50, 50, red=[(patient, x % 50)])
    return tmp_path / "in"


def test_the_same_seed_gives_the_same_bytes_wherever_the_download_lies(download: Path, tmp_path: Path) -> None:
    convert("janowczyk6", download, tmp_path / "a")
    download.rename(tmp_path / "elsewhere")
    convert("janowczyk6", tmp_path / "elsewhere", tmp_path / "b")
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    assert json.loads(first.pop("conversion.json")) | {"source": ""} == json.loads(second.pop("conversion.json")) | {
        "source": ""
    }
    assert first == second
    convert("janowczyk6", tmp_path / "elsewhere", tmp_path / "c", seed=1)
    assert set(content(tmp_path / "c")) != set(content(tmp_path / "b"))


def test_the_windows_around_objects_follow_the_seed(tmp_path: Path) -> None:
    for patient in ("01", "02", "03"):
        write(plain(tmp_path / "in" / f"{patient}_01.tif", 600, 600).with_suffix(".csv"), "300,300\n")
    names = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert("janowczyk5", tmp_path / "in", tmp_path / out, seed=seed)
        names.append({Path(path).name for path in content(tmp_path / out) if "/mitosis/" in path})
    assert len(names[0]) == 30
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_the_record_says_what_was_made_and_the_command_prints_it(download: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", "janowczyk6", str(download), "--out", str(out), "--seed", "3"])
    assert result.exit_code == 0
    record = json.loads((out / "conversion.json").read_text("utf-8"))
    task = loaded(out)
    assert (record["task"], record["seed"], record["paper_images"]["train"]) == ("janowczyk6", 3, 224_822)
    for split, samples in task.samples.items():
        assert sum(record["images"][split].values()) == len(samples)
        assert record["groups"][split] == len({sample.group for sample in samples})
    groups = record["groups"]["train"]
    half = record["images"]["train"]["idc"]
    assert result.stdout.splitlines() == [
        f"train: {2 * half} images of {groups} patients (idc {half}, non_idc {half}); paper: 224822",
        *result.stdout.splitlines()[1:3],
        str(out),
    ]
    assert result.stderr.splitlines()[-1] == "converting 36/36"


def test_what_is_there_already_is_never_touched(download: Path, tmp_path: Path) -> None:
    kept = write(tmp_path / "out" / "mine.txt", "x")
    with pytest.raises(UsageError, match=r"/out is there already"):
        convert("janowczyk6", download, tmp_path / "out")
    stranger = write(tmp_path / "other.partial" / "mine.txt", "x")
    with pytest.raises(UsageError, match=r"other\.partial is in the way"):
        convert("janowczyk6", download, tmp_path / "other")
    assert kept.read_text() == stranger.read_text() == "x"
    (tmp_path / "third.partial").mkdir()  # killed before the first file
    convert("janowczyk6", download, tmp_path / "third")
    assert not (tmp_path / "third.partial").exists()


def test_a_conversion_killed_half_way_leaves_no_task_and_the_next_one_makes_it(download: Path, tmp_path: Path) -> None:
    """As a process of its own, stopped after the first image is written and then killed."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    script = (
        "import sys, time; from pathlib import Path; from mtdp.converters import convert\n"
        "convert('janowczyk6', Path(sys.argv[1]), Path(sys.argv[2]), report=lambda done, total: time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(download), str(out)], cwd=Path(__file__).parents[3])
    deadline_s = time.monotonic() + 60
    while not list(partial.glob("*/*/*.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.is_dir()
    assert not out.exists()
    convert("janowczyk6", download, out)
    assert not partial.exists()
    assert len(loaded(out).of(["train", "val", "test"])) == 36


def test_data_that_lies_there_twice_is_refused(download: Path, tmp_path: Path) -> None:
    original = next(download.rglob("100_idx5_x1_y1_class0.png"))
    copy = plain(download / "copy" / "100" / "0" / original.name, 50, 50)
    with pytest.raises(TaskError) as caught:
        convert("janowczyk6", download, tmp_path / "out")
    assert str(original) in caught.value.message
    assert str(copy) in caught.value.message


def test_too_few_patients_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for patient in (1, 2):
        for label in (0, 1):
            plain(tmp_path / "in" / str(patient) / str(label) / f"{patient}_idx5_x1_y1_class{label}.png", 50, 50)
    with pytest.raises(TaskError, match=r"class 'idc' is in 2 groups only \(1, 2\)"):
        convert("janowczyk6", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_a_wrong_folder_is_refused_by_every_converter(name: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "holiday" / "notes.txt", "nothing")
    with pytest.raises(TaskError) as caught:
        convert(name, tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in") in caught.value.message
    assert "holiday/" in caught.value.hint + caught.value.message  # what is there
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", [task for task in catalogue() if not task.public], ids=lambda task: task.name)
def test_a_private_task_cannot_be_converted(task: object, tmp_path: Path) -> None:
    name = task.name  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=f"{name} .* was never published"):
        convert(name, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("janowczyk6", "nowhere"), "no folder nowhere"),
        (("mitos2012", "."), "no task 'mitos2012'"),
        (("ulg_breast", "."), "was never published"),
    ],
)
def test_wrong_usage_is_a_line_a_hint_and_exit_code_2(arguments: tuple[str, str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")


def test_a_disk_that_cannot_be_written_is_an_error_with_the_path(download: Path, tmp_path: Path) -> None:
    write(tmp_path / "file", "in the way")
    with pytest.raises(MtdpError) as caught:
        convert("janowczyk6", download, tmp_path / "file" / "out")
    assert str(tmp_path / "file") in caught.value.message
