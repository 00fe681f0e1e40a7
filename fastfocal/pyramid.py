"""What every loss function and module calls: prepare -> pack the labels -> the operator, recorded by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import labels as label_conventions
from fastfocal import ops
from fastfocal.autograd import differentiable_loss
from fastfocal.ops import OperatorOptions
from fastfocal.options import INPUTS, OPTIONS, Inputs, Options
from fastfocal.prepare import REDUCTIONS, Prepared, prepare

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
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {"reduction": reduction}
    of_call: dict[str, Any] = {}
    given = {**parameters.defaults, **keywords} if parameters.defaults else keywords
    for name, value in given.items():
        if name in OPTIONS:
            shared[name] = value
        elif name in INPUTS:
            of_call[name] = value
        elif name in parameters.__dataclass_fields__:
            own[name] = value
        else:
            raise TypeError(f"{parameters.name}() got an unexpected keyword argument {name!r}")
    return parameters(**own), parameters.options(**shared), Inputs(logits, targets, **of_call)


def pyramid_loss(loss: Loss, options: Options, inputs: Inputs) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula."""
    prepared = prepare(loss, options, inputs)
    packed_labels, divisor = pack(prepared)
    operator_options = OperatorOptions(
        packed_labels=packed_labels,
        soft_targets=prepared.soft_targets,
        scores=prepared.scores,
        anchor_weight=prepared.anchor_weight,
        class_weights=prepared.class_weights,
        class_mask=prepared.class_mask,
        divisor=divisor,
        level_scales=prepared.level_scales,
        positive_weight=prepared.positive_weight,
        negative_weight=prepared.negative_weight,
        loss=loss.kind,
        loss_parameters=loss.parameters(),
        num_classes=prepared.pyramid.num_classes,
        reduction=REDUCTIONS[options.reduction],
    )
    pyramid = prepared.pyramid
    losses = differentiable_loss(prepared.mode, operator_options, pyramid.levels, pyramid.dense, prepared.transformed)
    if options.reduction == "none" and not isinstance(inputs.logits, Tensor):
        return list(losses)
    return losses[0]


def pack(prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
    """The packed labels, none of soft targets, and the divisor as far as it is a tensor."""
    labels, divisor = prepared.labels, prepared.divisor
    if labels is None:
        return None, divisor.factor
    pyramid, background, ignored = prepared.pyramid, prepared.background, prepared.ignored
    classes = pyramid.num_classes
    if background == classes and ignored == label_conventions.DEFAULT_IGNORE_INDEX and not is_compiling():
        label_conventions.no_background.look(labels, classes)
    # Each anchor's own score, where they are summed.
    scores = prepared.scores if divisor.count == ops.COUNT_SCORES else None
    try:
        packed, counted = ops.pack_labels(
            labels,
            pyramid.dense,
            scores,
            classes,
            background,
            ignored,
            divisor.count,
            divisor.minimum,
            prepared.background_is_class,
        )
    except ValueError:
        message = label_conventions.describe_bad_label(
            prepared.given,
            prepared.together,
            pyramid.anchors,
            classes,
            None if prepared.background_is_class else background,
            ignored,
        )
        if message is None:
            raise
        raise ValueError(message) from None
    return packed, divisor.of(counted)
