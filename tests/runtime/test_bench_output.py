"""What mtdp-bench shows: bars as long as a tile takes, the bottleneck marked; two runs compared, or refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import warm
from mtdp_runtime.commands.bench_output import comparison, comparison_lines, lines
from mtdp_runtime.errors import UsageError
from support import one_error

RUN = {
    "slide": "demo-slide.tiff",
    "reader": "tiled-tiff",
    "tiles": 269,
    "scale": 1.0,
    "model": "r50",
    "threads": 2,
    "repeats": 3,
    "file_cache": "warm",
    "engine": "openvino 2026.4.1",
    "precision": "bf16",
    "batch": 16,
    "read_tiles_per_s": 3000.0,
    "infer_tiles_per_s": 125.0,
    "extract_tiles_per_s": 100.0,
    "read_runs": [2900.0, 3000.0, 3100.0],
    "infer_runs": [120.0, 125.0, 126.0],
    "extract_runs": [99.0, 100.0, 101.0],
    "ceiling_tiles_per_s": 120.0,
    "ceiling_from": "reading and inferring on the same cores",
    "extract_of_ceiling": 0.833,
    "extract_of_infer": 0.8,
    "bottleneck": "infer",
    "device_idle": 0.02,
}


def stage_lines(rates: dict[str, Any], columns: int = 100) -> dict[str, str]:
    return {line.split()[0]: line for line in lines(rates, columns, "#") if " ms a tile" in line}


def test_a_bar_is_as_long_as_a_tile_takes_and_the_bottleneck_is_marked() -> None:
    shown = stage_lines(RUN)
    assert list(shown) == ["read", "infer", "extract"]
    assert {stage: line.count("#") for stage, line in shown.items()} == {"read": 1, "infer": 32, "extract": 40}
    assert [stage for stage, line in shown.items() if "bottleneck" in line] == ["infer"]
    assert "10.00 ms a tile     100.0 tiles/s (99.0 to 101.0)" in shown["extract"]
    said = "\n".join(lines(RUN, 100))
    assert "80% of the model alone, and 83% of the ceiling: 120.0 tiles/s" in said
    assert "the engine waited 2% of the time" in said


def test_a_stage_alone_has_a_bar_and_no_bottleneck() -> None:
    alone = {name: value for name, value in RUN.items() if not re.match("infer|extract|ceiling|bottleneck|dev", name)}
    assert stage_lines(alone)["read"].count("#") == 40
    assert "bottleneck" not in "".join(lines(alone, 100))


@given(st.integers(1, 300), st.floats(0.01, 1e6), st.floats(0.01, 1e6))
def test_every_bar_is_seen_and_none_is_too_long(columns: int, read: float, infer: float) -> None:
    rates = {"read_tiles_per_s": read, "read_runs": [read], "infer_tiles_per_s": infer, "infer_runs": [infer]}
    bars = [line.count("#") for line in stage_lines({**RUN, **rates}, columns).values()]
    assert min(bars) >= 1
    assert max(bars) <= min(40, max(5, columns - 60))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    faster = {**RUN, "precision": "fp32", "infer_tiles_per_s": 250.0, "infer_runs": [240.0, 250.0, 255.0]}
    for name, run in (("a", RUN), ("b", faster)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    return tmp_path / "a.json", tmp_path / "b.json"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from mtdp_runtime.commands.bench import main; main()"
    return warm.run(code, *arguments)


def test_two_runs_are_compared_with_what_is_not_alike(files: tuple[Path, Path]) -> None:
    result = bench("compare", *files)
    assert (result.returncode, result.stderr) == (0, "")
    assert "not alike: precision bf16 in A, fp32 in B" in result.stdout
    assert re.search(r"infer +125\.0 +250\.0 +2\.00$", result.stdout, re.MULTILINE)
    assert re.search(r"read +3000\.0 +3000\.0 +1\.00  within the spread of the runs$", result.stdout, re.MULTILINE)
    found = json.loads(bench("compare", *files, "--json").stdout)
    assert found["stages"]["infer"] == {"a": 125.0, "b": 250.0, "ratio": 2.0, "apart": True}


def test_a_run_compared_with_itself_is_the_same(files: tuple[Path, Path]) -> None:
    found = comparison(files[0], files[0])
    assert found["differs"] == {}
    assert {stage["ratio"] for stage in found["stages"].values()} == {1.0}
    assert all("within" in line for line in comparison_lines(found) if line.split()[0] in found["stages"])


def test_runs_of_different_kinds_are_refused(files: tuple[Path, Path]) -> None:
    alone = {name: value for name, value in RUN.items() if not name.startswith(("infer", "extract", "ceiling"))}
    files[1].write_text(json.dumps(alone))
    result = bench("compare", *files)
    assert result.returncode == 2
    assert f"{files[0]} is of mtdp-bench extract, {files[1]} of mtdp-bench read" in one_error(result)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tiles": 3}',
        '{"read_tiles_per_s": 3}',
        '{"read_tiles_per_s": 3, "read_runs": []}',
        '{"read_tiles_per_s": 0, "read_runs": [1]}',
        '{"read_tiles_per_s": NaN, "read_runs": [1]}',
        '{"read_tiles_per_s": 3, "read_runs": ["x"]}',
        '{"read_tiles_per_s": 3, "read_runs": 4}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_file_that_is_no_run_is_refused_by_name(files: tuple[Path, Path], content: str) -> None:
    files[1].write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"b\.json: not what mtdp-bench --json prints") as caught:
        comparison(*files)
    assert caught.value.hint.startswith("Record a run with")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_compare_takes_two_files(files: tuple[Path, Path], count: int) -> None:
    result = bench("compare", *[files[0]] * count)
    assert result.returncode == 2
    assert f"compare takes two files, not {count}" in one_error(result)


def test_a_missing_file_and_a_second_slide_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert "none.json: cannot be read: No such file" in one_error(bench("compare", files[0], tmp_path / "none.json"))
    assert "2 slides, one is measured" in one_error(bench("read", "a.svs", "b.svs"))
