"""By what a combination was chosen: the ranks of all of them on the val splits of the left-out tasks."""

from __future__ import annotations

from mtdp.protocol.cells import selection_cells
from mtdp.protocol.ranking import average_ranks, ranks
from mtdp.protocol.run import Protocol, chosen, chosen_overall, scores_on_val


def rank_table(protocol: Protocol) -> str:
    """Markdown: the rank and the mean score on val of each combination on each task, the average, and what was chosen.

    Empty where there is a single combination, or not all of them are scored yet.
    """
    combinations = protocol.config.combinations()
    cells = selection_cells(protocol.sets, protocol.evaluated, protocol.config)
    if len(combinations) == 1 or any(protocol.result(cell) is None for cell in cells if cell.kind == "select"):
        return ""
    scores = scores_on_val(protocol, "select")
    of_task = {task: ranks(values) for task, values in scores.items()}
    average = average_ranks(scores)
    lines = [
        "Ranks on val: of each combination by its mean score over the seeds (in brackets, in percent); 1 is best.",
        "",
        f"| Combination | {' | '.join(of_task)} | Average |",
        "|---" * (len(of_task) + 2) + "|",
    ]
    for name in sorted(average, key=lambda name: average[name]):
        cells_of = [f"{of_task[task][name]:g} ({100 * scores[task][name]:.2f})" for task in of_task]
        lines.append(f"| {name} | {' | '.join(cells_of)} | {average[name]:.2f} |")
    judges = [f"{task} by {chosen(protocol, task).name}" for task in of_task]
    best = f"Best over all: {chosen_overall(protocol).name}. Each task is judged by the best over the other tasks: "
    lines += ["", f"{best}{'; '.join(judges)}."]
    return "\n".join(lines) + "\n"
