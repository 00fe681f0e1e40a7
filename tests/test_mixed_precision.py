"""16-bit logits: beside float32 values, under autocast, and in float16 with a GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Backend
from torch import Tensor, nn

from fastfocal import FastFocalLoss, focal_loss, reference
from fastfocal.losses.bce import BCELoss
from fastfocal.losses.focal import FocalLoss
from fastfocal.losses.loss import Loss
from fastfocal.options import Inputs, Options
from fastfocal.pyramid import pyramid_loss

CLASSES, ANCHORS = 5, 3
CELLS = ((16, 24), (8, 12), (4, 6))
SCALES = [2.0**power for power in range(17)]  # 1 to 65536, which a GradScaler starts with
# The promise for float32 beside float64, gamma 2; CUDA's kernels for 16-bit logits compute to 1.2e-5.
RELATIVE = {"cpu": 2e-6, "cuda": 1.2e-5, "cuda_on_host": 1.2e-5}


def at_the_start_of_training(backend: Backend, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Logits around the bias -4.6 that gives everything a probability of 0.01; one anchor in forty is positive."""
    levels, labels = [], []
    for h, w in CELLS:
        noise = torch.randn(2, ANCHORS * CLASSES, h, w, generator=generator)
        levels.append((-4.6 + 0.3 * noise).half().to(backend.device))
        drawn = torch.randint(0, 40 * CLASSES, (2, h * w * ANCHORS), generator=generator)
        labels.append(torch.where(drawn < CLASSES, drawn, CLASSES).to(backend.device))
    return levels, labels


def exact_gradients(levels: list[Tensor], labels: list[Tensor], normalizer: Any) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in levels]
    loss = reference.focal_loss(leaves, labels, num_classes=CLASSES, normalizer=normalizer)
    return list(torch.autograd.grad(loss, leaves))


def scaled_gradients(levels: list[Tensor], labels: list[Tensor], scale: float, **options: Any) -> list[Tensor]:
    """As a GradScaler scales the loss."""
    leaves = [x.clone().requires_grad_() for x in levels]
    scaler = torch.amp.GradScaler(levels[0].device.type, init_scale=scale)
    loss = focal_loss(leaves, labels, num_classes=CLASSES, **options)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call, union-attr]
    return [x.grad for x in leaves]  # type: ignore[misc]


@pytest.mark.parametrize("normalizer", ["positives", 1.0, 1000.0])
def test_gradients_of_a_scaled_loss_are_rounded_once(
    backend: Backend, normalizer: Any, generator: torch.Generator
) -> None:
    """Float64's gradient times the scale, rounded once, but where float32's error is on the other side of a tie."""
    levels, labels = at_the_start_of_training(backend, generator)
    exact = exact_gradients(levels, labels, normalizer)
    relative = RELATIVE[backend.name]
    for scale in SCALES:
        for got, g in zip(scaled_gradients(levels, labels, scale, normalizer=normalizer), exact, strict=True):
            want = g * scale
            low, high = (want * (1 - relative)).half(), (want * (1 + relative)).half()
            assert got.dtype == torch.float16
            assert (torch.minimum(low, high) <= got).all() and (got <= torch.maximum(low, high)).all(), scale
            # Ties are as rare as float32's error is small beside a float16's: 4e-6 of 2^-11, and 2.4e-5 of it on CUDA.
            assert (got == want.half()).double().mean() > 0.9, scale


def lost(
    levels: list[Tensor], labels: list[Tensor], scale: float, normalizer: Any, **options: Any
) -> tuple[float, float]:
    """Of the background's gradients: the share that became 0, and the error of their sum, which moves the bias."""
    exact = exact_gradients(levels, labels, normalizer)
    found = scaled_gradients(levels, labels, scale, normalizer=normalizer, **options)
    got = torch.cat([g.double().flatten() / scale for g in found])
    want = torch.cat([g.flatten() for g in exact])
    background = want > 0
    sums = got[background].sum() / want[background].sum()
    return (got[background] == 0).double().mean().item(), abs(1 - sums.item())


