"""apex.contrib.focal_loss.focal_loss on any device and in any dtype, from one level or from all.

    from fastfocal.compat.apex import focal_loss

Equivalent to apex's function (6424da3): classes 0..num_real_classes - 1, background -1, ignored -2, the sum divided by
num_positives_sum, label smoothing as in effdet. Written from apex's source and documentation; apex itself needs a GPU to run.
Unlike apex's, a second backward through the same graph gives the same gradient, bfloat16 works, no number of classes is
required to be a multiple of anything, and a label that is none of these is an error (of the kernels: a ValueError on the CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import fastfocal


def focal_loss(
    cls_output: Tensor | Sequence[Tensor],
    cls_targets_at_level: Tensor | Sequence[Tensor],
    num_positive_sum: Tensor,
    num_real_classes: int,
    alpha: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Summed focal loss of one level or of a list of them.

    Args:
        cls_output: logits (..., A, K) with K >= num_real_classes; classes beyond these pad the memory, cost nothing and get
            gradient 0. A list has one per level.
        cls_targets_at_level: (..., A) integers; a list with a list.
        num_positive_sum: what the sum is divided by, one element.
        num_real_classes: classes that count.
        alpha, gamma, label_smoothing: as :func:`fastfocal.focal_loss` takes them.

    Returns:
        A 0-d tensor; float32, or float64 for float64 logits.

    Raises:
        ValueError: num_real_classes is more than K; a label is neither a class nor -1 nor -2.
    """
    levels = [cls_output] if isinstance(cls_output, Tensor) else list(cls_output)
    targets = [cls_targets_at_level] if isinstance(cls_targets_at_level, Tensor) else list(cls_targets_at_level)
    classes = levels[0].shape[-1]
    if num_real_classes > classes:
        raise ValueError(
            f"num_real_classes: expected at most {classes}, the logits' last dimension, got {num_real_classes}"
        )
    loss = fastfocal.focal_loss(
        # Padding is taken off by a slice, whose derivative puts zeros back.
        [x[..., :num_real_classes].reshape(-1, num_real_classes) for x in levels],
        [t.reshape(-1) for t in targets],
        alpha=alpha,
        gamma=gamma,
        labels="effdet",
        label_smoothing=label_smoothing,
        normalizer=num_positive_sum.reshape(()),
    )
    assert isinstance(loss, Tensor)
    return loss
