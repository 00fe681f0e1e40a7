"""The losses beside the focal loss, logit by logit in numpy, written from their papers and the projects that train with them.

Nothing here is shared with the package. What each function takes is what its paper names: x a logit, p = sigmoid(x), s the
score of a positive (its IoU, its quality) in [0, 1], y a target. Arrays of numpy.longdouble give more digits than float64
has: a difference such as p - s or 1 - s^gamma loses some.

A derivative is the product rule, term by term. Where a difference in a formula is of two rounded numbers, a result can be no
more exact than they are: for a relative error `relative` every function gives, beside the loss and its two derivatives, the
absolute error that it comes to. Elsewhere that is the relative error times the value, or times the sum of the magnitudes of a
derivative's terms.

The second derivative is that of the gradient: what is a constant for the one is a constant for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FAR = (
    1e300  # stands for infinity in a gradient: every exponential has long reached its limit, and 0 * inf does not arise
)


class Element(NamedTuple):
    loss: Array
    gradient: Array
    loss_bound: Array
    gradient_bound: Array
    second: Array
    second_bound: Array


def _sigmoid(x: Array) -> tuple[Array, Array]:
    """p and 1 - p, each to full relative accuracy."""
    e = np.exp(-np.abs(x))
    larger, smaller = 1 / (1 + e), e / (1 + e)
    return np.where(x < 0, smaller, larger), np.where(x < 0, larger, smaller)


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _times(weight: Array, value: Array) -> Array:
    """weight * value, where a weight of 0 leaves nothing of an infinite value; NaN stays NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((weight == 0) & ~np.isnan(value), np.zeros_like(value), weight * value)


def _power(base: Array, exponent: float) -> Array:
    """base^exponent, 0^0 = 1, in the type of the base."""
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        return np.power(base, np.asarray(exponent, dtype=base.dtype))


def _finite(x: Array) -> Array:
    return np.clip(x, -FAR, FAR)


def _bound(relative: float, value: Array) -> Array:
    """Of an infinite value nothing but infinity will do."""
    return _times(np.asarray(relative, dtype=value.dtype), np.abs(value))


# --- the parts that several share -------------------------------------------------------------------------------------


def focal_negative(x: Array, *, gamma: float, detached: bool = False, relative: float = 0.0) -> Element:
    """p^gamma softplus(x), Lin et al. 2017 (arXiv:1708.02002), equation 4 for y = 0; detached: p^gamma is a constant."""
    p, _ = _sigmoid(x)
    loss = _times(_power(p, gamma), _softplus(x))
    x = _finite(x)
    p, q = _sigmoid(x)
    power, ce = _power(p, gamma), _softplus(x)
    growth = 0.0 if detached else gamma * q  # p^(gamma - 1) dp/dx is p^gamma (1 - p)
    gradient = power * (p + growth * ce)
    # The derivative of `growth` is growth (growth - p), less what is counted with the other factor's.
    mixed, bent = 2 * growth * p, growth * (gamma * q - p) * ce
    second, size = power * (p * q + mixed + bent), power * (p * q + mixed + np.abs(bent))
    return Element(loss, gradient, _bound(relative, loss), _bound(relative, gradient), second, relative * size)


def focal_positive(x: Array, *, gamma: float, detached: bool = False, relative: float = 0.0) -> Element:
    """(1 - p)^gamma softplus(-x): the negative of -x."""
    mirrored = focal_negative(-x, gamma=gamma, detached=detached, relative=relative)
    return mirrored._replace(gradient=-mirrored.gradient)


def cross_entropy(x: Array, t: Array, rest: Array, *, relative: float = 0.0) -> Element:
    """-t log p - (1 - t) log(1 - p), with rest = 1 - t; its derivative p - t is the difference of p (1 - t) and (1 - p) t."""
    loss = _times(t, _softplus(-x)) + _times(rest, _softplus(x))
    p, q = _sigmoid(x)
    second = p * q * (t + rest)  # t + rest is 1, or NaN
    return Element(
        loss, p * rest - q * t, _bound(relative, loss), relative * (p * rest + q * t), second, relative * second
    )


