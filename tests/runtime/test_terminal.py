"""What the commands print, and where: one door, one style, nothing that commands a terminal."""

from __future__ import annotations

import ast
import doctest
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mtdp_runtime
import warm
from mtdp_runtime import printable, units
from mtdp_runtime.commands import bench, doctor, output, view
from mtdp_runtime.commands import extract as command
from mtdp_runtime.commands.progress import PLAIN_EVERY_S, Progress
from mtdp_runtime.extraction.extract import CHECK, TILES, TISSUE
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.store import run_log
from mtdp_runtime.units import cells, duration, shorten, size
from mtdp_runtime.version import __version__
from support import extract, pyramid, stained

ROOT = Path(mtdp_runtime.__file__).parent
TCGA = "TCGA-02-0001-01Z-00-DX1.83fce43e-42ac-4dcd-b156-2908e75f2e47.svs"
COMMANDS = {"mtdp-extract": "extract", "mtdp-bench": "bench", "mtdp-doctor": "doctor", "mtdp-view": "view"}


def run_command(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"from mtdp_runtime.commands.{COMMANDS[name]} import main; main()"
    return warm.run(code, *arguments, env=os.environ | environment)


def on_terminal(arguments: list[object], columns: int = 80, **environment: str) -> str:
    """Run mtdp-extract on a pseudo terminal of so many columns; return all that it wrote."""
    code = "from mtdp_runtime.commands.extract import main; main()"
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"} | environment
    process = warm.start(code, *arguments, streams=(theirs, theirs, theirs), env=env)
    os.close(theirs)
    seen = b""
    while True:
        try:
            if select.select([ours], [], [], 60)[0] and (block := os.read(ours, 1 << 16)):
                seen += block
                continue
        except OSError:  # the other end is closed
            pass
        break
    process.wait()
    os.close(ours)
    return seen.decode()


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def done(path: str = "a.svs") -> Outcome:
    return Outcome(Path(path), "done")


class TestOneDoor:
    def test_nothing_prints_but_the_console(self) -> None:
        """So what is escaped there is escaped everywhere. The parent of a run, which loads nothing, prints itself."""
        allowed = {"commands/console.py", "cohort/watchdog.py", "backends/tensorrt/engine_source.py"}
        found = set()
        for path in ROOT.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
                writes = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "sys.stdout.write",
                    "sys.stderr.write",
                    "typer.echo",
                    "typer.secho",
                )
                if prints or writes:
                    found.add(path.relative_to(ROOT).as_posix())
        assert found <= allowed

    def test_a_hostile_slide_and_model_command_no_terminal(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        evil = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"
        slide = make_slide("a.tiff").rename(tmp_path / f"a{evil}.tiff")
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        for path in tiny_bundle.iterdir():
            (bundle / path.name).write_bytes(path.read_bytes())
        manifest = json.loads((bundle / "bundle.json").read_text())
        manifest["name"] = f"m{evil}"
        (bundle / "bundle.json").write_text(json.dumps(manifest))
        options = (slide, "--model", bundle, "--out", tmp_path / "o", "-v", "--no-report")
        for more in (["--dry-run"], [], [], ["--stride-px", "7"], ["--dry-run"], ["--verify", tmp_path / "o"]):
            result = extract(*(options[3:5] if "--verify" in more else options), *more)
            assert result.stdout + result.stderr
            for line in (result.stdout + result.stderr).split("\n"):
                assert line.isprintable(), repr(line)
        result = run_command("mtdp-bench", "read", slide, "--model", bundle, "--repeats", 1, "-v")
        assert result.returncode == 0, result.stderr
        assert all(line.isprintable() for line in (result.stdout + result.stderr).split("\n"))

    def test_colour_only_where_a_terminal_has_it_and_no_color_is_not_set(self, tmp_path: Path) -> None:
        missing: list[object] = [tmp_path / "none.svs"]
        assert "\x1b[31merror: \x1b[0m" in on_terminal(missing)
        assert "\x1b[" not in on_terminal(missing, NO_COLOR="1")
        assert "\x1b[" not in on_terminal(missing, TERM="dumb")
        assert "\x1b[" not in extract(*missing).stderr

    def test_an_error_is_a_line_and_a_hint(self, tmp_path: Path) -> None:
        lines = extract(tmp_path / "none.svs").stderr.splitlines()
        assert [line.split(": ")[0] for line in lines] == ["error", "hint"]


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_the_common_options(self, name: str) -> None:
        for flag in ("-h", "--help"):
            text = run_command(name, flag).stdout
            assert text.startswith(f"Usage: {name} ")
            for option in ("-q, --quiet", "-v, --verbose", "--version", "--json", "--install-completion"):
                assert option in text
        assert run_command(name, "--version").stdout == f"{name} {__version__}\n"

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_leaks_no_type_and_keeps_brackets(self, name: str) -> None:
        text = run_command(name, "--help").stdout
        assert not re.search(r"<(bool|str|int|float|Path|list)\b", text)
        assert "[default: " in text or name == "mtdp-doctor"
        if name == "mtdp-extract":
            assert "slide[,mpp][,mask][,name][,coords][,classes]" in text

    def test_options_stand_in_their_groups(self) -> None:
        text = run_command("mtdp-extract", "--help").stdout
        heads = re.findall(r"^([A-Z][^:\n]*):$", text, re.MULTILINE)
        assert heads == [
            "Arguments",
            "What is worked on",
            "Which numbers come out",
            "What computes them",
            "What is written, and when",
            "Help and output",
        ]
        engine = text.split("What computes them:")[1].split("What is written")[0]
        assert "--batch N|auto" in engine
        assert "--mpp" not in engine

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_loads_neither_rich_nor_what_computes(self, name: str) -> None:
        code = (
            "import sys, contextlib\n"
            f"from mtdp_runtime.commands.{COMMANDS[name]} import main\n"
            "sys.argv = ['x', '--help']\n"
            "with contextlib.suppress(SystemExit): main()\n"
            "print('heavy:', sorted({'rich', 'numpy', 'cv2', 'h5py', 'openslide', 'onnxruntime'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.rstrip().endswith("heavy: []")

    def test_the_module_is_mtdp_extract(self) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "mtdp_runtime", "--version"], capture_output=True, text=True, check=True
        )
        assert result.stdout == f"mtdp-extract {__version__}\n"
        result = subprocess.run([sys.executable, "-m", "mtdp_runtime", "--bad"], capture_output=True, text=True)
        assert "hint: mtdp-extract --help" in result.stderr

    def test_completion_is_made_without_a_network(self) -> None:
        environment = {
            "_MTDP_EXTRACT_COMPLETE": "complete_bash",
            "COMP_WORDS": "mtdp-extract --stri",
            "COMP_CWORD": "1",
        }
        assert "--stride-px" in run_command("mtdp-extract", **environment).stdout.split()


