"""What is on the disk of a folder's slides: feature files, unfinished ones, and what run.jsonl says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

from mtdp_runtime.errors import StoreError
from mtdp_runtime.report import places
from mtdp_runtime.report.thumbnails import page_picture
from mtdp_runtime.store import run_log
from mtdp_runtime.store.causes import FailedSlide, plain_message
from mtdp_runtime.store.reader import FeatureFile, open_features

DONE: Final = "done"
EMPTY: Final = "no tissue"
FAILED: Final = "failed"
UNFINISHED: Final = "unfinished"
_SUFFIX: Final = ".h5"
_PARTIAL: Final = ".h5.partial"
# What says nothing of how a slide went: it was done before, or is another process's, or was never begun.
_TELLS_NOTHING: Final = ("skipped", "claimed", "planned", "passed-over")
_UNFINISHED: Final = "begun, and not finished: it is still worked on, or was stopped"
_STAGES: Final = ("read", "infer", "store")


@dataclass(frozen=True, slots=True)
class StageShare:
    """What a stage did with the time of a slide, in seconds of the run: its threads are averaged."""

    busy_s: float
    starved_s: float
    blocked_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """A slide, or one of its feature files where several models share a reading."""

    name: str  # of its files, without extension
    folder: Path
    slide: str  # its path as the run named it, or its file's name
    status: str
    tiles: int = 0
    bad_tiles: int = 0
    tissue_mm2: float | None = None
    tiles_per_s: float | None = None
    seconds: float | None = None  # for finding tissue, and reading and computing tiles
    plan_s: float = 0.0
    model: str = ""
    digest: str = ""
    engine: str = ""
    precision: str = ""
    reader: str = ""
    reader_reason: str = ""
    bottleneck: str = ""
    device_idle: float = 0.0
    stages: Mapping[str, StageShare] = field(default_factory=dict)
    check: Mapping[str, Any] | None = None  # tiles, min_cosine, reference
    earlier_tiles: int = 0  # rows that an earlier run computed
    size_bytes: int = 0
    message: str = ""
    hint: str = ""
    warning: str = ""
    picture: bytes = b""  # a small JPEG

    @property
    def needs_a_look(self) -> bool:
        """Whether something is not as it should be."""
        return self.status not in (DONE, EMPTY) or self.bad_tiles > 0 or bool(self.warning)

    @property
    def failure(self) -> FailedSlide:
        """What is told of a slide that failed."""
        return FailedSlide(self.slide, self.name, self.message, self.hint)


@dataclass(frozen=True, slots=True)
class Folder:
    """All that a folder holds of slides, of all its runs."""

    rows: tuple[Row, ...]  # by name
    runs: tuple[Mapping[str, Any], ...]  # the lines of runs: started, host, version, arguments, models
    passed_over: tuple[Mapping[str, Any], ...]  # what lay in the folders and is no work


def read_folder(out: Path) -> Folder:
    """Read what is there now of the slides of a folder. A file that cannot be read is a row that says so."""
    runs, passed_over, last = [], {}, dict[str, dict[str, Any]]()
    for line in run_log.read(out):
        if "slide" not in line:
            runs.append(line)
        elif line.get("status") == "passed-over":
            passed_over[str(line["slide"])] = line
        elif line.get("status") not in _TELLS_NOTHING:
            last[_name_of(line)] = line
        elif line.get("check"):
            earlier = last.get(_name_of(line), {})
            last[_name_of(line)] = earlier | {key: line[key] for key in ("check", "warning") if key in line}
    folders = list(_folders(out))
    slides = max(len(last), sum(_is_finished(name) for folder in folders for name in _names(folder)))
    rows = [row for folder in folders for row in _rows_of(folder, last, slides)]
    found = {row.name for row in rows}
    rows += [_row_of_line(out, name, line) for name, line in last.items() if name not in found and "slide" in line]
    return Folder(tuple(sorted(rows, key=lambda row: (row.name, row.model))), tuple(runs), tuple(passed_over.values()))


def _name_of(line: Mapping[str, Any]) -> str:
    """Return the name of a slide's files; lines of earlier versions say it only where there is an output."""
    return str(line.get("name") or PurePath(str(line.get("output") or line["slide"])).stem)


def _folders(out: Path) -> Iterator[Path]:
    """Yield the folder, and those of several models and scales below it.

    A folder with a run.jsonl of its own is another run's.
    """
    yield out
    for below in sorted(out.iterdir()):
        if below.is_dir() and not below.name.startswith(".") and below.name != places.FOLDER:
            ours = not (below / run_log.NAME).exists()
            if ours and places.is_of_a_scale(below):
                yield from _folders(below)  # of several models
            elif ours and any(below.glob(f"*{_SUFFIX}")):
                yield below


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_finished(name: str) -> bool:
    return name.endswith(_SUFFIX) and not name.startswith(".")


