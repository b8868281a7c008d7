"""An evaluation of encoders as a table, as numbers for programs, and as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from mtdp.charts import in_table
from mtdp.evaluate import DRAWS, FEW, FIRST, NEIGHBOURS, RETRIEVAL, Evaluated, Measure, TaskEvaluation, few_name
from mtdp.run_state import write_text, writing_said

NAMES: Final = ("probe", *(few_name(each) for each in FEW), "k-NN", RETRIEVAL)
LEGEND: Final = (
    f"In percent, on the test split. probe: a linear SVM fitted on train and val, C by grouped cross-validation. "
    f"{few_name(1)}, ...: nearest class mean from so many groups of each class, mean ± standard deviation of {DRAWS} "
    f"draws. k-NN: {NEIGHBOURS} neighbours. {RETRIEVAL}: how many of the {FIRST} most similar images of other groups "
    "are of the same class. [low, high]: 95 % interval, by resampling whole groups (patients, slides or source images) "
    "of the test split. Balanced: mean of the accuracies within each class. A task on which the random network or the "
    "six colour numbers do as well as an encoder says nothing of encoders."
)


def markdown(found: Sequence[TaskEvaluation]) -> str:
    """A table for each task, and the differences between encoders with their intervals."""
    parts = ["# Encoders on labelled tasks"]
    for one in found:
        metric = "ROC AUC" if one.metric == "roc_auc" else "accuracy"
        parts.append(
            f"## {one.task}\n\n{metric}, {len(one.class_names)} classes; fitted on {one.fit_images} images of "
            f"{one.fit_groups} groups, judged on {one.test_images} images of {one.test_groups} groups."
        )
        names = [name for name in NAMES if any(name in encoder.measures for encoder in one.encoders)]
        lines = [f"| Encoder | {' | '.join(names)} | Balanced | C | Of each class |", "|---" * (len(names) + 4) + "|"]
        for encoder in one.encoders:
            cells = [_cell(encoder.measures.get(name)) for name in names]
            of_classes = ", ".join(
                f"{in_table(name)} {100 * value:.1f}"
                for name, value in zip(one.class_names, encoder.of_classes, strict=True)
            )
            facts = [f"{100 * encoder.balanced:.1f}", f"{encoder.c:g}", of_classes]
            lines.append(f"| {in_table(encoder.encoder)} | {' | '.join([*cells, *facts])} |")
        parts.append("\n".join(lines))
        differences = [_difference(first, second, names) for first, second in combinations(one.encoders, 2)]
        parts.append("Differences (points), with 95 % intervals of pairs:\n\n" + "\n".join(differences))
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return "too few groups"
    text = f"{100 * measure.score:.1f}" + (f" ± {100 * measure.spread:.1f}" if measure.spread else "")
    return text + (f" {_span(measure.interval)}" if measure.interval else "")


def _span(interval: tuple[float, float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _difference(first: Evaluated, second: Evaluated, names: Sequence[str]) -> str:
    told = []
    for name in names:
        if name in first.measures and name in second.measures:
            by, interval = first.measures[name].minus(second.measures[name])
            told.append(f"{name} {100 * by:+.1f}" + (f" {_span(interval)}" if interval else ""))
    return f"- {in_table(first.encoder)} over {in_table(second.encoder)}: {', '.join(told)}"


def as_csv(found: Sequence[TaskEvaluation]) -> str:
    """One line for each task, encoder and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "metric", "encoder", "measure", "score", "spread", "low", "high", "images", "groups"])
    for one in found:
        for encoder in one.encoders:
            for name, measure in encoder.measures.items():
                low, high = measure.interval or ("", "")
                row = [one.task, one.metric, encoder.encoder, name, measure.score, measure.spread, low, high]
                writer.writerow([*row, one.test_images, one.test_groups])
    return text.getvalue()


def as_json(found: Sequence[TaskEvaluation]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {
            "task": one.task,
            "metric": one.metric,
            "classes": list(one.class_names),
            "fit_images": one.fit_images,
            "fit_groups": one.fit_groups,
            "test_images": one.test_images,
            "test_groups": one.test_groups,
            "encoders": [
                {
                    "encoder": encoder.encoder,
                    "balanced_accuracy": encoder.balanced,
                    "class_accuracies": list(encoder.of_classes),
                    "c": encoder.c,
                    "measures": {
                        name: {"score": m.score, "spread": m.spread, "interval": m.interval}
                        for name, m in encoder.measures.items()
                    },
                }
                for encoder in one.encoders
            ],
        }
        for one in found
    ]


def draw(found: Sequence[TaskEvaluation], path: Path) -> None:
    """A panel for each task: every measure of every encoder, with its 95 % interval."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 2.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)
    for axes, one in zip(panels[:, 0], found, strict=True):
        width = 0.7 / len(one.encoders)
        names = [name for name in NAMES if any(name in encoder.measures for encoder in one.encoders)]
        for number, encoder in enumerate(one.encoders):
            points = [(i, encoder.measures[name]) for i, name in enumerate(names) if name in encoder.measures]
            spans = [m.interval or (m.score, m.score) for _, m in points]
            axes.errorbar(
                [i + (number - (len(one.encoders) - 1) / 2) * width for i, _ in points],
                [100 * m.score for _, m in points],
                yerr=[
                    [100 * max(m.score - low, 0) for (_, m), (low, _) in zip(points, spans, strict=True)],
                    [100 * max(high - m.score, 0) for (_, m), (_, high) in zip(points, spans, strict=True)],
                ],
                fmt="o",
                ms=5,
                capsize=2,
                color=colormaps["tab10"](number % 10),
                label=encoder.encoder,
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("%")
        axes.set_title(f"{one.task}: {one.test_images} test images of {one.test_groups} groups", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def write(found: Sequence[TaskEvaluation], out: Path) -> list[Path]:
    """Write evaluation.md, evaluation.csv and evaluation.png.

    Raises:
        UsageError: the system refuses it.
    """
    paths = [out / f"evaluation.{suffix}" for suffix in ("md", "csv", "png")]
    write_text(paths[0], markdown(found) + "\n![scores with their 95 % intervals](evaluation.png)\n")
    write_text(paths[1], as_csv(found))
    with writing_said(paths[2]):
        draw(found, paths[2])
    return paths
