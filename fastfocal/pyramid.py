"""What every loss function and module calls: prepare -> pack the labels -> the operator, recorded by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import labels as label_conventions
from fastfocal import ops
from fastfocal.autograd import differentiable_loss
from fastfocal.options import INPUTS, OPTIONS, Inputs, Options
from fastfocal.prepare import Prepared, prepare

if TYPE_CHECKING:
    from fastfocal.checks import Levels
    from fastfocal.losses.loss import Loss


def call(
    parameters: type[Loss], logits: Levels, targets: Levels, reduction: str, keywords: dict[str, Any]
) -> Tensor | list[Tensor]:
    """A loss function's whole body: its keywords go to the loss, to the shared options and to the inputs."""
    loss, options, inputs = sort_keywords(parameters, logits, targets, reduction, keywords)
    return pyramid_loss(loss, options, inputs)


def sort_keywords(
    parameters: type[Loss], logits: Levels, targets: Levels, reduction: str, keywords: dict[str, Any]
) -> tuple[Loss, Options, Inputs]:
    """Raises: TypeError for a keyword that is none; and what each of the three has to say."""
    own_names = [entry[0] for entry in parameters.checked_fields]
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {"reduction": reduction}
    of_call: dict[str, Any] = {}
    given = {**parameters.defaults, **keywords} if parameters.defaults else keywords
    for name, value in given.items():
        if name in OPTIONS:
            shared[name] = value
        elif name in INPUTS:
            of_call[name] = value
        elif name in own_names:
            own[name] = value
        else:
            raise TypeError(f"{parameters.name}() got an unexpected keyword argument {name!r}")
    return parameters(**own), Options(**shared), Inputs(logits, targets, **of_call)


def pyramid_loss(loss: Loss, options: Options, inputs: Inputs) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula."""
    prepared = prepare(loss, options, inputs)
    if prepared.labels is not None:
        pack(prepared, prepared.labels)
    pyramid = prepared.pyramid
    losses = differentiable_loss(prepared.mode, prepared.options, pyramid.levels, pyramid.dense, prepared.transformed)
    if options.reduction == "none" and not isinstance(inputs.logits, Tensor):
        return list(losses)
    return losses[0]


def pack(prepared: Prepared, labels: list[Tensor]) -> None:
    """Gives the operator's options the packed labels, and what was counted on the way."""
    options, divisor, pyramid = prepared.options, prepared.divisor, prepared.pyramid
    background, ignored = prepared.background, prepared.ignored
    classes = pyramid.num_classes
    if background == classes and ignored == label_conventions.DEFAULT_IGNORE_INDEX and not is_compiling():
        label_conventions.no_background.look(labels, classes)
    # Each anchor's own score, where they are summed.
    scores = options.scores if divisor.count == ops.COUNT_SCORES else None
    try:
        options.packed_labels, counted = ops.pack_labels(
            labels, pyramid.dense, scores, classes, background, ignored, divisor.count, divisor.minimum
        )
    except ValueError:
        message = label_conventions.describe_bad_label(
            prepared.given, prepared.together, pyramid.anchors, classes, background, ignored
        )
        if message is None:
            raise
        raise ValueError(message) from None
    options.divisor = divisor.of(counted)
