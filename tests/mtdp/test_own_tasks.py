"""`mtdp-train split` and `mtdp-train pool`: tasks and pools of one's own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mtdp.cli import app
from mtdp.errors import MtdpError, TaskError, UsageError
from mtdp.own_tasks import split_classes, write_pool
from mtdp.tasks import load_pool, load_task

Make = Callable[..., Path]


@pytest.fixture
def classes(tmp_path: Path, write_image: Make) -> Path:
    """Two classes of 10 patients with 2 images each; patients p0 to p4 hold both classes."""
    for number, label in enumerate(("red", "blue")):
        for patient in range(10):
            for image in range(2):
                name = f"p{patient + 5 * number}_{image}.jpg"
                write_image(tmp_path / "in" / label / name, 40, 40, seed=1000 * number + 10 * patient + image)
    return tmp_path / "in"


def test_whole_groups_stay_in_one_split_and_every_class_is_in_each(classes: Path, tmp_path: Path) -> None:
    summary = split_classes(classes, tmp_path / "task", (60, 20, 20), seed=1)
    task = load_task(tmp_path / "task")
    assert {split: sum(found.values()) for split, found in summary.images.items()} == {
        split: len(samples) for split, samples in task.samples.items()
    }
    assert sum(len(samples) for samples in task.samples.values()) == 40
    assert 20 <= len(task.samples["train"]) <= 28
    homes: dict[str, set[str]] = {}
    for split, samples in task.samples.items():
        assert {sample.label for sample in samples} == {0, 1}
        for sample in samples:
            homes.setdefault(sample.group, set()).add(split)
            assert sample.path.name.startswith(f"{sample.group}_")
    assert len(homes) == 15
    assert all(len(found) == 1 for found in homes.values())
    split_classes(classes, tmp_path / "again", (60, 20, 20), seed=1)
    assert {s.path.name for s in load_task(tmp_path / "again").samples["test"]} == {
        s.path.name for s in task.samples["test"]
    }


def test_each_image_may_be_a_group_and_the_seed_decides_which_split_it_is_in(classes: Path, tmp_path: Path) -> None:
    of_test = set()
    for seed in (1, 1, 2):
        out = tmp_path / f"task{len(list(tmp_path.iterdir()))}"
        summary = split_classes(classes, out, each_image=True, seed=seed)
        assert sum(summary.groups.values()) == 40, "as many as images"
        of_test.add(frozenset(path.name for path in (out / "test").rglob("*.jpg")))
    assert len(of_test) == 2


def test_groups_may_come_from_a_list(classes: Path, tmp_path: Path) -> None:
    """Patients p0 and p1 are one person."""
    lines = ["image,group"]
    for image in sorted(classes.rglob("*.jpg")):
        group = image.name.split("_")[0]
        lines.append(f"{image.relative_to(classes)},{'x 1' if group in ('p0', 'p1') else group}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    split_classes(classes, tmp_path / "task", groups=tmp_path / "groups.csv")
    task = load_task(tmp_path / "task")
    homes = {split for split, samples in task.samples.items() for s in samples if s.group == "x-1"}
    assert len(homes) == 1
    assert sum(s.group == "x-1" for s in task.of(("train", "val", "test"))) == 4
    other = "\n".join(["Image;Group", *("./" + line.replace(",", ";") for line in lines[1:])])
    (tmp_path / "groups.csv").write_text(other, "utf-16")
    split_classes(classes, tmp_path / "again", groups=tmp_path / "groups.csv")
    assert load_task(tmp_path / "again").classes == task.classes
    (tmp_path / "groups.csv").write_text("\n".join([*lines, lines[1].split(",")[0] + ",another"]))
    with pytest.raises(TaskError, match=r"line 42 puts blue/p10_0\.jpg into group 'another', one before it into 'p10'"):
        split_classes(classes, tmp_path / "other", groups=tmp_path / "groups.csv")
    (tmp_path / "groups.csv").write_text("\n".join(lines[:-2]))
    with pytest.raises(TaskError, match="2 problems"):
        split_classes(classes, tmp_path / "other", groups=tmp_path / "groups.csv")


def test_an_image_that_is_in_two_groups_leaves_no_task(classes: Path, tmp_path: Path) -> None:
    for patient in range(10):  # the same picture under many patients: in one split or another it must turn up
        (classes / "red" / f"q{patient}_copy.jpg").write_bytes((classes / "red" / "p0_0.jpg").read_bytes())
    with pytest.raises(TaskError, match="are the same image in two splits"):
        split_classes(classes, tmp_path / "task")
    assert not (tmp_path / "task").exists()
    assert not (tmp_path / "task.partial").exists()


def test_what_cannot_be_split_is_said(classes: Path, tmp_path: Path, write_image: Make) -> None:
    cases: list[tuple[dict[str, object], type[MtdpError], str]] = [
        ({"source": tmp_path / "nowhere"}, UsageError, "no folder"),
        ({"out": classes}, UsageError, "is there already"),
        ({"out": classes / "task"}, UsageError, "would be one of the classes"),
        ({"shares": (0, 50, 50)}, UsageError, "train above 0"),
        ({"shares": (1, 1)}, UsageError, "three numbers|shares"),
    ]
    for change, kind, words in cases:
        with pytest.raises(kind) as caught:
            split_classes(**{"source": classes, "out": tmp_path / "t", **change})  # type: ignore[arg-type]
        assert any(word in f"{caught.value.message} {caught.value.hint}" for word in words.split("|"))
    (classes / "notes.txt").touch()
    write_image(classes / "p98_0.png")
    (classes / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TaskError, match="2 problems") as told:
        split_classes(classes, tmp_path / "t")
    assert f"{classes / 'p98_0.png'} is in no class" in told.value.message
    for stray in ("p98_0.png", "gone.txt"):
        (classes / stray).unlink()
    write_image(classes / "green" / "p99_0.png")
    with pytest.raises(TaskError, match="class 'green' is in 1 group only"):
        split_classes(classes, tmp_path / "t")


def test_the_command_says_what_it_made(classes: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["split", str(classes), "--out", str(tmp_path / "task"), "--shares", "70,0,30"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:-1]] == ["train", "test"]
    assert result.stdout.splitlines()[-1] == str(tmp_path / "task")
    assert CliRunner().invoke(app, ["split", str(classes), "--out", "x", "--shares", "a"]).exit_code == 2


def test_a_pool_file_lists_the_tasks_of_a_folder_and_relates_those_that_share_images(
    tmp_path: Path, make_task: Make, write_image: Make
) -> None:
    folder = tmp_path / "tasks"
    make_task(folder / "one", ("blue", "red"))
    make_task(folder / "two", ("blue", "green"))  # its blue images are those of `one`
    for split in ("train", "val", "test"):
        for label in ("a", "b"):
            write_image(folder / "breakhis" / split / label / f"{split}0_x.png", seed=len(split) * 10 + ord(label))
            write_image(
                folder / "breakhis_binary" / split / label / f"{split}0_y.png", seed=5000 + len(split) * 10 + ord(label)
            )
    (folder / "notes.csv").write_text("x,y\n")
    (folder / "pictures").mkdir()
    path, found = write_pool(folder)
    assert [task.name for task in found] == ["breakhis", "breakhis_binary", "one", "two"]
    tasks = {task.name: task for task in load_pool(path)}
    assert tasks["one"].leave_out_with == {"two"}
    assert tasks["two"].leave_out_with == {"one"}
    assert tasks["breakhis"].leave_out_with == {"breakhis_binary"}
    entries = tomllib.loads(path.read_text())["task"]
    assert all(entry["ships"] is False for entry in entries)
    with pytest.raises(UsageError, match="is there already"):
        write_pool(folder)
    result = CliRunner().invoke(app, ["pool", str(folder), "--out", str(tmp_path / "other.toml")])
    assert result.exit_code == 0, result.output
    assert len(load_pool(tmp_path / "other.toml")) == 4


def test_a_folder_without_tasks_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no task"):
        write_pool(tmp_path)
