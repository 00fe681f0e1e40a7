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
from fastfocal.prepare import Prepared, Pyramid, anchors_that_count, read_others, read_targets

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
    return parameters(**own), parameters.options(**shared), Inputs(logits, targets, **of_call)


def pyramid_loss(
    loss: Loss, options: Options, inputs: Inputs, ranks: Ranks | None = None, running: Running | None = None
) -> Tensor | list[Tensor]:
    """Everything that does not depend on the formula.

    Args:
        ranks: those whose counts are added.
        running: the mean over calls that the normalizer is then taken from.
    """
    prepared, operator_options = start(loss, options, inputs, ranks, running)
    pyramid = prepared.pyramid
    losses = differentiable_loss(prepared.mode, operator_options, pyramid.levels, pyramid.dense, prepared.transformed)
    if options.reduction == "none" and not isinstance(inputs.logits, Tensor):
        return list(losses)
    return losses[0]


def start(
    loss: Loss,
    options: Options,
    inputs: Inputs,
    ranks: Ranks | None = None,
    running: Running | None = None,
    pyramid: Pyramid | None = None,
) -> tuple[Prepared, OperatorOptions]:
    """All that the operator takes beside logits: the labels packed and counted, the divisor resolved, the options checked.

    pyramid: of logits that are still to come.
    """
    prepared = read_targets(loss, options, inputs, ranks is not None, running is not None, pyramid)
    divisor, packed_labels, counted = prepared.divisor, None, prepared.divisor.counted
    # First of all, so that a sum over ranks is under way as early as may be.
    if prepared.labels is not None:
        packed_labels, counted = pack(prepared, prepared.labels)
        if divisor.class_mask is not None:
            counted = anchors_that_count(packed_labels, prepared.pyramid, divisor.class_mask)
    total = None if ranks is None else ranks.start_sum(divisor.share(counted))
    operator_options = read_others(prepared, loss, inputs)
    operator_options.packed_labels = packed_labels
    if ranks is not None and total is not None:
        operator_options.divisor = divisor.of_whole_batch(counted, total(), ranks.size)
    elif counted is not None:
        operator_options.divisor = divisor.of(counted)
    if running is not None and operator_options.divisor is not None:
        operator_options.divisor = running.next(operator_options.divisor)
    return prepared, operator_options


def pack(prepared: Prepared, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The packed labels, and what was counted on the way."""
    divisor, pyramid, known = prepared.divisor, prepared.pyramid, prepared.known
    background, ignored, classes = known.background_index, known.ignore_index, pyramid.num_classes
    assert background is not None
    if background == classes and ignored == label_conventions.DEFAULT_IGNORE_INDEX and not is_compiling():
        label_conventions.no_background.look(labels, classes)
    # Each anchor's own score, where they are summed.
    scores = prepared.scores if divisor.count == ops.COUNT_SCORES else None
    try:
        return ops.pack_labels(
            labels,
            pyramid.dense if pyramid.placeholders is None else pyramid.placeholders,
            scores,
            classes,
            background,
            ignored,
            divisor.count,
            divisor.minimum,
            known.background_is_class,
            pyramid.placeholders is not None,
        )
    except ValueError:
        message = label_conventions.describe_bad_label(
            prepared.given,
            prepared.together,
            pyramid.anchors,
            classes,
            None if known.background_is_class else background,
            ignored,
        )
        if message is None:
            raise
        raise ValueError(message) from None
