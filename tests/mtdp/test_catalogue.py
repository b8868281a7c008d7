"""The catalogue equals the paper's totals, and the documents and commands equal the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mtdp.catalogue import catalogue, catalogue_task, markdown
from mtdp.cli import app
from mtdp.converters.convert import CONVERTERS
from mtdp.errors import UsageError
from mtdp.multitask import is_head_name

DOCS = Path(__file__).parents[2] / "docs"


def test_the_sums_are_the_papers() -> None:
    tasks = catalogue()
    assert (len(tasks), sum(task.classes for task in tasks), sum(task.images for task in tasks)) == (22, 81, 882_800)
    splits = [sum(getattr(task, split) for task in tasks) for split in ("train", "val", "test")]
    assert splits == [663_918, 104_363, 114_519]


@pytest.mark.parametrize("task", catalogue(), ids=lambda task: task.name)
def test_the_splits_of_a_task_sum_to_its_images(task: object) -> None:
    entry = catalogue_task(task.name)  # type: ignore[attr-defined]
    assert entry.train + entry.val + entry.test == entry.images
    assert is_head_name(entry.name)
    assert not entry.class_names or len(set(entry.class_names)) == entry.classes


def test_thirteen_tasks_are_public_and_have_a_converter_the_others_neither() -> None:
    public = {task.name for task in catalogue() if task.public}
    assert public == set(CONVERTERS)
    assert sum(task.images for task in catalogue() if task.public) == 790_621
    assert sum(task.images for task in catalogue() if not task.public) == 92_179
    assert all(bool(task.source) == task.public for task in catalogue())


def test_tasks_left_out_together_name_each_other() -> None:
    pairs = {(task.name, other) for task in catalogue() for other in task.leave_out_with}
    assert pairs == {(other, name) for name, other in pairs}
    assert {name for name, _ in pairs} == {"ulg_breast", "ulg_breast2", "cells_no_aug", "patterns_no_aug"}


def test_where_the_paper_contradicts_itself_the_note_says_so() -> None:
    noted = {task.name: task.note for task in catalogue() if task.note}
    assert "9 classes" in noted["ulg_bonemarrow"]
    assert "2922216" in noted["camelyon16"]
    assert "exchanges the full names" in noted["ulg_breast"]
    assert noted["ulg_breast"] == noted["ulg_breast2"]


def test_an_unknown_task_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="no task 'mitos2012'"):
        catalogue_task("mitos2012")


def test_the_page_equals_the_data() -> None:
    """To renew it: python -c "from mtdp.catalogue import markdown; print(markdown(), end='')" between the marks."""
    page = (DOCS / "catalogue.md").read_text("utf-8")
    begin, end = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
    assert page[page.index(begin) + len(begin) : page.index(end)] == markdown()


def test_the_command_lists_the_tasks() -> None:
    result = CliRunner().invoke(app, ["tasks"])
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines)) == (0, 24)
    assert lines[0].split()[:5] == ["task", "organ", "stain", "annotation", "classes"]
    assert lines[12].split()[-4:] == ["5000", "3349/-/1651", "patient", "public"]
    assert lines[-1].split() == ["22", "tasks", "81", "882800", "663918/104363/114519", "13", "public"]


def test_the_command_gives_json() -> None:
    entries = json.loads(CliRunner().invoke(app, ["tasks", "--json"]).stdout)
    assert len(entries) == 22
    kather = next(entry for entry in entries if entry["name"] == "umcm_colorectal")
    assert (kather["val"], kather["licence"], kather["doi"]) == (0, "CC BY 4.0", "10.1038/srep27988")
    assert kather["class_names"][:2] == ["adipose", "complex"]
