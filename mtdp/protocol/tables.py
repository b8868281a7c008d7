"""The paper's result table: as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mtdp.protocol.cells import Cell, judgement_cells
from mtdp.protocol.ranking import mean_and_std, significant
from mtdp.protocol.run import Protocol

# Column -> (kind of cell, weights), in the paper's order; features of random weights are our addition.
COLUMNS: Final = {
    "Scratch": ("finetune", "random"),
    "FE random": ("probe", "random"),
    "FE start": ("probe", "start"),
    "FE MTL": ("probe", "mtl"),
    "FT start": ("finetune", "start"),
    "FT MTL": ("finetune", "mtl"),
    "Joint": ("joint-test", "mtl"),
}
LEGEND: Final = (
    "FE: pooled features and a linear SVM; FT: fine-tuning; start: the weights that pre-training started from; MTL: "
    "multi-task pre-trained without the task and those related to it; mean ± sample standard deviation over the seeds. "
    "`*`: better than its counterpart by more than twice the larger standard deviation."
)
# Which columns are held against each other.
PAIRS: Final = (("FE start", "FE MTL"), ("FT start", "FT MTL"))
_COLOURS: Final = {"start": "#4c72b0", "mtl": "#c44e52", "random": "#8c8c8c"}


@dataclass(frozen=True, slots=True)
class Row:
    """One left-out task: its test scores by column, one a seed; an empty column was not computed."""

    task: str
    metric: str
    train_images: int  # train and val, as the paper counts
    classes: int
    scores: dict[str, tuple[float, ...]]
    combination: str  # that judged it


def collect(protocol: Protocol) -> list[Row]:
    """The rows of every evaluated task, of the cells that are done.

    A training that diverged has no score and leaves its seed out.
    """
    done: dict[tuple[str, str, str], list[float]] = {}
    combination: dict[str, str] = {}
    for cell in judgement_cells(protocol.evaluated, protocol.finetuned, protocol.config):
        found = protocol.result(cell)
        if found is None:
            continue
        if cell.kind == "probe" and cell.weights == "mtl":
            combination[cell.subject] = found["combination"]
        if found["score"] is not None:
            done.setdefault(_key(cell), []).append(float(found["score"]))
    return [
        Row(
            task.name,
            task.metric,
            len(task.of(("train", "val"))),
            len(task.classes),
            {name: tuple(done.get((task.name, *column), ())) for name, column in COLUMNS.items()},
            combination.get(task.name, ""),
        )
        for task in protocol.evaluated
    ]


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.subject, cell.kind, cell.weights


def markdown(rows: Sequence[Row]) -> str:
    """The table in percent, mean ± sample standard deviation over the seeds, and what the 2-sigma rule says of it."""
    columns = [name for name in COLUMNS if any(row.scores[name] for row in rows)]
    lines = [
        "| Task | Metric | Classes | Train size | " + " | ".join(columns) + " |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        metric = "AUC" if row.metric == "roc_auc" else "ACC"
        cells = [_percent(row, name) for name in columns]
        lines.append(f"| {row.task} | {metric} | {row.classes} | {row.train_images} | " + " | ".join(cells) + " |")
    lines += ["", *(_tally(rows, *pair) for pair in PAIRS if all(name in columns for name in pair))]
    lines += ["", LEGEND]
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each task, column and seed: what the table was made of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "metric", "classes", "train_images", "column", "run", "score", "combination"])
    for row in rows:
        for column, scores in row.scores.items():
            mtl = row.combination if COLUMNS[column] == ("probe", "mtl") else ""
            for number, value in enumerate(scores):
                facts = [row.task, row.metric, row.classes, row.train_images]
                writer.writerow([*facts, column, number, f"{value:.6f}", mtl])
    return text.getvalue()


def draw(rows: Sequence[Row], path: Path) -> None:
    """A figure: for each task the mean of each column, and one standard deviation to either side."""
    from matplotlib.figure import Figure

    columns = [name for name in COLUMNS if any(row.scores[name] for row in rows)]
    figure = Figure(figsize=(1.6 + 1.3 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.7 / max(len(columns), 1)
    for number, name in enumerate(columns):
        kind, weights = COLUMNS[name]
        points = [(i, *mean_and_std(row.scores[name])) for i, row in enumerate(rows) if row.scores[name]]
        axes.errorbar(
            [i + (number - (len(columns) - 1) / 2) * width for i, _, _ in points],
            [100 * mean for _, mean, _ in points],
            yerr=[100 * std for _, _, std in points],
            fmt="o" if kind == "probe" else "s" if kind == "finetune" else "D",
            color=_COLOURS[weights],
            mfc=_COLOURS[weights] if kind == "probe" else "white",
            ms=5,
            capsize=2,
            label=name,
        )
    axes.set_xticks(range(len(rows)), [row.task for row in rows], rotation=20, ha="right")
    axes.set_ylabel("test score, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def write_tables(protocol: Protocol) -> list[Path]:
    """Writes table.md, table.csv and table.png to the run's folder."""
    rows = collect(protocol)
    paths = [protocol.out / name for name in ("table.md", "table.csv", "table.png")]
    paths[0].write_text(markdown(rows), "utf-8")
    paths[1].write_text(as_csv(rows), "utf-8")
    draw(rows, paths[2])
    return paths


def _percent(row: Row, column: str) -> str:
    scores = row.scores[column]
    if not scores:
        return ""
    mean, std = mean_and_std(scores)
    text = f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if len(scores) > 1 else "")
    for pair in PAIRS:
        if column in pair:
            other = row.scores[pair[1 - pair.index(column)]]
            if other and significant(scores, other) and mean > mean_and_std(other)[0]:
                text += " *"
    return text


def _tally(rows: Sequence[Row], first: str, second: str) -> str:
    both = [row for row in rows if row.scores[first] and row.scores[second]]
    better, much_better, much_worse = 0, 0, 0
    for row in both:
        of_first, of_second = row.scores[first], row.scores[second]
        gain = mean_and_std(of_second)[0] - mean_and_std(of_first)[0]
        better += gain > 0
        much_better += gain > 0 and significant(of_first, of_second)
        much_worse += gain < 0 and significant(of_first, of_second)
    return (
        f"{second} is better than {first} on {better} of {len(both)} tasks, significantly on {much_better}; "
        f"significantly worse on {much_worse}."
    )
