"""A run file: a cohort's command in version control. The command line wins; what is wrong is refused before work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import typer

from mtdp_runtime.commands.extract import app
from mtdp_runtime.commands.run_file import options_in
from mtdp_runtime.errors import UsageError
from support import extract, one_error

COMMAND = typer.main.get_command(app)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> dict[str, Any]:
    return options_in(written(folder, text), COMMAND)


@pytest.fixture
def cohort(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> Path:
    """A run file beside its slides; its paths are relative to it."""
    make_slide("a.tiff", seed=1)
    make_slide("b.tiff", seed=2)
    text = f"""
        slides = ["a.tiff"]
        out = "features"
        model = ["{tiny_bundle}"]
        mpp = 1
        backend = "onnxruntime"
        threads = 1
        batch = "8"
        format = ["npy", "csv"]
        no-report = true
    """
    return written(tmp_path, text)


def header(out: Path) -> dict[str, Any]:
    first: dict[str, Any] = json.loads((out / "run.jsonl").read_text().splitlines()[0])
    return first


def test_a_run_file_says_what_a_command_line_would(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = cohort.parent, cohort.parent / "features"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = extract("--config", "../run.toml")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == [".derived", "a.h5", "model-outputs-csv", "npy", "run.jsonl"]
    with h5py.File(out / "a.h5") as file:
        assert (file.attrs["mpp"], file.attrs["batch"]) == (1.0, 8)
    line = header(out)
    assert line["arguments"] == ["mtdp-extract", "--config", "../run.toml"]
    said = line["options"]
    assert {name: said[name] for name in ("mpp", "batch", "threads", "format", "no-report", "min-tissue")} == {
        "mpp": 1.0,
        "batch": "8",
        "threads": 1,
        "format": ["npy", "csv"],
        "no-report": True,
        "min-tissue": 0.25,
    }
    assert [Path(path).resolve() for path in said["slides"]] == [folder / "a.tiff"]
    assert (said["config"], "mask" in said) == ("../run.toml", False)
    assert line["models"][0]["batch"] == 8


def test_the_command_line_wins(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    line = (cohort.parent / "b.tiff", "--out", out, "--magnification", 20, "--format", "npy", "--config", cohort)
    result = extract(*line)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == [".derived", "b.h5", "npy", "run.jsonl"]
    with h5py.File(out / "b.h5") as file:
        assert file.attrs["mpp"] == 0.5, "--magnification 20 replaces the file's mpp = 1"
    assert header(out)["options"]["format"] == ["npy"]
    assert "say the same twice" in one_error(extract("--config", cohort, "--mpp", 1, "--magnification", 10))


def test_every_option_may_stand_in_a_file(tmp_path: Path) -> None:
    """But those that say what the command itself does."""
    with pytest.raises(UsageError) as refused:
        read(tmp_path, "xyzzy = 1")
    offered = set(refused.value.hint.removeprefix("Options that a file may have: ").rstrip(".").split(", "))
    shown = {max(param.opts, key=len).removeprefix("--") for param in COMMAND.params}
    shown = {name for name in shown if not name.endswith("-completion")}
    assert shown - offered == {"config", "verify", "version"}
    assert offered <= shown


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("strid-px = 4", "strid-px: no option has this name", "Did you mean stride-px?"),
        ("stride_px = 4", "stride_px: no option has this name", "Did you mean stride-px?"),
        ("slide = ['a']", "slide: no option has this name", "Did you mean slides?"),
        ("config = 'a'", "config: no option has this name", ""),
        ("[tissue]\nmpp = 1", "tissue: no option has this name", ""),
        ("mpp = '0.5'", "mpp = '0.5': must be a number", ""),
        ("mpp = true", "mpp = True: must be a number", ""),
        ("stride-px = 4.0", "stride-px = 4.0: must be a whole number", ""),
        ("heads = 1", "heads = 1: must be true or false", ""),
        ("out = 3", "out = 3: must be a path in quotes", ""),
        ("out = ''", "out = '': must be a path in quotes", ""),
        ("slides = 'a.svs'", "slides = 'a.svs': must be a list, each a path in quotes", ""),
        ("slides = [1]", "slides = 1: must be a path in quotes", ""),
        ("format = ['h6']", "format = 'h6': must be one of h5, pt, npy, csv, geojson, zarr", ""),
        ("backend = 'cuda'", "backend = 'cuda': must be one of auto, tensorrt", ""),
        ("threads = 1.5", "threads = 1.5: must be text in quotes, or a whole number", ""),
        ("mpp = {a = 1}", "mpp = {'a': 1}: must be a number", ""),
        ("mpp 1", "is not TOML: Expected '=' after a key", ""),
        ("mpp = 1\nmpp = 2", "is not TOML: Cannot overwrite a value", ""),
        ("mpp = 1979-05-27", "mpp = datetime.date(1979, 5, 27): must be a number", ""),
        ("out = 1979-05-27", "out = datetime.date(1979, 5, 27): must be a path in quotes", ""),
        ("[[slides]]\na = 1", "slides = {'a': 1}: must be a path in quotes", ""),
        ("mpp = [[0.5]]", "mpp = [0.5]: must be a number", ""),
        ('out = "a\\u0000b"', "out = 'a\\x00b': must be a path in quotes", ""),
        (f"mpp = {'9' * 5000}", "is not TOML: Exceeds the limit", ""),
        (f"mpp = {'[' * 5000}", "is not TOML: ", ""),
    ],
)
def test_what_is_wrong_is_refused_with_the_file_and_the_key(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'run.toml'}: {message}")
    assert refused.value.hint.startswith(hint)


def test_a_value_out_of_range_and_a_missing_file_are_one_line_too(tmp_path: Path) -> None:
    assert "stall-limit" in one_error(extract("--config", written(tmp_path, 'slides = ["a"]\nstall-limit = -1')))
    assert one_error(extract("--config", tmp_path / "no.toml")).endswith(
        "no.toml: cannot be read: No such file or directory"
    )
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    result = extract("--config", tmp_path / "run.toml")
    assert ("is not TOML" in one_error(result), result.returncode) == (True, 2)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_that_windows_wrote_is_read(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(mark + b'mpp = 0.5\r\nslides = [\r\n  "a",\r\n]\r\n')
    assert options_in(tmp_path / "run.toml", COMMAND) == {"mpp": ["0.5"], "slides": [str(tmp_path / "a")]}


def test_paths_start_at_the_files_folder_and_whole_paths_stay(tmp_path: Path) -> None:
    values = read(tmp_path, 'slides = ["a", "/b"]\nmask = "../m.png"\nstage = "/scratch"')
    assert values == {
        "slides": [str(tmp_path / "a"), "/b"],
        "mask": str(tmp_path / "../m.png"),
        "stage": "/scratch",
    }
