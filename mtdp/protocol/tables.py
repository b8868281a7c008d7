"""The rows of a protocol as the paper's result table: in Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from mtdp.charts import in_table
from mtdp.metrics import percentiles
from mtdp.protocol.rank_table import rank_table
from mtdp.protocol.ranking import mean_and_std, significant
from mtdp.protocol.rows import COLUMNS, Row, collect
from mtdp.protocol.run import Protocol
from mtdp.run_state import write_text, writing_said

LEGEND: Final = (
    "Test scores in percent. FE: features and a linear SVM; FT: fine-tuning; colour: six numbers, the mean and the "
    "deviation of red, green and blue, in place of features; random: a network that was never trained; start: the "
    "weights that pre-training started from; MTL: multi-task pre-trained without the task and those related to it. "
    "mean ± sample standard deviation over the seeds. `*`: better than its counterpart by more than twice the larger "
    "standard deviation (the paper's rule, not a test). [low, high]: 95 % interval of the mean, by resampling whole "
    "groups of the test split (patients, slides or source images). A task on which colours or random features do as "
    "well as the others says nothing of encoders."
)
# Which columns are held against each other.
PAIRS: Final = (("FE start", "FE MTL"), ("FT start", "FT MTL"))
_COLOURS: Final = {"start": "#4c72b0", "mtl": "#c44e52", "random": "#8c8c8c", "colour": "#ccb974"}


def markdown(rows: Sequence[Row]) -> str:
    """The tables in percent: scores with intervals, what the 2-sigma rule says of them, and the classes."""
    columns = _columns(rows)
    head = ["Task", "Metric", "Classes", "Train size", *columns, "Test images (groups)", "Seeds", "Combination"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        metric = "AUC" if row.metric == "roc_auc" else "ACC"
        facts = [row.task, metric, str(row.classes), str(row.train_images)]
        after = [f"{row.test_images} ({row.test_groups})", str(row.seeds), _combination(row)]
        lines.append(f"| {' | '.join([*facts, *(_percent(row, name) for name in columns), *after])} |")
    for pair in PAIRS:
        if all(name in columns for name in pair):
            lines += ["", _tally(rows, *pair), *_gains(rows, *pair)]
    lines += ["", LEGEND]
    if any(row.judgements for row in rows):
        lines += ["", "Accuracy within each class (recall), mean over the seeds; balanced: their mean.", ""]
        lines += ["| Task | Column | Balanced | Of each class |", "|---|---|---|---|"]
        lines += [_classes_line(row, name) for row in rows for name in columns if name in row.judgements]
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[Row]) -> list[str]:
    return [name for name in COLUMNS if any(row.scores.get(name) for row in rows)]


def _combination(row: Row) -> str:
    """Of FE MTL; that of joint training beside it where it differs."""
    joint = row.combinations.get("Joint", row.combination)
    return row.combination + (f" (Joint: {joint})" if joint != row.combination else "")


def _classes_line(row: Row, column: str) -> str:
    judgement = row.judgements[column]
    of_classes = ", ".join(
        f"{in_table(name)} {100 * value:.1f}" for name, value in zip(row.class_names, judgement.of_classes, strict=True)
    )
    return f"| {row.task} | {column} | {100 * fmean(judgement.balanced):.1f} | {of_classes} |"


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each task, column and seed: what the table was made of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["task", "metric", "classes", "train_images", "column", "run", "score", "combination"]
    writer.writerow([*head, "test_images", "test_groups", "low", "high", "balanced_accuracy"])
    for row in rows:
        for column, scores in row.scores.items():
            combination = row.combinations.get(column, row.combination if column == "FE MTL" else "")
            judgement = row.judgements.get(column)
            low, high = (
                (f"{value:.6f}" for value in judgement.interval) if judgement and judgement.interval else ("", "")
            )
            for number, value in enumerate(scores):
                facts = [row.task, row.metric, row.classes, row.train_images, column, number, f"{value:.6f}"]
                balanced = f"{judgement.balanced[number]:.6f}" if judgement else ""
                writer.writerow([*facts, combination, row.test_images, row.test_groups, low, high, balanced])
    return text.getvalue()


def draw(rows: Sequence[Row], path: Path) -> None:
    """A figure: for each task the mean of each column, and its 95 % interval, or one standard deviation without it."""
    from matplotlib.figure import Figure

    columns = _columns(rows)
    figure = Figure(figsize=(1.6 + 1.3 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.7 / max(len(columns), 1)
    for number, name in enumerate(columns):
        kind, weights = COLUMNS[name]
        points = [(i, *_mean_and_bar(row, name)) for i, row in enumerate(rows) if row.scores.get(name)]
        axes.errorbar(
            [i + (number - (len(columns) - 1) / 2) * width for i, _, _, _ in points],
            [100 * mean for _, mean, _, _ in points],
            yerr=[[100 * below for _, _, below, _ in points], [100 * above for _, _, _, above in points]],
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
    if columns:
        axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def _mean_and_bar(row: Row, column: str) -> tuple[float, float, float]:
    mean, std = mean_and_std(row.scores[column])
    judgement = row.judgements.get(column)
    if judgement is None or judgement.interval is None:
        return mean, std, std
    return mean, max(mean - judgement.interval[0], 0.0), max(judgement.interval[1] - mean, 0.0)


def write_tables(protocol: Protocol) -> list[Path]:
    """Write table.md, table.csv and table.png to the run's folder."""
    rows = collect(protocol)
    paths = [protocol.out / name for name in ("table.md", "table.csv", "table.png")]
    figure = "![test scores with their 95 % intervals](table.png)"
    parts = [_title(protocol), markdown(rows), figure, rank_table(protocol)]
    write_text(paths[0], "\n\n".join(part.strip() for part in parts if part) + "\n")
    write_text(paths[1], as_csv(rows))
    with writing_said(paths[2]):
        draw(rows, paths[2])
    return paths


