"""Tasks and pools: what is read, and what is refused before training."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mtdp.errors import ImageUnreadable, MtdpError, TaskError, UsageError
from mtdp.tasks import group_of, load_pool, load_task

Make = Callable[..., Path]  # writes files, returns where


def manifest_of(folder: Path, path: Path) -> Path:
    """The same task as a manifest."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        for image in sorted(folder.rglob("*.png")):
            row = [
                str(image.relative_to(path.parent)),
                image.parent.name,
                group_of(image.name),
                image.parent.parent.name,
            ]
            writer.writerow(row)
    return path


def test_a_folder_gives_classes_splits_and_groups(tmp_path: Path, make_task: Make) -> None:
    task = load_task(make_task(tmp_path / "colour", ("red", "blue"), per_class=4))
    assert (task.name, task.classes, task.metric) == ("colour", ("blue", "red"), "roc_auc")
    assert {split: len(samples) for split, samples in task.samples.items()} == {"train": 8, "val": 8, "test": 8}
    assert {sample.group for sample in task.of(["val"])} == {"val0", "val1"}
    assert [sample.label for sample in task.of(["train"])] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert task.of(["val", "train"]) == task.samples["train"] + task.samples["val"]


def test_a_manifest_gives_the_same_task_as_its_folder(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    by_manifest = load_task(manifest_of(folder, tmp_path / "list.csv"), name="colour")
    by_folder = load_task(folder)
    assert by_manifest.samples == by_folder.samples
    assert by_manifest.classes == by_folder.classes


def test_a_parquet_manifest_gives_the_same_task_too(tmp_path: Path, make_task: Make) -> None:
    arrow_csv = pytest.importorskip("pyarrow.csv", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    folder = make_task(tmp_path / "colour")
    table = arrow_csv.read_csv(manifest_of(folder, tmp_path / "list.csv"))
    parquet.write_table(table, tmp_path / "list.parquet")
    assert load_task(tmp_path / "list.parquet", name="colour").samples == load_task(folder).samples


def test_metric_auto_is_accuracy_for_three_classes(tmp_path: Path, make_task: Make) -> None:
    assert load_task(make_task(tmp_path / "t", ("blue", "green", "red"))).metric == "accuracy"


def test_a_task_without_val_is_a_task(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "t")
    for image in (folder / "val").rglob("*.png"):
        image.unlink()
    for label in ("blue", "red"):
        (folder / "val" / label).rmdir()
    assert load_task(folder).samples["val"] == ()


def refused(path: Path, kind: type[MtdpError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load_task(path)
    for word in words:
        assert word in caught.value.message
    assert caught.value.exit_code == (2 if kind is UsageError else 1)


def test_an_empty_class_is_refused(tmp_path: Path, make_task: Make) -> None:
    empty = make_task(tmp_path / "t") / "val" / "green"
    empty.mkdir()
    refused(tmp_path / "t", TaskError, str(empty), "empty")


def test_a_class_that_is_missing_in_a_split_is_refused(tmp_path: Path, make_task: Make, write_image: Make) -> None:
    folder = make_task(tmp_path / "t")
    write_image(folder / "train" / "green" / "train9_x.png")
    refused(folder, TaskError, str(folder), "'green'", "val")


def test_a_group_in_two_splits_is_refused_across_classes(tmp_path: Path, make_task: Make, write_image: Make) -> None:
    folder = make_task(tmp_path / "t")
    stray = write_image(folder / "test" / "red" / "train0_again.png")
    refused(folder, TaskError, "'train0'", str(stray))


def test_an_unreadable_image_is_refused(tmp_path: Path, make_task: Make) -> None:
    bad = make_task(tmp_path / "t") / "train" / "red" / "train0_bad.png"
    bad.write_text("not an image")
    refused(tmp_path / "t", ImageUnreadable, str(bad))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_a_truncated_image_with_a_sound_header_is_refused(
    tmp_path: Path, make_task: Make, write_image: Make, suffix: str
) -> None:
    bad = write_image(make_task(tmp_path / "t") / "val" / "red" / f"val0_cut{suffix}", 64, 64)
    whole = bad.read_bytes()
    load_task(tmp_path / "t")
    bad.write_bytes(whole[: len(whole) * 2 // 3])
    with Image.open(bad) as image:
        assert image.size == (64, 64)  # the header alone says nothing
    refused(tmp_path / "t", ImageUnreadable, str(bad), "cannot be decoded")


def test_a_split_by_another_name_is_refused_not_overlooked(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "t")
    (folder / "val").rename(folder / "valid")
    refused(folder, TaskError, str(folder / "valid"))


def test_a_manifest_that_names_a_missing_file_is_refused(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "t")
    path = manifest_of(folder, tmp_path / "list.csv")
    gone = sorted(folder.rglob("*.png"))[0]
    gone.unlink()
    refused(path, ImageUnreadable, str(gone))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("path,label\na.png,x\n", "columns"),
        ("path,label,group,split\na.png,x,g,training\n", "line 2: split 'training'"),
        ("path,label,group,split\na.png,x,,train\n", "line 2 has no group"),
        ("path,label,group,split\na.png,x,g,train\na.png,y,g,train\n", "line 3 lists a.png again, after line 2"),
        ("path,label,group,split\n", "lists no image"),
    ],
)
def test_a_faulty_manifest_is_refused_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text, "utf-8")
    refused(path, TaskError, str(path), word)


def test_no_such_task_is_wrong_usage(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", UsageError, "nowhere")


def test_one_class_is_no_task(tmp_path: Path, make_task: Make) -> None:
    refused(make_task(tmp_path / "t", ("red",)), TaskError, "1 class")


def test_a_pool_lists_its_tasks(pool_file: Path) -> None:
    two, three = load_pool(pool_file)
    assert (two.name, two.ships, three.name, three.ships) == ("two", True, "three", False)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[[task]]\nname = "two"\npath = "two"\n[[task]]\nname = "two"\npath = "three"\n', "two tasks are named 'two'"),
        ('[[task]]\nname = "two"\n', "task 1 has no path"),
        ('[[task]]\nname = "two"\npath = "two"\nmetrics = "auto"\n', "unknown key 'metrics'"),
        ('[[task]]\nname = "two"\npath = "two"\nleave_out_with = ["x"]\n', "'x', which is not in the pool"),
        ('[[task]]\nname = "two"\npath = "two"\nleave_out_with = "x"\n', "leave_out_with must be a list"),
        ('[[task]]\nname = "two"\npath = "two"\nships = "yes"\n', "ships must be true or false"),
        ('[[task]]\nname = "two"\npath = "two"\nmetric = "auc"\n', "metric 'auc'"),
        ('[[task]]\nname = "a b"\npath = "two"\n', "'a b' cannot be the name"),
        ("task = 3\n", "lists no task"),
        ("[[task]\n", "not a TOML file"),
        ("", "lists no task"),
    ],
)
def test_a_faulty_pool_is_refused(pool_file: Path, text: str, word: str) -> None:
    pool_file.write_text(text, "utf-8")
    with pytest.raises(TaskError) as caught:
        load_pool(pool_file)
    assert word in caught.value.message
    assert str(pool_file.parent) in caught.value.message


def test_the_digest_of_a_task_follows_its_files(tmp_path: Path, make_task: Make, write_image: Make) -> None:
    folder = make_task(tmp_path / "t")
    before = load_task(folder).summary(("train",))
    assert before["images"] == 8
    assert load_task(folder).summary(("train",)) == before
    write_image(folder / "train" / "red" / "train0_more.png")
    assert load_task(folder).summary(("train",))["files_sha256"] != before["files_sha256"]


def test_the_real_pool_is_sound(data_dir: Path) -> None:
    tasks = {task.name: task for task in load_pool(data_dir / "tasks" / "pool.toml")}
    assert len(tasks) == 13
    assert {split: len(samples) for split, samples in tasks["lung"].samples.items()} == {
        "train": 1092,
        "val": 366,
        "test": 357,
    }
    assert tasks["lung"].classes == ("lung_aca", "lung_n", "lung_scc")
    assert tasks["wbc_type"].leave_out_with == {"blood_object"}
    assert len({sample.group for sample in tasks["breast_idc2"].of(["train"])}) == 160
