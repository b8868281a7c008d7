"""--shard slurm: the part of a task of a job array, and a line where this is none."""

from __future__ import annotations

import pytest

from mtdp_runtime.commands.options import part_of
from mtdp_runtime.errors import UsageError


def array(monkeypatch: pytest.MonkeyPatch, task: object, count: object, first: object, last: object) -> None:
    for name, value in (("ID", task), ("COUNT", count), ("MIN", first), ("MAX", last)):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize("first", [0, 1, 7])
def test_each_task_of_an_array_has_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    parts = []
    for task in range(first, first + 4):
        array(monkeypatch, task, 4, first, first + 3)
        parts.append(part_of("slurm"))
    assert parts == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_outside_an_array_the_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    array(monkeypatch, 3, None, 1, 8)
    with pytest.raises(UsageError, match=r"^--shard slurm: SLURM_ARRAY_TASK_COUNT not set$") as refused:
        part_of("slurm")
    assert "sbatch -a 1-8" in refused.value.hint


@pytest.mark.parametrize("count", ["-1", "4 ", "0x4", "٤", "9" * 5000, ""])
def test_what_is_no_number_is_shown(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    array(monkeypatch, 1, count, 1, 8)
    with pytest.raises(UsageError) as refused:
        part_of("slurm")
    assert str(refused.value) == f"--shard slurm: SLURM_ARRAY_TASK_COUNT is {count!r}"
    with pytest.raises(UsageError, match="must be slurm, or I/N"):
        part_of(f"1/{count}")


@pytest.mark.parametrize("tasks", [(1, 3, 5, 7), (3, 7), (0, 1, 2, 4)])  # -a 1-8:2; two of an array again; a list
def test_no_task_of_an_array_with_gaps_does_a_part(monkeypatch: pytest.MonkeyPatch, tasks: tuple[int, ...]) -> None:
    for task in tasks:
        array(monkeypatch, task, len(tasks), tasks[0], tasks[-1])
        with pytest.raises(UsageError, match="the array has gaps"):
            part_of("slurm")
