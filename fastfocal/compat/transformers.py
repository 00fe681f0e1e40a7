"""The classification losses of Hugging Face transformers' detectors and its focal mask losses, computed by fastfocal.

    from fastfocal.compat.transformers import fused_functions
    with fused_functions():
        loss = model(pixel_values, labels=labels).loss

Inside the context, the criteria of these models (5.23) compute their classification loss from the matches, without a dense
target, all decoder layers in one call:

    RT-DETR, RT-DETR v2, D-FINE     RTDetrLoss.loss_labels_vfl            varifocal_loss
    DEIMv2                          Deimv2Loss.loss_labels_mal            matchability_aware_loss
    LW-DETR, RF-DETR                LwDetrImageLoss.loss_labels           iou_aware_bce_loss
    Deformable, Conditional, DAB    DeformableDetrImageLoss.loss_labels   deformable_focal_loss
    Grounding DINO, MM-             GroundingDinoImageLoss.loss_labels    grounded_focal_loss

and the name `sigmoid_focal_loss` in the modules that have it means the fused one, for the mask losses of DETR, LW-DETR, RT-DETR
and MaskFormer. LW-DETR's own loss takes log(1 - p), which is infinite from a logit of about 6.5 in bfloat16, 9 in float16 and
17 in float32, and whose gradient is NaN there; the fused one is finite for every finite logit.

A subclass of a criterion, which may do with its losses what it likes, has each layer's loss computed when it asks for it.

Losses have the dtype that theirs have: what logits and targets promote to, but float32 for 16 bits under autocast. They are
computed in float32 or float64 and rounded once; in float16, without autocast, a loss above 65504 is infinite, as theirs is.

Inside the context, an object whose label is no class is a ValueError that names image and object. In transformers K is
background to these losses (an IndexError to their matchers, and to LW-DETR's loss), and -1 the last class or an error of the
scatter.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastfocal
from fastfocal.compat.conventions import check_classes, over, require
from fastfocal.compat.matching import Layer, fit_one_call, intersection_over_union, labels_and_scores
from fastfocal.sigmoid import entropy_dtype

Outputs = dict[str, Any]
Targets = list[dict[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]


def mean_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """transformers.loss.loss_for_object_detection.sigmoid_focal_loss.

    Args:
        inputs: logits of at least two dimensions.
        targets: of the same shape, values in [0, 1].
        num_boxes: what the sum is divided by, besides the length of the second dimension.
        alpha: weight of positives; a negative number: no weights.
        gamma: exponent of the modulating factor.
    """
    loss = _focal_loss(inputs, targets, alpha, gamma) / inputs.shape[1]
    return over(loss, num_boxes, entropy_dtype(inputs, targets))


def sum_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """transformers.loss.loss_grounding_dino.sigmoid_focal_loss: as above, without the mean; any number of dimensions."""
    return over(_focal_loss(inputs, targets, alpha, gamma), num_boxes, entropy_dtype(inputs, targets))


def _focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """The sum, in float32 or float64."""
    if torch.promote_types(inputs.dtype, targets.dtype) == torch.float64:
        inputs = inputs.double()
    if not targets.is_floating_point():
        targets = targets.to(inputs.dtype)
    loss = fastfocal.focal_loss(
        inputs.reshape(-1, 1),
        targets.reshape(-1, 1),
        alpha=_alpha(alpha),
        gamma=gamma,
        normalizer=None,
    )
    assert isinstance(loss, Tensor)
    return loss


# --- classification losses of the criteria ----------------------------------------------------------------------------


class _Call(NamedTuple):
    """One layer's classification loss, as the criterion asked for it."""

    outputs: Outputs
    targets: Targets
    indices: Indices
    num_boxes: float | Tensor


Factors = Sequence[float] | None
Compute = Callable[[Any, Sequence[_Call], Factors], Tensor]


class _Loss(NamedTuple):
    """A criterion's method that gives its classification loss, and what fastfocal computes for it."""

    name: str  # of the method
    key: str  # of the loss in the dict that the method returns
    needs: tuple[str, ...]  # of the outputs
    compute: Compute  # the losses (L,) of L calls that fit together, each times its factor
    fit: Callable[[Sequence[_Call]], bool]
    dtype: Callable[[Tensor], torch.dtype]  # from logits to the loss's dtype