def test_what_a_stored_float16_gradient_loses(generator: torch.Generator) -> None:
    """docs/notes/float16.md: "save" rounds before the scale is there, and at the start of training little is left."""
    levels, labels = at_the_start_of_training(Backend("cpu", torch.device("cpu")), generator)
    for normalizer, zeros, of_sum in ((10.0, 0.0, 0.0), (100.0, 0.6, 0.15), (300.0, 0.9, 0.6)):
        kept = lost(levels, labels, 65536.0, normalizer)
        stored = lost(levels, labels, 65536.0, normalizer, grad_mode="save")
        assert kept[0] == 0 and kept[1] < 1e-4, (normalizer, kept)  # errors of 2^-12 at the most, either way
        assert stored[0] >= zeros and stored[1] >= of_sum, (normalizer, stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_under_autocast_with_a_grad_scaler(backend: Backend, dtype: torch.dtype) -> None:
    """The head computes in 16 bits, the loss reads its logits as they come; the scale is out of the parameters' gradients."""
    torch.manual_seed(2)
    head = nn.Conv2d(4, ANCHORS * CLASSES, 1).to(backend.device)
    assert head.bias is not None
    nn.init.constant_(head.bias, -4.6)
    features = torch.randn(2, 4, 8, 6).to(backend.device)
    labels = torch.randint(0, CLASSES + 1, (2, 8 * 6 * ANCHORS)).to(backend.device)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=65536.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
    with torch.autocast(backend.device.type, dtype):
        logits = head(features)
        assert logits.dtype == dtype
        loss = FastFocalLoss(CLASSES)([logits], labels)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    assert head.bias.grad is not None
    # The gradient of the bias sums, over cells, the gradients of these logits: each rounded once, sums by autocast.
    (g,) = exact_gradients([logits.detach()], [labels], "positives")
    want = g.sum(dim=(0, 2, 3))
    # Eight roundings of the sum to the 16-bit dtype.
    torch.testing.assert_close(head.bias.grad.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


# --- float32 beside 16 bits ---------------------------------------------------------------------------------------------


class Bce(Loss):
    kind, name, takes_scores = BCELoss.kind, "bce", True

    def parameters(self) -> list[float]:
        return [0.0]

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        return nn.functional.softplus(x) - torch.where(y > 0, score, 0.0) * x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["weight", "soft", "scores", "normalizer", "alpha", "class_weight"])
def test_float32_values_keep_their_digits(
    backend: Backend, what: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Beside 16-bit logits: 1/3 rounded to 16 bits would be off by 1e-4 or more."""
    levels, labels = at_the_start_of_training(backend, generator)
    levels = [(x + 4.6).to(dtype) for x in levels]
    third = [torch.full(y.shape, 1 / 3, device=backend.device) for y in labels]
    of_classes = torch.full((CLASSES,), 1 / 3, device=backend.device)
    targets: Any = labels
    loss: Loss = FocalLoss()
    options: dict[str, Any] = {}
    if what == "soft":
        targets, options = [torch.full(x.shape, 1 / 3, device=backend.device) for x in levels], {"normalizer": 9.0}
    elif what == "scores":
        loss, options = Bce(), {"scores": third, "normalizer": "scores"}
    elif what == "alpha":
        loss = FocalLoss(alpha=of_classes)
    elif what == "normalizer":
        options = {"normalizer": of_classes[0]}
    else:
        options = {what: third if what == "weight" else of_classes}
    got = pyramid_loss(loss, Options(num_classes=CLASSES), Inputs(levels, targets, **options))
    want = reference.pyramid_loss(
        loss, Options(num_classes=CLASSES), Inputs([x.double() for x in levels], targets, **options)
    )
    assert isinstance(got, Tensor) and isinstance(want, Tensor) and got.dtype == torch.float32
    # 5e-6 is promised for each term (1.2e-5 for 16-bit logits on CUDA); their sum is float64 until the end.
    torch.testing.assert_close(got.double(), want, rtol=1.5e-5, atol=0)
    sixteen = torch.tensor(1 / 3).to(dtype).double().item() * 3 - 1
    assert abs(sixteen) > 5 * 1.5e-5  # so it would show
