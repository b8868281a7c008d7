"""Encoders compared on labelled tasks: what is computed, what the table says, and the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from typer.testing import CliRunner

from mtdp.bundle_features import features_of_bundle, open_bundle
from mtdp.charts import from_markdown
from mtdp.cli import app
from mtdp.errors import UsageError, WeightsError
from mtdp.evaluate import RETRIEVAL, Evaluated, Measure, TaskEvaluation, evaluate_task
from mtdp.evaluation_report import as_csv, as_json, markdown, write
from mtdp.evaluation_sources import COLOUR_ROW, RANDOM_ROW, named_sources
from mtdp.few_labels import drawn_groups, nearest_mean, nearest_neighbours, retrieval_precision
from mtdp.images import load_image
from mtdp.metrics import resampled_means
from mtdp.run_state import locked_run
from mtdp.tasks import Sample, load_task
from mtdp.transfer import Colours, ProbeResult, colour_numbers, judge_features

Make = Callable[..., Path]


def bundle(folder: Path, channel: int | None = None) -> Path:
    """A bundle whose features are the mean of red, green and blue; or of one of them alone."""
    folder.mkdir()
    nodes = [
        helper.make_node("Cast", ["tiles"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
    ]
    if channel is None:
        nodes.append(helper.make_node("Identity", ["mean"], ["features"]))
    else:
        nodes.append(helper.make_node("Gather", ["mean", "channel"], ["features"], axis=1))
    dims = 3 if channel is None else 1
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 32, 32, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", dims])],
        [helper.make_tensor("channel", TensorProto.INT64, [1], [channel or 0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, folder / "model.fp32.onnx")
    digest = hashlib.sha256((folder / "model.fp32.onnx").read_bytes()).hexdigest()
    variant = {"precision": "fp32", "file": {"file": "model.fp32.onnx", "sha256": digest}}
    other = {"precision": "bf16", "file": {"file": "model.bf16.onnx", "sha256": "0"}}  # by which nothing is judged
    stated = {"name": folder.name, "tile_px": 32, "features_dim": dims, "variants": [variant, other]}
    (folder / "bundle.json").write_text(json.dumps({"schema_version": 1, "mtdp": stated}))
    return folder


@pytest.fixture
def task_folder(tmp_path: Path, make_task: Make) -> Path:
    """Red against blue: the mean of red tells, the mean of green does not."""
    return make_task(tmp_path / "colour", ("blue", "red"), per_class=12)


def test_every_measure_has_a_score_and_an_interval_and_equals_its_parts(task_folder: Path, tmp_path: Path) -> None:
    task = load_task(task_folder)
    sources = named_sources([bundle(tmp_path / "good"), bundle(tmp_path / "green", 1)], [], None)
    assert list(sources) == ["good", "green", RANDOM_ROW, COLOUR_ROW]
    del sources[RANDOM_ROW]
    found = evaluate_task(task, sources)
    assert (found.fit_images, found.fit_groups, found.test_images, found.test_groups) == (48, 12, 24, 6)
    by_name = {one.encoder: one for one in found.encoders}
    assert set(by_name["good"].measures) == {"probe", "1 group", "5 groups", "k-NN", RETRIEVAL}, "12 groups, not 20"
    for name in by_name["good"].measures:
        assert by_name["good"].measures[name].score == 1.0, name
        assert by_name["good"].measures[name].interval == (1.0, 1.0)
        assert by_name["green"].measures[name].score < 0.9, name
        by, interval = by_name["good"].measures[name].minus(by_name["green"].measures[name])
        assert by == 1.0 - by_name["green"].measures[name].score
        assert interval is not None
        assert interval[0] <= by <= interval[1]
    assert by_name["good"].of_classes == (1.0, 1.0)


def test_the_probe_of_an_evaluation_is_the_probe(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(task_folder)
    features = np.random.default_rng(0).normal(size=(72, 5)).astype(np.float32)
    features[:, 0] += np.array([sample.label for sample in task.of(("train", "val", "test"))])
    asked: list[tuple[object, ...]] = []

    def judged(*args: Any) -> ProbeResult:
        asked.append(args[1:])
        return judge_features(*args)

    monkeypatch.setattr("mtdp.evaluate.judge_features", judged)
    found = evaluate_task(task, {"x": Colours()}, seed=3, extract=lambda source, task: features).encoders[0]
    assert asked == [(task, "x", 3)]
    alone = judge_features(features, task, "", 3)
    assert (found.measures["probe"].score, found.c) == (alone.score, alone.c)


def test_the_command_writes_a_table_and_a_figure(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mtdp.evaluation_sources.RANDOM_ARCH", "timm:test_resnet"
    )  # which takes a thirtieth of the time
    out = tmp_path / "out"
    arguments = ["evaluate", "--task", str(task_folder), "--bundle", str(bundle(tmp_path / "good"))]
    arguments += ["--bundle", str(bundle(tmp_path / "green", 1)), "--out", str(out), "--seed", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = (out / "evaluation.md").read_text()
    for words in (
        "| good | 100.0 [100.0, 100.0] |",
        f"| {RANDOM_ROW} |",
        f"| {COLOUR_ROW} | 100.0 [100.0, 100.0] |",
        "fitted on 48 images of 12 groups, judged on 24 images of 6 groups",
        "- good over green: probe +",
        "blue 100.0, red 100.0",
    ):
        assert words in text
        assert words in result.stdout
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    rows = (out / "evaluation.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 5
    numbers = json.loads(CliRunner().invoke(app, [*arguments, "--json", "-q"]).stdout)
    assert numbers[0]["encoders"][0]["measures"]["probe"] == {"score": 1.0, "spread": 0.0, "interval": [1.0, 1.0]}


def test_every_figure_of_the_report_stands_in_its_place() -> None:
    """Every number of it is another one."""
    first, second = (
        Evaluated(
            name, {"probe": Measure(score, 0.04, np.linspace(low, low + 0.2, 1001))}, balanced, (0.5, 0.75), c, (1.0,)
        )
        for name, score, low, balanced, c in (("A|B", 0.84, 0.7, 0.625, 0.1), ("C", 0.66, 0.5, 0.55, 1e-3))
    )
    found = [TaskEvaluation("lung", "roc_auc", ("x|y", "z"), 11, 5, 7, 3, (first, second))]
    text = markdown(found)
    assert "ROC AUC, 2 classes; fitted on 11 images of 5 groups, judged on 7 images of 3 groups." in text
    assert r"| A\|B | 84.0 ± 4.0 [70.5, 89.5] | 62.5 | 0.1 | x\|y 50.0, z 75.0 |" in text
    assert r"- A\|B over C: probe +18.0 [20.0, 20.0]" in text
    assert as_csv(found).splitlines()[1].startswith("lung,roc_auc,A|B,probe,0.84,0.04,0.705")
    assert as_csv(found).splitlines()[1].endswith(",7,3")
    told = as_json(found)[0]
    assert (told["fit_images"], told["fit_groups"], told["test_images"], told["test_groups"]) == (11, 5, 7, 3)
    encoder = told["encoders"][0]
    assert (encoder["balanced_accuracy"], encoder["class_accuracies"], encoder["c"]) == (0.625, [0.5, 0.75], 0.1)
    assert encoder["measures"]["probe"]["interval"] == pytest.approx((0.705, 0.895))
    assert from_markdown(text, Path()).count("<td>x|y 50.0, z 75.0") == 2, "a bar in a name is no bar of the table"


def test_too_small_a_task_says_so_in_the_table(tmp_path: Path, make_task: Make) -> None:
    found = [evaluate_task(load_task(make_task(tmp_path / "t", per_class=8)), {"colours": Colours()})]
    assert "20 groups" not in markdown(found).splitlines()[6]
    assert "roc_auc,colours,probe," in as_csv(found)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtdp.evaluation_sources.RANDOM_ARCH", "timm:test_resnet")
    monkeypatch.setattr("mtdp.evaluate.evaluate_task", lambda *args: pytest.fail("computed"))
    (tmp_path / "file").touch()
    base = ["evaluate", "--task", str(task_folder), "--bundle", str(bundle(tmp_path / "b")), "--out"]
    result = CliRunner().invoke(app, [*base, str(tmp_path / "out"), "--task", str(task_folder)])
    assert (result.exit_code, "two tasks are named 'colour'" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, [*base, str(tmp_path / "file" / "out")])
    assert (result.exit_code, result.stderr.splitlines()[0].split(": ")[1]) == (
        2,
        f"{tmp_path}/file/out cannot be made",
    )
    with locked_run(tmp_path / "out"):
        result = CliRunner().invoke(app, [*base, str(tmp_path / "out")])
    assert (result.exit_code, "another process is working in" in result.stderr) == (2, True)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation.csv").mkdir()
    with pytest.raises(UsageError, match=r"evaluation\.csv cannot be written: Is a directory"):
        write([], tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tile_px": 0}, "tile_px is 0"),
        ({"tile_px": 10**7}, "tile_px is 10000000"),
        ({"features_dim": -3}, "features_dim is -3"),
        ({"features_dim": 1}, "gives features of \\(1, 3\\), bundle.json says 1 x 1"),
    ],
)
def test_a_bundle_that_states_what_it_is_not_is_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    path = bundle(tmp_path / "b") / "bundle.json"
    document = json.loads(path.read_text())
    document["mtdp"] |= change
    path.write_text(json.dumps(document))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(WeightsError, match=words):
        features_of_bundle(open_bundle(path.parent), [Sample(tmp_path / "a.png", 0, "g")])


def test_encoders_in_folders_of_one_name_have_a_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtdp.evaluation_sources.load_extractor", lambda source, *rest: source)
    (tmp_path / "other").mkdir()
    places = [bundle(tmp_path / "b"), bundle(tmp_path / "other" / "b"), bundle(tmp_path / "c")]
    found = named_sources(places, [], None)
    assert list(found) == [str(places[0]), str(places[1]), "c", RANDOM_ROW, COLOUR_ROW]
    assert list(found.values())[:3] == [str(place) for place in places]


def test_a_bundle_is_given_images_by_the_interpolation_that_it_states(tmp_path: Path, write_image: Make) -> None:
    path = bundle(tmp_path / "b") / "bundle.json"
    document = json.loads(path.read_text())
    document["mtdp"]["interpolation"] = "lanczos"
    path.write_text(json.dumps(document))
    image = write_image(tmp_path / "a.png", 45, 45, (9, 9, 9))  # noise cut at 0: its mean depends on the interpolation
    found = features_of_bundle(open_bundle(path.parent), [Sample(image, 0, "g")])
    np.testing.assert_allclose(found[0], load_image(image, 32, "lanczos").mean((0, 1)), rtol=1e-4)
    assert np.abs(found[0] - load_image(image, 32).mean((0, 1))).max() > 0.01


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    for bundles, inits, words in (
        ([], [], "no encoder was named"),
        ([tmp_path], [], "is not a bundle"),
        ([], ["a", "a"], "named twice"),
        ([bundle(tmp_path / COLOUR_ROW)], [], "six colour numbers has the name of a row"),
    ):
        with pytest.raises(UsageError, match=words):
            named_sources(bundles, inits, None)


def test_each_measure_is_of_its_own_rows_seed_and_count(tmp_path: Path, make_task: Make) -> None:
    """Written out: few labels from 20 draws of their own, 20 neighbours, 5 finds, for the test images alone."""
    task = load_task(make_task(tmp_path / "t", ("blue", "green", "red"), per_class=24))
    fit, test = task.of(("train", "val")), task.of(("test",))
    labels = np.array([sample.label for sample in (*fit, *test)])
    groups = [sample.group for sample in (*fit, *test)]
    features = np.random.default_rng(3).normal(size=(len(labels), 3)).astype(np.float32)
    features[np.arange(len(labels)), labels] += 0.7
    n = len(fit)
    few: dict[int, list[float]] = {1: [], 5: []}
    for each, scores in few.items():
        for number in range(20):
            rows = drawn_groups(labels[:n], groups[:n], 3, each, np.random.default_rng([4, each, number]))
            assert rows is not None
            scores.append(float((nearest_mean(features[rows], labels[rows], features[n:], 3) == labels[n:]).mean()))
    votes = nearest_neighbours(features[:n], labels[:n], features[n:], 3, 20)
    finds = retrieval_precision(features, labels, groups, np.arange(n, len(labels)), 5)
    wanted = {
        "1 group": np.mean(few[1]),
        "5 groups": np.mean(few[5]),
        "k-NN": (votes == labels[n:]).mean(),
        RETRIEVAL: finds.mean(),
    }
    found = evaluate_task(task, {"x": Colours()}, seed=4, extract=lambda source, task: features).encoders[0]
    for name, score in wanted.items():
        assert found.measures[name].score == pytest.approx(float(score)), name
    np.testing.assert_allclose(found.measures[RETRIEVAL].replicates, resampled_means(finds, groups[n:]))
    assert found.measures["1 group"].spread == pytest.approx(float(np.std(few[1], ddof=1)))
    other = evaluate_task(task, {"x": Colours()}, seed=5, extract=lambda source, task: features).encoders[0]
    assert other.measures["1 group"].score != found.measures["1 group"].score


def test_the_random_row_is_of_the_seed_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("mtdp.evaluation_sources.load_extractor", lambda *args: asked.append(args))
    named_sources([], ["RUN"], "resnet50", 7, 96)
    assert asked == [("RUN", "resnet50", 7, 96), ("random", "resnet18", 7), ("colour",)]


def test_colours_and_bundles_are_judged_on_the_central_square(tmp_path: Path) -> None:
    """Red above, green in the middle, blue below."""
    image = np.repeat(np.diag([255, 255, 255]).astype(np.uint8), 32, axis=0)  # (96, 3)
    Image.fromarray(np.repeat(image[:, None], 32, axis=1)).save(tmp_path / "tall.png")
    sample = Sample(tmp_path / "tall.png", 0, "g")
    np.testing.assert_allclose(colour_numbers([sample]), [[0, 1, 0, 0, 0, 0]], atol=0.05)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 16:, 0] = 255  # a quarter of it is dark: a deviation of sqrt(3) / 4
    Image.fromarray(halves).save(tmp_path / "halves.png")
    found = colour_numbers([Sample(tmp_path / "halves.png", 0, "g")])
    np.testing.assert_allclose(found, [[0.75, 0, 0, 3**0.5 / 4, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(features_of_bundle(open_bundle(bundle(tmp_path / "b")), [sample]), [[0, 255, 0]])


def test_a_difference_is_that_of_pairs() -> None:
    """Two encoders that do well on the same resamples differ by nothing; on opposite ones, by everything."""
    up = np.arange(1001) / 1000
    first, same, opposite = (Measure(0.5, 0.0, values) for values in (up, up.copy(), up[::-1]))
    assert first.minus(same) == (0.0, (0.0, 0.0))
    assert first.minus(opposite) == (0.0, pytest.approx((-0.95, 0.95)))


def test_the_balanced_accuracy_counts_a_rare_class_as_much_as_a_frequent_one(tmp_path: Path, make_task: Make) -> None:
    """Three classes, and the probe takes the rare one for another: two thirds, and not nearly all images."""
    task = load_task(make_task(tmp_path / "t", ("blue", "green", "red"), per_class=6))
    test = tuple(sample for sample in task.samples["test"] if sample.label < 2) + task.samples["test"][-2:]
    task = replace(task, samples={**task.samples, "test": test})
    labels = np.array([sample.label for sample in task.of(("train", "val", "test"))])
    seen = labels.copy()
    seen[-2:] = 0
    features = np.eye(3, dtype=np.float32)[seen]
    found = evaluate_task(task, {"x": Colours()}, extract=lambda source, task: features).encoders[0]
    assert found.measures["probe"].score == pytest.approx(12 / 14)
    assert found.of_classes == (1.0, 1.0, 0.0)
    assert found.balanced == pytest.approx(2 / 3)