def _from_matches(fused: Callable[[Any], Callable[..., Any]], overlap: bool = True) -> Compute:
    """
    Args:
        fused: from a criterion to fastfocal's function with that criterion's parameters.
        overlap: whether a positive has the overlap of its boxes for its score.
    """

    def compute(criterion: Any, calls: Sequence[_Call], factors: Factors) -> Tensor:
        targets, layers = calls[0].targets, _layers(calls, overlap)
        _check_objects(calls[0].outputs, targets)
        classes = [target["class_labels"] for target in targets]
        boxes = [target["boxes"] for target in targets] if overlap else []
        labels, scores = labels_and_scores(layers, classes, boxes, intersection_over_union)
        given = {} if scores is None else {"scores": scores}
        found: Tensor = fused(criterion)(
            [layer.logits for layer in layers],
            labels,
            normalizer=None,
            reduction="level",
            level_weights=factors,
            **given,
        )
        return found

    return compute


def _check_objects(outputs: Outputs, targets: Targets) -> None:
    """Their classes; in Grounding DINO an image's classes are the rows of its label map."""
    classes = [target["class_labels"] for target in targets]
    if "label_maps" not in outputs:
        check_classes("class_labels", classes, outputs["logits"].shape[-1])
        return
    for image, (of_image, label_map) in enumerate(zip(classes, outputs["label_maps"], strict=True)):
        check_classes("class_labels", [of_image], len(label_map), first_image=image)


def _layers(calls: Sequence[_Call], overlap: bool = True) -> list[Layer]:
    return [
        Layer(call.outputs["logits"], call.outputs["pred_boxes"] if overlap else None, call.indices) for call in calls
    ]


def _fit(calls: Sequence[_Call]) -> bool:
    return fit_one_call(_layers(calls, overlap=False))


def _varifocal(criterion: Any) -> Callable[..., Any]:
    numbers = {"alpha": criterion.alpha, "gamma": criterion.gamma}
    return functools.partial(fastfocal.varifocal_loss, detach_modulating_factor=True, **numbers)


def _matchability_aware(criterion: Any) -> Callable[..., Any]:
    return functools.partial(fastfocal.matchability_aware_loss, alpha=criterion.mal_alpha, gamma=criterion.gamma)


def _iou_aware_bce(criterion: Any) -> Callable[..., Any]:
    return functools.partial(fastfocal.iou_aware_bce_loss, alpha=criterion.focal_alpha, gamma=2.0)


def _focal(criterion: Any) -> Callable[..., Any]:
    return functools.partial(fastfocal.focal_loss, alpha=_alpha(criterion.focal_alpha), gamma=2.0)


def _alpha(alpha: float) -> float | None:
    return None if alpha < 0 else alpha


def _of_phrases(criterion: Any, calls: Sequence[_Call], factors: Factors) -> Tensor:
    """Grounding DINO's classes are the tokens of a text: several are one object's, and a mask says which are none."""
    targets, mask = calls[0].targets, calls[0].outputs["text_mask"]
    _check_objects(calls[0].outputs, targets)
    require((mask == mask[:, :1]).all(), "text_mask: expected the same tokens for all queries of an image")
    logits = [call.outputs["logits"] for call in calls]
    tokens = [
        criterion._get_target_classes_one_hot(call.outputs, targets, call.indices).to(x.dtype)
        for call, x in zip(calls, logits, strict=True)
    ]
    found = fastfocal.focal_loss(
        logits,
        tokens,
        alpha=_alpha(criterion.focal_alpha),
        gamma=2.0,
        class_mask=mask[:, 0],
        normalizer=None,
        reduction="level",
        level_weights=factors,
    )
    assert isinstance(found, Tensor)
    return found


def _fit_and_share_a_text(calls: Sequence[_Call]) -> bool:
    return _fit(calls) and all(call.outputs["text_mask"] is calls[0].outputs["text_mask"] for call in calls)


def _dtype(logits: Tensor) -> torch.dtype:
    """Of a binary cross entropy of them."""
    return entropy_dtype(logits, logits)


def _dtype_of_logarithms(logits: Tensor) -> torch.dtype:
    """LW-DETR takes logarithms, which autocast computes in float32 too, but not on the CPU."""
    return logits.dtype if logits.device.type == "cpu" else _dtype(logits)


def _dtype_of_phrases(logits: Tensor) -> torch.dtype:
    """Grounding DINO's targets are float32."""
    return entropy_dtype(logits, torch.empty(0, dtype=torch.float32))


_BOTH = ("logits", "pred_boxes")
_VARIFOCAL = _Loss("loss_labels_vfl", "loss_vfl", _BOTH, _from_matches(_varifocal), _fit, _dtype)
_MATCHABILITY = _Loss("loss_labels_mal", "loss_mal", _BOTH, _from_matches(_matchability_aware), _fit, _dtype)
_IOU_AWARE = _Loss("loss_labels", "loss_ce", _BOTH, _from_matches(_iou_aware_bce), _fit, _dtype_of_logarithms)
_FOCAL = _Loss("loss_labels", "loss_ce", ("logits",), _from_matches(_focal, overlap=False), _fit, _dtype)
_PHRASES = _Loss(
    "loss_labels",
    "loss_ce",
    ("logits", "text_mask", "label_maps"),
    _of_phrases,
    _fit_and_share_a_text,
    _dtype_of_phrases,
)


