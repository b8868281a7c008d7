"""The paper's protocol: sets, ranks, the 2-sigma rule, cells that resume, and the table."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import warm
from mtdp.backbones import build_backbone
from mtdp.checkpoint import load_checkpoint
from mtdp.choices import protocol_choices
from mtdp.errors import CheckpointError, MtdpError, UsageError
from mtdp.pretrain import pretrain
from mtdp.protocol.cells import Cell, cost, judgement_cells, selection_cells
from mtdp.protocol.config import ProtocolConfig, evaluated_tasks, finetuned_tasks, left_out_sets
from mtdp.protocol.estimate import say_plan
from mtdp.protocol.rank_table import rank_table
from mtdp.protocol.ranking import choose, mean_and_std, ranks, significant
from mtdp.protocol.rows import Judgement, Row, collect, confusions_of
from mtdp.protocol.run import Protocol, _trained, chosen, run_protocol, scores_on_val, training_folder
from mtdp.protocol.settings import hold_to_settings
from mtdp.protocol.tables import as_csv, draw, markdown, write_tables
from mtdp.run_state import write_json
from mtdp.tasks import Task, load_pool
from mtdp.transfer import Extractor, ProbeResult

Make = Callable[..., Path]

ARCH = "timm:test_resnet"
MAIN = "from mtdp.cli import main; main()"
TINY = ProtocolConfig(
    arch=ARCH,
    init="random",
    lrs=(1e-2,),
    head_lr_multipliers=(1.0,),
    warmups=(0,),
    seeds=1,
    iterations=2,
    batch_size=4,
    image_px=32,
    precision="fp32",
    adaptation_batches=0,
    finetune_lrs=(1e-3,),
    finetune_epochs=1,
)
GRID = replace(TINY, lrs=(1e-2, 1e-3), warmups=(0, 1))


@pytest.fixture
def tasks(tmp_path: Path, make_task: Make) -> tuple[Task, ...]:
    """Four tasks, of which `a` and `b` are related."""
    lines = []
    for name in ("a", "b", "c", "d"):
        make_task(tmp_path / name, ("blue", "red"), per_class=4)
        together = '\nleave_out_with = ["b"]' if name == "a" else ""
        lines.append(f'[[task]]\nname = "{name}"\npath = "{name}"{together}\n')
    (tmp_path / "pool.toml").write_text("".join(lines), "utf-8")
    return load_pool(tmp_path / "pool.toml")


def test_related_tasks_are_left_out_together_whoever_of_them_says_so(tasks: tuple[Task, ...]) -> None:
    assert left_out_sets(tasks, tasks) == (("a", "b"), ("c",), ("d",))
    only_b = evaluated_tasks(tasks, replace(TINY, evaluate=("b",)))
    assert left_out_sets(tasks, only_b) == (("a", "b"),), "a is not trained on, though it is not judged"


def test_a_pool_of_related_tasks_only_is_refused(tasks: tuple[Task, ...]) -> None:
    with pytest.raises(UsageError, match="no task is left"):
        left_out_sets(tasks[:2], tasks[:2])


def test_names_that_are_not_in_the_pool_are_refused(tasks: tuple[Task, ...]) -> None:
    with pytest.raises(UsageError, match="'e'"):
        evaluated_tasks(tasks, replace(TINY, evaluate=("e",)))
    with pytest.raises(UsageError, match="'c' is to be fine-tuned, but not evaluated"):
        finetuned_tasks(tasks[:1], replace(TINY, finetune=("c",)))


def test_the_papers_grid_has_24_combinations_a_network() -> None:
    combinations = ProtocolConfig().combinations()
    assert len(combinations) == 24 == len({c.name for c in combinations})
    assert [(c.lr, c.head_lr_multiplier, c.warmup) for c in combinations[:4]] == [
        *((1e-3, tau, 5000) for tau in (1.0, 5.0, 10.0)),
        (1e-4, 1.0, 5000),
    ], "of equals the first is taken"


def test_every_combination_and_seed_is_trained_once_for_each_set(tasks: tuple[Task, ...]) -> None:
    config = replace(GRID, seeds=3)
    cells = selection_cells(left_out_sets(tasks, tasks), tasks, config)
    assert len(cells) == len(set(cells)) == 4 * 3 * (3 + 4)  # combinations x seeds x (sets + tasks)
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cost(cell, tasks, config) > 0 for cell in cells)


def test_without_a_choice_the_val_split_is_not_looked_at(tasks: tuple[Task, ...]) -> None:
    assert {cell.kind for cell in selection_cells(left_out_sets(tasks, tasks), tasks, TINY)} == {"pretrain"}


SCORES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), min_size=1)


@given(SCORES)
def test_ranks_are_those_of_the_scores(scores: dict[str, float]) -> None:
    found = ranks(scores)
    assert sum(found.values()) == pytest.approx(len(scores) * (len(scores) + 1) / 2)
    for one in scores:
        for other in scores:
            assert (scores[one] > scores[other]) == (found[one] < found[other])


def test_a_task_has_no_say_in_its_own_combination() -> None:
    scores = {"t": {"x": 0.9, "y": 0.1}, "u": {"x": 0.2, "y": 0.3}, "v": {"x": 0.5, "y": 0.6}}
    assert choose(scores, "t") == "y"
    # Ranks over the others: u says y, t says x: a tie, and the first is taken.
    assert choose(scores, "v") == "x"
    with pytest.raises(UsageError, match="only evaluated task"):
        choose({"t": scores["t"]}, "t")


def test_a_training_that_diverged_ranks_last() -> None:
    assert choose({"t": {"x": 0.1, "y": 0.2}, "u": {"x": float("-inf"), "y": 0.0}}, "t") == "y"


def test_the_2_sigma_rule_gives_the_papers_tallies() -> None:
    """Thesis, chapter 5: DenseNet-121, ImageNet features (deterministic) against multi-task ones (mean, std)."""
    table = {
        "BoMa": (71.52, 75.05, 0.70),
        "MoLb": (75.68, 77.63, 3.27),
        "HuLba": (78.01, 79.73, 2.27),
        "Lung": (90.54, 91.40, 0.32),
        "Nec": (99.82, 99.61, 0.20),
        "PrPa": (88.22, 88.77, 0.21),
        "CeIn": (96.97, 98.05, 0.13),
        "Glom": (99.20, 99.40, 0.02),
        "Br2": (93.17, 94.40, 0.18),
        "Br1": (95.66, 96.42, 0.17),
    }
    found = set()
    for task, (imagenet, mean, std) in table.items():
        spread = std * (3 / 2) ** 0.5  # three values mean - s, mean, mean + s have the sample deviation s
        three = (mean - std, mean, mean + std)
        assert mean_and_std(three) == pytest.approx((mean, std)), spread
        if significant((imagenet,), three):
            found.add(task)
    assert found == {"BoMa", "Lung", "PrPa", "CeIn", "Glom", "Br2", "Br1"}  # 9 of 10 better, 7 significantly


def test_twice_the_deviation_itself_is_not_more_than_it() -> None:
    assert not significant((-1.0, 0.0, 1.0), (2.0, 2.0))
    assert significant((-1.0, 0.0, 1.0), (2.01, 2.01))


def test_two_single_scores_never_differ_significantly() -> None:
    assert not significant((0.1,), (0.9,))


def test_a_run_fills_every_cell_and_the_table(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, evaluate=("a", "c"), finetune=("c",), scratch=True, joint=True, seeds=2)
    protocol = Protocol(tasks, config, tmp_path / "run")
    run_protocol(protocol)
    assert all(protocol.result(cell) is not None for cell in protocol.cells())
    trained = json.loads((tmp_path / "run/cells/pretrain/a-b/mtl/lr0.01-tau1-warmup0/seed-0.json").read_text())
    assert trained["tasks"] == ["c", "d"]
    paths = write_tables(protocol)
    text = paths[0].read_text()
    assert "| a | AUC | 2 | 16 |" in text
    assert "FT MTL is better than FT start on" in text
    rows = paths[1].read_text().splitlines()
    assert len([row for row in rows if row.startswith("c,")]) == 2 + 1 + 2 + 1 + 2 + 2 + 2 + 2  # each column's runs
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_finished_cell_is_not_computed_again(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    run_protocol(protocol)
    said: list[str] = []
    run_protocol(protocol, said.append)
    assert said == []
    cell = judgement_cells(protocol.evaluated, (), protocol.config)[0]
    protocol.result_path(cell).unlink()
    run_protocol(protocol, said.append)
    assert [line.split("] ")[1] for line in said] == [cell.name]


def test_the_choice_is_by_val_and_the_judgement_by_test(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(GRID, evaluate=("c", "d"), lrs=(1e-3,)), tmp_path / "run")
    first, second = protocol.config.combinations()
    for cell in selection_cells(protocol.sets, protocol.evaluated, protocol.config):
        if cell.kind == "select":
            wins = (cell.subject == "c") == (cell.combination == first)  # c says the first, d says the second
            write_json(protocol.result_path(cell), {"score": 0.9 if wins else 0.1})
        else:
            write_json(protocol.result_path(cell), {})
    assert scores_on_val(protocol, "select")["c"] == {first.name: 0.9, second.name: 0.1}
    assert chosen(protocol, "c") == second
    assert chosen(protocol, "d") == first


def test_a_run_of_other_settings_is_refused(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = replace(TINY, evaluate=("c", "d"))
    run_protocol(Protocol(tasks, config, run))
    with pytest.raises(UsageError, match="other settings: iterations"):
        run_protocol(Protocol(tasks, replace(config, iterations=3), run))
    run_protocol(Protocol(tasks, replace(config, seeds=2), run))  # a second seed adds to the first
    with pytest.raises(UsageError, match="lrs, seeds"):
        run_protocol(Protocol(tasks, replace(config, seeds=3, lrs=(1e-2, 1e-3)), run))


def test_a_damaged_result_is_named(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, TINY, tmp_path / "run")
    path = protocol.result_path(Cell("probe", "a", "start", None, 0))
    path.parent.mkdir(parents=True)
    path.write_text('{"score": 0.')
    with pytest.raises(CheckpointError, match=r"seed-0\.json is damaged"):
        protocol.result(Cell("probe", "a", "start", None, 0))


def test_a_killed_run_goes_on_and_two_processes_share_the_cells(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    pool = tasks[0].path.parent / "pool.toml"
    arguments = ["loto", "--pool", str(pool), "--out", str(out)]
    arguments += ["--arch", ARCH, "--init", "random", "--evaluate", "c", "--evaluate", "d"]
    arguments += ["--lr", "1e-2", "--head-lr-multiplier", "1", "--warmup", "0", "--seeds", "2", "--iterations", "2"]
    arguments += ["--batch-size", "4", "--image-px", "32", "--adaptation-batches", "0", "--precision", "fp32"]
    first = warm.start(MAIN, *arguments, imports=warm.TRAINING)
    done = out / "cells/pretrain/c/mtl/lr0.01-tau1-warmup0/seed-0.json"
    while not done.exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = done.stat().st_mtime_ns
    both = [warm.start(MAIN, *arguments, imports=warm.TRAINING) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert done.stat().st_mtime_ns == before, "a cell that was done is computed again"
    computed = [line.split("] ")[1] for _, said in outputs for line in said.splitlines() if line.startswith("[")]
    assert len(computed) == len(set(computed)), "a cell was computed twice"
    assert "| d | AUC |" in outputs[0][0]


def test_the_table_marks_what_differs() -> None:
    scores = {"FE start": (0.70,), "FE MTL": (0.80, 0.81, 0.82), "FT start": (0.9, 0.8), "FT MTL": (0.91, 0.82)}
    every = {"Scratch": (), "FE random": (), "Joint": (), **scores}
    row = Row("blood", "accuracy", 120, 4, every, "lr0.001-tau1-warmup0")
    text = markdown([row])
    assert (
        "| blood | ACC | 4 | 120 | 70.00 | 81.00 ± 1.00 * | 85.00 ± 7.07 (2 seeds) | 86.50 ± 6.36 (2 seeds) "
        "| 0 (0) | 3 | lr0.001-tau1-warmup0 |" in text
    )
    assert "FE MTL is better than FE start on 1 of 1 tasks, significantly on 1; significantly worse on 0." in text
    assert "Scratch" not in text.splitlines()[0]
    worse = Row("lung", "accuracy", 9, 2, {"FE start": (0.70,), "FE MTL": (0.6, 0.7)}, "")
    text = markdown([row, worse])
    assert "FE MTL is better than FE start on 1 of 2 tasks, significantly on 1; significantly worse on 0." in text
    assert as_csv([row]).splitlines()[1:3] == [
        "blood,accuracy,4,120,FE start,0,0.700000,,0,0,,,",
        "blood,accuracy,4,120,FE MTL,0,0.800000,lr0.001-tau1-warmup0,0,0,,,",
    ]


def test_the_bars_of_the_figure_are_the_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars, errorbar = [], Axes.errorbar

    def recording(axes: Axes, x: Any, y: Any, **options: Any) -> Any:  # type: ignore[explicit-any]
        bars.append((y, options["yerr"]))
        return errorbar(axes, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", recording)
    judged = {"FE start": Judgement(np.linspace(0.5, 0.7, 1001), (0.6,), ())}
    row = Row("blood", "accuracy", 9, 2, {"FE start": (0.66,), "FE MTL": (0.6, 0.8)}, "", judgements=judged)
    draw([row], tmp_path / "a.png")
    (start, of_start), (mtl, of_mtl) = bars
    assert (start, mtl) == (pytest.approx([66.0]), pytest.approx([70.0]))
    np.testing.assert_allclose(of_start, [[66.0 - 50.5], [69.5 - 66.0]])
    np.testing.assert_allclose(of_mtl, [[20 / 2**0.5], [20 / 2**0.5]])  # without images: one deviation


def test_two_columns_are_compared_on_the_same_resamples() -> None:
    """Each is uncertain by 20 points, their difference by 4."""
    start, mtl = np.linspace(0.5, 0.7, 1001), np.linspace(0.6, 0.76, 1001)
    judged = {"FE start": Judgement(start, (0.6,), ()), "FE MTL": Judgement(mtl, (0.68,), ())}
    row = Row("blood", "accuracy", 9, 2, {"FE start": (0.6,), "FE MTL": (0.68,)}, "", judgements=judged)
    lines = markdown([row]).splitlines()
    assert "FE MTL minus FE start, in points, with the 95 % interval of pairs: blood +8.0 [+6.1, +9.9]." in lines


def test_an_unfinished_run_has_a_table_of_what_is_there(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path)
    write_json(protocol.result_path(Cell("probe", "c", "start", None, 0)), {"score": 0.5})
    assert collect(protocol)[0].scores["FE start"] == (0.5,)
    assert "50.00" in markdown(collect(protocol))


def plan(protocol: Protocol) -> str:
    """What --dry-run prints, without the three steps that it times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtdp.protocol.estimate._timed", lambda config: 100.0)
        said: list[str] = []
        say_plan(protocol, said.append)
    return said[-1]


