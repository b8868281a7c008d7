"""One shared backbone and one linear head for each task (paper: multi-task architecture, loss, and head gradients).

Every sample goes through its own task's head only. A head without a sample in the batch is inactive: it gets no
gradient (None, not zero), so an optimiser with momentum leaves it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mtdp.backbones import Backbone
from mtdp.errors import UsageError


class MultiTaskNet(nn.Module):
    """A backbone with one `nn.Linear` head for each task.

    Args:
        backbone: gives float32[N, D].
        heads: class names of each task, in the order of the head's outputs. The order of the mapping numbers the
            tasks: `task_names[i]` is the task that the number i means in `routed_loss`.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        for name in heads:
            if not is_head_name(name):
                raise UsageError(
                    f"{name!r} cannot be the name of a task",
                    "use letters, digits, '_' and '-' only, and not a method name of a dict",
                )
        self.backbone = backbone
        self.class_names: dict[str, tuple[str, ...]] = {name: tuple(classes) for name, classes in heads.items()}
        self.task_names: tuple[str, ...] = tuple(self.class_names)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(backbone.features_dim, len(classes)) for name, classes in self.class_names.items()}
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32[N, 3, H, W] -> for each task, logits float32[N, C_t] of every sample."""
        features = self.backbone(x)
        return {name: head(features) for name, head in self.heads.items()}


def is_head_name(name: str) -> bool:
    """Whether a task may have this name: it becomes a module name and an output name of the exported graph."""
    plain = name.replace("_", "").replace("-", "")
    return plain.isascii() and plain.isalnum() and not hasattr(nn.ModuleDict, name)


@dataclass(frozen=True, slots=True)
class TaskShare:
    """One task's part of a batch: number of samples, their summed cross-entropy, and how many were right."""

    samples: int
    loss_sum: float
    correct: int


def routed_loss(
    net: MultiTaskNet, features: torch.Tensor, tasks: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, TaskShare]]:
    """The mean cross-entropy over all samples of a batch, each through its own head.

    L = (1 / B) * sum over the tasks of the summed cross-entropies of their samples: a task counts by its samples.

    Args:
        features: float32[B, D].
        tasks: int64[B], the number of each sample's task; on the CPU, so that a GPU need not be waited for.
        labels: int64[B], the class within that task.

    Returns:
        The loss, float32 scalar, and the share of each task that is in the batch.
    """
    total = features.new_zeros(())
    samples: dict[str, int] = {}
    loss_sums, corrects = [], []
    for number, name in enumerate(net.task_names):
        rows = (tasks.cpu() == number).nonzero(as_tuple=True)[0].to(features.device)  # (B_t,)
        if rows.numel() == 0:
            continue
        logits = net.heads[name](features[rows])  # (B_t, D) -> (B_t, C_t)
        wanted = labels[rows]
        loss_sum = F.cross_entropy(logits, wanted, reduction="sum")
        total = total + loss_sum
        samples[name] = rows.numel()
        loss_sums.append(loss_sum.detach())
        corrects.append((logits.detach().argmax(1) == wanted).sum())
    # Read once for all tasks: each reading waits for all that a GPU was given to do.
    values = zip(samples.items(), torch.stack(loss_sums).tolist(), torch.stack(corrects).tolist(), strict=True)
    return total / features.shape[0], {name: TaskShare(n, loss, right) for (name, n), loss, right in values}


def rescale_head_gradients(net: MultiTaskNet, shares: Mapping[str, TaskShare]) -> None:
    """Multiply each active head's gradients by B / B_t: its own mean loss, as if it were alone (paper: eq. of phi).

    Call it after backward and before the optimiser's step; the backbone's gradients stay as they are.
    """
    batch_size = sum(share.samples for share in shares.values())
    for name, share in shares.items():
        for parameter in net.heads[name].parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(batch_size / share.samples)
