"""The two lists of losses, csrc/losses/registry.h and fastfocal/losses/__init__.py: what one says, the other says too."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfocal
from fastfocal import losses, ops
from fastfocal.losses import LOSSES
from fastfocal.losses.loss import Member, members_of
from fastfocal.losses.varifocal import VarifocalLoss

OPERATORS = ops._C.losses()
CSRC = Path(__file__).resolve().parent.parent / "csrc"
every_member = pytest.mark.parametrize("member", LOSSES, ids=lambda member: member.parameters.name)


def test_both_have_the_same_losses() -> None:
    assert [(loss["number"], loss["name"]) for loss in OPERATORS] == [
        (member.parameters.kind, member.parameters.name) for member in LOSSES
    ]
    assert [loss["number"] for loss in OPERATORS] == list(range(len(OPERATORS)))


@every_member
def test_both_say_the_same_of_a_loss(member: Member) -> None:
    loss, known = member.parameters, OPERATORS[member.parameters.kind]
    assert known["reads_scores"] is loss.takes_scores
    assert known["takes_anchors"] is loss.takes_anchors
    assert (loss.kind in ops.ANCHOR_LOSSES) is loss.takes_anchors


def another(default: Any) -> Any:
    """A valid value of an option, other than its default."""
    if isinstance(default, bool):
        return not default
    return 0.375 if default is None or default != 0.375 else 0.25


@every_member
def test_numbers_are_passed_in_the_order_of_their_names(member: Member) -> None:
    names = OPERATORS[member.parameters.kind]["parameters"]
    own = {name: default for name, default, _ in member.parameters.checked_fields}
    assert names == ["unused"] or set(names) <= set(own)
    for changed in [{}, *({name: another(default)} for name, default in own.items())]:
        loss = member.parameters(**changed)
        for name, value in zip(names, loss.parameters(), strict=True):
            if name in changed:
                assert value == changed[name], (changed, name)
            else:
                assert value == float(own.get(name) or 0) or own[name] is None, (changed, name)


@every_member
def test_the_operator_takes_as_many_numbers_as_the_loss_passes(member: Member) -> None:
    """A direct call: the operators read scores, and take soft targets, where the registry says so."""
    loss, numbers = member.parameters(), member.parameters().parameters()
    x, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int16)
    arguments: dict[str, Any] = {
        **dict.fromkeys(ops.OPTION_NAMES), "packed_labels": labels, "level_scales": [1.0], "positive_weight": 1.0,
        "negative_weight": 1.0, "loss": loss.kind, "loss_parameters": numbers, "num_classes": 3, "first_class": 0,
        "reduction": ops.NONE, "needs_grad": [1],
    }  # fmt: skip
    call = ops.operators.pyramid_loss
    ((made,), _) = call([x], **arguments)
    assert made.shape == (2,) if loss.takes_anchors else (2, 3)
    with pytest.raises(RuntimeError, match="loss_parameters: expected"):
        call([x], **{**arguments, "loss_parameters": [*numbers, 0.0]})
    scored = {**arguments, "scores": torch.ones(2)}
    if loss.takes_scores:
        call([x], **scored)
    else:
        with pytest.raises(RuntimeError, match="scores: expected none"):
            call([x], **scored)


def test_each_file_of_a_loss_is_a_row() -> None:
    files = {name for _, name, _ in pkgutil.iter_modules(losses.__path__)} - {"loss"}
    assert len(files) == len(LOSSES)
    for name in files:
        public = import_module(f"fastfocal.losses.{name}").__all__
        (member,) = [member for member in LOSSES if member.function.__name__ in public]
        assert sorted(public) == sorted([member.function.__name__, member.module.__name__])
        for known in public:
            assert known in losses.__all__ and known in fastfocal.__all__
            assert getattr(fastfocal, known) in member
    assert len(losses.__all__) == 2 * len(LOSSES)


def test_each_header_of_a_loss_is_in_the_list() -> None:
    headers = [path.read_text() for path in (CSRC / "losses").glob("*.h")]
    names = [name for text in headers for name in re.findall(r"kName = \"(\w+)\"", text)]
    assert sorted(names) == sorted(loss["name"] for loss in OPERATORS)


def test_members_are_found_by_their_module_and_sorted() -> None:
    """Whatever else a namespace has: parameters, other modules, a function's name."""
    of_losses = {"FastB": losses.FastBCELoss, "FastF": losses.FastFocalLoss, "focal_loss": losses.focal_loss}
    others = {"VarifocalLoss": VarifocalLoss, "Linear": torch.nn.Linear, "text": "varifocal_loss"}
    found = members_of({**of_losses, "bce_loss": losses.bce_loss, **others})
    assert [member.parameters.name for member in found] == ["focal_loss", "bce_loss"]
    with pytest.raises(KeyError, match="bce_loss"):  # a file that has no function of the loss's name in its `__all__`
        members_of(of_losses)