def _rows_of(folder: Path, last: Mapping[str, Mapping[str, Any]], slides: int) -> Iterator[Row]:
    names = _names(folder)
    finished = {name.removesuffix(_SUFFIX) for name in names if _is_finished(name)}
    for name in finished:
        yield _row_of_file(folder / f"{name}{_SUFFIX}", name, last.get(name, {}), slides)
    begun = {name[1:].removesuffix(_PARTIAL) for name in names if name.endswith(_PARTIAL) and name.startswith(".")}
    for name in begun - finished:
        line = last.get(name, {})
        if line.get("status") == "failed":
            yield _row_of_line(folder, name, line)
        else:
            yield Row(name, folder, name, UNFINISHED, message=_UNFINISHED)


def _row_of_line(folder: Path, name: str, line: Mapping[str, Any]) -> Row:
    """Return the row of a slide that has no feature file."""
    if line.get("status") == "failed":
        message, hint = plain_message(str(line.get("message", ""))), str(line.get("hint", ""))
        return Row(name, folder, str(line["slide"]), FAILED, message=message, hint=hint)
    return Row(
        name,
        folder,
        str(line["slide"]),
        FAILED,
        message=f"run.jsonl says {line.get('status')}, and its feature file is not here",
        hint="It was moved or deleted: the same command makes it again.",
    )


def _row_of_file(path: Path, name: str, line: Mapping[str, Any], slides: int) -> Row:
    slide = str(line.get("slide", name))
    try:
        with open_features(path) as file:
            return _with_line(_facts(file, path, name, slide, slides), line)
    except (StoreError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        hint = getattr(error, "hint", "") or "Delete it, and run the same command again."
        text = str(error) if isinstance(error, StoreError) else f"{path}: not a feature file of this program: {error}"
        return Row(name, path.parent, slide, FAILED, message=plain_message(text), hint=hint)


def _with_line(facts: dict[str, Any], line: Mapping[str, Any]) -> Row:
    """Add what only run.jsonl knows. A slide may have failed though its file is there: of other settings, say."""
    facts["check"] = line.get("check") or facts["check"]
    facts["warning"] = facts["warning"] or str(line.get("warning", ""))
    if line.get("status") == "failed":
        facts |= {
            "status": FAILED,
            "message": plain_message(str(line.get("message", ""))),
            "hint": str(line.get("hint", "")),
        }
    return Row(**facts)


def _facts(file: FeatureFile, path: Path, name: str, slide: str, slides: int) -> dict[str, Any]:
    attrs, tiles = file.attrs, len(file)
    timing = file.fact("timing") or {}
    wall_s, plan_s = float(timing.get("wall_s", 0.0)), float(timing.get("plan_s", 0.0))
    return {
        "name": name,
        "folder": path.parent,
        "slide": slide if slide != name else str(attrs.get("slide", name)),
        "status": DONE if tiles else EMPTY,
        "tiles": tiles,
        "bad_tiles": int(attrs.get("bad_tiles", 0)),
        "tissue_mm2": float(attrs["tissue_mm2"]) if "tissue_mm2" in attrs else None,
        "tiles_per_s": float(attrs["tiles_per_s"]) if tiles and attrs.get("tiles_per_s") else None,
        "seconds": wall_s + plan_s if timing else None,
        "plan_s": plan_s,
        "model": str(attrs.get("model", "")),
        "digest": str(attrs.get("bundle_digest", "")),
        "engine": str(attrs.get("backend", "")),
        "precision": str(attrs.get("precision", "")),
        "reader": str(attrs.get("reader", "")),
        "reader_reason": str(attrs.get("reader_reason", "")),
        "bottleneck": str(attrs.get("bottleneck", "")) if tiles else "",
        "device_idle": float(timing.get("device_idle", 0.0)),
        "stages": stage_shares(timing),
        "check": file.fact("check"),
        "earlier_tiles": int(attrs.get("rows_from_an_earlier_run", 0)),
        "size_bytes": path.stat().st_size,
        "message": "" if tiles else "no tile has enough tissue",
        "warning": str(attrs.get("check_warning", "")),
        "picture": page_picture(places.thumbnail(path.parent, name), lambda: file.tissue, slides),
    }


def stage_shares(timing: Mapping[str, Any]) -> dict[str, StageShare]:
    """Return what each stage did with the time of a slide; nothing where the file does not say it."""
    if not timing.get("wall_s"):
        return {}
    threads = stage_threads(timing)
    return {
        stage: StageShare(
            *(float(timing[f"{stage}_{what}_s"]) / threads[stage] for what in ("busy", "starved", "blocked"))
        )
        for stage in _STAGES
    }


def stage_threads(timing: Mapping[str, Any]) -> dict[str, int]:
    """Return how many threads each stage had; files of earlier versions do not say how many of the readers read."""
    return {"read": max(1, int(timing.get("read_threads", timing["readers"]))), "infer": 1, "store": 1}