def _options_of(app: Any) -> set[str]:
    import typer

    params = typer.main.get_command(app).params
    return {name for param in params if hasattr(param, "is_flag") for name in param.opts} | {"--help", "-h"}


def _export_options() -> set[str]:
    sources = ROOT.parents[1] / "export" / "mtdp_export"
    text = "\n".join(path.read_text() for path in sources.rglob("*.py"))
    named = set(re.findall(r'"(--[a-z][a-z-]+)"', text))
    body = text.split("def export(")[-1].split('"""')[0]
    return named | {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+):", body, re.MULTILINE)}


_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def _hints() -> list[tuple[str, str, str]]:
    """Every text of the runtime that tells what to do: its file, what is said to have happened, and the text."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            texts: list[ast.expr] = []
            message = _text(node.args[0]) if isinstance(node, ast.Call) and node.args else ""
            if isinstance(node, ast.Call):
                texts += [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name.endswith(("Error", "Unavailable", "Memory", "Invalid", "Probe")) or "Slide" in name:
                    texts += node.args[1:]
            if isinstance(node, ast.FunctionDef) and node.name.endswith("hint"):
                texts += [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target).strip("_").lower() in ("hint", "rerun", "needs_driver", "no_driver"):
                    texts.append(node.value)
            found += [(place, message, _text(one)) for one in texts]
    return found


def _text(node: ast.expr) -> str:
    parts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return "".join(parts)


# What these raise, only a run that extracts meets: mtdp-bench has a fresh folder and no option that leads there.
_EXTRACT_ONLY = ("commands/extract", "cohort/", "extraction/", "formats/", "report/", "store/", "files.py", "api.py")
_EXTRACT_ONLY += ("pipeline/run.py", "tiling/given_mask.py")


class TestHints:
    def test_a_hint_names_only_options_of_the_command_that_runs(self) -> None:
        """An option of another command stands behind that command's name."""
        options = {"mtdp-extract": _options_of(command.app), "mtdp-bench": _options_of(bench.app)}
        options |= {
            "mtdp-doctor": _options_of(doctor.app),
            "mtdp-export": _export_options(),
            "mtdp-view": _options_of(view.app),
        }
        seen = 0
        for place, message, text in _hints():
            running = ["mtdp-extract"]
            # What is said of an option is said where it was given.
            shared = not place.startswith(_EXTRACT_ONLY) and set(_OPTION.findall(message)) <= options["mtdp-bench"]
            running += ["mtdp-bench"] if shared else []
            owner = ""
            for word in re.findall(rf"mtdp-[a-z]+|{_OPTION.pattern}|[;,.](?= )", text):
                if word in ";,.":
                    owner = ""
                elif word.startswith("mtdp-"):
                    owner = word
                else:
                    seen += 1
                    for name in [owner] if owner else running:
                        assert word in options[name], f"{place}: {text!r} names {word}, which {name} does not have"
        assert seen > 25, "the hints were found"

    def test_an_option_has_one_help_wherever_it_is(self) -> None:
        import typer

        texts: dict[str, set[str]] = {}
        for app in (command.app, bench.app):
            for param in typer.main.get_command(app).params:
                if param.name not in ("model", "as_json") and getattr(param, "help", None):
                    texts.setdefault(str(param.name), set()).add(str(param.help))
        shared = {"slide_mpp", "backend", "precision", "batch", "threads", "quiet", "verbose", "version"}
        assert all(len(texts[name]) == 1 for name in shared)