def _title(protocol: Protocol) -> str:
    """What the table is of, so that the file speaks for itself."""
    config, cells = protocol.config, protocol.cells()
    missing = sum(protocol.result(cell) is None for cell in cells)
    count = len(config.combinations())
    facts = [
        f"{config.arch} from {config.init}",
        f"{config.iterations} iterations of {config.batch_size} images of {config.image_px} px",
        f"{config.seeds} seed{'s' * (config.seeds != 1)} of {count} combination{'s' * (count != 1)}",
        f"{len(protocol.evaluated)} of the pool's {len(protocol.tasks)} tasks left out in {len(protocol.sets)} sets",
    ]
    lines = ["# Leave-one-task-out: test scores of tasks that were not trained on", "", f"{'; '.join(facts)}."]
    if missing:
        lines += ["", f"**Not finished: {missing} of {len(cells)} cells are missing.**"]
    return "\n".join(lines)


def _percent(row: Row, column: str) -> str:
    scores = row.scores.get(column, ())
    if not scores:
        return ""
    mean, std = mean_and_std(scores)
    text = f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if len(scores) > 1 else "")
    for pair in PAIRS:
        if column in pair:
            other = row.scores.get(pair[1 - pair.index(column)])
            if other and significant(scores, other) and mean > mean_and_std(other)[0]:
                text += " *"
    judgement = row.judgements.get(column)
    if judgement and judgement.interval:
        text += f" [{100 * judgement.interval[0]:.1f}, {100 * judgement.interval[1]:.1f}]"
    if 1 < len(scores) < row.seeds:
        text += f" ({len(scores)} seeds)"
    return text


def _tally(rows: Sequence[Row], first: str, second: str) -> str:
    both = [row for row in rows if row.scores.get(first) and row.scores.get(second)]
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


def _gains(rows: Sequence[Row], first: str, second: str) -> list[str]:
    """By how much the second column is better on each task: both are judged on the same resamples."""
    told = []
    for row in rows:
        one, other = row.judgements.get(first), row.judgements.get(second)
        if one and other:
            gain = mean_and_std(row.scores[second])[0] - mean_and_std(row.scores[first])[0]
            span = percentiles(other.replicates - one.replicates)
            told.append(
                f"{row.task} {100 * gain:+.1f}" + (f" [{100 * span[0]:+.1f}, {100 * span[1]:+.1f}]" if span else "")
            )
    return [f"{second} minus {first}, in points, with the 95 % interval of pairs: {', '.join(told)}."] if told else []
