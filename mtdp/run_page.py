"""The page of a training run, made of what its folder holds: curves, results, what was taken for what."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import mtdp
from mtdp.charts import chart, from_markdown
from mtdp.checkpoint import read_description
from mtdp.confusions import Confusion, Mistake, read_confusions
from mtdp.errors import ImageUnreadable, MtdpError, UsageError
from mtdp.images import read_rgb
from mtdp.progress import METRICS_NAME
from mtdp.run_state import write_text
from mtdp.weights import CHECKPOINT_NAME

PAGE_NAME: Final = "index.html"
_TABLES: Final = ("table.md", "evaluation.md")
_RESULT: Final = "result.json"
_PICTURE_PX: Final = 112
_MOST_PICTURES: Final = 60
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
Lines = Sequence[Mapping[str, Any]]


def write_run_page(run: Path) -> Path:
    """Write the page of a run of pretrain, finetune, loto or evaluate anew.

    Returns:
        The page, RUN/index.html.

    Raises:
        UsageError: there is no such folder, it holds no run, or the page cannot be written.
    """
    if not run.is_dir():
        raise UsageError(f"no folder {run}", "name the --out of a run")
    parts = [_tables(run), _training(run), _finetuning(run), _confusions(read_confusions(run)), _facts(run)]
    if not any(parts):
        raise UsageError(f"{run} holds no run", "name the --out of pretrain, finetune, loto or evaluate")
    name = html.escape(run.resolve().name)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_style()}</style></head><body><main><h1>{name}</h1>{''.join(parts)}</main>"
        f"<footer><p>Made {made} by mtdp {mtdp.__version__} from the files of this folder. "
        "Networks of this kind are for research, not for diagnosis.</p></footer></body></html>\n"
    )
    write_text(run / PAGE_NAME, page)
    return run / PAGE_NAME


def _style() -> str:
    return Path(__file__).with_name("run_page.css").read_text("utf-8")


def _tables(run: Path) -> str:
    found = [run / name for name in _TABLES if (run / name).is_file()]
    return "".join(from_markdown(path.read_text("utf-8", errors="replace"), run) for path in found)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; none where it has none, without torn ones."""
    try:
        texts = (folder / METRICS_NAME).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _points(lines: Lines, x: str, *names: str) -> list[tuple[float, float]]:
    """Return what lies under nested names, as far as lines have it."""
    found = []
    for line in lines:
        value: Any = line
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and isinstance(line.get(x), int | float):
            found.append((float(line[x]), float(value)))
    return found


def _training(run: Path) -> str:
    lines = [line for line in read_metrics(run) if "iteration" in line]
    if not lines:
        return ""
    last = lines[-1]
    warm = [line["iteration"] for line in lines if line.get("phase") == "warm-up"]
    mark = float(warm[-1]) if warm and len(warm) < len(lines) else None
    tasks = sorted({name for line in lines for name in line.get("tasks", {})})
    whole = [
        chart("Loss", {"loss": _points(lines, "iteration", "loss")}, mark),
        chart("Learning rate", {"rate": _points(lines, "iteration", "lr")}, mark),
        chart("Images per second", {"speed": _points(lines, "iteration", "images_per_s")}, mark),
    ]
    of_tasks = "".join(
        chart(f"{task}: {what}", {what: _points(lines, "iteration", "tasks", task, what)}, mark)
        for task in tasks
        for what in ("loss", "accuracy")
    )
    warmed = " The dashed line is the end of the warm-up, in which only the heads learn." if mark else ""
    return (
        f"<p>{last['iteration']} iterations; the last loss was {last.get('loss', float('nan')):.4g}.{warmed}</p>"
        f"<h2>Training</h2><div class=charts>{''.join(whole)}</div>"
        "<h2>Each task</h2><p>On the images that it was trained with, augmented: this says how training went, "
        f"not how good the network is.</p><div class=charts>{of_tasks}</div>"
    )


def _finetuning(run: Path) -> str:
    runs = {folder.name.removeprefix("lr-"): read_metrics(folder) for folder in sorted(run.glob("lr-*"))}
    runs = {rate: lines for rate, lines in runs.items() if lines}
    parts = [_result(run)]
    if runs:
        curves = [
            chart(
                "Loss on train, by learning rate",
                {rate: _points(lines, "epoch", "loss") for rate, lines in runs.items()},
            ),
            chart(
                "Score on val, by learning rate", {rate: _points(lines, "epoch", "val") for rate, lines in runs.items()}
            ),
        ]
        parts.append(f"<h2>Training</h2><div class=charts>{''.join(curves)}</div>")
    return "".join(parts)


