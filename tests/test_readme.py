"""README's claims that code can check."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Size, draw_classes, draw_levels, encode

import fastfocal
from fastfocal import FastFocalLoss

README = (Path(__file__).parent.parent / "README.md").read_text()
SIZE = Size(2, 3, 80, ((5, 3), (3, 2)))


def block_after(words: str) -> str:
    found = re.search(rf"^{words}.*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def torchvision_by_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that this also runs where torchvision does not import."""
    ops = SimpleNamespace(sigmoid_focal_loss=fastfocal.reference.sigmoid_focal_loss)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)


@pytest.mark.usefixtures("torchvision_by_its_formula")
def test_the_first_lines_and_their_equivalent_run_as_pasted() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(block_after("\\*\\*For whom"), names)
    fused = names["loss"].item()
    assert all(x.grad is not None and x.grad.any() for x in names["cls_logits"])
    exec(block_after("Equivalent to"), names)
    # Four million terms, summed in float32 in blocks.
    torch.testing.assert_close(fused, names["loss"].item(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("torchvision_by_its_formula")
def test_equivalent_to() -> None:
    """The block under "Equivalent to", run as it stands, gives the loss and the gradients of FastFocalLoss."""
    generator = torch.Generator().manual_seed(0)
    logits = [x.double().requires_grad_() for x in draw_levels(SIZE, generator)]
    labels = [
        y.reshape(x.shape[0], *x.shape[2:], SIZE.anchors)
        for x, y in zip(logits, encode(draw_classes(SIZE, generator), SIZE.classes), strict=True)
    ]
    names: dict[str, Any] = {"cls_logits": logits, "labels": labels}
    exec(block_after("Equivalent to"), names)
    fused = FastFocalLoss(num_classes=80)(logits, labels)
    # Two float64 computations of some thousand terms.
    torch.testing.assert_close(fused, names["loss"], rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(fused, logits), torch.autograd.grad(names["loss"], logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-300)


def test_files_that_readme_names_are_there() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).is_file(), target


def test_the_first_screen_stays_one() -> None:
    assert len(README.splitlines()) <= 120