class TestProgress:
    def run(self, slides: int = 500) -> tuple[Progress, Clock]:
        clock = Clock()
        return Progress(slides, 2, clock=clock), clock

    def test_a_line_says_slide_tiles_rate_and_both_times_left(self) -> None:
        progress, clock = self.run()
        progress.on_slide(Path("a.svs"))
        progress.on_plan(1000, 0)
        clock.s = 10
        progress.on_progress(100)
        # 10 tiles/s: 90 s for the rest of this one, and 497 more of 100 s each
        assert progress.line(200) == ("[3/500] a.svs  100/1000 tiles, 10 tiles/s, 2 min left (all: 13 h 50 min)")

    def test_a_rate_counts_only_what_this_run_did(self) -> None:
        progress, clock = self.run(1)
        progress.on_slide(Path("a.svs"))
        progress.on_plan(1000, 900)
        clock.s = 10
        progress.on_progress(10)
        assert progress.line(200) == "a.svs  910/1000 tiles, 1 tiles/s, 2 min left"

    def test_slides_that_were_done_already_do_not_shorten_what_is_left(self) -> None:
        progress, clock = self.run(103)
        progress.on_outcome(Outcome(Path("0.svs"), "skipped"))
        progress.on_slide(Path("a.svs"))
        progress.on_plan(10, 0)
        clock.s = 60
        progress.on_outcome(done())
        progress.on_slide(Path("b.svs"))
        progress.on_phase(TISSUE)
        assert progress.line(200) == f"[5/103] b.svs  {TISSUE} (all: 1 h 38 min)"  # 98 more of 60 s

    def test_the_phases_have_names_and_a_check_is_no_tile_of_the_run(self) -> None:
        progress, _ = self.run(1)
        progress.on_slide(Path("a.svs"))
        progress.on_plan(10, 0)
        progress.on_phase(CHECK)
        progress.on_progress(7)
        assert progress.line(80) == f"a.svs  {CHECK}"
        progress.on_phase(TILES)
        assert progress.line(80) == "a.svs  0/10 tiles"
        progress.on_outcome(done())
        assert progress.line(80) == ""

    @pytest.mark.parametrize("columns", [40, 60, 79, 100])
    def test_a_long_name_leaves_the_rest_on_the_line(self, columns: int) -> None:
        progress, clock = self.run()
        progress.on_slide(Path(TCGA))
        progress.on_plan(20_000, 0)
        clock.s = 100
        progress.on_progress(10_000)
        line = progress.line(columns)
        assert cells(line) <= columns
        assert line.startswith("[3/500] TCGA")
        if columns > 70:
            assert "10000/20000 tiles, 100 tiles/s, 2 min left (all: 1 d 4 h)" in line
            assert ".svs  " in line

    def test_without_a_terminal_it_is_a_line_a_minute(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert PLAIN_EVERY_S == 60
        monkeypatch.setattr("mtdp_runtime.commands.progress.PLAIN_EVERY_S", 0.05)
        progress = Progress(2)
        with progress:
            progress.on_slide(Path(TCGA))
            progress._end.wait(0.5)
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) >= 2
        assert set(lines) == {f"[1/2] {TCGA}  opening"}

    def test_a_terminal_of_80_columns_shows_each_slide_and_keeps_no_line(
        self, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        for name in (TCGA.replace("svs", "tiff"), "b.tiff"):
            pyramid(stained(768, 1024), tmp_path / name, 0.5)
        code = [tmp_path, "--model", tiny_bundle, "--out", tmp_path / "o", "--no-report", "--backend", "onnxruntime"]
        seen = on_terminal(code)
        shown = re.findall(r"\r\x1b\[K(\[[^\r\n]*)", seen)
        assert all(cells(line) < 80 or "-> " in line for line in shown)
        assert "\x1b" not in seen.replace("\r\x1b[K", "")
        last = seen.rstrip("\r\n").split("\n")[-1]
        assert last.rpartition("\r\x1b[K")[2] == "" or "2 of 2 slides done" in last


class TestVoices:
    def test_the_engine_line_is_short_and_v_gives_the_reason(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        options = (make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", "--backend", "onnxruntime")
        plain = extract(*options, "--dry-run")
        plain = extract(*options)
        engine = next(line for line in plain.stdout.splitlines() if line.startswith("engine: "))
        assert re.fullmatch(r"engine: onnxruntime [0-9.]+, fp32, batches of [0-9]+", engine)
        assert "asked for" not in plain.stdout + plain.stderr
        assert "asked for: " in extract(*options, "-v").stderr

    def test_quiet_leaves_failures_alone(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        (tmp_path / "bad.svs").write_bytes(b"no slide")
        options = ("--model", tiny_bundle, "--out", tmp_path / "o", "-q")
        result = extract(make_slide(), tmp_path / "bad.svs", *options)
        assert result.stdout == ""
        assert [line.split(": ")[0].strip() for line in result.stderr.splitlines()] == ["[2/2] failed", "hint"]

    def test_a_resumed_slide_says_what_was_there(self) -> None:
        from mtdp_runtime.commands.output import _lines
        from mtdp_runtime.extraction.outcome import log_line
        from mtdp_runtime.pipeline.timing import RunTimes

        outcome = Outcome(
            Path("a.svs"),
            "done",
            Path("o/a.h5"),
            tiles=1000,
            seconds=10,
            times=RunTimes(wall_s=10, tiles=100),
            tiles_before=900,
            reader="one of ours",
            own_decoder=True,
        )
        (line,) = _lines(outcome)
        assert line.startswith("a.svs: 1000 tiles (900 were there already) in 10.0 s, 10.0 tiles/s, ")
        assert log_line(outcome)["tiles_before"] == 900


class TestDryRun:
    def test_what_is_done_is_left_out_and_reasons_are_given(
        self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        first, out = make_slide("a.tiff"), tmp_path / "o"
        pyramid(np.full((768, 1024, 3), 243, np.uint8), tmp_path / "blank.tiff", 0.5)
        options = ("--model", tiny_bundle, "--out", out, "--backend", "onnxruntime", "--no-report")
        assert extract(first, *options).returncode == 0
        make_slide("c.tiff", seed=2)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        result = extract(tmp_path, *options, "--dry-run")
        assert result.returncode == 0, result.stderr
        assert f"a.tiff: skipped: already done -> {out / 'a.h5'}" in result.stdout
        assert "  nothing to compute: no tile has enough tissue" in result.stdout
        assert re.search(
            r"3 slides: 2 to do with 144 tiles, [0-9.]+ (kB|MB), about .*; 1 done already, 0 failed", result.stdout
        )
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        other = extract(first, *options, "--dry-run", "--stride-px", 32)
        assert other.returncode == 1
        assert "is not what would be made now" in other.stderr
        replaced = extract(first, *options, "--dry-run", "--stride-px", 32, "--overwrite")
        assert replaced.returncode == 0
        assert "a.tiff: " in replaced.stdout


def test_an_empty_slide_gets_no_bag_and_is_said_so(tiny_bundle: Path, tmp_path: Path) -> None:
    slide = pyramid(np.full((768, 1024, 3), 243, np.uint8), tmp_path / "blank.tiff", 0.5)
    options = ("--model", tiny_bundle, "--out", tmp_path / "o", "--format", "pt", "--format", "csv")
    result = extract(slide, *options)
    assert result.returncode == 0, result.stderr
    assert "no .pt file is written, since it would hold no tiles" in result.stdout
    assert not list((tmp_path / "o").rglob("*.pt"))
    assert (tmp_path / "o" / "model-outputs-csv" / "blank.csv").is_file()


@given(st.text(max_size=60), st.integers(1, 40))
def test_a_shortened_name_fits_and_keeps_both_ends(name: str, columns: int) -> None:
    short = shorten(name, columns)
    assert cells(short) <= columns
    if cells(name) <= columns:
        assert short == name
    elif name.isascii() and columns > 2:
        head, tail = short.split("…")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert len(short) == columns


def test_units_are_those_of_a_person() -> None:
    assert [size(n) for n in (12, 1500, 12_345_678, 2.5e9, 999_999)] == [
        "12 bytes",
        "1.5 kB",
        "12 MB",
        "2.5 GB",
        "1.0 MB",
    ]
    assert [duration(s) for s in (0.2, 59.6, 89.4, 95, 3599, 7200, 90_000)] == [
        "under 1 s",
        "60 s",
        "89 s",
        "2 min",
        "1 h",
        "2 h",
        "1 d 1 h",
    ]


def test_printable_is_idempotent() -> None:
    evil = "a\x1b[2J\n\\x1b"
    assert printable.printable(printable.printable(evil)) == printable.printable(evil)


@pytest.mark.parametrize("module", [printable, units, output, run_log], ids=lambda module: module.__name__)
def test_what_the_docstrings_show_is_so(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
