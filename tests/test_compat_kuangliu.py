"""fastfocal.compat.kuangliu against a port of that repository's training step to today's PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from precision import Precision, check, every_precision
from torch import Tensor, nn
from torch.nn import functional as F

from fastfocal.compat import kuangliu

CLASSES, ANCHORS = 20, 9


class Net(nn.Module):
    """The shape of that repository's network: a pyramid of three levels, and two heads shared by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=8, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, stride=2, padding=1) for _ in range(2))
        self.loc_head = nn.Conv2d(16, ANCHORS * 4, 3, padding=1)
        self.cls_head = nn.Conv2d(16, ANCHORS * CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Box and class outputs of every level, raw."""
        levels = [torch.relu(self.stem(x))]
        for conv in self.down:
            levels.append(torch.relu(conv(levels[-1])))
        return [self.loc_head(f) for f in levels], [self.cls_head(f) for f in levels]


def concatenated(levels: list[Tensor], width: int) -> Tensor:
    return torch.cat([x.permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, width) for x in levels], 1)


def one_hot(x: Tensor, y: Tensor) -> Tensor:
    """float32 in that repository, whatever the logits are."""
    return torch.eye(1 + CLASSES, dtype=torch.promote_types(x.dtype, torch.float32))[y][:, 1:]


def their_alternative(x: Tensor, y: Tensor) -> Tensor:
    t = one_hot(x, y)
    x_t = x * (2 * t - 1)
    p_t = (2 * x_t + 1).sigmoid()
    w = 0.25 * t + 0.75 * (1 - t)
    return (-w * p_t.log() / 2).sum()


def their_focal_loss(x: Tensor, y: Tensor) -> Tensor:
    t = one_hot(x, y)
    p = x.sigmoid()
    p_t = p * t + (1 - p) * (1 - t)
    w = (0.25 * t + 0.75 * (1 - t)) * (1 - p_t).pow(2)
    # The PyTorch of that time multiplied by the weight, and differentiated it too; today's refuses such a weight.
    return (w * F.binary_cross_entropy_with_logits(x, t, reduction="none")).sum()


def exact_alternative(x: Tensor, y: Tensor) -> Tensor:
    """The same, of which nothing cancels."""
    t = one_hot(x, y)
    return (-(0.25 * t + 0.75 * (1 - t)) * F.logsigmoid(2 * x * (2 * t - 1) + 1) / 2).sum()


def their_step(
    loc: Tensor,
    loc_targets: Tensor,
    cls: Tensor,
    targets: Tensor,
    star: bool = True,
    alternative: Callable[[Tensor, Tensor], Tensor] = their_alternative,
) -> Tensor:
    positive, counted = targets > 0, targets > -1
    boxes = F.smooth_l1_loss(loc[positive], loc_targets[positive], reduction="sum")
    classes = (alternative if star else their_focal_loss)(cls[counted], targets[counted])
    return (boxes + classes) / positive.sum()


def scene(positives: bool = True) -> tuple[Net, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net().double()
    x = torch.rand(2, 3, 56, 72, dtype=torch.float64)
    anchors = sum(t.shape[2] * t.shape[3] * ANCHORS for t in net(x)[1])
    kind = torch.rand(2, anchors)
    targets = torch.zeros(2, anchors, dtype=torch.int64)
    if positives:
        targets[kind < 0.05] = torch.randint(1, CLASSES + 1, (int((kind < 0.05).sum()),))
    targets[kind > 0.9] = -1
    return net, x, torch.randn(2, anchors, 4, dtype=torch.float64), targets


def gradients(net: Net, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("star", [True, False])
@pytest.mark.parametrize("form", ["raw", "concatenated"])
def test_a_training_step_is_theirs(form: str, star: bool) -> None:
    net, x, loc_targets, targets = scene()
    loc, cls = net(x)
    theirs = their_step(concatenated(loc, 4), loc_targets, concatenated(cls, CLASSES), targets, star)
    expected = gradients(net, theirs)
    loc, cls = net(x)
    given = (loc, cls) if form == "raw" else (concatenated(loc, 4), concatenated(cls, CLASSES))
    ours = kuangliu.FocalLoss(CLASSES, star=star)(given[0], loc_targets, given[1], targets)
    # float64; theirs takes the logarithm of a sigmoid, which loses digits where that is nearly 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for name, gradient in gradients(net, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12 * float(expected[name].abs().max()))


def test_the_loss_functions_alone() -> None:
    _, _, _, targets = scene()
    y = targets[targets > -1]
    x = torch.randn(len(y), CLASSES, dtype=torch.float64)
    criterion = kuangliu.FocalLoss(CLASSES)
    torch.testing.assert_close(criterion.focal_loss(x, y), their_focal_loss(x, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.focal_loss_alt(x, y), their_alternative(x, y), rtol=1e-12, atol=0)


def test_no_positives() -> None:
    """Theirs is infinite; here the sum is divided by 1."""
    net, x, loc_targets, targets = scene(positives=False)
    loc, cls = net(x)
    rows = concatenated(cls, CLASSES)
    assert torch.isinf(their_step(concatenated(loc, 4), loc_targets, rows, targets))
    counted = targets > -1
    ours = kuangliu.FocalLoss(CLASSES)(loc, loc_targets, cls, targets)
    torch.testing.assert_close(ours, their_alternative(rows[counted], targets[counted]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("star", [True, False])
@every_precision
def test_precision(star: bool, precision: Precision) -> None:
    """One positive, so that the sum, which is more than float16 has, is not divided."""
    generator = torch.Generator().manual_seed(1)
    m = 6000
    x = 4 * torch.randn(1, m, CLASSES, generator=generator, dtype=torch.float64) + 1
    y = torch.zeros(1, m, dtype=torch.int64)
    y[0, 7], y[0, 9:200] = 3, -1
    boxes = torch.rand(2, 1, m, 4, generator=generator)
    criterion = kuangliu.FocalLoss(CLASSES, star=star)
    loss = check(
        lambda x: criterion(boxes[0].to(x.dtype), boxes[1], x, y),
        lambda x: their_step(boxes[0].to(x.dtype), boxes[1], x, y, star),
        lambda x: their_step(boxes[0].to(precision.logits).to(x.dtype), boxes[1], x, y, star, exact_alternative),
        x,
        precision,
    )
    assert loss.dtype == torch.float32 and loss > 65504


@pytest.mark.parametrize("label", [CLASSES + 1, -2, CLASSES + 100])
def test_a_label_that_is_no_class(label: int) -> None:
    net, x, loc_targets, targets = scene()
    loc, cls = net(x)
    targets[1, 5] = label
    with pytest.raises(ValueError, match=rf"label {label} at \[1, 5\] .*; expected one of the classes 1\.\.{CLASSES}"):
        kuangliu.FocalLoss(CLASSES)(loc, loc_targets, cls, targets)


def test_twenty_classes_are_the_default() -> None:
    assert kuangliu.FocalLoss().num_classes == 20