# --- varifocal loss: Zhang et al. 2021, arXiv:2008.13367, equation 2 ---------------------------------------------------


def varifocal_positive(x: Array, s: Array, *, iou_weighted: bool = True, relative: float = 0.0) -> Element:
    """-s (s log p + (1 - s) log(1 - p)); mmdetection's iou_weighted=False leaves out the first s."""
    element = cross_entropy(x, s, 1 - s, relative=relative)
    return Element(*(_times(s, part) for part in element)) if iou_weighted else element


# --- quality focal loss: Li et al. 2020, arXiv:2006.04388, equation 3 --------------------------------------------------


class _Distance(NamedTuple):
    """w = |distance|, known to `noise`, and the sizes of its two derivatives; the second one has the sign of `turned`."""

    w: Array
    sign: Array
    noise: Array
    first: Array
    second: Array
    turned: Array


class _Factor(NamedTuple):
    """f, and its derivatives: the first is `steepness` times the distance, with terms of `size`. Where the second derivative
    takes it, it is `again`."""

    f: Array
    steepness: Array
    size: Array
    second: Array
    again: Array


def _modulated(distance: _Distance, factor: _Factor, beta: float, relative: float) -> Element:
    """w^beta f and its derivatives."""
    w, sign, noise, dw, d2w, turned = distance
    loss = _times(_power(w, beta), factor.f)
    f = _finite(factor.f)
    slope = factor.steepness * w * sign

    def of_power(w: Array, beside: Array) -> Array:
        """beta w^(beta - 1) beside; 0 at the cusp."""
        return np.where(w == 0, 0, beta * _power(w, beta) * (beside / w))

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        low, high = np.maximum(w - noise, 0), w + noise
        within = (w <= noise) & (noise > 0)

        # By the product rule: of both factors, of the distance's curve, and of its power; a parabola has that at its cusp too.
        def terms(w: Array) -> list[Array]:
            bent = (beta - 1) * of_power(w, dw) * np.where(w == 0, 0, dw / w)
            return [
                _power(w, beta) * factor.second,
                2 * beta * _power(w, beta) * dw * factor.again,
                of_power(w, d2w) * f,
                (np.where(w == 0, 2 * dw**2, bent) if beta == 2 else bent) * f,
            ]

        def steep(w: Array) -> Array:
            return of_power(w, dw) * f

        gradient = _power(w, beta) * slope + sign * steep(w)
        loss_bound = _bound(relative, loss) + _times(_power(high, beta) - _power(low, beta), f)
        gradient_bound = relative * (_power(w, beta) * factor.size + steep(w))
        gradient_bound += (_power(high, beta) - _power(low, beta)) * factor.size
        # Either sign within the noise; for beta < 1 the derivative has no bound there, and may be any number.
        unknown = 2 * steep(high) if beta >= 1 else np.full_like(w, np.inf)
        gradient_bound += np.where(within, unknown, np.abs(steep(high) - steep(low))) if beta else 0

        at = terms(w)
        second = at[0] + at[1] + sign * turned * at[2] + at[3]
        second_bound = relative * sum(np.abs(term) for term in at)
        second_bound += sum(np.abs(a - b) for a, b in zip(terms(high), terms(low), strict=True))
        # So it is for the second derivative below 2; at 2 and above only the third term has a sign.
        if beta:
            second_bound += np.where(within, 2 * terms(high)[2] if beta >= 2 else np.full_like(w, np.inf), 0)
    return Element(loss, gradient, loss_bound, gradient_bound, second, second_bound)


def quality_positive(x: Array, s: Array, *, beta: float = 2.0, relative: float = 0.0) -> Element:
    """-|s - p|^beta (s log p + (1 - s) log(1 - p))."""
    ce = cross_entropy(x, s, 1 - s)
    p, q = _sigmoid(x)
    size = p * (1 - s) + q * s
    distance = ce.gradient
    # A target that is met, 0 or 1, makes the distance a single number: nothing is subtracted.
    noise = np.where((s == 0) | (s == 1), 0, relative * size)
    one = np.ones_like(p)
    # The derivative of p q is p q (q - p), a difference of two rounded numbers whose sum is 1.
    of_distance = _Distance(np.abs(distance), np.sign(distance), noise, p * q, p * q, q - p)
    return _modulated(of_distance, _Factor(ce.loss, one, size, ce.second, one), beta, relative)


