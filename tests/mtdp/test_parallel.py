"""Two processes that share each batch take the step that one would take."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import warm
from mtdp.checkpoint import load_checkpoint
from mtdp.errors import UsageError
from mtdp.parallel import Ranks, check_batch, whole_shares
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.sampling import draw
from mtdp.tasks import load_pool


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def in_two_processes(code: str, *arguments: str) -> list[tuple[str, str]]:
    """Run a program as torchrun would start it twice; return stdout and stderr of each, both having ended well."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        warm.start(
            code,
            *arguments,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            imports=warm.TRAINING,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return outputs


def test_the_parts_of_a_batch_are_the_batch() -> None:
    whole = draw(0, 0, 5, [3, 9], 8)
    parts = [whole.of(slice(rank, None, 2)) for rank in (0, 1)]
    assert sorted([*parts[0].images, *parts[1].images]) == sorted(whole.images)
    assert [len(part.tasks) for part in parts] == [4, 4]


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    check_batch(Ranks(0, 4), 8)
    with pytest.raises(UsageError, match="a batch of 6 cannot be shared by 4"):
        check_batch(Ranks(0, 4), 6)
    with pytest.raises(UsageError):
        check_batch(Ranks(0, 4), 4)


def test_alone_nothing_is_exchanged() -> None:
    assert whole_shares(("a",), {}, True, Ranks(), torch.device("cpu")) == ({}, True)


def test_two_processes_train_the_heads_that_one_trains(pool_file: Path, tmp_path: Path) -> None:
    """In warm-up batch norm is frozen, so the two must agree with one up to rounding; after it, on a CPU, each
    process's batch norm sees its own half, and the run only has to end well."""
    config = PretrainConfig(
        arch="resnet18", init="random", iterations=3, warmup=3, warmup_lr=1e-2, batch_size=6, image_px=32, seed=1
    )
    pretrain(load_pool(pool_file), config, tmp_path / "one", quiet=True)
    arguments = ["--pool", str(pool_file), "--out", str(tmp_path / "two"), "--arch", "resnet18", "--init", "random"]
    arguments += ["--iterations", "4", "--warmup", "3", "--warmup-lr", "1e-2", "--lr", "1e-12", "--batch-size", "6"]
    arguments += ["--image-px", "32", "--seed", "1", "--tensorboard"]
    outputs = in_two_processes("from mtdp.cli import main; main()", "pretrain", *arguments)
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    for name in one:
        if name.startswith("heads."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    last = json.loads((tmp_path / "two/metrics.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 4
    assert sum(task["samples"] for task in last["tasks"].values()) == 4 * 6, "each batch counts whole, and once"
    assert "2 processes on cpu" in outputs[0][1]
    assert "processes" not in outputs[1][1], "rank 0 alone tells"
    assert list((tmp_path / "two/tensorboard").glob("events.*"))


SPOIL_ONE_RANK = """
import hashlib, os, sys
from pathlib import Path
import torch
import mtdp.pretrain as module
from mtdp.pretrain_config import PretrainConfig
from mtdp.tasks import load_pool

real, calls, nets = module.average_head_gradients, [], []

def average(net, active, ranks):
    calls.append(1)
    nets[:] = [net]
    if len(calls) == 3 and ranks.rank == 1:  # the second step of the training
        for name in net.task_names:
            for parameter in net.heads[name].parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
    real(net, active, ranks)

scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda device, enabled: scaler(device, init_scale=1024.0, enabled=enabled)
module.average_head_gradients = average
config = PretrainConfig("resnet18", "random", 4, 1, lr=1e-4, batch_size=8, image_px=32, precision="fp16")
module.pretrain(load_pool(Path(sys.argv[1])), config, Path(sys.argv[2]), quiet=True)
values = b"".join(parameter.detach().numpy().tobytes() for parameter in nets[0].parameters())
print(hashlib.sha256(values).hexdigest())
"""


def test_processes_skip_a_step_together(pool_file: Path, tmp_path: Path) -> None:
    """Gradients that are not finite in one process only: apart, the two would step with and without them for ever."""
    outputs = in_two_processes(SPOIL_ONE_RANK, str(pool_file), str(tmp_path / "run"))
    assert outputs[0][0] == outputs[1][0]
    net, _ = load_checkpoint(tmp_path / "run")
    values = b"".join(parameter.detach().numpy().tobytes() for parameter in net.parameters())
    assert outputs[0][0].strip() == hashlib.sha256(values).hexdigest()
    told = json.loads(safe_open(tmp_path / "run/state.safetensors", framework="pt").metadata()["mtdp"])
    assert told["scaler"]["scale"] == 512.0, "one step was skipped"


def test_events_hold_what_metrics_hold(pool_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = PretrainConfig(arch="resnet18", init="random", iterations=1, warmup=0, batch_size=4, image_px=32)
    pretrain(load_pool(pool_file), config, tmp_path / "run", quiet=True, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert events.Scalars("loss")[0].value == pytest.approx(line["loss"])
    assert events.Scalars("loss")[0].step == 1
    task = next(iter(line["tasks"]))
    assert f"tasks/{task}/accuracy" in events.Tags()["scalars"]