def _result(run: Path) -> str:
    try:
        found = json.loads((run / _RESULT).read_text("utf-8"))
        metric = "ROC AUC" if found["metric"] == "roc_auc" else "accuracy"
        rows = "".join(
            f"<tr><th scope=row>{html.escape(rate)}<td>{100 * value:.1f}"
            for rate, value in found["val_of_each_lr"].items()
        )
        return (
            f"<p><b>{html.escape(found['task'])}</b>: {metric} {100 * found['test']:.1f} % on test, from "
            f"{html.escape(found['weights'])}. Learning rate {found['lr']:g} and epoch {found['epoch']} did best on "
            f"val ({100 * found['val']:.1f} %).</p><table><thead><tr><th scope=col>learning rate"
            f"<th scope=col>best on val, %</tr></thead><tbody>{rows}</tbody></table>"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _confusions(found: Sequence[Confusion]) -> str:
    if not found:
        return ""
    left, parts = _MOST_PICTURES, []
    for one in found:
        parts.append(f"<h3>{html.escape(f'{one.task}: {one.title}')}</h3>{_matrix(one)}")
        shown = one.mistakes[: max(0, left)]
        left -= len(shown)
        if shown:
            parts.append(f"<div class=tiles>{''.join(_mistake(one, mistake) for mistake in shown)}</div>")
    return (
        "<h2>What was taken for what</h2><p>On the test images. A row is a class, a column what its images were taken "
        "for; the shade is the part of the row. Below it are some of the mistakes, in turn of each kind.</p>"
        + "".join(parts)
    )


def _matrix(one: Confusion) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}" for name in one.classes)
    rows = ""
    for true, counts in enumerate(one.matrix):
        whole = sum(counts)
        cells = "".join(_cell(count, whole, true == guess) for guess, count in enumerate(counts))
        rows += f"<tr><th scope=row>{html.escape(one.classes[true])}{cells}"
    right = sum(counts[label] for label, counts in enumerate(one.matrix))
    whole = sum(map(sum, one.matrix))
    label = html.escape(f"{one.task}, {one.title}")
    return (
        f"<p>{right} of {whole} images are right ({right / max(whole, 1):.1%}).</p>"
        f'<div class=scroll role=region tabindex=0 aria-label="Confusions of {label}"><table class=matrix><thead><tr>'
        f"<td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(count: int, whole: int, right: bool) -> str:
    part = count / whole if whole else 0.0
    kind = "right" if right else "wrong"
    return f'<td class={kind} style="--part:{part:.2f}">{count}<span>{part:.0%}</span>'


def _mistake(one: Confusion, mistake: Mistake) -> str:
    words = f"{one.classes[mistake.label]}, taken for {one.classes[mistake.predicted]}"
    name = Path(mistake.path).name
    try:
        image = read_rgb(Path(mistake.path))
        image.thumbnail((_PICTURE_PX, _PICTURE_PX))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=82)
        data = base64.b64encode(stream.getvalue()).decode()
        shown = f'<img alt="{html.escape(words)}" src="data:image/jpeg;base64,{data}">'
    except ImageUnreadable:
        shown = "<p>its file is gone</p>"
    return f"<figure>{shown}<figcaption>{html.escape(words)}<br><code>{html.escape(name)}</code></figcaption></figure>"


def _facts(run: Path) -> str:
    """Return what the checkpoint says of itself."""
    if not (run / CHECKPOINT_NAME).is_file():
        return ""
    try:
        told = read_description(run / CHECKPOINT_NAME)
    except MtdpError as error:
        return f"<h2>Settings and facts</h2><p>{html.escape(error.message)}</p>"
    training = told.get("training", {})
    rows = [("arch", told.get("arch")), ("iteration", told.get("iteration"))]
    for group in ("config", "init", "versions", "choices"):
        rows += sorted((f"{group}: {name}", value) for name, value in _named(training.get(group)))
    for name, task in sorted(dict(training.get("tasks", {})).items()):
        rows.append((f"task: {name}", f"{task.get('images')} images of {', '.join(map(str, task.get('classes', ())))}"))
    shown = "".join(f"<tr><th scope=row>{html.escape(str(name))}<td>{html.escape(str(value))}" for name, value in rows)
    return f"<h2>Settings and facts</h2><table class=facts><tbody>{shown}</tbody></table>"


def _named(group: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(group, Mapping):
        yield from group.items()
    elif isinstance(group, list | tuple):
        yield from ((str(number), value) for number, value in enumerate(group, 1))
