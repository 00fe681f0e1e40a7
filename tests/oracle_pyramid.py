"""The whole contract for a list of levels in float64 numpy, whatever the loss: targets, scores, weights, class masks, divisors
and reductions around the terms of oracle.py, oracle_losses.py and oracle_softmax.py.

Nothing here is shared with the package: no torch, and anchors are found by index arithmetic. Beside every number stands how
far a result may be off for a relative error `relative`, as oracle_losses.py has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import oracle_losses
from oracle import (
    Array,
    _by_level,
    _indices,
    _times,
    element_gradient,
    element_loss,
    star_gradient,
    star_loss,
)
from oracle_softmax import softmax_focal


class Term(NamedTuple):
    """Of every logit, or loss and its bound of every anchor."""

    loss: Array
    gradient: Array
    loss_bound: Array
    gradient_bound: Array


@dataclass(frozen=True)
class Loss:
    """One of the losses with its numbers.

    term: (logits, targets, which of them are positives, relative error) -> terms; a positive's target is its score, if the
        loss reads scores.
    positive_weight, negative_weight: one for all classes, or one for each.
    share: (targets, which are positives) -> the share that the positives' weight has in a logit's; the rest is the negatives'.
    exponent: of its modulating factor, which the promised accuracy goes by.
    """

    term: Callable[[Array, Array, Array, float], Term]
    exponent: float
    positive_weight: Any = 1.0
    negative_weight: Any = 1.0
    share: Callable[[Array, Array], Array] = lambda y, positive: y
    reads_scores: bool = False
    peak: float | None = None  # what a soft target is where a normalizer counts it
    takes_anchors: bool = False


# --- the losses, by the names of their functions ------------------------------------------------------------------------


def _alpha(alpha: Any) -> tuple[Any, Any]:
    if alpha is None or (np.ndim(alpha) == 0 and float(alpha) < 0):
        return 1.0, 1.0
    return np.asarray(alpha, dtype=np.float64), 1 - np.asarray(alpha, dtype=np.float64)


def focal_loss(
    alpha: Any = 0.25, gamma: float = 2.0, label_smoothing: float = 0.0, detach_modulating_factor: bool = False
) -> Loss:
    def term(x: Array, y: Array, positive: Array, relative: float) -> Term:
        numbers: dict[str, Any] = {"alpha": None, "gamma": gamma, "label_smoothing": label_smoothing}
        loss = element_loss(x, y, **numbers)
        gradient, size = element_gradient(x, y, **numbers, detached=detach_modulating_factor)
        return Term(loss, gradient, relative * np.abs(loss), relative * size)

    return Loss(term, gamma, *_alpha(alpha))


def focal_loss_star(alpha: Any = 0.25, gamma: float = 2.0, beta: float = 1.0) -> Loss:
    def term(x: Array, y: Array, positive: Array, relative: float) -> Term:
        loss = star_loss(x, y, alpha=None, gamma=gamma, beta=beta)
        gradient, size = star_gradient(x, y, alpha=None, gamma=gamma, beta=beta)
        return Term(loss, gradient, relative * np.abs(loss), relative * size)

    return Loss(term, gamma, *_alpha(alpha))


def _in_float64(element: oracle_losses.Element) -> Term:
    with np.errstate(under="ignore", over="ignore"):
        parts = (element.loss, element.gradient, element.loss_bound, element.gradient_bound)
        return Term(*(np.asarray(part, dtype=np.float64) for part in parts))


def _scored(loss: oracle_losses.Loss, exponent: float, negative_weight: float = 1.0) -> Loss:
    def term(x: Array, y: Array, positive: Array, relative: float) -> Term:
        x, y = x.astype(np.longdouble), np.where(positive, y, 0).astype(np.longdouble)
        with np.errstate(invalid="ignore"):  # NaN logits
            yes, no = loss.positive(x, y, relative=relative), loss.negative(x, relative=relative)
        return Term(*(np.where(positive, a, b) for a, b in zip(_in_float64(yes), _in_float64(no), strict=True)))

    return Loss(
        term, exponent, negative_weight=negative_weight, share=lambda y, positive: positive + 0.0, reads_scores=True
    )


def varifocal_loss(
    alpha: float = 0.75, gamma: float = 2.0, iou_weighted: bool = True, detach_modulating_factor: bool = False
) -> Loss:
    return _scored(oracle_losses.varifocal(gamma, iou_weighted, detach_modulating_factor), gamma, alpha)


def quality_focal_loss(beta: float = 2.0, activated: bool = False) -> Loss:
    return _scored(oracle_losses.quality_focal(beta, activated), beta)


def matchability_aware_loss(gamma: float = 1.5, alpha: float | None = None) -> Loss:
    return _scored(oracle_losses.matchability_aware(gamma), gamma, 1.0 if alpha is None else alpha)


def iou_aware_bce_loss(alpha: float = 0.25, gamma: float = 2.0) -> Loss:
    return _scored(oracle_losses.iou_aware_bce(alpha, gamma), gamma)


def bce_loss() -> Loss:
    return _scored(oracle_losses.bce(), 0.0)


def gaussian_focal_loss(alpha: float = 2.0, gamma: float = 4.0, eps: float = 0.0) -> Loss:
    loss = oracle_losses.gaussian_focal(alpha, gamma, eps)

    def term(x: Array, y: Array, positive: Array, relative: float) -> Term:
        return _in_float64(loss.dense(x.astype(np.longdouble), y.astype(np.longdouble), relative=relative))

    return Loss(term, max(alpha, gamma), share=lambda y, positive: (y == 1) + 0.0, peak=1.0)


def asymmetric_loss(
    gamma_pos: float = 1.0,
    gamma_neg: float = 4.0,
    clip: float | None = 0.05,
    detach_modulating_factor: bool = False,
) -> Loss:
    clip = clip or 0.0
    loss = oracle_losses.asymmetric_loss(gamma_pos, gamma_neg, clip, detach_modulating_factor)

    def term(x: Array, y: Array, positive: Array, relative: float) -> Term:
        found = _in_float64(loss.dense(x.astype(np.longdouble), y.astype(np.longdouble), relative=relative))
        if not clip or not 0 < gamma_neg < 1 or detach_modulating_factor:
            return found
        # Where p meets clip the derivative of m^gamma_neg has no bound: within a rounding of p it may be any number.
        p = 1 / (1 + np.exp(-np.clip(x, -700, 700)))
        unknown = (np.abs(p - clip) <= relative * p) & (y < 1)
        return found._replace(gradient_bound=np.where(unknown, np.inf, found.gradient_bound))

    return Loss(term, max(gamma_pos, gamma_neg))


def softmax_focal_loss(gamma: float = 2.0, detach_modulating_factor: bool = False) -> Loss:
    def term(x: Array, labels: Array, positive: Array, relative: float) -> Term:
        """Of rows (M, K) with labels (M,): losses (M,), gradients (M, K)."""
        far = 1e300  # stands for infinity: several that are infinite share p equally
        given = np.nan_to_num(np.clip(x, -far, far), nan=0.0)
        with np.errstate(over="ignore", invalid="ignore"):  # of powers that 0 is multiplied with
            loss, gradient, size = softmax_focal(given, labels, gamma=gamma, detached=detach_modulating_factor)
        loss = np.where(np.abs(loss) > far / 1e3, np.inf, loss)
        # Of an anchor with logits beyond 28, differences are rounded before they are exponents: as far as exp goes, 110 times
        # a float32's rounding, and for each exponent again.
        with np.errstate(invalid="ignore"):
            width = np.minimum(given.max(1, initial=0) - given.min(1, initial=0), 110)
        wide = np.abs(given).max(1, initial=0) > 28
        each = relative + np.where(wide, 2.0**-23 * width * (1 + gamma) * min(1.0, relative / 2e-6), 0)
        nan = np.isnan(x).any(1) & (labels >= 0)
        return Term(
            np.where(nan, np.nan, loss),
            np.where(nan[:, None], np.nan, gradient),
            oracle_losses._bound(1.0, each * np.where(np.isinf(loss), 0, np.abs(loss))),
            each[:, None] * size,
        )

    return Loss(term, gamma, takes_anchors=True)


LOSSES: dict[str, Callable[..., Loss]] = {
    function.__name__: function
    for function in (
        focal_loss,
        focal_loss_star,
        varifocal_loss,
        quality_focal_loss,
        matchability_aware_loss,
        iou_aware_bce_loss,
        bce_loss,
        gaussian_focal_loss,
        asymmetric_loss,
        softmax_focal_loss,
    )
}


# --- around the terms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    loss: Any  # a number, (L,), (N,) or a list of arrays, by the reduction
    loss_bound: Any
    grads: list[Array]  # of the summed loss, one per level
    grad_bounds: list[Array]
    factors: list[
        Array
    ]  # the most that each logit's term is multiplied by, in magnitude; 0 where nothing is left of it
    anchors: list[tuple[Array, Array]]  # image and anchor of every logit


def _row(weight: Any, classes: int) -> Array:
    return np.broadcast_to(np.asarray(weight, dtype=np.float64), (classes,))


def pyramid_loss(
    levels: Sequence[Array],
    targets: Array | Sequence[Array],
    loss: Loss,
    *,
    relative: float,
    num_classes: int,
    background_index: int | None = None,
    ignore_index: int = -1,
    scores: Array | Sequence[Array] | None = None,
    weight: Array | Sequence[Array] | None = None,
    class_weight: Any = None,
    class_mask: Array | None = None,
    level_weights: Sequence[float] | None = None,
    normalizer: str | float | Array | None = "positives",
    reduction: str = "sum",
    loss_weight: float = 1.0,
) -> Expected:
    """Integer targets are labels, floating ones soft targets; a list has one entry per level."""
    levels = [np.asarray(x, dtype=np.float64) for x in levels]
    images, classes = 1 if levels[0].ndim == 2 else levels[0].shape[0], num_classes
    index = [_indices(x.shape, classes) for x in levels]
    anchors = [entry[3] for entry in index]
    first = targets if isinstance(targets, np.ndarray) else targets[0]
    soft = first.dtype.kind == "f"
    present = np.ones((images, classes), dtype=bool)
    if class_mask is not None:
        present = np.broadcast_to(np.asarray(class_mask, dtype=bool), present.shape)

    # Targets, and what counts.
    labels: list[Array] = []  # (N, M): a class, or -1 for none
    dense: list[Array] = []
    positive: list[Array] = []
    kept: list[Array] = []
    counted = np.zeros(images)  # not ignored
    positives, summed = np.zeros(images), 0.0
    per_score = None if scores is None else _by_level(scores, images, anchors)
    if soft:
        for x, y, (n, _, _, m) in zip(levels, targets, index, strict=True):
            dense.append(np.asarray(y, dtype=np.float64))
            positive.append(dense[-1] > 0)
            kept.append(present[n, index[len(kept)][2]])
            counted += m
            if loss.peak is not None:
                positives += np.bincount(n.ravel(), (dense[-1] == loss.peak).ravel(), images)
            assert y.shape == x.shape
    else:
        background = classes if background_index is None else background_index
        for level, ((n, m, k, _), given) in enumerate(
            zip(index, _by_level(targets, images, anchors), strict=True)  # type: ignore[arg-type]
        ):
            label = given.astype(np.int64)
            ignored = label == ignore_index
            counted += (~ignored).sum(1)
            if loss.takes_anchors:
                counts = ~ignored if background_index is None else ~ignored & (label != background)
                assigned, of_class = label, ~ignored
            else:
                counts = of_class = ~ignored & (label != background)
                assigned = label - 1 if background == 0 else label
            assert np.all(~of_class | ((assigned >= 0) & (assigned < classes))), "the test drew a bad label"
            positives += counts.sum(1)
            labels.append(np.where(of_class, assigned, -1))
            is_positive = labels[-1][n, m] == k
            score = np.ones(label.shape) if per_score is None else np.where(of_class, per_score[level], 0)
            summed += float(score[of_class].sum())
            positive.append(is_positive)
            dense.append(np.where(is_positive, score.astype(np.float64)[n, m] if loss.reads_scores else 1.0, 0.0))
            kept.append(~ignored[n, m] & present[n, k])

    divisor = np.ones(images)
    if reduction == "mean":
        divisor *= max(1, (counted * (1 if loss.takes_anchors else present.sum(1))).sum())
    elif isinstance(normalizer, str):
        divisor = {
            "positives": np.full(images, max(1, positives.sum())),
            "positives_per_image": images * np.maximum(1, positives),
            "scores": np.full(images, max(1.0, summed)),
        }[normalizer]
    elif normalizer is not None:
        divisor = divisor * np.asarray(normalizer, dtype=np.float64)

    # Weights of classes.
    rows = np.ones((1, classes)) if class_weight is None else np.atleast_2d(np.asarray(class_weight, dtype=np.float64))
    of_positives = _row(loss.positive_weight, classes) * rows[0]
    of_negatives = _row(loss.negative_weight, classes) * rows[-1]

    # Terms.
    per_anchor = None if weight is None else _by_level(weight, images, anchors)
    found: list[Term] = []
    factors: list[Array] = []
    for level, (x, (n, m, k, count)) in enumerate(zip(levels, index, strict=True)):
        scale = loss_weight * (1.0 if level_weights is None else float(level_weights[level])) / divisor
        factor = np.broadcast_to(scale[:, None], (images, count))
        if per_anchor is not None:
            factor = factor * per_anchor[level].astype(np.float64)
        if loss.takes_anchors:
            factor = np.where(labels[level] < 0, 0.0, factor * of_positives[labels[level]])
            by_anchor = np.zeros((images, count, classes))
            by_anchor[n, m, k] = x
            term = loss.term(
                by_anchor.reshape(images * count, classes), labels[level].ravel(), positive[level], relative
            )
            shape = _shape_of_anchors(x.shape, classes)
            of_logits = [part.reshape(by_anchor.shape)[n, m, k] for part in (term.gradient, term.gradient_bound)]
            size, each = np.abs(factor), factor[n, m]
            found.append(
                Term(
                    _times(factor, term.loss.reshape(factor.shape)).reshape(shape),
                    _times(each, of_logits[0]),
                    _times(size, term.loss_bound.reshape(factor.shape)).reshape(shape),
                    _times(np.abs(each), of_logits[1]),
                )
            )
            factors.append(np.abs(each))
            continue
        factor = factor[n, m]
        share = loss.share(dense[level], positive[level])
        class_factor = share * of_positives[k] + (1 - share) * of_negatives[k]
        size = np.abs(factor) * (share * np.abs(of_positives[k]) + (1 - share) * np.abs(of_negatives[k]))
        factor, keep = factor * class_factor, kept[level]
        term = loss.term(np.where(keep, x, 0.0), dense[level], positive[level], relative)
        weights = (factor, factor, size, size)
        found.append(Term(*(np.where(keep, _times(w, part), 0.0) for w, part in zip(weights, term, strict=True))))
        factors.append(np.where(keep, size, 0.0))

    def reduced(parts: list[Array]) -> Any:
        if reduction == "none":
            return parts
        if reduction == "level":
            return np.array([part.sum() for part in parts])
        if reduction == "image":
            flat = [part.reshape(images, -1) if part.size else np.zeros((images, 0)) for part in parts]
            return np.asarray(sum(part.sum(1) for part in flat))
        return float(sum(part.sum() for part in parts))

    with np.errstate(invalid="ignore"):  # inf - inf, where weights have both signs
        return Expected(
            reduced([term.loss for term in found]),
            reduced([term.loss_bound for term in found]),
            [term.gradient for term in found],
            [term.gradient_bound for term in found],
            factors,
            [(n, m) for n, m, _, _ in index],
        )


def _shape_of_anchors(shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """Of a loss for each anchor."""
    if len(shape) != 4:
        return shape[:-1]
    n, channels, h, w = shape
    return (n, h, w) if channels == classes else (n, h, w, channels // classes)
