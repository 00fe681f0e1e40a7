"""README's claims that code can check."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import Size, draw_classes, draw_levels, encode

import fastfocal
from fastfocal import FastFocalLoss

README = (Path(__file__).parent.parent / "README.md").read_text()
SIZE = Size(2, 3, 80, ((5, 3), (3, 2)))


def test_equivalent_to() -> None:
    """The block under "Equivalent to", run as it stands, gives the loss and the gradients of FastFocalLoss."""
    block = re.search(r"^Equivalent to.*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    generator = torch.Generator().manual_seed(0)
    logits = [x.double().requires_grad_() for x in draw_levels(SIZE, generator)]
    labels = [
        y.reshape(x.shape[0], *x.shape[2:], SIZE.anchors)
        for x, y in zip(logits, encode(draw_classes(SIZE, generator), SIZE.classes), strict=True)
    ]
    # torchvision's function by its formula, so that this also runs where torchvision does not import.
    ops = SimpleNamespace(sigmoid_focal_loss=fastfocal.reference.sigmoid_focal_loss)
    names: dict[str, Any] = {"torchvision": SimpleNamespace(ops=ops), "F": F, "cls_logits": logits, "labels": labels}
    exec(block.group(1), names)
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
