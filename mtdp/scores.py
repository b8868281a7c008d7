"""How a network's own head does on a split of its task: accuracy, or ROC AUC for two classes (paper: evaluation)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mtdp.augment import evaluation_view
from mtdp.devices import autocast
from mtdp.errors import LOWER_RATE, TrainingDiverged, or_overflow
from mtdp.images import ImageCache
from mtdp.metrics import score_outputs
from mtdp.multitask import MultiTaskNet
from mtdp.sampling import in_order
from mtdp.tasks import Sample


@torch.no_grad()
def head_scores(
    net: MultiTaskNet,
    normalise: nn.Module,
    head: str,
    samples: Sequence[Sample],
    cache: ImageCache,
    precision: str,
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """The logits of one head for the central square of each image: float32[N, C]. The network is left in eval mode.

    Raises:
        TrainingDiverged: a logit is not finite; the best class of such logits would be the first, whatever the image.
    """
    device = next(net.parameters()).device
    net.eval()
    parts = []
    for images in in_order(samples, cache, evaluation_view, batch_size):
        with autocast(precision, device):
            features = net.backbone(normalise(images.to(device)))  # (B, P, P, 3) -> (B, D)
        parts.append(net.heads[head](features.float()).cpu().numpy())  # (B, D) -> (B, C)
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        hint = or_overflow(LOWER_RATE, precision)
        raise TrainingDiverged(f"{head}: the trained network gives values that are not finite", hint)
    return logits


def outputs_of(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """What `mtdp.metrics` takes, of logits float32[N, C]: of two classes the margin of the second, else the best."""
    values = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits.argmax(1)
    return np.asarray(values, np.float64)


def score(logits: NDArray[np.float32], labels: NDArray[np.int64], metric: str) -> float:
    """The task's metric of logits float32[N, C]."""
    return score_outputs(outputs_of(logits), labels, metric, logits.shape[1])


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """Return int64[N]: the label of each sample."""
    return np.array([sample.label for sample in samples], dtype=np.int64)
