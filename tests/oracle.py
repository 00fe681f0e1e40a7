"""Focal loss and its derivatives in float64 numpy, written from the definition, to hold every kernel against.

The binary term is Lin et al., "Focal Loss for Dense Object Detection" (arXiv:1708.02002), equations 1, 4 and 5:

    CE(p_t) = -log(p_t)        FL(p_t) = alpha_t * (1 - p_t)^gamma * CE(p_t)

with p = sigmoid(x), p_t = p for y = 1 and 1 - p for y = 0. A soft target y in [0, 1] mixes the two ends linearly
(p_t = p*y + (1 - p)*(1 - y), alpha_t and CE alike), and label smoothing s replaces y by y*(1 - s) + s/2 in CE alone.
Nothing here is shared with the package: no torch, and anchors are found by index arithmetic, not by permuting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _probabilities(x: Array) -> tuple[Array, Array]:
    """p and 1 - p, each to full relative accuracy: neither is made by subtracting from 1."""
    e = np.exp(-np.abs(x))
    larger, smaller = 1 / (1 + e), e / (1 + e)
    return np.where(x < 0, smaller, larger), np.where(x < 0, larger, smaller)


def _softplus(x: Array) -> Array:
    """-log(1 - p), without overflow for large x and without cancellation for small."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _times(weight: Array, value: Array) -> Array:
    """weight * value, where weight 0 leaves nothing of an infinite value; NaN stays NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((weight == 0) & ~np.isnan(value), np.zeros_like(value), weight * value)


def _parts(x: Array, y: Array, gamma: float, smoothing: float) -> tuple[Array, Array, Array, Array]:
    p, not_p = _probabilities(x)
    smooth = y * (1 - smoothing) + smoothing / 2
    ce = _times(smooth, _softplus(-x)) + _times(1 - smooth, _softplus(x))
    missed = p * (1 - y) + not_p * y
    modulating = np.power(missed, np.asarray(gamma, dtype=x.dtype))
    if gamma:
        # Where 1 - p_t itself underflows (|x| > 700, hard targets) its power need not: ln(1 - p_t) is then -softplus.
        far = missed < 1e-300
        with np.errstate(over="ignore"):
            modulating = np.where(far, np.exp(-gamma * _softplus(np.where(y == 1, x, -x))), modulating)
    return p, not_p, ce, modulating


def _alpha_t(y: Array, alpha: Array | float | None) -> Array:
    return np.ones_like(y) if alpha is None else alpha * y + (1 - alpha) * (1 - y)


def element_loss(
    x: Array, y: Array, *, alpha: Array | float | None = 0.25, gamma: float = 2.0, label_smoothing: float = 0.0
) -> Array:
    """FL of every logit. Infinite logits give the limit: an exponentially small factor beats a linear one."""
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=np.asarray(x).dtype))
    _, _, ce, modulating = _parts(x, y, gamma, label_smoothing)
    return _times(_alpha_t(y, alpha), _times(modulating, ce))


def element_gradient(
    x: Array,
    y: Array,
    *,
    alpha: Array | float | None = 0.25,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
    detached: bool = False,
) -> tuple[Array, Array]:
    """dFL/dx by the product rule, and the sum of its terms' magnitudes.

    With w = 1 - p_t, dw/dx = (1 - 2y) p (1 - p) and dCE/dx = p - y', where y' is the smoothed target:

        dFL/dx = alpha_t * [w^gamma * (p - y') + gamma * w^(gamma - 1) * (1 - 2y) * p (1 - p) * CE]

    `detached` leaves the second term out: w^gamma is then a constant weight.

    The terms' magnitudes say how exact a result can be where they cancel (soft or smoothed targets, never hard ones).
    """
    # 1e300 stands for infinity: every exponential has long reached its limit, and 0 * inf does not arise.
    x = np.clip(x, -1e300, 1e300)
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=x.dtype))
    p, not_p, ce, modulating = _parts(x, y, gamma, label_smoothing)
    smooth = y * (1 - label_smoothing) + label_smoothing / 2
    # w^(gamma - 1) p (1 - p) is w^gamma times p (1 - p) / w; for y in {0, 1} that quotient is 1 - p or p.
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.where(y == 0, not_p, np.where(y == 1, p, p * not_p / (p * (1 - y) + not_p * y)))
    falling = 0.0 if detached else gamma * (1 - 2 * y) * quotient * ce
    alpha_t = _alpha_t(y, alpha)
    gradient = alpha_t * modulating * ((p * (1 - smooth) - not_p * smooth) + falling)
    magnitude = alpha_t * modulating * (p * (1 - smooth) + not_p * smooth + np.abs(falling))
    return gradient, magnitude


def element_second_derivative(
    x: Array,
    y: Array,
    *,
    alpha: Array | float | None = 0.25,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
    detached: bool = False,
) -> tuple[Array, Array]:
    """d2FL/dx2 by the product rule, and the sum of its terms' magnitudes: w^gamma CE has

        w^gamma * CE'' + 2 (w^gamma)' * CE' + (w^gamma)'' * CE

    with CE' = p - y', CE'' = p (1 - p) and, as w' = (1 - 2y) p (1 - p) and p' = p (1 - p), for R = w' / w

        (w^gamma)' = w^gamma * gamma R            (w^gamma)'' = w^gamma * gamma R ((gamma - 1) R + 1 - 2p).

    `detached` leaves the last two terms out.
    """
    x = np.clip(x, -1e300, 1e300)
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=x.dtype))
    p, not_p, ce, modulating = _parts(x, y, gamma, label_smoothing)
    smooth = y * (1 - label_smoothing) + label_smoothing / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.where(y == 0, not_p, np.where(y == 1, p, p * not_p / (p * (1 - y) + not_p * y)))
    growth = 0.0 if detached else gamma * (1 - 2 * y) * quotient
    mixed = 2 * growth * (p * (1 - smooth) - not_p * smooth)
    bent = growth * ((gamma - 1) * (1 - 2 * y) * quotient + (not_p - p)) * ce
    factor = _alpha_t(y, alpha) * modulating
    magnitude = factor * (p * not_p + 2 * np.abs(growth) * (p * (1 - smooth) + not_p * smooth) + np.abs(bent))
    return factor * (p * not_p + mixed + bent), magnitude


def star_loss(
    x: Array, y: Array, *, alpha: Array | float | None = 0.25, gamma: float = 2.0, beta: float = 1.0
) -> Array:
    """Focal loss star of every logit, appendix B: -alpha_t log(sigmoid(gamma x_t + beta)) / gamma, x_t = x (2 y - 1)."""
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=np.asarray(x).dtype))
    x_t = _times(2 * y - 1, x)
    return _times(_alpha_t(y, alpha), _softplus(-(gamma * x_t + beta)) / gamma)


def star_gradient(
    x: Array, y: Array, *, alpha: Array | float | None = 0.25, gamma: float = 2.0, beta: float = 1.0
) -> tuple[Array, Array]:
    """dFL*/dx = -alpha_t (2 y - 1) (1 - sigmoid(gamma x_t + beta)), a single term: its magnitude is its size."""
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=np.asarray(x).dtype))
    _, wrong = _probabilities(gamma * _times(2 * y - 1, x) + beta)
    gradient = _alpha_t(y, alpha) * (1 - 2 * y) * wrong
    return gradient, np.abs(gradient)


def star_second_derivative(
    x: Array, y: Array, *, alpha: Array | float | None = 0.25, gamma: float = 2.0, beta: float = 1.0
) -> tuple[Array, Array]:
    """d2FL*/dx2 = alpha_t (2 y - 1)^2 gamma sigmoid(.) (1 - sigmoid(.)), of gamma x_t + beta; a single term."""
    x, y = np.broadcast_arrays(x, np.asarray(y, dtype=np.asarray(x).dtype))
    right, wrong = _probabilities(gamma * _times(2 * y - 1, x) + beta)
    second = _alpha_t(y, alpha) * (1 - 2 * y) ** 2 * gamma * right * wrong
    return second, np.abs(second)


@dataclass(frozen=True)
class Expected:
    loss: Any  # float, (L,), (N,) or a list of arrays, by the reduction
    grads: list[Array]  # of the summed loss, one per level
    magnitudes: list[Array]  # of the gradient's terms: its scale where they cancel
    positives: Array  # (N,)
    sizes: Any = None  # as loss, of the terms' magnitudes: weights may have either sign
    factors: Sequence[Array] = ()  # what each logit's bare term is multiplied by, alpha aside
    seconds: Sequence[Array] = ()  # second derivatives of the summed loss, one per level: nothing mixes two logits
    second_magnitudes: Sequence[Array] = ()  # of their terms


def _indices(shape: tuple[int, ...], classes: int) -> tuple[Array, Array, Array, int]:
    """Image, anchor and class of every logit of a level, and the level's number of anchors."""
    if len(shape) == 4:
        n, c, h, w = np.indices(shape)
        anchors = shape[1] // classes
        return n, (h * shape[3] + w) * anchors + c // classes, c % classes, shape[2] * shape[3] * anchors
    if len(shape) == 3:
        n, m, k = np.indices(shape)
        return n, m, k, shape[1]
    m, k = np.indices(shape)
    return np.zeros_like(m), m, k, shape[0]


def _by_level(values: Array | Sequence[Array], images: int, anchors: list[int]) -> list[Array]:
    """Per-anchor values as one (N, M) array a level; C order of (h, w, a) is the order of the anchors."""
    if isinstance(values, np.ndarray):
        table = values.reshape(images, sum(anchors))
        starts = np.concatenate([[0], np.cumsum(anchors)])
        return [table[:, starts[i] : starts[i + 1]] for i in range(len(anchors))]
    return [value.reshape(images, m) for value, m in zip(values, anchors, strict=True)]


def oracle_focal_loss(
    levels: Sequence[Array],
    targets: Array | Sequence[Array],
    *,
    num_classes: int | None = None,
    alpha: float | Sequence[float] | Array | None = 0.25,
    gamma: float = 2.0,
    background_index: int | None = None,
    ignore_index: int = -1,
    weight: Array | Sequence[Array] | None = None,
    level_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    detach_modulating_factor: bool = False,
    beta: float | None = None,
    normalizer: str | float | Array | None = "positives",
    reduction: str = "sum",
    loss_weight: float = 1.0,
) -> Expected:
    """The whole contract for a list of levels; integer targets are labels, floating ones soft targets. With `beta` it is
    focal loss star."""
    levels = [np.asarray(x, dtype=np.float64) for x in levels]
    rank = levels[0].ndim
    classes = num_classes if num_classes is not None else levels[0].shape[-1]
    images = 1 if rank == 2 else levels[0].shape[0]
    background = classes if background_index is None else background_index
    index = [_indices(x.shape, classes) for x in levels]
    anchors = [entry[3] for entry in index]

    if alpha is not None and np.ndim(alpha) == 0 and float(alpha) < 0:  # type: ignore[arg-type]
        alpha = None
    first = targets if isinstance(targets, np.ndarray) else targets[0]
    soft = first.dtype.kind == "f"
    positives = np.zeros(images, dtype=np.int64)
    y: list[Array] = []
    kept: list[Array] = []
    if soft:
        listed = [targets] if isinstance(targets, np.ndarray) else list(targets)
        y = [np.asarray(t, dtype=np.float64) for t in listed]
        kept = [np.ones(x.shape, dtype=bool) for x in levels]
    else:
        for (n, m, k, _), labels in zip(index, _by_level(targets, images, anchors), strict=True):
            label = labels.astype(np.int64)
            ignored = label == ignore_index
            positive = ~ignored & (label != background)
            assigned = label - 1 if background == 0 else label
            assert np.all(~positive | ((assigned >= 0) & (assigned < classes))), "the test drew a bad label"
            positives += positive.sum(axis=1)
            y.append((positive[n, m] & (assigned[n, m] == k)).astype(np.float64))
            kept.append(~ignored[n, m])

    divisor = np.ones(images)
    if reduction == "mean":
        divisor *= max(1, sum(int(mask.sum()) for mask in kept))
    elif isinstance(normalizer, str):
        divisor = {
            "positives": np.full(images, max(1, int(positives.sum())), dtype=np.float64),
            "positives_per_image": images * np.maximum(1, positives).astype(np.float64),
        }[normalizer]
    elif normalizer is not None:
        divisor = divisor * np.asarray(normalizer, dtype=np.float64)

    per_anchor = None if weight is None else _by_level(weight, images, anchors)
    losses, grads, magnitudes, factors = [], [], [], []
    seconds, second_magnitudes = [], []
    for level, (x, (n, m, k, _)) in enumerate(zip(levels, index, strict=True)):
        class_alpha = None if alpha is None else np.asarray(alpha, dtype=np.float64)
        if class_alpha is not None and class_alpha.ndim:
            class_alpha = class_alpha[k]
        options: dict[str, Any] = {"alpha": class_alpha, "gamma": gamma}
        options |= {"label_smoothing": label_smoothing} if beta is None else {"beta": beta}
        factor = loss_weight * (1.0 if level_weights is None else float(level_weights[level])) / divisor[n]
        if per_anchor is not None:
            factor = factor * per_anchor[level].astype(np.float64)[n, m]
        zero = np.zeros(x.shape)
        loss_of = element_loss if beta is None else star_loss
        gradient_of = partial(element_gradient, detached=detach_modulating_factor) if beta is None else star_gradient
        gradient, magnitude = gradient_of(x, y[level], **options)
        second_of = (
            partial(element_second_derivative, detached=detach_modulating_factor)
            if beta is None
            else star_second_derivative
        )
        second, second_magnitude = second_of(x, y[level], **options)
        losses.append(np.where(kept[level], _times(factor, loss_of(x, y[level], **options)), zero))
        grads.append(np.where(kept[level], factor * gradient, zero))
        magnitudes.append(np.where(kept[level], np.abs(factor) * magnitude, zero))
        seconds.append(np.where(kept[level], factor * second, zero))
        second_magnitudes.append(np.where(kept[level], np.abs(factor) * second_magnitude, zero))
        factors.append(np.where(kept[level], factor + zero, zero))

    def reduced(parts: list[Array]) -> Any:
        if reduction in ("sum", "mean"):
            return float(sum(part.sum() for part in parts))
        if reduction == "level":
            return np.array([part.sum() for part in parts])
        if reduction == "image":
            return sum(np.bincount(i[0].ravel(), p.ravel(), images) for i, p in zip(index, parts, strict=True))
        assert reduction == "none", reduction
        return parts

    with np.errstate(invalid="ignore"):  # inf - inf, where weights have both signs
        sizes = reduced([np.abs(part) for part in losses])
        return Expected(reduced(losses), grads, magnitudes, positives, sizes, factors, seconds, second_magnitudes)
