"""The files of deploy/ name options that exist, and their own tools find nothing in them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
COMMAND = re.compile(r"\b(mtdp-(?:extract|doctor|export|view))\b([^\n]*(?:\\\n[^\n]*)*)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")


def _options(command: str) -> set[str]:
    program = Path(sys.executable).with_name(command)
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, env={"COLUMNS": "200"})
    return set(OPTION.findall(shown.stdout))


def test_every_option_in_deploy_exists() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        for command, rest in COMMAND.findall(path.read_text("utf-8")):
            used.setdefault(command, set()).update(OPTION.findall(rest))
    assert {"--shard", "--out", "--model", "--scheduler"} <= used["mtdp-extract"]
    for command, options in used.items():
        assert options <= _options(command), command


def test_every_file_is_in_the_table() -> None:
    page = (DEPLOY / "README.md").read_text("utf-8")
    assert [path.name for path in FILES if f"`{path.name}`" not in page and path.name != "README.md"] == []


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "ray-cluster.yaml"])
def test_yaml_can_be_read(name: str) -> None:
    assert isinstance(yaml.safe_load((DEPLOY / name).read_text("utf-8")), dict)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_is_made_in_two_stages_and_runs_as_nobody_special(name: str) -> None:
    lines = (DEPLOY / name).read_text("utf-8").splitlines()
    assert len([line for line in lines if line.startswith("FROM ${BASE}")]) == 2
    assert "USER 10001:10001" in lines


def _tool(*words: str) -> None:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing() -> None:
    _tool("shellcheck", str(DEPLOY / "slurm.sbatch"))


def test_hadolint_finds_nothing() -> None:
    _tool("hadolint", str(DEPLOY / "Dockerfile"), str(DEPLOY / "Dockerfile.cuda"))


def test_kubernetes_knows_every_field() -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    import kubernetes_validate

    job = yaml.safe_load((DEPLOY / "kubernetes-job.yaml").read_text("utf-8"))
    kubernetes_validate.validate(job, "1.30", strict=True)


def test_ray_up_takes_every_field_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # it notes the machines of a cluster there
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text("utf-8"))
    validate_config(prepare_config(dict(cluster)))
    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config({**cluster, "setup_command": []}))
