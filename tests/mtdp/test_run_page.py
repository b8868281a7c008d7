"""The page of a training run: made of what its folder holds, at the end of the run or later."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mtdp.charts import chart, from_markdown
from mtdp.cli import app
from mtdp.confusions import confusion, read_confusions, write_confusions
from mtdp.errors import UsageError
from mtdp.run_page import read_metrics, write_run_page
from mtdp.tasks import Task, load_task

Make = Callable[..., Path]
TINY = ("--arch", "resnet18", "--init", "random", "--batch-size", "4", "--image-px", "32", "--precision", "fp32")
HOSTILE = "<script>alert(1)</script>"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def words_of(page: Path) -> str:
    text = re.sub(r"<style>.*?</style>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.fixture
def task(tmp_path: Path, make_task: Make) -> Task:
    return load_task(make_task(tmp_path / "three", ("blue", "green", "red")))


def test_pretrain_ends_with_a_page_of_its_curves(pool_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--warmup", 10, "--iterations", 30, "--lr", 1e-3, "--warmup-lr", 1e-2, "--schedule", "cosine", *TINY)
    code, out, err = invoke("pretrain", "--pool", pool_file, "--out", run, *options)
    assert (code, out) == (0, f"{run / 'checkpoint.safetensors'}\n"), err
    assert err.splitlines()[-1] == f"page: {run / 'index.html'}"
    rates = [line["lr"] for line in read_metrics(run)]
    assert rates[0] == 1e-2
    assert rates[1] == pytest.approx(0.5 * (1 + np.cos(np.pi * 9 / 20)) * 1e-3)
    assert rates[2] < rates[1]
    page = (run / "index.html").read_text("utf-8")
    for name in ("Loss", "Learning rate", "three: accuracy", "three: loss", "two: accuracy", "two: loss"):
        assert f"<b>{name}</b>" in page
    assert page.count("class=mark") == page.count("<svg"), "the end of the warm-up is in each chart"
    words = words_of(run / "index.html")
    assert f"30 iterations; the last loss was {read_metrics(run)[-1]['loss']:.4g}." in words
    assert "config: batch_size 4" in words
    assert "task: two 16 images of blue, red" in words
    assert not re.search(r'(src|href)="(?!data:)', page), "it asks for nothing"


def test_finetune_and_evaluate_show_what_was_taken_for_what(task: Task, tmp_path: Path) -> None:
    common = ("--task", task.path, "--arch", "resnet18", "--image-px", 32, "--precision", "fp32")
    code, out, err = invoke(
        "finetune", *common, "--init", "random", "--out", tmp_path / "t", "--epochs", 1, "--lr", 1e-3
    )
    assert code == 0, err
    (found,) = read_confusions(tmp_path / "t")
    assert np.trace(found.matrix) / np.sum(found.matrix) == pytest.approx(json.loads(out)["test"])
    words = words_of(tmp_path / "t/index.html")
    assert f"three : accuracy {100 * json.loads(out)['test']:.1f} % on test" in words
    assert "Score on val, by learning rate" in words
    code, out, err = invoke("evaluate", *common, "--init", "random", "--out", tmp_path / "e", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["task"] == "three", "stdout is for programs"
    page = (tmp_path / "e/index.html").read_text("utf-8")
    assert page.count("data:image/png") == 1, "the figure"
    titles = [one.title for one in read_confusions(tmp_path / "e")]
    assert "probe of six colour numbers" in " ".join(titles) or len(titles) >= 2
    for one, encoder in zip(read_confusions(tmp_path / "e"), json.loads(out)[0]["encoders"], strict=True):
        part = [row[i] / sum(row) for i, row in enumerate(one.matrix)]
        assert part == pytest.approx(encoder["class_accuracies"])


def test_loto_shows_its_table_and_its_figure(pool_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "loto"
    options = ("--evaluate", "two", "--lr", 1e-3, "--head-lr-multiplier", 1, "--warmup", 0, "--seeds", 1)
    code, _, err = invoke("loto", "--pool", pool_file, "--out", out, *options, "--iterations", 1, *TINY)
    assert code == 0, err
    page, words = (out / "index.html").read_text("utf-8"), words_of(out / "index.html")
    assert "Leave-one-task-out: test scores of tasks that were not trained on" in words
    assert "<th scope=col>FE MTL" in page
    assert page.count("data:image/png") == 1
    assert {one.title for one in read_confusions(out)} >= {"FE MTL", "FE random", "FE colour"}


def test_the_command_makes_it_again_and_refuses_what_is_no_run(task: Task, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert invoke("page", tmp_path / "empty")[0] == 2
    assert invoke("page", tmp_path / "nowhere") == (
        2,
        "",
        f"error: no folder {tmp_path / 'nowhere'}\nhint: name the --out of a run\n",
    )
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.jsonl").write_text('{"iteration": 10, "loss": 1.5, "tasks": {}}\n{"iterat')
    assert invoke("page", tmp_path / "r") == (0, f"{tmp_path / 'r/index.html'}\n", "")
    (tmp_path / "r/checkpoint.safetensors").write_bytes(b"cut")
    write_run_page(tmp_path / "r")
    assert "is not a readable safetensors file" in words_of(tmp_path / "r/index.html")
    (tmp_path / "r/index.html").unlink()
    (tmp_path / "r/index.html").mkdir()
    with pytest.raises(UsageError, match=r"index\.html cannot be written"):
        write_run_page(tmp_path / "r")


class TestConfusions:
    def test_rows_are_classes_and_columns_what_they_were_taken_for(self, task: Task, tmp_path: Path) -> None:
        labels = [sample.label for sample in task.of(("test",))]
        outputs = [float(label if i % 4 else (label + 1) % 3) for i, label in enumerate(labels)]
        found = confusion("x", task, outputs)
        assert found is not None
        assert found.matrix == ((3, 1, 0), (0, 3, 1), (1, 0, 3))
        assert [(one.label, one.predicted) for one in found.mistakes] == [(0, 1), (1, 2), (2, 0)]
        for one in found.mistakes:
            assert task.classes[one.label] in Path(one.path).parts
        write_confusions(tmp_path, [found, None])
        assert read_confusions(tmp_path) == [found]

    def test_of_two_classes_the_surest_mistakes_come_first(self, tmp_path: Path, make_task: Make) -> None:
        two = load_task(make_task(tmp_path / "two", ("blue", "red")))
        assert [sample.label for sample in two.of(("test",))] == [0] * 4 + [1] * 4
        found = confusion("x", two, [-1.0, 0.5, 3.0, -1.0, 1.0, 1.0, 1.0, -2.0])
        assert found is not None
        assert found.matrix == ((2, 2), (1, 3))
        names = [Path(one.path).name for one in found.mistakes]
        assert names == ["test1_blue2.png", "test1_red3.png", "test0_blue1.png"], "in turn of each kind"

    def test_outputs_of_other_images_are_no_confusions(self, task: Task) -> None:
        assert confusion("x", task, [0.0] * 5) is None
        assert confusion("x", task, []) is None

    def test_mistakes_are_shown_and_an_image_that_is_gone_is_said(self, task: Task, tmp_path: Path) -> None:
        labels = [sample.label for sample in task.of(("test",))]
        found = confusion(HOSTILE, task, [float((label + 1) % 3) for label in labels])
        assert found is not None
        Path(found.mistakes[0].path).unlink()
        write_confusions(tmp_path, [found])
        page = write_run_page(tmp_path).read_text("utf-8")
        assert HOSTILE not in page
        assert html.escape(HOSTILE) in page
        assert page.count("its file is gone") == 1
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
        assert len(pictures) == len(found.mistakes) - 1
        shown = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
        assert shown.size == (40, 40)
        assert "0 of 12 images are right (0.0%)." in words_of(tmp_path / "index.html")

    @pytest.mark.parametrize("content", ["", "[]", '{"confusions": [1]}', '{"confusions": [{"title": "x"}]}'])
    def test_a_damaged_file_is_as_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "confusions.json").write_text(content)
        assert read_confusions(tmp_path) == []


class TestCharts:
    @given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(allow_nan=True, allow_infinity=True)), max_size=600))
    def test_every_curve_stays_inside_its_picture(self, points: list[tuple[float, float]]) -> None:
        points = sorted((x, y) for x, y in points if not abs(y) > 1e300)
        drawn = chart("t", {"a": points})
        for path in re.findall(r'points="([^"]*)"', drawn):
            places = [tuple(map(float, place.split(","))) for place in path.split()]
            assert len(places) <= 240
            assert all(0 <= x <= 420 and 0 <= y <= 190 for x, y in places)

    def test_nothing_finite_is_no_chart(self) -> None:
        assert chart("t", {"a": [], "b": [(1.0, float("nan"))]}) == ""

    def test_markdown_becomes_what_it_says_and_nothing_else(self, tmp_path: Path) -> None:
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
        text = (
            f"# Head\n\nSome **bold** `code` {HOSTILE}.\n\n"
            f"| A | B |\n|---|---|\n| x | 1 |\n| y | {HOSTILE} |\nafter\n\n"
            "- one\n- two\n\n![figure](a.png)\n\n![none](missing.png)\n![up](../secret.png)\n"
        )
        shown = from_markdown(text, tmp_path)
        assert "<h2>Head</h2>" in shown
        assert "<b>bold</b> <code>code</code>" in shown
        assert "<tr><th scope=row>x<td>1<tr><th scope=row>y<td>" in shown
        assert "<p>after</p><ul><li>one<li>two</ul>" in shown
        assert shown.count("data:image/png;base64,") == 1
        assert HOSTILE not in shown
        assert "<img" not in shown.split("</figure>")[-1]

    def test_a_run_that_moved_keeps_its_page(self, task: Task, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0, "lr": 0.1}\n')
        write_run_page(tmp_path / "a")
        shutil.move(tmp_path / "a", tmp_path / "b")
        assert words_of(tmp_path / "b/index.html").startswith("a a 1 iterations")
