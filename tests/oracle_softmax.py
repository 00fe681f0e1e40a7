"""Softmax focal loss and its gradient in float64 numpy, written from the definition, to hold every kernel against.

Of an anchor with the logits x_1..x_K and the label y, p = softmax(x):

    L = -w_y (1 - p_y)^gamma log(p_y)

Lin et al. (arXiv:1708.02002) give it for two classes in equation 4; for K of them it is mmcv's `softmax_focal_loss`. With
gamma 0 it is the cross entropy, of which p_j - [j = y] is the derivative. Classes that are not present are in no sum and have
gradient 0; an anchor of such a class has no loss. Nothing here is shared with the package.
"""

from __future__ import annotations

import numpy as np
from oracle import Array


def _log_sum_exp(x: Array, where: Array) -> Array:
    """log of the sum of exp(x) over the classes that `where` leaves, row by row; -inf where there are none."""
    x = np.where(where, x, -np.inf)
    most = x.max(axis=1, keepdims=True, initial=-np.inf)
    finite = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        return (finite + np.log(np.exp(x - finite).sum(axis=1, keepdims=True)))[:, 0]


def softmax_focal(
    x: Array,
    labels: Array,
    *,
    gamma: float = 2.0,
    class_weight: Array | None = None,
    detached: bool = False,
    present: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Rows of logits (M, K) with labels (M,) -> losses (M,), gradients (M, K), and the sum of their terms' magnitudes (M, K).

    dL/dx_j = dL/dp_y * dp_y/dx_j, where dL/dp_y = gamma (1 - p_y)^(gamma - 1) log(p_y) - (1 - p_y)^gamma / p_y and
    dp_y/dx_j = p_y ([j = y] - p_j). `detached`: (1 - p_y)^gamma is a constant weight. A label below 0: nothing.

    1 - p_y is the other classes' share, so that nothing is lost where p_y is nearly 1; finite logits only, but for those of
    classes that are not `present` (M, K), which may be any.
    """
    x = np.asarray(x, dtype=np.float64)
    rows = np.arange(len(x))
    label = np.where(labels < 0, 0, labels)
    own = np.zeros(x.shape, dtype=bool)
    own[rows, label] = True
    there = np.ones_like(own) if present is None else present
    counts = (labels >= 0) & there[rows, label]
    # Of an anchor that does not count, any numbers will do: it weighs 0.
    x = np.where(there & counts[:, None], x, 0.0)
    there = there | ~counts[:, None]
    all_classes = _log_sum_exp(x, there)
    log_others = _log_sum_exp(x, there & ~own)
    # log(p_y) from whichever side loses nothing: log(1 + others / own), or the difference of two logarithms.
    x_y = x[rows, label]
    with np.errstate(over="ignore"):
        ce = np.where(log_others < x_y, np.log1p(np.exp(log_others - x_y)), all_classes - x_y)
    log_q = np.where(log_others < x_y, log_others - all_classes, -np.log1p(np.exp(np.minimum(x_y - log_others, 0))))
    p_y, p_j = np.exp(x_y - all_classes), np.where(there, np.exp(x - all_classes[:, None]), 0.0)
    with np.errstate(invalid="ignore"):
        modulating = np.ones_like(ce) if gamma == 0 else np.exp(gamma * log_q)
    # The part ([j = y] - p_j), which is 1 - p_y where j = y; with (1 - p_y)^(gamma - 1) it makes one power.
    toward = np.where(own, np.exp(log_q)[:, None], -p_j)
    entropy = -modulating[:, None] * toward
    with np.errstate(invalid="ignore"):
        one_power_less = np.exp((gamma - 1) * log_q)[:, None]
    bend = np.zeros_like(x) if gamma == 0 or detached else -gamma * one_power_less * (p_y * ce)[:, None] * toward
    bend = np.where(toward == 0, 0.0, bend)
    weight = np.where(counts, 1.0, 0.0)
    if class_weight is not None:
        weight = weight * np.asarray(class_weight, dtype=np.float64)[label]
    column = weight[:, None]
    return weight * modulating * ce, column * (entropy + bend), np.abs(column) * (np.abs(entropy) + np.abs(bend))