def _log_as_torch(v: Array) -> Array:
    """binary_cross_entropy's: no less than -100."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(v), -100)


def activated_quality_positive(p: Array, s: Array, *, beta: float = 2.0, relative: float = 0.0) -> Element:
    """The same of p itself, whose cross entropy is torch's binary_cross_entropy: logarithms of -100 at least, and
    (p - s) / max(p (1 - p), 1e-12) for its derivative. Its second derivative has 1e-12 added to p and to 1 - p, and so has the
    first one in one of the two places where the second derivative of the product has it. Rounded, p - s has lost nothing that
    counts."""
    p = np.where(np.isnan(p), p, np.clip(p, 0, 1))
    log_rest = np.where(p < 0.5, np.log1p(-np.minimum(p, 0.5)), _log_as_torch(1 - p))
    ce = -(s * _log_as_torch(p) + (1 - s) * log_rest)
    distance = p - s
    steepness = 1 / np.maximum(p * (1 - p), 1e-12)
    one, zero = np.ones_like(p), 0 * p
    around = (p + 1e-12) * (1 - p + 1e-12)
    curve, again = (s * (1 - p) ** 2 + (1 - s) * p**2) / around**2, (steepness + 1 / around) / 2
    of_distance = _Distance(np.abs(distance), np.sign(distance), zero, one, zero, zero)
    return _modulated(of_distance, _Factor(ce, steepness, steepness * np.abs(distance), curve, again), beta, relative)


# --- matchability-aware loss: Huang et al. 2025 (DEIM), arXiv:2412.04234, equation 3 -----------------------------------


def matchability_positive(x: Array, s: Array, *, gamma: float = 1.5, relative: float = 0.0) -> Element:
    """-s^gamma log p - (1 - s^gamma) log(1 - p)."""
    with np.errstate(divide="ignore"):
        rest = np.where(
            s == 0, 0.0 if gamma == 0 else 1.0, -np.expm1(_times(np.asarray(gamma, dtype=s.dtype), np.log(s)))
        )
    return cross_entropy(x, _power(s, gamma), rest, relative=relative)


# --- IoU-aware BCE: Cai et al. 2024 (Align-DETR), arXiv:2304.07527, equation 4 -----------------------------------------


def iou_aware_positive(x: Array, s: Array, *, alpha: float = 0.25, relative: float = 0.0) -> Element:
    """-t log p - (1 - t) log(1 - p), t = max(0.01, p^alpha s^(1 - alpha)) a constant for the gradient."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_s = np.where((s == 0) & (alpha == 1), 0, (1 - np.asarray(alpha, dtype=s.dtype)) * np.log(s))
        log_t = (0 if alpha == 0 else alpha * -_softplus(-x)) + log_s
    t = np.maximum(np.exp(log_t), np.asarray(0.01, dtype=x.dtype))
    return cross_entropy(x, t, np.minimum(-np.expm1(log_t), np.asarray(1 - 0.01, dtype=x.dtype)), relative=relative)


# --- Gaussian focal loss: Law and Deng 2018 (CornerNet), arXiv:1808.01244, equation 1 ----------------------------------


