"""Routing, loss and head gradients, against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtdp.backbones import Backbone
from mtdp.errors import UsageError
from mtdp.multitask import MultiTaskNet, is_head_name, rescale_head_gradients, routed_loss


class Flat(Backbone):
    """Two features, which are the input itself."""

    def __init__(self) -> None:
        super().__init__("flat", nn.Identity(), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def net() -> MultiTaskNet:
    """Heads a (2 classes), b (3) and c (2), all zero: every logit is 0 and every class equally likely."""
    net = MultiTaskNet(Flat(), {"a": ("x", "y"), "b": ("p", "q", "r"), "c": ("m", "n")})
    for parameter in net.heads.parameters():
        nn.init.zeros_(parameter)
    return net


FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
TASKS = torch.tensor([0, 0, 0, 1])  # three samples of a, one of b, none of c
LABELS = torch.tensor([0, 1, 0, 2])


def test_the_loss_is_the_mean_over_all_samples(net: MultiTaskNet) -> None:
    loss, shares = routed_loss(net, FEATURES, TASKS, LABELS)
    assert float(loss.detach()) == pytest.approx((3 * math.log(2) + math.log(3)) / 4)
    assert set(shares) == {"a", "b"}
    assert (shares["a"].samples, shares["b"].samples) == (3, 1)
    assert shares["a"].loss_sum == pytest.approx(3 * math.log(2))


def test_correct_answers_are_counted_in_each_task(net: MultiTaskNet) -> None:
    with torch.no_grad():
        net.heads["a"].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        net.heads["b"].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    _, shares = routed_loss(net, FEATURES, TASKS, LABELS)
    assert (shares["a"].correct, shares["b"].correct) == (3, 0)


class Readings(TorchDispatchMode):
    """Counts what reads a value off the device, and so waits for all that it was given to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_waited_for_at_each_head(net: MultiTaskNet) -> None:
    with Readings() as readings:
        routed_loss(net, FEATURES, TASKS, LABELS)
    assert readings.count == 0


def test_head_gradients_are_rescaled_to_their_own_mean_and_the_backbone_keeps_its_own(net: MultiTaskNet) -> None:
    features = FEATURES.clone().requires_grad_()
    with torch.no_grad():
        net.heads["b"].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    loss, shares = routed_loss(net, features, TASKS, LABELS)
    loss.backward()
    backbone_gradient = features.grad
    assert backbone_gradient is not None
    before = backbone_gradient.clone()
    rescale_head_gradients(net, shares)
    assert backbone_gradient.equal(before)
    # Head a: p = 1/2 everywhere, so dL/dbias_x = mean over its 3 samples of (1/2 - [label = x]) = -1/2 / 3.
    torch.testing.assert_close(net.heads["a"].bias.grad, torch.tensor([-1 / 6, 1 / 6]))
    # dL/dweight[x] = mean of (p - [label = x]) * feature = (-1/2 (1,0) + 1/2 (0,1) - 1/2 (2,0)) / 3.
    torch.testing.assert_close(net.heads["a"].weight.grad[0], torch.tensor([-0.5, 1 / 6]))
    # Head b, one sample (0, 2) of class r: p = 1/3 each, its own mean is itself.
    torch.testing.assert_close(net.heads["b"].bias.grad, torch.tensor([1 / 3, 1 / 3, -2 / 3]))
    # Backbone: gradients of the batch's mean, not of the tasks' means; sample 3 meets head b only.
    torch.testing.assert_close(before[3], torch.tensor([(1 / 3) / 4, 0.0]))


def test_an_inactive_head_does_not_move_even_with_momentum(net: MultiTaskNet) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(tasks: list[int]) -> None:
        loss, shares = routed_loss(net, FEATURES, torch.tensor(tasks), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        rescale_head_gradients(net, shares)
        optimizer.step()

    step([0, 0, 2, 2])  # c gets momentum
    before = {name: tensor.clone() for name, tensor in net.heads["c"].state_dict().items()}
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in net.heads["c"].parameters()]
    assert before["weight"].abs().max() > 0
    step([0, 0, 0, 1])  # c is absent
    for name, tensor in net.heads["c"].state_dict().items():
        assert tensor.equal(before[name])
    for parameter, buffer in zip(net.heads["c"].parameters(), momentum, strict=True):
        assert optimizer.state[parameter]["momentum_buffer"].equal(buffer)


def test_forward_gives_every_head_every_sample(net: MultiTaskNet) -> None:
    assert {name: tuple(logits.shape) for name, logits in net(FEATURES).items()} == {
        "a": (4, 2),
        "b": (4, 3),
        "c": (4, 2),
    }


@pytest.mark.parametrize("name", ["keys", "forward", "a.b", "a b", "", "é", "__class__"])
def test_names_that_no_module_can_have_are_refused(name: str) -> None:
    assert not is_head_name(name)
    with pytest.raises(UsageError, match="cannot be the name of a task"):
        MultiTaskNet(Flat(), {name: ("x", "y")})


def test_names_of_the_paper_are_taken() -> None:
    assert all(is_head_name(name) for name in ("mitos2014", "ulg_lbtd2_chimio_necrose", "camelyon16", "CRC-4"))
