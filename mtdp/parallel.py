"""Data-parallel training under torchrun: each process takes its part of every batch; together they take one step.

A batch is drawn as a whole by every process (it depends on the seed and its number alone), so each knows how many
samples each head has in all, and which heads are active, without asking. The backbone's gradients are averaged by
DistributedDataParallel while backward runs; the heads', which may be absent in a process, here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtdp.errors import UsageError
from mtdp.multitask import MultiTaskNet, TaskShare


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together; one alone is rank 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells of the progress."""
        return self.rank == 0


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started (RANK and WORLD_SIZE are set), and leave them at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


def leads_all() -> bool:
    """Whether this process speaks for all that torchrun started, also after they left each other."""
    return os.environ.get("RANK", "0") == "0"


def refuse_torchrun(what: str) -> None:
    """Refuse to do under torchrun what one process does: the others would do it, too, in the same folder."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UsageError(
            f"{what} was started as {world} processes (WORLD_SIZE), but runs as one", "start it without torchrun"
        )


def check_batch(ranks: Ranks, batch_size: int) -> None:
    """Refuse a batch that the processes cannot share evenly: their mean would not be the batch's."""
    if batch_size % ranks.world or batch_size // ranks.world < 2:
        raise UsageError(
            f"a batch of {batch_size} cannot be shared by {ranks.world} processes",
            "batch_size must be a multiple of the number of processes, with at least 2 samples for each",
        )


def shared_backbone(net: MultiTaskNet, ranks: Ranks) -> nn.Module:
    """The backbone as to be called in training: its backward averages the gradients over the processes.

    Batch norm takes the statistics of the whole batch on GPUs; on CPUs, where PyTorch has no such layer, each process
    takes those of its part, and the running statistics of rank 0 are kept.
    """
    if ranks.world == 1:
        return net.backbone
    if torch.cuda.is_available():
        net.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(net.backbone)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(net.backbone, device_ids=[torch.cuda.current_device()])
    return DistributedDataParallel(net.backbone)


def average_head_gradients(net: MultiTaskNet, active: Sequence[str], ranks: Ranks) -> None:
    """Average the gradients of the heads that have a sample in any process; the others keep none."""
    if ranks.world == 1:
        return
    parameters = [parameter for name in active for parameter in net.heads[name].parameters()]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= ranks.world
    start = 0
    for parameter in parameters:
        part = flat[start : start + parameter.numel()]
        parameter.grad = part.view_as(parameter).clone()
        start += parameter.numel()


def whole_shares(
    task_names: Sequence[str], shares: Mapping[str, TaskShare], stop: bool, ranks: Ranks, device: torch.device
) -> tuple[dict[str, TaskShare], bool]:
    """Each task's part of the whole batch, and whether any process was asked to stop: all must stop together."""
    if ranks.world == 1:
        return dict(shares), stop
    rows = [
        (s.samples, s.loss_sum, s.correct) if (s := shares.get(name)) is not None else (0, 0.0, 0)
        for name in task_names
    ]
    table = torch.tensor([*rows, (float(stop), 0.0, 0.0)], dtype=torch.float64).to(device)  # (T + 1, 3)
    dist.all_reduce(table)
    *values, last = table.cpu().tolist()
    whole = {
        name: TaskShare(int(samples), loss_sum, int(correct))
        for name, (samples, loss_sum, correct) in zip(task_names, values, strict=True)
        if samples
    }
    return whole, bool(last[0])