def gaussian(
    x: Array, y: Array, *, alpha: float = 2.0, gamma: float = 4.0, eps: float = 0.0, relative: float = 0.0
) -> Element:
    """(1 - p)^alpha -log p where y = 1, else (1 - y)^gamma p^alpha -log(1 - p), with p clamped to [eps, 1 - eps] as
    CenterNet, OpenPCDet and mmdet3d do it (torch.clamp: no gradient beyond)."""
    z = np.where(y == 1, -x, x)
    inside = focal_negative(z, gamma=alpha, relative=relative)
    p, q = _sigmoid(z)
    low, high = p < eps, q < eps
    edge = np.asarray(eps, dtype=x.dtype)
    loss = inside.loss
    if eps:
        loss = np.where(low, _power(edge, alpha) * -np.log1p(-edge), loss)
        loss = np.where(high, _power(1 - edge, alpha) * -np.log(edge), loss)
    factor = np.where(y == 1, 1, _power(1 - y, gamma))
    loss = _times(factor, loss)
    gradient, second, size = (
        np.where(low | high, 0, factor * part) for part in (inside.gradient, inside.second, inside.second_bound)
    )
    bounds = _bound(relative, loss), _bound(relative, gradient)
    return Element(loss, np.where(y == 1, -gradient, gradient), *bounds, second, size)


# --- asymmetric loss: Ridnik et al. 2021, arXiv:2009.14119, equations 4 to 7 -------------------------------------------


