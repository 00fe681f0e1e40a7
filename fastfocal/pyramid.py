"""What every loss function and module calls: read -> pack the labels -> the operator, recorded by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.compiler import is_compiling

from fastfocal import labels as label_conventions
from fastfocal import ops
from fastfocal.autograd import differentiable_loss
from fastfocal.ops import OperatorOptions
from fastfocal.options import INPUTS, OPTIONS, Inputs, Options
from fastfocal.prepare import REDUCTIONS, Prepared, read_others, read_targets

if TYPE_CHECKING:
    from fastfocal.checks import Levels
    from fastfocal.distributed import Ranks, Running
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
    return parameters(**own), Options(**shared), Inputs(logits, targets, **of_call)


def pyramid_loss(
    loss: Loss, options: Options, inputs: Inputs, ranks: Ranks | None = None, running: Running | None = None
) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula.

    Args:
        ranks: those whose counts are added.
        running: the mean over calls that the normalizer is then taken from.
    """
    prepared = read_targets(loss, options, inputs, ranks is not None, running is not None)
    # First of all, so that a sum over ranks is under way as early as may be.
    packed_labels, counted = pack(prepared)
    total = None if ranks is None else ranks.start_sum(prepared.divisor.share(counted))
    read_others(prepared, loss, inputs)
    if ranks is None or total is None:
        divisor = prepared.divisor.of(counted)
    else:
        divisor = prepared.divisor.of_whole_batch(counted, total(), ranks.size)
    if running is not None and divisor is not None:
        divisor = running.next(divisor)
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
    """The packed labels, and what was counted on the way; neither of soft targets."""
    labels, divisor = prepared.labels, prepared.divisor
    if labels is None:
        return None, None
    pyramid, background, ignored = prepared.pyramid, prepared.options.background_index, prepared.options.ignore_index
    assert background is not None
    classes = pyramid.num_classes
    if background == classes and ignored == label_conventions.DEFAULT_IGNORE_INDEX and not is_compiling():
        label_conventions.no_background.look(labels, classes)
    # Each anchor's own score, where they are summed.
    scores = prepared.scores if divisor.count == ops.COUNT_SCORES else None
    try:
        return ops.pack_labels(
            labels, pyramid.dense, scores, classes, background, ignored, divisor.count, divisor.minimum
        )
    except ValueError:
        message = label_conventions.describe_bad_label(
            prepared.given, prepared.together, pyramid.anchors, classes, background, ignored
        )
        if message is None:
            raise
        raise ValueError(message) from None
