"""The commands of docs/scale.md run as printed, where one machine can: a bucket is one on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from buckets import a_bucket
from mtdp_runtime.commands.demo_slide import write_demo_slide
from printed import DOCS, give, steps_of

STEPS = steps_of("scale.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small slides in a folder and in a bucket, a list of the latter, and the project's benchmarks."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "slides").mkdir()
    write_demo_slide(folder / "slides" / "slide.tiff", 700, 500)
    (folder / "slides.csv").write_text("slide\ns3://bucket/more/listed.tiff\n")
    (folder / "benchmarks").symlink_to(DOCS.parent / "benchmarks")
    with a_bucket("bucket") as gate:
        for key in ("slides/one.tiff", "more/listed.tiff"):
            content = (folder / "slides" / "slide.tiff").read_bytes()
            gate.client.put_object(Bucket="bucket", Key=key, Body=content)
        yield folder


def test_every_command_that_can_run_here_is_marked() -> None:
    assert len(STEPS) == 5


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_step_runs_as_printed(folder: Path, number: int) -> None:
    _, language, code = STEPS[number]
    said = give(language, code, folder)
    table = (DOCS / "scale.md").read_text(encoding="utf-8")
    for line in said.splitlines():
        if code.startswith("python benchmarks/scale.py"):
            assert line in table, "the page's table is what the command prints"
        elif "--calm" not in code and code.startswith("python benchmarks/simulate.py") and line.startswith("{"):
            row = json.loads(line)
            assert f"| {row['hours']} | {row['efficiency']} | {row['lost_workers']} | {row['failed']} |" in table