def varifocal_loss(
    criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor, log: bool = True
) -> dict[str, Tensor]:
    """transformers.loss.loss_rt_detr.RTDetrLoss.loss_labels_vfl, a method of the criterion.

    Varifocal loss (Zhang et al. 2020, arXiv:2008.13367, equation 2) with its weights taken from detached logits: a negative
    costs `alpha p^gamma` times its cross entropy, a query matched with overlap q costs `q` times its cross entropy with the
    target q.

    Args:
        criterion: the RTDetrLoss: its alpha and gamma.
        outputs: "logits" (N, queries, K), "pred_boxes" (N, queries, 4) as centre and size.
        targets: an image each: "class_labels" (T,), "boxes" (T, 4).
        indices: an image each: which queries are matched, and with which targets.
        num_boxes: what the sum is divided by.
        log: not used.

    Raises:
        KeyError: outputs without logits or pred_boxes.
        ValueError: an object's class is outside 0..K-1 (on CUDA: a device-side assertion).
    """
    return _now_or_later(_VARIFOCAL, criterion, outputs, targets, indices, num_boxes)


def matchability_aware_loss(
    criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
) -> dict[str, Tensor]:
    """transformers.loss.loss_deimv2.Deimv2Loss.loss_labels_mal: the same, of the matchability-aware loss.

    DEIM (Huang et al. 2024, arXiv:2412.04234): a negative costs `mal_alpha p^gamma` times its cross entropy, with the weight
    detached, a query matched with overlap q its cross entropy with the target `q^gamma`.
    """
    return _now_or_later(_MATCHABILITY, criterion, outputs, targets, indices, num_boxes)


def iou_aware_bce_loss(
    criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
) -> dict[str, Tensor]:
    """transformers.loss.loss_lw_detr.LwDetrImageLoss.loss_labels: the same, of the IoU-aware binary cross entropy.

    LW-DETR (Chen et al. 2024, arXiv:2406.03459), after Align-DETR: a negative costs `p^2` times its cross entropy, a query
    matched with overlap q its cross entropy with the target `max(0.01, p^alpha q^(1 - alpha))`, which is detached.
    """
    return _now_or_later(_IOU_AWARE, criterion, outputs, targets, indices, num_boxes)


def deformable_focal_loss(
    criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
) -> dict[str, Tensor]:
    """transformers.loss.loss_deformable_detr.DeformableDetrImageLoss.loss_labels: the same, of the focal loss."""
    return _now_or_later(_FOCAL, criterion, outputs, targets, indices, num_boxes)


def grounded_focal_loss(
    criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
) -> dict[str, Tensor]:
    """transformers.loss.loss_grounding_dino.GroundingDinoImageLoss.loss_labels: the focal loss of a text's tokens.

    Args:
        outputs: "logits" (N, queries, tokens), "label_maps", and "text_mask", shaped as the logits: which tokens count. It is
            the same for all queries of an image, as the model makes it.

    Raises:
        KeyError: outputs without logits or text_mask.
        ValueError: an object's class is no row of its image's label map; a text mask that depends on the query (on CUDA: a
            device-side assertion).
    """
    return _now_or_later(_PHRASES, criterion, outputs, targets, indices, num_boxes)


# --- now, or at the end of the criterion's forward ---------------------------------------------------------------------

_LATER = "_fastfocal_later"  # an attribute of a criterion while its forward runs: what was asked for, by loss
Later = dict[_Loss, list[_Call]]


def _now_or_later(
    loss: _Loss, criterion: Any, outputs: Outputs, targets: Targets, indices: Indices, num_boxes: float | Tensor
) -> dict[str, Tensor]:
    for name in loss.needs:
        if name not in outputs:
            raise KeyError(f"No {name} were found in the outputs")
    call = _Call(outputs, targets, indices, num_boxes)
    later: Later | None = criterion.__dict__.get(_LATER)
    if later is None or isinstance(num_boxes, Tensor):
        found = loss.compute(criterion, [call], None)[0]
        return {loss.key: over(found, num_boxes, loss.dtype(outputs["logits"]))}
    later.setdefault(loss, []).append(call)
    # The criterion multiplies it with the loss's weight, or not, and files it.
    return {loss.key: torch.ones((), dtype=torch.float64)}