def with_related(tasks: tuple[Task, ...], name: str, other: str) -> tuple[Task, ...]:
    return tuple(replace(t, leave_out_with=frozenset({other})) if t.name == name else t for t in tasks)


def one_result(protocol: Protocol) -> None:
    """The settings, written down, and a cell that is done."""
    hold_to_settings(protocol.tasks, protocol.config, protocol.out)
    write_json(protocol.result_path(protocol.cells()[0]), {"checkpoint": "", "tasks": []})


def test_a_relation_that_is_added_makes_it_another_run(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    one_result(protocol)
    with pytest.raises(UsageError, match="other settings: pool"):
        plan(replace(protocol, tasks=with_related(tasks, "d", "c")))


def test_the_order_the_groups_and_the_splits_of_the_pool_count(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    one_result(protocol)
    d = tasks[3]
    regrouped = tuple(replace(sample, group=f"x{sample.group}") for sample in d.samples["train"])
    last = d.samples["val"][-1]
    moved = {"train": d.samples["train"], "val": d.samples["val"][:-1], "test": (last, *d.samples["test"])}
    for other in (
        (*tasks[:2], d, tasks[2]),
        (*tasks[:3], replace(d, samples={**d.samples, "train": regrouped})),
        (*tasks[:3], replace(d, samples=moved)),
    ):
        with pytest.raises(UsageError, match="other settings: pool"):
            plan(replace(protocol, tasks=other))
    assert "cells are missing" in plan(protocol)


def test_after_joint_training_what_is_evaluated_may_not_grow(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, evaluate=("c",))
    one_result(Protocol(tasks, config, tmp_path / "run"))
    plan(Protocol(tasks, replace(config, evaluate=("c", "d")), tmp_path / "run"))
    plan(Protocol(tasks, replace(config, evaluate=("c", "d"), joint=True), tmp_path / "run"))
    (tmp_path / "run/pretrain/joint").mkdir(parents=True)  # its network was trained without c's val, but with d's
    for joint in (True, False):
        with pytest.raises(UsageError, match="other settings: evaluate"):
            plan(Protocol(tasks, replace(config, evaluate=("c", "d"), joint=joint), tmp_path / "run"))


def test_a_setting_that_did_not_exist_then_had_its_default(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    one_result(protocol)
    path = tmp_path / "run/protocol.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in written.items() if name not in ("warmup_lr", "pool")}))
    plan(protocol)
    with pytest.raises(UsageError, match="other settings: warmup_lr"):
        plan(replace(protocol, config=replace(protocol.config, warmup_lr=2e-3)))


def test_without_results_a_mistake_may_be_corrected(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    wrong = Protocol(tasks, replace(TINY, evaluate=("c",), init="imagnet"), tmp_path / "run")
    with pytest.raises(UsageError, match="no weights 'imagnet'"):
        run_protocol(wrong)
    assert not (tmp_path / "run").exists()
    hold_to_settings(tasks, replace(wrong.config, init="mtdp"), wrong.out)  # of which there is none
    hold_to_settings(tasks, replace(TINY, evaluate=("c",)), wrong.out)
    assert json.loads((tmp_path / "run/protocol.json").read_text())["init"] == "random"


def test_the_starting_weights_count_and_not_the_spelling_of_their_path(
    tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the settings, and of a training that was stopped half-way, which is compared when it goes on."""
    setting = TINY.pretraining(TINY.combinations()[0], 0)
    for seed, name in enumerate(("start", "other")):
        pretrain(tasks, replace(setting, seed=seed, iterations=1), tmp_path / name, quiet=True)
    weights = tmp_path / "start/checkpoint.safetensors"
    config = replace(TINY, evaluate=("c",), init=str(tmp_path / "start"))
    protocol = Protocol(tasks, config, tmp_path / "run")
    training = protocol.cells()[0]
    begun = replace(protocol.config.pretraining(TINY.combinations()[0], 0), iterations=1)
    pretrain([task for task in tasks if task.name != "c"], begun, training_folder(protocol, training), quiet=True)
    hold_to_settings(tasks, config, protocol.out)
    monkeypatch.chdir(tmp_path)
    for init in ("start", "./start", str(weights)):
        run_protocol(replace(protocol, config=replace(config, init=init)))
    assert protocol.result(training) is not None
    weights.write_bytes((tmp_path / "other/checkpoint.safetensors").read_bytes())
    for init in (config.init, "start", "other"):
        with pytest.raises(UsageError, match=r"other settings: init$"):
            run_protocol(replace(protocol, config=replace(config, init=init)))


def test_settings_of_before_digests_are_compared_by_name(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    for name in ("one.pth", "two.pth"):
        torch.save(build_backbone(ARCH).trunk.state_dict(), tmp_path / name)
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",), init=str(tmp_path / "one.pth")), tmp_path / "run")
    one_result(protocol)
    path = tmp_path / "run/protocol.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in written.items() if name != "init_sha256"}))
    plan(protocol)
    with pytest.raises(UsageError, match="other settings: init"):
        plan(replace(protocol, config=replace(protocol.config, init=str(tmp_path / "two.pth"))))


def test_what_would_end_a_run_after_its_trainings_is_refused_before_them(
    tasks: tuple[Task, ...], tmp_path: Path
) -> None:
    no_val = tuple(replace(task, samples={**task.samples, "val": ()}) for task in tasks)
    one_group = tuple(
        replace(task, samples={**task.samples, "train": tuple(replace(s, group="g") for s in task.samples["train"])})
        for task in tasks
    )
    cases: list[tuple[tuple[Task, ...], ProtocolConfig, str]] = [
        (tasks, replace(GRID, evaluate=("c",)), "'c' is the only evaluated task"),
        (no_val, TINY, "no task of the pool has val and test"),
        (one_group, GRID, "task 'a', train: cross-validation needs two groups"),
        (tasks, replace(TINY, evaluate=("e",)), "no task 'e'"),
        (tuple(replace(t, name="joint") if t.name == "c" else t for t in tasks), replace(TINY, joint=True), "'joint'"),
    ]
    for number, (pool, config, words) in enumerate(cases):
        protocol = Protocol(pool, config, tmp_path / str(number))
        for begin in (plan, run_protocol):
            with pytest.raises(MtdpError, match=words):
                begin(protocol)
        assert not protocol.out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finetune_lrs": (0.0,)}, "lr is 0"),
        ({"finetune_epochs": 0}, "epochs is 0"),
        ({"finetune_lrs": (1e-3, 0.001)}, "finetune_lrs: one was given twice"),
        ({"lrs": (1e-3, 1e-3)}, "lrs: one was given twice"),
        ({"warmups": (0, 0)}, "warmups: one was given twice"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_wrong_usage(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_torchrun_is_refused(tasks: tuple[Task, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="started as 2 processes"):
        run_protocol(Protocol(tasks, TINY, tmp_path / "run"))


def test_a_dry_run_reads_what_a_running_one_wrote(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    metrics = training_folder(protocol, protocol.cells()[0]) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"phase": "training", "images_per_s": 7.5}\n{"phase": "trai')
    assert "at 7.5 images/s (median of the trainings so far)" in plan(protocol)
    for cell in protocol.cells():
        write_json(protocol.result_path(cell), {})
    assert plan(protocol) == f"all {len(protocol.cells())} cells are done"


def test_a_network_that_diverged_in_its_last_step_has_no_score(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(TINY, evaluate=("c",), lrs=(1e30,), iterations=1, joint=True, finetune=("c",))
    protocol = Protocol(tasks, replace(config, finetune_lrs=(1e30,)), tmp_path / "run")
    run_protocol(protocol)
    for cell in judgement_cells(protocol.evaluated, protocol.finetuned, protocol.config):
        found = protocol.result(cell)
        assert found is not None
        assert (found["score"] is None) == (cell.kind != "probe" or cell.weights == "mtl"), cell.name
        assert (found["score"] is None) == found.get("diverged", False)
    (row,) = collect(protocol)
    assert row.scores["FE MTL"] == row.scores["FT start"] == row.scores["Joint"] == ()
    assert len(row.scores["FE start"]) == 1
    write_tables(protocol)


def test_joint_training_is_chosen_by_the_tasks_own_val(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    config = replace(GRID, evaluate=("c", "d"), lrs=(1e-3,), joint=True)
    protocol = Protocol(tasks, config, tmp_path / "run")
    first, second = protocol.config.combinations()
    for cell in protocol.cells():
        if cell.kind == "joint-select":
            wins = (cell.subject == "c") == (cell.combination == first)  # c does best with the first, d with the second
            write_json(protocol.result_path(cell), {"score": 0.9 if wins else 0.1})
        else:
            write_json(protocol.result_path(cell), {})
    assert chosen(protocol, "c", joint=True) == first
    assert chosen(protocol, "d", joint=True) == second


def test_joint_training_sees_train_alone_of_what_it_is_judged_on(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",), joint=True), tmp_path / "run")
    run_protocol(protocol)
    cell = next(cell for cell in protocol.cells() if cell.subject == "joint")
    _, info = load_checkpoint(training_folder(protocol, cell))
    images = {name: told["images"] for name, told in info.training["tasks"].items()}
    assert images == {"a": 16, "b": 16, "c": 8, "d": 16}


def test_without_a_choice_the_first_seed_is_whole_before_the_second_begins(tasks: tuple[Task, ...]) -> None:
    (cells,) = Protocol(tasks, replace(TINY, seeds=2), Path()).phases()
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.kind for cell in cells if cell.seed == 0} == {"pretrain", "probe"}
    first = next(number for number, cell in enumerate(cells) if cell.kind == "probe")
    assert all(cell.kind == "pretrain" for cell in cells[:first])
    selection, judgement = Protocol(tasks, replace(GRID, seeds=2), Path()).phases()
    assert {cell.kind for cell in selection} == {"pretrain", "select"}
    assert {cell.kind for cell in judgement} == {"probe"}


def test_what_was_chosen_where_the_paper_is_silent_is_written_down(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    hold_to_settings(tasks, TINY, tmp_path)
    choices = json.loads((tmp_path / "protocol.json").read_text())["choices"]
    assert choices == protocol_choices(TINY)
    told = choices["pre-training"]["lr0.01-tau1-warmup0"]
    assert "no weight decay" in told["optimiser"]
    assert told["batch norm"].startswith("not adapted")
    assert told["momentum after the warm-up"] == "there was no warm-up"
    assert "ranks" not in choices["transfer"], "a single combination is not ranked"
    assert "fine-tuning" not in choices


def test_ctrl_c_leaves_a_table_and_says_how_to_go_on(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    """As a process of its own, in its first training; loto has no --resume, the same command goes on."""
    out = tmp_path / "run"
    arguments = ["loto", "--out", str(out), "--pool", str(tasks[0].path.parent / "pool.toml")]
    arguments += ["--arch", ARCH, "--init", "random"]
    arguments += ["--evaluate", "c", "--lr", "1e-6", "--head-lr-multiplier", "1", "--warmup", "0", "--seeds", "1"]
    arguments += ["--iterations", "100000", "--batch-size", "2", "--image-px", "32", "--precision", "fp32"]
    process = warm.start(MAIN, *arguments, imports=warm.TRAINING)
    metrics = out / "pretrain/c/lr1e-06-tau1-warmup0/seed-0/metrics.jsonl"
    while not metrics.is_file() or not metrics.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "hint: give the same command again: it goes on from there"
    assert (out / "table.md").is_file()


def test_a_training_that_is_done_keeps_its_checkpoint_only(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    run_protocol(protocol)
    cell = protocol.cells()[0]
    folder = training_folder(protocol, cell)
    kept = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert kept == ["checkpoint.safetensors", "metrics.jsonl"]
    before = (folder / "checkpoint.safetensors").stat().st_mtime_ns
    protocol.result_path(cell).unlink()  # as if the process had been killed just before it
    run_protocol(protocol)
    assert protocol.result(cell) is not None
    assert (folder / "checkpoint.safetensors").stat().st_mtime_ns == before, "trained again"
    setting = protocol.config.pretraining(protocol.config.combinations()[0], 0)
    assert _trained(folder, setting)
    assert not _trained(folder, replace(setting, iterations=3)), "a checkpoint on the way is no training that is done"


def test_the_starting_weights_are_judged_at_the_side_of_the_others(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    """A run to start from was trained at 64 px; the table's columns are all at --image-px."""
    setting = TINY.pretraining(TINY.combinations()[0], 0)
    pretrain(tasks, replace(setting, image_px=64, iterations=1), tmp_path / "start", quiet=True)
    seen: list[tuple[str, int]] = []

    def look(extractor: Extractor, task: Task, *args: object, **options: object) -> ProbeResult:
        if isinstance(extractor, Extractor):
            seen.append((extractor.description, extractor.preprocessing.image_px))
        return ProbeResult(task.name, "", task.metric, 0.5, 1.0, {}, {}, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtdp.protocol.run.probe_task", look)
        config = replace(TINY, evaluate=("c",), init=str(tmp_path / "start"))
        run_protocol(Protocol(tasks, config, tmp_path / "run"))
    assert {px for _, px in seen} == {32}
    assert len(seen) == 3  # of a network; the colours have no side


def test_every_row_tells_its_test_images_groups_seeds_combination_and_interval(
    tasks: tuple[Task, ...], tmp_path: Path
) -> None:
    """Two seeds on 8 test images of 2 groups; one seed gets all right, the other those of the first group."""
    tasks = tuple(replace(task, samples={**task.samples, "val": task.samples["val"][:-1]}) for task in tasks)
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",), seeds=2), tmp_path)
    test = protocol.evaluated[0].of(("test",))
    sign = [1.0 if sample.label else -1.0 for sample in test]
    first = sorted({sample.group for sample in test})[0]
    half = [value if sample.group == first else -value for value, sample in zip(sign, test, strict=True)]
    for seed, outputs in enumerate((sign, half)):
        found = {"score": 1.0 - 0.5 * seed, "combination": "lr0.01-tau1-warmup0", "outputs": outputs}
        write_json(protocol.result_path(Cell("probe", "c", "mtl", None, seed)), found)
    write_json(protocol.result_path(Cell("probe", "c", "start", None, 0)), {"score": 0.5, "combination": None})
    (row,) = collect(protocol)
    assert (row.test_images, row.test_groups, row.seeds) == (8, 2, 2)
    assert list(row.judgements) == ["FE MTL"], "a result of before outputs were kept has no interval"
    judgement = row.judgements["FE MTL"]
    assert judgement.balanced == (1.0, 0.5)
    assert judgement.of_classes == (0.75, 0.75)
    # ROC AUC of the second seed: 1 on the first group alone, 0 on the other alone, 0.5 on both; the first is always 1.
    assert judgement.interval == (0.5, 1.0)
    text = markdown([row])
    assert "75.00 ± 35.36 [50.0, 100.0] | 8 (2) | 2 | lr0.01-tau1-warmup0 |" in text
    assert "| c | FE MTL | 75.0 | blue 75.0, red 75.0 |" in text
    (shown,) = confusions_of(protocol)
    assert shown is not None
    assert (shown.title, shown.matrix) == ("FE MTL", ((4, 0), (0, 4))), "of the first seed"
    lines = as_csv([row]).splitlines()
    assert lines[2].endswith("lr0.01-tau1-warmup0,8,2,0.500000,1.000000,1.000000")
    assert lines[3].endswith("lr0.01-tau1-warmup0,8,2,0.500000,1.000000,0.500000"), "each seed has its own"
    joint = {"score": 0.5, "combination": "another", "outputs": sign}
    write_json(protocol.result_path(Cell("joint-test", "c", "mtl", None, 0)), joint)
    for seed in range(2):
        protocol.result_path(Cell("probe", "c", "mtl", None, seed)).unlink()
    (row,) = collect(replace(protocol, config=replace(protocol.config, joint=True)))
    assert (row.combination, row.combinations) == ("", {"Joint": "another"}), "that of FE MTL, which is not there"


def test_the_table_file_speaks_for_itself(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path)
    write_json(protocol.result_path(Cell("probe", "c", "start", None, 0)), {"score": 0.5})
    text = write_tables(protocol)[0].read_text()
    assert f"{ARCH} from random; 2 iterations of 4 images of 32 px; 1 seed of 1 combination" in text
    assert "**Not finished: 4 of 5 cells are missing.**" in text
    assert "![test scores with their 95 % intervals](table.png)" in text
    assert (tmp_path / "table.png").is_file()


def test_the_ranks_that_chose_are_in_the_table(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(GRID, evaluate=("a", "c", "d"), lrs=(1e-3,), joint=True), tmp_path)
    first, second = protocol.config.combinations()
    assert rank_table(protocol) == "", "nothing is ranked yet"
    for cell in selection_cells(protocol.sets, protocol.evaluated, protocol.config):
        wins = cell.combination == (first if cell.subject == "c" else second)
        write_json(protocol.result_path(cell), {"score": (0.9 if wins else 0.1) if cell.kind == "select" else None})
    text = rank_table(protocol)
    rows = [line for line in text.splitlines() if line.startswith("| lr")]
    assert rows == [
        f"| {second.name} | 1 (90.00) | 2 (10.00) | 1 (90.00) | 1.33 |",
        f"| {first.name} | 2 (10.00) | 1 (90.00) | 2 (10.00) | 1.67 |",
    ], "the best first"
    assert f"Best over all: {second.name}." in text
    assert f"a by {first.name}; c by {second.name}; d by {first.name}" in text
    assert text.strip() in write_tables(protocol)[0].read_text()


def test_fine_tuning_that_is_added_later_takes_its_options(tasks: tuple[Task, ...], tmp_path: Path) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",)), tmp_path / "run")
    one_result(protocol)
    later = replace(protocol.config, finetune=("c",), finetune_lrs=(1e-2,), finetune_epochs=7)
    hold_to_settings(tasks, later, protocol.out)
    with pytest.raises(UsageError, match="other settings: finetune_epochs"):
        plan(replace(protocol, config=replace(later, finetune_epochs=8)))


def test_the_network_to_give_away_is_trained_on_all_images_of_all_tasks(
    tasks: tuple[Task, ...], tmp_path: Path
) -> None:
    protocol = Protocol(tasks, replace(TINY, evaluate=("c",), release=True), tmp_path / "run")
    run_protocol(protocol)
    _, info = load_checkpoint(tmp_path / "run/release")
    assert {name: told["images"] for name, told in info.training["tasks"].items()} == dict.fromkeys("abcd", 24)
    assert info.training["choices"]["splits of the pool's tasks"] == "train and val and test"
