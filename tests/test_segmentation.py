"""docs/segmentation.md: every block gives the host's own loss and gradient. A block's host is the first package it imports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfocal

PAGE = Path(__file__).resolve().parent.parent / "docs" / "segmentation.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def names() -> dict[str, Any]:
    """What the page calls logits, labels, mask, masks, known, volume and volume_labels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 2).requires_grad_()

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    known = integers(21, 2, 9, 7)
    return {
        "fastfocal": fastfocal,
        "logits": draw(2, 21, 9, 7),
        "known": known,
        "labels": known.masked_fill(torch.rand(known.shape, generator=generator) < 0.2, 255),
        "mask": integers(2, 2, 1, 9, 7),
        "masks": integers(2, 2, 21, 9, 7).float(),
        "volume": draw(2, 4, 3, 9, 7),
        "volume_labels": integers(4, 2, 3, 9, 7),
    }


def test_the_page_has_blocks_of_every_host() -> None:
    hosts = {re.match(r"from (\w+)", block)[1] for block in BLOCKS}  # type: ignore[index]
    assert hosts == {"segmentation_models_pytorch", "kornia", "monai"} and len(BLOCKS) == 8


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.match(r"from (\w+)", block)[1])  # type: ignore[index]
def test_block(block: str) -> None:
    pytest.importorskip(re.match(r"from (\w+)", block)[1], exc_type=Exception)  # type: ignore[index]
    found = names()
    exec(block, found)  # the page's own code
    leaf = found["volume" if "volume" in block else "logits"]
    # MONAI and kornia add a logarithm and a product in float32, smp takes 1 - exp(-ce): a few 1e-6 of the mean.
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=5e-6, atol=0)
    ours, theirs = (torch.autograd.grad(found[name], leaf)[0] for name in ("ours", "theirs"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("mode", ["auto", "save", "recompute", "inplace"])
def test_monais_own_tensors(mode: str) -> None:
    """A MetaTensor carries where an image came from; the loss takes its numbers, and the gradient goes back to it."""
    data = pytest.importorskip("monai.data")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    leaf = data.MetaTensor(logits.clone()).requires_grad_()
    given = leaf * 1
    assert type(given) is data.MetaTensor
    options: dict[str, Any] = {"num_classes": 3, "labels": "segmentation"}
    loss = fastfocal.focal_loss(given, data.MetaTensor(labels), grad_mode=mode, **options)
    loss.backward()
    plain = logits.clone().requires_grad_()
    want = fastfocal.focal_loss(plain, labels, **options)
    want.backward()
    assert torch.equal(loss, want)
    assert torch.equal(leaf.grad.as_subclass(torch.Tensor), plain.grad)