def asymmetric_negative(
    x: Array, *, gamma_neg: float = 4.0, clip: float = 0.05, detached: bool = False, relative: float = 0.0
) -> Element:
    """-m^gamma_neg log(1 - m), m = max(p - clip, 0). m is known to `relative` times p, 1 - m to
    that of itself."""
    if clip == 0:
        return focal_negative(x, gamma=gamma_neg, detached=detached, relative=relative)
    x = _finite(x)
    p, q = _sigmoid(x)
    clip_ = np.asarray(clip, dtype=x.dtype)
    shifted = p - clip_

    def loss_of(m: Array) -> Array:
        return _power(m, gamma_neg) * -np.log1p(-m)

    def gradient_of(m: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            falling = 0.0 if detached else gamma_neg * np.where(m > 0, -np.log1p(-m) / m, 1)
            return np.where(m > 0, _power(m, gamma_neg) * (falling + 1 / (1 - m)) * p * q, 0)

    # With L = -log(1 - m) and dL/dx = pq / (1 - m): what m^gamma_neg leaves, and the terms in which its derivatives are.
    def terms_of(m: Array) -> list[Array]:
        slope = p * q / v
        with np.errstate(divide="ignore", invalid="ignore"):
            log, falling = -np.log1p(-m), np.where(m > 0, 0.0 if detached else gamma_neg * p * q / m, 0)
            power = np.where(m > 0, _power(m, gamma_neg), 0)
            bent = np.where(m > 0, (gamma_neg - 1) * p * q / m, 0)
        # Each beside what it is multiplied by: 1, or q - p, a difference of two rounded numbers whose sum is 1.
        return [
            power * slope**2,
            power * slope,
            power * falling * 2 * slope,
            power * falling * log,
            power * falling * bent * log,
        ]

    # 1 - m is (1 - p) + clip, more exact than m where that is near 1.
    v = np.minimum(q + clip_, 1)
    m, noise = np.maximum(shifted, 0), relative * np.minimum(p, q + clip_)
    low, high = np.maximum(shifted - noise, 0), np.maximum(shifted + noise, 0)
    loss, gradient, terms = loss_of(m), gradient_of(m), terms_of(m)
    second_bound = relative * sum(np.abs(term) for term in terms)
    second_bound += sum(np.abs(a - b) for a, b in zip(terms_of(high), terms_of(low), strict=True))
    if gamma_neg < 1:  # without bound next to the clip, where the noise may lead
        second_bound = np.where((low == 0) & (high > 0), np.inf, second_bound)
    return Element(
        loss,
        gradient,
        relative * loss + loss_of(high) - loss_of(low),
        relative * gradient + np.abs(gradient_of(high) - gradient_of(low)),
        terms[0] + (q - p) * (terms[1] + terms[3]) + terms[2] + terms[4],
        second_bound,
    )


def asymmetric(
    x: Array,
    y: Array,
    *,
    gamma_pos: float = 1.0,
    gamma_neg: float = 4.0,
    clip: float = 0.05,
    detached: bool = False,
    relative: float = 0.0,
) -> Element:
    """(1 - p)^gamma_pos -log p and the negative, mixed by y: a target is 0 or 1."""
    yes = focal_positive(x, gamma=gamma_pos, detached=detached, relative=relative)
    no = asymmetric_negative(x, gamma_neg=gamma_neg, clip=clip, detached=detached, relative=relative)
    mixed = Element(*(_times(y, a) + _times(1 - y, b) for a, b in zip(yes, no, strict=True)))
    size = y * yes.gradient_bound + (1 - y) * no.gradient_bound  # the two have opposite signs
    return mixed._replace(gradient_bound=size)


# --- all of them under one interface ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """One of the losses with its numbers. `relative` as above; s is looked at only by losses that read scores."""

    negative: Callable[..., Element]
    positive: Callable[..., Element]
    dense: Callable[..., Element]


def _scored(negative: Callable[..., Element], positive: Callable[..., Element]) -> Loss:
    """A target of 0 is a negative's, any other a positive's score."""

    def dense(x: Array, y: Array, relative: float = 0.0) -> Element:
        yes, no = positive(x, y, relative=relative), negative(x, relative=relative)
        return Element(*(np.where(y > 0, a, b) for a, b in zip(yes, no, strict=True)))

    return Loss(negative, positive, dense)


def varifocal(gamma: float = 2.0, iou_weighted: bool = True, detached: bool = False) -> Loss:
    return _scored(
        lambda x, relative=0.0: focal_negative(x, gamma=gamma, detached=detached, relative=relative),
        lambda x, s, relative=0.0: varifocal_positive(x, s, iou_weighted=iou_weighted, relative=relative),
    )


def quality_focal(beta: float = 2.0, activated: bool = False) -> Loss:
    if activated:
        return _scored(
            lambda p, relative=0.0: activated_quality_positive(p, np.zeros_like(p), beta=beta, relative=relative),
            lambda p, s, relative=0.0: activated_quality_positive(p, s, beta=beta, relative=relative),
        )
    return _scored(
        lambda x, relative=0.0: focal_negative(x, gamma=beta, relative=relative),
        lambda x, s, relative=0.0: quality_positive(x, s, beta=beta, relative=relative),
    )


def matchability_aware(gamma: float = 1.5) -> Loss:
    return _scored(
        lambda x, relative=0.0: focal_negative(x, gamma=gamma, detached=True, relative=relative),
        lambda x, s, relative=0.0: matchability_positive(x, s, gamma=gamma, relative=relative),
    )


def iou_aware_bce(alpha: float = 0.25, gamma: float = 2.0) -> Loss:
    return _scored(
        lambda x, relative=0.0: focal_negative(x, gamma=gamma, relative=relative),
        lambda x, s, relative=0.0: iou_aware_positive(x, s, alpha=alpha, relative=relative),
    )


def bce() -> Loss:
    return _scored(
        lambda x, relative=0.0: focal_negative(x, gamma=0.0, relative=relative),
        lambda x, s, relative=0.0: cross_entropy(x, s, 1 - s, relative=relative),
    )


def gaussian_focal(alpha: float = 2.0, gamma: float = 4.0, eps: float = 0.0) -> Loss:
    def dense(x: Array, y: Array, relative: float = 0.0) -> Element:
        return gaussian(x, y, alpha=alpha, gamma=gamma, eps=eps, relative=relative)

    def negative(x: Array, relative: float = 0.0) -> Element:  # nothing is counted at -inf, where eps leaves a loss
        element = dense(x, np.zeros_like(x), relative)
        return element._replace(loss=np.where(x == -np.inf, 0, element.loss))

    return Loss(negative, lambda x, s, relative=0.0: dense(x, np.ones_like(x), relative), dense)


def asymmetric_loss(gamma_pos: float = 1.0, gamma_neg: float = 4.0, clip: float = 0.05, detached: bool = False) -> Loss:
    def dense(x: Array, y: Array, relative: float = 0.0) -> Element:
        options: dict[str, Any] = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "clip": clip, "detached": detached}
        return asymmetric(x, y, **options, relative=relative)

    return Loss(
        lambda x, relative=0.0: dense(x, np.zeros_like(x), relative),
        lambda x, s, relative=0.0: dense(x, np.ones_like(x), relative),
        dense,
    )