def _with_all_layers(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A criterion's forward whose classification losses are computed at its end, all layers in one call.

    Meanwhile each has a 1 in its place, which comes out as the weight that the criterion gives it. That is what happens to it
    in transformers' own criteria; in others, losses are computed at once.
    """

    @functools.wraps(stock)
    def forward(criterion: Any, outputs: Outputs, targets: Targets) -> dict[str, Any]:
        if _LATER in criterion.__dict__ or type(criterion) not in _stock_criteria():
            return stock(criterion, outputs, targets)
        _check_objects(outputs, targets)  # before the matcher, to which K is an index out of range
        later: Later = {}
        setattr(criterion, _LATER, later)
        try:
            losses = stock(criterion, outputs, targets)
        finally:
            delattr(criterion, _LATER)
        for loss, calls in later.items():
            places = [key for key in losses if key.startswith(loss.key)]
            if places:  # without a weight, the criterion drops them
                weights = [float(losses[key]) for key in places]
                losses.update(zip(places, _losses(loss, criterion, calls, weights), strict=True))
        return losses

    return forward


def _losses(loss: _Loss, criterion: Any, calls: Sequence[_Call], weights: Sequence[float]) -> list[Tensor]:
    """Those of several layers, each times its weight over its number of boxes."""
    factors = [weight / float(call.num_boxes) for weight, call in zip(weights, calls, strict=True)]
    if loss.fit(calls):
        found = loss.compute(criterion, calls, factors).unbind()
    else:
        parts = zip(calls, factors, strict=True)
        found = tuple(loss.compute(criterion, [call], [factor])[0] for call, factor in parts)
    return [x.to(loss.dtype(call.outputs["logits"])) for x, call in zip(found, calls, strict=True)]


def _module(name: str) -> Any:
    return importlib.import_module(f"transformers.loss.{name}")


@functools.cache
def _stock_criteria() -> tuple[type, ...]:
    names = {
        "loss_rt_detr": "RTDetrLoss",
        "loss_d_fine": "DFineLoss",
        "loss_deimv2": "Deimv2Loss",
        "loss_lw_detr": "LwDetrImageLoss",
        "loss_rf_detr": "RfDetrImageLoss",
        "loss_deformable_detr": "DeformableDetrImageLoss",
        "loss_grounding_dino": "GroundingDinoImageLoss",
    }
    return tuple(getattr(_module(module), name) for module, name in names.items())


# --- the swap ---------------------------------------------------------------------------------------------------------

_FUNCTIONS = {
    "transformers.loss.loss_for_object_detection": mean_focal_loss,
    "transformers.loss.loss_deformable_detr": mean_focal_loss,
    "transformers.loss.loss_lw_detr": mean_focal_loss,
    "transformers.loss.loss_rt_detr": mean_focal_loss,
    "transformers.loss.loss_grounding_dino": sum_focal_loss,
    "transformers.models.maskformer.modeling_maskformer": mean_focal_loss,
}
_METHODS = [
    ("loss_rt_detr", "RTDetrLoss", _VARIFOCAL, varifocal_loss),
    ("loss_deimv2", "Deimv2Loss", _MATCHABILITY, matchability_aware_loss),
    ("loss_lw_detr", "LwDetrImageLoss", _IOU_AWARE, iou_aware_bce_loss),
    ("loss_deformable_detr", "DeformableDetrImageLoss", _FOCAL, deformable_focal_loss),
    ("loss_grounding_dino", "GroundingDinoImageLoss", _PHRASES, grounded_focal_loss),
]
_FORWARDS = [
    ("loss_rt_detr", "RTDetrLoss"),
    ("loss_deimv2", "Deimv2Loss"),
    ("loss_lw_detr", "LwDetrImageLoss"),
    ("loss_rf_detr", "RfDetrImageLoss"),
    ("loss_for_object_detection", "ImageLoss"),  # Deformable DETR's and Grounding DINO's
]


@contextmanager
def fused_functions() -> Iterator[None]:
    """Swaps the criteria's methods and the functions `sigmoid_focal_loss` above, for as long as the context lasts.

    It holds for every model of the process.
    """
    swaps: list[tuple[Any, str, Any]] = [
        (importlib.import_module(name), "sigmoid_focal_loss", function) for name, function in _FUNCTIONS.items()
    ]
    swaps += [(getattr(_module(module), name), loss.name, method) for module, name, loss, method in _METHODS]
    for module, name in _FORWARDS:
        criterion = getattr(_module(module), name)
        swaps.append((criterion, "forward", _with_all_layers(criterion.forward)))
    stock = [getattr(owner, name) for owner, name, _ in swaps]
    try:
        for owner, name, function in swaps:
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(swaps, stock, strict=True):
            setattr(owner, name, function)
