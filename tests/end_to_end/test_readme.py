"""The README's commands: CI runs every one, in an environment that has only what its row installs (.ci/run)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- run: ([^\n]+) -->\n)?```sh\n(.*?)```", README, re.DOTALL)


def test_every_command_of_ours_stands_under_a_row_that_installs_it() -> None:
    marks = [mark for mark, code in BLOCKS if "mtdp-" in code]
    assert marks
    for mark in marks:
        assert mark.startswith("row "), mark
        assert f"pip install '.[{mark.removeprefix('row ')}]'" in README


def test_each_command_is_there() -> None:
    said = {line.split()[0] for _, code in BLOCKS for line in code.splitlines() if line.startswith("mtdp-")}
    assert said == {"mtdp-extract", "mtdp-bench", "mtdp-doctor", "mtdp-export", "mtdp-train", "mtdp-view"}


def test_the_test_command_is_marked_for_ci() -> None:
    assert [code.split()[-1] for mark, code in BLOCKS if mark == "test"] == ["pytest"]


def test_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 2
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 300_000, picture
