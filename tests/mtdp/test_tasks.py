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
    head, *lines = (tmp_path / "list.csv").read_text("utf-8").splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([head, *lines[::-1]]), "utf-8")
    assert load_task(tmp_path / "turned.csv").samples == by_folder.samples, "whatever the order of its lines"
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
    write_image(folder / "val" / "green" / "val9_x.png", seed=1)
    refused(folder, TaskError, str(folder), "'green'", "test")


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
        ("path,label,group,split,Label\na.png,x,g,train,y\n", "has the column label twice"),
        ("path,label,group,split\na\0.png,x,g,train\n", "line 2 has a path that no file can have"),
        (f"path,label,group,split\n{'a' * 300}.png,x,g,train\n", "line 2 has a path that no file can have"),
    ],
)
def test_a_faulty_manifest_is_refused_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text, "utf-8")
    refused(path, TaskError, str(path), word)


def test_every_entry_of_a_folder_is_accounted_for_and_all_that_is_wrong_named_at_once(
    tmp_path: Path, make_task: Make, write_image: Make
) -> None:
    folder = make_task(tmp_path / "t")
    write_image(folder / "train" / "red" / "more" / "train0_deep.png")
    (folder / "train" / "red" / "train0_gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "train" / "stray.csv").write_text("x")
    write_image(folder / "test" / "test0_no-class.png")
    write_image(folder / "test" / "red" / "_nobody.png")
    write_image(folder / "masks" / "m.png")
    write_image(folder / "beside.png")
    (folder / "Val").mkdir()
    with pytest.raises(TaskError) as caught:
        load_task(folder)
    for words in (
        "train/red/more is a folder inside a class",
        f"train/red/train0_gone.png is a link to {tmp_path / 'nowhere.png'}, which is not there",
        "train/stray.csv is in no class",
        "test/test0_no-class.png is in no class",
        "test/red/_nobody.png has no group before its first underscore",
        "masks would not be read",
        "beside.png would not be read",
        "Val would not be read: rename it to val",
    ):
        assert f"{folder}/{words}" in caught.value.message
    assert len(caught.value.message.splitlines()) == 9


def test_what_systems_and_archives_leave_behind_is_not_in_the_way(
    tmp_path: Path, make_task: Make, write_image: Make
) -> None:
    folder = make_task(tmp_path / "t")
    before = load_task(folder)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        for place in (folder, folder / "train", folder / "train" / "red"):
            (place / name).write_text("x")
    write_image(folder / "__MACOSX" / "train" / "red" / "._train0_red0.png")
    write_image(folder / "train" / "__MACOSX" / "x.png")
    for name in ("README.md", "LICENSE", "conversion.json", "labels.csv"):
        (folder / name).write_text("notes")
    assert load_task(folder) == before


def test_the_same_class_by_another_spelling_is_not_a_second_one(
    tmp_path: Path, make_task: Make, write_image: Make
) -> None:
    folder = make_task(tmp_path / "t", ("blue", "red"))
    write_image(folder / "train" / "red " / "train0_x.png", seed=99)
    refused(folder, TaskError, "are one class by name")
    other = make_task(tmp_path / "u", ("blue", "red"))
    (other / "train" / "red").rename(other / "train" / "e\u0301")
    for split in ("val", "test"):
        (other / split / "red").rename(other / split / "\u00e9")
    assert load_task(other).classes == ("blue", "\u00e9")


def test_the_same_image_in_two_splits_or_classes_is_found(
    tmp_path: Path, make_task: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_task(tmp_path / "t")
    one = folder / "train" / "red" / "train0_red0.png"
    (folder / "train" / "red" / "train7_copy.png").write_bytes(one.read_bytes())
    load_task(folder)
    said = capsys.readouterr().err
    assert f"images that equal one of another group: 1, for example {one} and" in said
    for place in ("test/red/test9_copy.png", "val/red/val9_copy.png", "train/blue/train8_copy.png"):
        with Image.open(one) as image:
            image.save(folder / place, compress_level=1)  # other bytes, the same pixels
    with pytest.raises(TaskError, match="4 problems") as caught:
        load_task(folder)
    for place in ("test/red/test9_copy.png (test)", "val/red/val9_copy.png (val)", "blue/train8_copy.png (blue)"):
        assert place in caught.value.message


def test_text_of_a_manifest_is_stripped_and_of_one_form(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    plain = manifest_of(folder, tmp_path / "list.csv").read_text("utf-8").splitlines()
    spaced = [plain[0].replace("group", " Group ")]
    for number, line in enumerate(plain[1:]):
        path, label, group, split = line.split(",")
        label = {"red": "e\u0301" if number % 2 else "\u00e9 "}.get(label, label)
        spaced.append(f"{path} , {label},{group} ,{split} ")
    (tmp_path / "spaced.csv").write_text("\n".join(spaced), "utf-8")
    task = load_task(tmp_path / "spaced.csv", name="colour")
    assert task.classes == ("blue", "\u00e9")
    assert {s.group for s in task.of(("train",))} == {"train0", "train1"}


def test_a_group_with_a_space_behind_it_does_not_pass_the_check_of_groups(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    path = manifest_of(folder, tmp_path / "list.csv")
    lines = path.read_text("utf-8").splitlines()
    lines = [line.replace(",val0,", ",train0 ,") for line in lines]
    path.write_text("\n".join(lines), "utf-8")
    refused(path, TaskError, "group 'train0' is in two splits")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_and_encodings_of_a_table(tmp_path: Path, make_task: Make, separator: str, encoding: str) -> None:
    folder = make_task(tmp_path / "colour")
    text = manifest_of(folder, tmp_path / "list.csv").read_text("utf-8").replace(",", separator)
    (tmp_path / "other.csv").write_bytes(text.encode(encoding))
    assert load_task(tmp_path / "other.csv", name="colour").samples == load_task(folder).samples


def test_a_table_in_another_encoding_is_refused_and_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes("path,label,group,split\na.png,\u00e9pith\u00e9lium,g,train\n".encode("cp1252"))
    with pytest.raises(TaskError, match="not a CSV file in UTF-8") as caught:
        load_task(path)
    assert "save it as UTF-8" in caught.value.hint


def test_all_faulty_lines_are_named_at_once_and_a_file_is_one_file_however_it_is_spelt(
    tmp_path: Path, make_task: Make
) -> None:
    folder = make_task(tmp_path / "colour")
    path = manifest_of(folder, tmp_path / "list.csv")
    first = path.read_text("utf-8").splitlines()[1].split(",")[0]
    (tmp_path / "link.png").symlink_to(tmp_path / first)
    more = ["link.png,red,x,train", "a.png,red,,train", "", "b.png,red,g,Validation", "c.png,red,g,train,9"]
    path.write_text(path.read_text("utf-8") + "\n".join(more), "utf-8")
    with pytest.raises(TaskError, match="line 30 has 5 cells, the header 4"):
        load_task(path)
    path.write_text(path.read_text("utf-8").removesuffix(",9").removesuffix("c.png,red,g,train"), "utf-8")
    with pytest.raises(TaskError, match="3 problems") as caught:
        load_task(path)
    for words in (
        "line 26 lists link.png again, after line 2",
        "line 27 has no group",
        "line 29: split 'Validation'",
    ):
        assert words in caught.value.message


def test_all_missing_files_of_a_manifest_are_named(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    path = manifest_of(folder, tmp_path / "list.csv")
    gone = sorted(folder.rglob("*.png"))[:3]
    for file in gone:
        file.unlink()
    refused(path, ImageUnreadable, *(f"{file} is not a readable image" for file in gone))


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("train/red,red,", "train/red,Red,"), "classes 'Red' and 'red' differ in case alone"),
        ((",red,", ',"re\nd",'), r"class 're\nd' holds a line break"),
        ((",val0,", ',"val\t0",'), r"group 'val\t0' holds a line break or another control character"),
    ],
)
def test_names_that_are_seldom_meant_are_refused(
    tmp_path: Path, make_task: Make, change: tuple[str, str], words: str
) -> None:
    folder = make_task(tmp_path / "colour")
    path = manifest_of(folder, tmp_path / "list.csv")
    text = path.read_text("utf-8")
    text = text.replace("red0.png,red,", "red0.png,Red,") if "Red" in change[1] else text.replace(*change)
    path.write_text(text, "utf-8")
    refused(path, TaskError, words)


def test_names_that_are_not_in_utf_8_are_refused_for_classes_and_taken_for_images(
    tmp_path: Path, make_task: Make, write_image: Make
) -> None:
    folder = make_task(tmp_path / "t")
    write_image(folder / "train" / "red" / "train0_\udcff.png", seed=77)
    assert len(load_task(folder).samples["train"]) == 9
    assert load_task(folder).summary(("train",))["images"] == 9
    for split in ("train", "val", "test"):
        (folder / split / "red").rename(folder / split / "r\udcffd")
    refused(folder, TaskError, r"class 'r\udcffd' is not in UTF-8")


def test_groups_that_differ_in_case_alone_are_told_where_they_are_in_two_splits(
    tmp_path: Path, make_task: Make, write_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_task(tmp_path / "t")
    write_image(folder / "val" / "red" / "VAL0_x.png", seed=78)
    load_task(folder)
    assert not capsys.readouterr().err
    write_image(folder / "test" / "red" / "TRAIN0_x.png", seed=79)
    load_task(folder)
    assert "group 'train0' is in train and 'TRAIN0' in test: are they one patient?" in capsys.readouterr().err


def test_what_the_system_refuses_is_an_error_of_the_task(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), TaskError, f"{tmp_path / ('x' * 300)}: File name too long")


def test_a_table_with_the_ends_of_lines_of_an_old_mac_is_read(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    text = manifest_of(folder, tmp_path / "list.csv").read_text("utf-8")
    (tmp_path / "other.csv").write_bytes(text.replace("\n", "\r").encode())
    assert load_task(tmp_path / "other.csv", name="colour").samples == load_task(folder).samples


def test_a_file_is_found_in_either_form_of_unicode_and_a_quoted_cell_behind_a_space(
    tmp_path: Path, make_task: Make
) -> None:
    folder = make_task(tmp_path / "colour")
    text = manifest_of(folder, tmp_path / "list.csv").read_text("utf-8").replace(",red,", ', "red, dark",')
    names = (
        ("train0_red0.png", "train0_e\u0301.png", "train0_\u00e9.png"),
        ("train0_red1.png", "\u00e9.png", "e\u0301.png"),
    )
    for name, on_disk, in_table in names:
        (folder / "train" / "red" / name).rename(folder / "train" / "red" / on_disk)
        text = text.replace(name, in_table)
    (tmp_path / "other.csv").write_text(text, "utf-8")
    task = load_task(tmp_path / "other.csv")
    assert (task.classes, len(task.samples["train"])) == (("blue", "red, dark"), 8)


def test_invisible_characters_around_text_are_no_part_of_it(tmp_path: Path, make_task: Make) -> None:
    folder = make_task(tmp_path / "colour")
    text = manifest_of(folder, tmp_path / "list.csv").read_text("utf-8")
    text = text.replace(",val0,", ",\u200btrain0\ufeff,")
    (tmp_path / "other.csv").write_text(f"\ufeff\ufeff{text}", "utf-8")
    refused(tmp_path / "other.csv", TaskError, "group 'train0' is in two splits")


def test_cells_of_parquet_may_be_bytes_and_not_a_number_is_no_label(tmp_path: Path, make_task: Make) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    folder = make_task(tmp_path / "colour", per_class=2)
    with manifest_of(folder, tmp_path / "list.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    as_bytes = columns | {"label": [text.encode() for text in columns["label"]]}
    parquet.write_table(pyarrow.table(as_bytes), tmp_path / "list.parquet")
    assert load_task(tmp_path / "list.parquet").classes == ("blue", "red")
    numbers = columns | {"label": [float("nan"), *map(float, range(1, len(rows)))]}
    parquet.write_table(pyarrow.table(numbers), tmp_path / "list.parquet")
    refused(tmp_path / "list.parquet", TaskError, "line 1 has no label")
