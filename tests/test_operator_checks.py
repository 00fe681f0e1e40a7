"""Direct calls of the operators with tensors and numbers that do not agree: an error each, before anything is read or written.

What users pass is checked in Python (test_errors.py); these calls go past that. Without the checks most of the cases below read
or write out of bounds, or return uninitialised memory.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import NATIVE, Backend
from torch import Tensor

import fastfocal
from fastfocal import guards, ops
from fastfocal.losses.focal import FocalLoss
from fastfocal.losses.focal_star import FocalLossStar
from fastfocal.losses.softmax_focal import SoftmaxFocalLoss
from fastfocal.losses.varifocal import VarifocalLoss
from fastfocal.ops import COUNT_SCORES

N, A, K = 2, 2, 3
CELLS = ((4, 3), (2, 2), (1, 1))
ANCHORS = [h * w * A for h, w in CELLS]
OPTIONS = ("packed_labels", "soft_targets", "scores", "anchor_weight", "class_weights", "class_mask", "divisor",
           "level_scales", "positive_weight", "negative_weight", "loss", "loss_parameters", "num_classes", "first_class",
           "reduction", "needs_grad")  # fmt: skip
Call = dict[str, Any]  # an operator's arguments by name, in their order
Change = Callable[[Call], Any]
NAN, INF = float("nan"), float("inf")


def make_logits(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, A * K, h, w, generator=generator).to(device) for h, w in CELLS]


def make_options(device: torch.device) -> Call:
    labels = torch.arange(N * sum(ANCHORS), device=device) % (K + 2) - 2  # ignored, background, classes
    values = (
        labels.to(torch.int16),
        [],
        None,
        None,
        None,
        None,
        None,
        [1.0] * 3,
        0.25,
        0.75,
        FocalLoss.kind,
        [2.0, 0.0, 0.0],
        K,
        0,
        0,
        [1] * 3,
    )
    return dict(zip(OPTIONS, values, strict=True))


def make(operator: str, device: torch.device) -> Call:
    logits = make_logits(device)
    if operator == "pack_labels":
        labels = [torch.arange(N * m, device=device).view(N, m) % (K + 1) for m in ANCHORS]
        return {
            "labels": labels,
            "logits": logits,
            "scores": None,
            "num_classes": K,
            "background": K,
            "ignore": -1,
            "count": 1,
            "least": 1.0,
        }
    if operator == "scale_gradients" or operator == "scale_gradients_":
        return {"gradients": logits, "grad_output": torch.tensor(3.0, device=device), "reduction": 0}
    before: Call = {"logits": logits}
    if operator == "pyramid_loss_":
        before["losses"] = [torch.zeros((), device=device)]
    if operator in ("pyramid_loss_backward", "pyramid_loss_double_backward"):
        before = {"grad_outputs": [torch.tensor(3.0, device=device)], **before}
    if operator == "pyramid_loss_double_backward":
        before = {"grad_gradients": [torch.ones_like(t) for t in logits], **before}
    return {**before, **make_options(device)}


def put(name: str, value: Any) -> Change:
    """value: or a function of the call."""

    def change(call: Call) -> None:
        call[name] = value(call) if callable(value) else value

    return change


def put_level(name: str, value: Callable[[Tensor], Tensor], level: int = 1) -> Change:
    """One entry of a list of tensors, the middle one unless said otherwise."""

    def change(call: Call) -> None:
        call[name] = [value(t) if i == level else t for i, t in enumerate(call[name])]

    return change


def soft(call: Call, change: Callable[[list[Tensor]], Any] = lambda targets: targets) -> None:
    call["packed_labels"] = None
    call["soft_targets"] = change([t.sigmoid() for t in call["logits"]])


def resized(t: Tensor, share: int = 0) -> Tensor:
    """The same shape over a storage of which a `share`-th is left, or nothing."""
    storage = t.untyped_storage().clone()
    t = t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload]
    storage.resize_(storage.nbytes() // share if share else 0)
    return t


def every_other(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=-1)[..., ::2]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def for_levels(*losses: int) -> Change:
    """One tensor for all levels' losses, or incoming gradients, with reduction "level"."""

    def change(call: Call) -> None:
        call["reduction"] = 1
        for name in ("losses", "grad_outputs"):
            if name in call:
                call[name] = [call["logits"][0].new_zeros(losses)]

    return change


def elementwise(name: str, change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    def apply(call: Call) -> None:
        call["reduction"] = 3
        call[name] = change([torch.zeros_like(t) for t in call["logits"]])

    return apply


def changed(tensors: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [tensors[0], change(tensors[1]), tensors[2]]


# What scores may not be, given them as they should be.
SCORES: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
    ("short", lambda t: t[1:], "scores: expected 68 numbers"),
    ("dtype", Tensor.double, "scores: expected Float, got Double"),
    ("strided", lambda t: every_other(t), "scores: expected contiguous"),
    ("storage", resized, "scores: expected a storage of at least 272 bytes, got 0"),
    ("rows_short", lambda t: t.view(2, 34)[:, :-1], r"scores: expected shape \(2, 34\), or as many .*got \(2, 33\)"),
    ("rows_of_other_images", lambda t: t.view(4, 17), r"scores: expected shape \(2, 34\), .*got \(4, 17\)"),
    ("rows_strided", lambda t: t.view(34, 2).t(), r"scores: expected rows side by side, got strides \(1, 2\)"),
    ("rows_dtype", lambda t: t.view(2, 34).double(), "scores: expected Float, got Double"),
    ("rows_storage", lambda t: resized(t.view(2, 34)), "scores: expected a storage of at least 272 bytes, got 0"),
)


def varifocal(call: Call, scores: Tensor) -> None:
    call.update(loss=VarifocalLoss.kind, loss_parameters=[2.0, 1.0, 0.0], scores=scores)


META = r"one device|device of logits\[0\]"  # the dispatcher sends such a call to the shape functions
ON_LOGITS: dict[str, tuple[Change, str]] = {
    "no_levels": (put("logits", []), "logits: expected at least one level"),
    "fewer_images": (
        put_level("logits", lambda t: t[:1]),
        r"logits\[1\]: expected 4 dimensions and 2 images .* \(1, 6, 2, 2\)",
    ),
    "more_images": (put_level("logits", lambda t: torch.cat([t, t])), r"logits\[1\]: .* \(4, 6, 2, 2\)"),
    "other_rank": (
        put_level("logits", lambda t: t.flatten(2).transpose(1, 2).reshape(N, -1, K)),
        r"logits\[1\]: .* \(2, 8, 3\)",
    ),
    "one_dimension": (
        put_level("logits", lambda t: t.flatten(), 0),
        r"logits\[0\]: expected 2, 3 or 4 dimensions.* \(144,\)",
    ),
    "five_dimensions": (put_level("logits", lambda t: t[None], 0), r"logits\[0\]: expected 2, 3 or 4 dimensions"),
    "other_dtype": (put_level("logits", lambda t: t.half()), r"logits\[1\]: expected Float, got Half"),
    "integer": (put("logits", lambda call: [t.int() for t in call["logits"]]), "logits: expected float32, .*got Int"),
    "channels": (
        put_level("logits", lambda t: t[:, :5].contiguous()),
        r"logits\[1\]: .* multiple of num_classes 3, got 5",
    ),
    "strided": (put_level("logits", every_other), r"logits\[1\]: expected contiguous or channels_last"),
    "transposed": (
        put_level("logits", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), 0),
        r"logits\[0\]: .*contiguous",
    ),
    "expanded": (put_level("logits", expanded), r"logits\[1\]: expected contiguous or channels_last"),
    "no_storage": (put_level("logits", resized), r"logits\[1\]: expected a storage of at least 192 bytes, got 0"),
    "half_the_storage": (
        put_level("logits", lambda t: resized(t, 2), 2),
        r"logits\[2\]: .*storage of at least 48 bytes, got 24",
    ),
    "meta": (put_level("logits", lambda t: t.to("meta")), META),
    "zero_classes": (put("num_classes", 0), "num_classes: expected 1 to .* got 0"),
    "negative_classes": (put("num_classes", -K), "num_classes: expected 1 to .* got -3"),
    "too_many_classes": (put("num_classes", 2**32 + K), "num_classes: expected 1 to"),
}
ON_LABELS: dict[str, tuple[Change, str]] = {
    **ON_LOGITS,
    "one_tensor_fewer_images": (
        lambda call: (put("labels", [torch.cat(call["labels"], 1)])(call), ON_LOGITS["fewer_images"][0](call)),
        r"logits\[1\]",
    ),
    "one_tensor_more_images": (
        lambda call: (put("labels", [torch.cat(call["labels"], 1)])(call), ON_LOGITS["more_images"][0](call)),
        r"logits\[1\]",
    ),
    "one_tensor_other_rank": (
        lambda call: (put("labels", [torch.cat(call["labels"], 1)])(call), ON_LOGITS["other_rank"][0](call)),
        r"logits\[1\]",
    ),
    "one_tensor_short": (
        put("labels", lambda call: [torch.cat(call["labels"], 1)[:, 1:]]),
        r"labels\[0\]: .*\(2, 34\), got \(2, 33\)",
    ),
    "no_labels": (put("labels", []), "labels: expected 1 or 3 tensors, got 0"),
    "two_labels": (put("labels", lambda call: call["labels"][:2]), "labels: expected 1 or 3 tensors, got 2"),
    "labels_short": (put_level("labels", lambda t: t[:, 1:]), r"labels\[1\]: expected shape \(2, 8\), got \(2, 7\)"),
    "labels_fewer_images": (
        put_level("labels", lambda t: t[:1]),
        r"labels\[1\]: expected shape \(2, 8\), got \(1, 8\)",
    ),
    "labels_flat": (put_level("labels", lambda t: t.flatten()), r"labels\[1\]: expected shape \(2, 8\), got \(16,\)"),
    "labels_other_dtype": (put_level("labels", lambda t: t.int()), r"labels\[1\]: expected Long, got Int"),
    "labels_floating": (
        put("labels", lambda call: [t.float() for t in call["labels"]]),
        "labels: expected int64, .*got Float",
    ),
    "labels_no_storage": (
        put_level("labels", resized),
        r"labels\[1\]: expected a storage of at least 128 bytes, got 0",
    ),
    "labels_strided_storage": (
        put_level("labels", lambda t: resized(every_other(t), 2)),
        r"labels\[1\]: expected a storage of at least 248 bytes, got",
    ),
    "labels_meta": (put_level("labels", lambda t: t.to("meta")), META),
    "count_below": (put("count", -1), "count: expected 0 to 5, got -1"),
    "count_above": (put("count", 6), "count: expected 0 to 5, got 6"),
    "count_scores_without": (put("count", COUNT_SCORES), "scores: expected a tensor, as their sum is wanted"),
    "count_scores_meta": (
        lambda call: call.update(count=COUNT_SCORES, scores=torch.ones(68, device="meta")),
        META,
    ),
    **{
        f"count_scores_{name}": (
            lambda call, scores=scores: call.update(count=COUNT_SCORES, scores=scores(call["logits"][0].new_ones(68))),
            message,
        )
        for name, scores, message in SCORES
    },
    "least_nan": (put("least", float("nan")), "minimum: expected a number >= 0, got -?nan"),
}
ON_OPTIONS: dict[str, tuple[Change, str]] = {
    **ON_LOGITS,
    "no_targets": (put("packed_labels", None), "packed_labels: expected either"),
    "both_targets": (put("soft_targets", lambda call: call["logits"]), "packed_labels: expected either"),
    "labels_short": (
        put("packed_labels", lambda call: call["packed_labels"][1:]),
        r"packed_labels: expected 68 numbers, got shape \(67,\)",
    ),
    "labels_dtype": (
        put("packed_labels", lambda call: call["packed_labels"].int()),
        "packed_labels: expected Short, got Int",
    ),
    "labels_strided": (
        put("packed_labels", lambda call: every_other(call["packed_labels"])),
        "packed_labels: expected contiguous",
    ),
    "labels_storage": (
        put("packed_labels", lambda call: resized(call["packed_labels"], 2)),
        "packed_labels: expected a storage of at least 136 bytes",
    ),
    "labels_meta": (put("packed_labels", lambda call: call["packed_labels"].to("meta")), META),
    "soft_levels": (lambda call: soft(call, lambda y: y[:2]), "soft_targets: expected 3 levels, got 2"),
    "soft_shape": (
        lambda call: soft(call, lambda y: changed(y, lambda t: t[:, :3].contiguous())),
        r"soft_targets\[1\]: .*got \(2, 3, 2, 2\)",
    ),
    "soft_rank": (
        lambda call: soft(call, lambda y: changed(y, lambda t: t.flatten(2))),
        r"soft_targets\[1\]: .*\(2, 6, 4\)",
    ),
    "soft_order": (
        lambda call: soft(call, lambda y: changed(y, lambda t: t.contiguous(memory_format=torch.channels_last))),
        r"soft_targets\[1\]: .*strides of its logits, got other strides",
    ),
    "soft_expanded": (
        lambda call: soft(call, lambda y: changed(y, expanded)),
        r"soft_targets\[1\]: .*got other strides",
    ),
    "soft_dtype": (lambda call: soft(call, lambda y: [t.double() for t in y]), r"soft_targets\[0\]: .*got Double"),
    "soft_integer": (lambda call: soft(call, lambda y: [t.int() for t in y]), r"soft_targets\[0\]: .*got Int"),
    "soft_other_dtype": (
        lambda call: soft(call, lambda y: changed(y, Tensor.half)),
        r"soft_targets\[1\]: expected Float, got Half",
    ),
    "soft_storage": (lambda call: soft(call, lambda y: changed(y, resized)), r"soft_targets\[1\]: expected a storage"),
    "soft_meta": (lambda call: soft(call, lambda y: changed(y, lambda t: t.to("meta"))), META),
    "weight_short": (
        put("anchor_weight", lambda call: call["logits"][0].new_ones(67)),
        "anchor_weight: expected 68 numbers",
    ),
    "weight_dtype": (
        put("anchor_weight", lambda call: call["packed_labels"]),
        "anchor_weight: expected Float, got Short",
    ),
    "weight_strided": (
        put("anchor_weight", lambda call: every_other(call["packed_labels"].float())),
        "anchor_weight: .*contiguous",
    ),
    "weight_storage": (
        put("anchor_weight", lambda call: resized(call["packed_labels"].float())),
        "anchor_weight: expected a storage",
    ),
    "class_weights_short": (
        put("class_weights", lambda call: call["logits"][0].new_ones(K)),
        "class_weights: expected 6 numbers",
    ),
    "class_weights_dtype": (
        put("class_weights", lambda call: torch.ones(2, K).double().to(call["packed_labels"].device)),
        "class_weights",
    ),
    "class_weights_storage": (
        put("class_weights", lambda call: resized(call["logits"][0].new_ones(2, K))),
        "class_weights: expected a storage",
    ),
    "divisor_count": (
        put("divisor", lambda call: call["packed_labels"][:3].double()),
        r"divisor: expected 2 numbers, got shape \(3,\)",
    ),
    "divisor_none": (put("divisor", lambda call: call["packed_labels"][:0].double()), "divisor: expected 2 numbers"),
    "divisor_dtype": (
        put("divisor", lambda call: call["logits"][0].new_ones(())),
        "divisor: expected Double, got Float",
    ),
    "divisor_strided": (
        put("divisor", lambda call: call["packed_labels"].double()[:4:2]),
        "divisor: expected contiguous",
    ),
    "divisor_storage": (
        put("divisor", lambda call: resized(call["packed_labels"][0].double())),
        "divisor: expected a storage",
    ),
    "divisor_meta": (put("divisor", torch.ones((), dtype=torch.float64, device="meta")), META),
    "scales_short": (put("level_scales", [1.0, 1.0]), "level_scales: expected 3 numbers, one per level, got 2"),
    "first_class_below_0": (put("first_class", -1), "first_class: expected a number >= 0.* got -1"),
    "first_class_beyond": (put("first_class", 2**31 - K), "first_class: .* less than 2.31 classes, got 2147483645"),
    "first_class_and_soft": (
        lambda call: (soft(call), call.update(first_class=1)),
        "first_class: expected 0 beside soft_targets",
    ),
    "scales_long": (put("level_scales", [1.0] * 4), "level_scales: expected 3 numbers, one per level, got 4"),
    "needs_short": (put("needs_grad", [1]), "needs_grad: expected none or 3 flags, one per level, got 1"),
    "needs_long": (put("needs_grad", [1] * 4), "needs_grad: expected none or 3 flags, one per level, got 4"),
    "loss_below": (put("loss", -1), "loss: expected 0 to 9, got -1"),
    "loss_above": (put("loss", 10), "loss: expected 0 to 9, got 10"),
    "loss_wide": (put("loss", 2**32), "loss: expected 0 to 9, got 4294967296"),
    "reduction_below": (put("reduction", -1), "reduction: expected 0 to 3, got -1"),
    "reduction_above": (put("reduction", 4), "reduction: expected 0 to 3, got 4"),
    "reduction_wide": (put("reduction", 2**32), "reduction: expected 0 to 3, got 4294967296"),
    **{
        name: (
            lambda call, loss=loss, numbers=numbers: call.update(loss=loss, loss_parameters=numbers),
            r"loss_parameters\[\d\]: expected " + message,
        )
        for name, loss, numbers, message in (
            ("gamma_nan", FocalLoss.kind, [NAN, 0.0, 0.0], "gamma, a finite number >= 0, got -?nan"),
            ("gamma_infinite", FocalLoss.kind, [INF, 0.0, 0.0], "gamma, a finite number >= 0, got inf"),
            ("gamma_negative", FocalLoss.kind, [-1.0, 0.0, 0.0], "gamma, a finite number >= 0, got -1"),
            ("smoothing_nan", FocalLoss.kind, [2.0, NAN, 0.0], "label_smoothing, a number >= 0 and <= 1, got -?nan"),
            ("smoothing_two", FocalLoss.kind, [2.0, 2.0, 0.0], "label_smoothing, a number >= 0 and <= 1, got 2"),
            ("detach_half", FocalLoss.kind, [2.0, 0.0, 0.5], "detach_modulating_factor, 0 or 1, got 0.5"),
            ("detach_nan", FocalLoss.kind, [2.0, 0.0, NAN], "detach_modulating_factor, 0 or 1, got -?nan"),
            ("star_gamma_zero", FocalLossStar.kind, [0.0, 1.0], "gamma, a finite number > 0, got 0"),
            ("star_gamma_nan", FocalLossStar.kind, [NAN, 1.0], "gamma, a finite number > 0, got -?nan"),
            ("star_beta_nan", FocalLossStar.kind, [2.0, NAN], "beta, a finite number, got -?nan"),
            ("star_beta_infinite", FocalLossStar.kind, [2.0, -INF], "beta, a finite number, got -inf"),
        )
    },
    "parameters_none": (put("loss_parameters", []), "loss_parameters: expected 3 numbers for loss 0, got 0"),
    "parameters_short": (put("loss_parameters", [2.0, 0.0]), "loss_parameters: expected 3 numbers for loss 0, got 2"),
    "parameters_long": (put("loss_parameters", [2.0] * 5), "loss_parameters: expected 3 numbers for loss 0, got 5"),
    "scores_of_another_loss": (
        put("scores", lambda call: call["logits"][0].new_ones(68)),
        "scores: expected none, as loss 0 does not read them",
    ),
    "scores_and_soft": (
        lambda call: (soft(call), varifocal(call, call["logits"][0].new_ones(68))),
        "scores: expected none beside soft_targets",
    ),
    "scores_meta": (lambda call: varifocal(call, torch.ones(68, device="meta")), META),
    **{
        f"scores_{name}": (
            lambda call, scores=scores: varifocal(call, scores(call["logits"][0].new_ones(68))),
            message,
        )
        for name, scores, message in SCORES
    },
    **{
        f"mask_{name}": (
            put("class_mask", lambda call, mask=mask: mask(call["logits"][0].new_ones(N, K).bool())),
            message,
        )
        for name, mask, message in (
            ("dtype", Tensor.byte, "class_mask: expected Bool, got Byte"),
            ("short", lambda t: t[:, 1:], r"class_mask: expected shape \(2, 3\), got \(2, 2\)"),
            ("fewer_images", lambda t: t[:1], r"class_mask: expected shape \(2, 3\), got \(1, 3\)"),
            ("flat", Tensor.flatten, r"class_mask: expected shape \(2, 3\), got \(6,\)"),
            ("storage", resized, "class_mask: expected a storage of at least 6 bytes, got 0"),
            (
                "strided_storage",
                lambda t: resized(every_other(t), 2),
                "class_mask: expected a storage of at least 11 bytes",
            ),
            ("meta", lambda t: t.to("meta"), META),
        )
    },
    "positive_weight_nan": (
        put("positive_weight", float("nan")),
        "positive_weight: expected a finite number, got -?nan",
    ),
    "negative_weight_infinite": (
        put("negative_weight", float("-inf")),
        "negative_weight: expected a finite number, got -inf",
    ),
}
ON_LOSSES: dict[str, tuple[Change, str]] = {
    **ON_OPTIONS,
    "losses_none": (put("losses", []), "losses: expected 1 tensors, got 0"),
    "losses_two": (put("losses", lambda call: 2 * call["losses"]), "losses: expected 1 tensors, got 2"),
    "losses_count": (for_levels(2), r"losses\[0\]: expected 3 numbers, got shape \(2,\)"),
    "losses_dtype": (put_level("losses", Tensor.double, 0), r"losses\[0\]: expected Float, got Double"),
    "losses_expanded": (
        lambda call: (for_levels(1)(call), put_level("losses", lambda t: t.expand(3), 0)(call)),
        r"losses\[0\]: ",
    ),
    "losses_storage": (put_level("losses", resized, 0), r"losses\[0\]: expected a storage of at least 4 bytes, got 0"),
    "losses_meta": (put_level("losses", lambda t: t.to("meta"), 0), META),
    "elements_levels": (elementwise("losses", lambda t: t[:2]), "losses: expected 3 tensors, got 2"),
    "elements_shape": (
        elementwise("losses", lambda t: changed(t, lambda t: t[:1])),
        r"losses\[1\]: .*got \(1, 6, 2, 2\)",
    ),
    "elements_order": (elementwise("losses", lambda t: changed(t, expanded)), r"losses\[1\]: .*got other strides"),
    "elements_dtype": (
        elementwise("losses", lambda t: changed(t, Tensor.half)),
        r"losses\[1\]: expected Float, got Half",
    ),
    "elements_storage": (elementwise("losses", lambda t: changed(t, resized)), r"losses\[1\]: expected a storage"),
    "losses_in_logits": (
        put("losses", lambda call: [call["logits"][1][0, 0, 0, 0]]),
        r"losses\[0\]: shares memory with logits\[1\]",
    ),
    "soft_in_logits": (
        lambda call: soft(call, lambda y: [call["logits"][0], *y[1:]]),
        r"soft_targets\[0\]: shares memory with logits\[0\]",
    ),
    "scores_in_logits": (
        lambda call: varifocal(call, call["logits"][0].view(-1)[:68]),
        r"scores: shares memory with logits\[0\]",
    ),
    "mask_in_logits": (
        put("class_mask", lambda call: call["logits"][1].view(torch.bool).flatten()[: N * K].view(N, K)),
        r"class_mask: shares memory with logits\[1\]",
    ),
    "labels_in_logits": (
        put("packed_labels", lambda call: call["logits"][0].view(torch.int16).flatten()[:68]),
        r"packed_labels: shares memory with logits\[0\]",
    ),
}
ON_INCOMING: dict[str, tuple[Change, str]] = {
    **ON_OPTIONS,
    "incoming_none": (put("grad_outputs", []), "grad_outputs: expected 1 tensors, got 0"),
    "incoming_two": (
        put("grad_outputs", lambda call: 2 * call["grad_outputs"]),
        "grad_outputs: expected 1 tensors, got 2",
    ),
    "incoming_count": (for_levels(2), r"grad_outputs\[0\]: expected 3 numbers .*got shape \(2,\)"),
    "incoming_rank": (for_levels(1, 3), r"grad_outputs\[0\]: expected 3 numbers .*got shape \(1, 3\)"),
    "incoming_dtype": (put_level("grad_outputs", Tensor.double, 0), r"grad_outputs\[0\]: expected Float, got Double"),
    "incoming_storage": (put_level("grad_outputs", resized, 0), r"grad_outputs\[0\]: expected a storage"),
    "incoming_meta": (put_level("grad_outputs", lambda t: t.to("meta"), 0), META),
    "elements_levels": (elementwise("grad_outputs", lambda t: t[:2]), "grad_outputs: expected 3 tensors, got 2"),
    "elements_shape": (
        elementwise("grad_outputs", lambda t: changed(t, lambda t: t[:1])),
        r"grad_outputs\[1\]: .*\(1, 6, 2, 2\)",
    ),
    "elements_order": (
        elementwise("grad_outputs", lambda t: changed(t, expanded)),
        r"grad_outputs\[1\]: .*other strides",
    ),
    "elements_dtype": (
        elementwise("grad_outputs", lambda t: changed(t, Tensor.half)),
        r"grad_outputs\[1\]: expected Float, got Half",
    ),
    "elements_storage": (
        elementwise("grad_outputs", lambda t: changed(t, resized)),
        r"grad_outputs\[1\]: expected a storage",
    ),
}
ON_DIRECTIONS: dict[str, tuple[Change, str]] = {
    **ON_INCOMING,
    "directions_levels": (
        put("grad_gradients", lambda call: call["grad_gradients"][:2]),
        "grad_gradients: expected 3 tensors, got 2",
    ),
    "directions_none": (put("grad_gradients", []), "grad_gradients: expected 3 tensors, got 0"),
    "directions_shape": (put_level("grad_gradients", lambda t: t[:1]), r"grad_gradients\[1\]: .*got \(1, 6, 2, 2\)"),
    "directions_rank": (put_level("grad_gradients", lambda t: t.flatten(2)), r"grad_gradients\[1\]: .*\(2, 6, 4\)"),
    "directions_order": (put_level("grad_gradients", expanded), r"grad_gradients\[1\]: .*got other strides"),
    "directions_dtype": (put_level("grad_gradients", Tensor.half), r"grad_gradients\[1\]: expected Float, got Half"),
    "directions_empty_dtype": (
        put_level("grad_gradients", lambda t: t.new_empty(0, dtype=torch.int64)),
        r"grad_gradients\[1\]: expected Float, got Long",
    ),
    "directions_storage": (put_level("grad_gradients", resized), r"grad_gradients\[1\]: expected a storage"),
    "directions_meta": (put_level("grad_gradients", lambda t: t.to("meta")), META),
    "no_second_derivative": (
        lambda call: call.update(loss=SoftmaxFocalLoss.kind, loss_parameters=[2.0, 0.0]),
        "loss: 9 has no second derivative",
    ),
}
ON_GRADIENTS: dict[str, tuple[Change, str]] = {
    "other_dtype": (put_level("gradients", Tensor.double), r"gradients\[1\]: expected Float, got Double"),
    "narrower_dtype": (put_level("gradients", Tensor.half), r"gradients\[1\]: expected Float, got Half"),
    "integer": (put("gradients", lambda call: [t.int() for t in call["gradients"]]), "expected float32, .*got Int"),
    "expanded": (put_level("gradients", expanded), r"gradients\[1\]: expected contiguous or channels_last"),
    "expanded_3d": (put_level("gradients", lambda t: expanded(t).flatten(2)), r"gradients\[1\]: expected contiguous"),
    "strided": (put_level("gradients", every_other), r"gradients\[1\]: expected contiguous or channels_last"),
    "one_dimension": (put_level("gradients", lambda t: t.flatten()), r"gradients\[1\]: expected 2, 3 or 4 dimensions"),
    "more_images": (
        put_level("gradients", lambda t: torch.cat([t, t[:1]])),
        r"gradients\[1\]: expected 2 images .* \(3, 6, 2, 2\)",
    ),
    "fewer_images": (
        put_level("gradients", lambda t: t[:1], 2),
        r"gradients\[2\]: expected 2 images .* \(1, 6, 1, 1\)",
    ),
    "storage": (put_level("gradients", resized), r"gradients\[1\]: expected a storage of at least 192 bytes, got 0"),
    "half_the_storage": (
        put_level("gradients", lambda t: resized(t, 2)),
        r"gradients\[1\]: expected a storage .*got 96",
    ),
    "meta": (put_level("gradients", lambda t: t.to("meta")), META),
    "incoming_dtype": (
        put("grad_output", lambda call: call["grad_output"].double()),
        "grad_output: expected Float, got Double",
    ),
    "incoming_count": (
        put("grad_output", lambda call: call["grad_output"].repeat(3)),
        r"grad_output: expected 1 numbers.*\(3,\)",
    ),
    "incoming_levels": (
        lambda call: call.update(reduction=1, grad_output=call["grad_output"].repeat(2)),
        "grad_output: expected 3 numbers",
    ),
    "incoming_images": (
        lambda call: call.update(reduction=2, grad_output=call["grad_output"].repeat(3)),
        "grad_output: expected 2 numbers",
    ),
    "incoming_rank": (
        put("grad_output", lambda call: call["grad_output"].view(1, 1)),
        "grad_output: expected 1 numbers",
    ),
    "incoming_storage": (
        put("grad_output", lambda call: resized(call["grad_output"])),
        "grad_output: expected a storage",
    ),
    "incoming_meta": (put("grad_output", lambda call: call["grad_output"].to("meta")), META),
    "reduction_none": (put("reduction", 3), "reduction: expected 0 to 2, got 3"),
    "reduction_below": (put("reduction", -1), "reduction: expected 0 to 2, got -1"),
}
ON_GRADIENTS_IN_PLACE = {
    **ON_GRADIENTS,
    "shared": (
        put("gradients", lambda call: [*call["gradients"], call["gradients"][0]]),
        r"gradients\[\d\]: shares memory with",
    ),
    "incoming_images_shared": (
        lambda call: call.update(reduction=2, grad_output=call["gradients"][0][:, 0, 0, 0]),
        "grad_output: shares memory with",
    ),
    "incoming_shared": (
        put("grad_output", lambda call: call["gradients"][0][0, 0, 0, 0]),
        "grad_output: shares memory with",
    ),
}
CASES = {
    "pack_labels": ON_LABELS,
    "pyramid_loss": ON_OPTIONS,
    "pyramid_loss_": ON_LOSSES,
    "pyramid_loss_backward": ON_INCOMING,
    "pyramid_loss_double_backward": ON_DIRECTIONS,
    "scale_gradients": ON_GRADIENTS,
    "scale_gradients_": ON_GRADIENTS_IN_PLACE,
}


def tensors_of(call: Call) -> list[Tensor]:
    """Those whose memory is there to be looked at."""
    found = [t for t in torch.utils._pytree.tree_leaves(list(call.values())) if isinstance(t, Tensor) and t.numel()]
    ends = [1 + t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in found]
    return [
        t
        for t, end in zip(found, ends, strict=True)
        if t.device.type != "meta" and t.untyped_storage().nbytes() >= end * t.element_size()
    ]


@pytest.mark.parametrize("operator", CASES)
def test_the_call_that_is_changed_below_is_right(backend: Backend, operator: str) -> None:
    getattr(ops.operators, operator)(*make(operator, backend.device).values())


@pytest.mark.parametrize("operator, name", [(operator, name) for operator, cases in CASES.items() for name in cases])
def test_a_call_that_does_not_agree_is_an_error(backend: Backend, operator: str, name: str) -> None:
    change, message = CASES[operator][name]
    call = make(operator, backend.device)
    change(call)
    before = [(t, t.clone()) for t in tensors_of(call)]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops.operators, operator)(*call.values())
    assert all(torch.equal(t, copy) for t, copy in before), "something was written"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.cuda
@pytest.mark.parametrize("operator", CASES)
def test_tensors_on_two_devices_are_an_error(operator: str) -> None:
    """Two indices of type CUDA are told apart as two types are; a machine with one GPU shows the latter."""
    cpu, cuda = (make(operator, torch.device(device)) for device in ("cpu", "cuda"))
    for name, value in cuda.items():
        if isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor)):
            with pytest.raises(RuntimeError, match=r"expected the device of logits\[0\]"):
                getattr(torch.ops.fastfocal, operator)(*{**cpu, name: value}.values())


@pytest.mark.parametrize("operator", ["scale_gradients", "scale_gradients_"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_scaled_gradients_of_every_dense_form(backend: Backend, operator: str, reduction: int) -> None:
    """Levels of any rank, in both memory orders, offset in their storage, empty, and without a gradient."""
    base = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(backend.device)
    gradients = [
        base[:72].view(N, 6, 2, 3).contiguous(memory_format=torch.channels_last),
        base[1:49].view(N, 4, 3, 2).clone(),
        base.new_empty(0),
        base[101:131].view(N, 5, 3),
        base.new_empty(N, 6, 0, 3),
    ]
    count = (None, 5, N)[reduction]
    incoming = torch.linspace(-2, 3, 2 * (count or 1), device=backend.device)[::2]
    factors = incoming if count else incoming[0].expand(5)
    if reduction == 2:
        expected = [t * incoming.view(N, *[1] * (t.dim() - 1)) if t.numel() else t for t in gradients]
    else:
        expected = [t * factor for t, factor in zip(gradients, factors, strict=True)]
    given = [t.clone() for t in gradients]
    found = getattr(ops.operators, operator)(given, incoming if count else incoming[0], reduction)
    found = given if found is None else found
    assert all(
        torch.equal(f, e) and f.stride() == t.stride() for f, e, t in zip(found, expected, gradients, strict=True)
    )


# --- out of memory ----------------------------------------------------------------------------------------------------

# What torch raises itself is the oracle: allocating as much directly. RLIMIT_AS makes it fail for certain, overcommit or not.
OUT_OF_MEMORY = """
import resource, sys, torch, fastfocal
torch.set_num_threads(1)
torch.autograd.set_multithreading_enabled(False)  # a thread started late would have no memory for its stack
mode, reduction = sys.argv[1:]
options = dict(num_classes=4, reduction=reduction)

def train(x, y):
    given = x * 1 if mode == "inplace" else x
    loss = fastfocal.focal_loss(given, y, grad_mode=mode, **options)
    loss.sum().backward()

x = torch.zeros(1, 4, 8192, 2048)  # 256 MiB
y = torch.full((1, 8192 * 2048), 4, dtype=torch.uint8)
train(torch.zeros(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 64, dtype=torch.uint8))  # what is made once a process
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), limits[1]))

def error(call):
    try:
        call()
    except Exception as raised:
        return type(raised), str(raised)

torchs = error(lambda: torch.empty_like(x))
assert torchs is not None and torchs[0] is RuntimeError and "268435456 bytes" in torchs[1], torchs
ours = error(lambda: train(x.requires_grad_(), y))
assert ours == torchs, ours
resource.setrlimit(resource.RLIMIT_AS, limits)
assert x.detach().eq(0).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as Linux has it")
@pytest.mark.parametrize("mode, reduction", [("save", "sum"), ("recompute", "sum"), ("save", "none")])
def test_out_of_memory_is_torchs_own_error(mode: str, reduction: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, mode, reduction], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, textwrap.indent(done.stderr, "  ")


class Failing:
    """Stands for an operator that runs out of memory on a GPU, and for the extension that knows how much was asked for."""

    def __init__(self, failures: int) -> None:
        self.calls, self.failures = 0, failures

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls <= self.failures:
            raise RuntimeError("CUDA out of memory. Tried to allocate 123 bytes.")
        return (*args, *kwargs.items())

    def failed_allocation(self) -> tuple[int, str, str]:
        return 123, "cuda:1", "CUDA out of memory. Tried to allocate 123 bytes."


def test_out_of_memory_raises_what_torch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type is torch's alone to throw: the allocation is tried again from Python."""
    failing = Failing(1)
    asked = []

    def empty(*size: object, **options: object) -> None:
        asked.append((*size, options))
        raise torch.OutOfMemoryError("torch's own words")

    monkeypatch.setattr(guards, "_C", failing)
    monkeypatch.setattr(guards.torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match="torch's own words") as caught:
        guards.with_torchs_own_error(failing)(1, 2)
    assert asked == [(123, {"dtype": torch.uint8, "device": "cuda:1"})] and failing.calls == 1
    assert caught.value.__context__ is None  # one error, not one during the handling of another


def test_memory_that_is_there_again_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(1)
    monkeypatch.setattr(guards, "_C", failing)
    monkeypatch.setattr(guards.torch, "empty", lambda *size, **options: None)
    assert guards.with_torchs_own_error(failing)(1, by_name=2) == (1, ("by_name", 2)) and failing.calls == 2


def test_other_errors_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an allocation that failed earlier and that nobody asked about."""

    def refuses(*args: object) -> None:
        raise RuntimeError("logits[0]: expected something else")

    monkeypatch.setattr(guards, "_C", Failing(0))
    with pytest.raises(RuntimeError, match=r"logits\[0\]: expected something else"):
        guards.with_torchs_own_error(refuses)()
    assert fastfocal._C.failed_allocation() is None


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
def test_the_guarded_operators_are_the_operators(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a torch with CUDA is given (ops.py)."""
    x = [t.requires_grad_() for t in make_logits(backend.device)]
    y = [torch.arange(N * m, device=backend.device).view(N, m) % (K + 1) for m in ANCHORS]

    def losses() -> list[Tensor]:
        found = []
        for mode, reduction in (("save", "sum"), ("recompute", "image"), ("inplace", "level"), ("save", "none")):
            given = [t * 1 for t in x]
            loss = fastfocal.focal_loss(given, y, num_classes=K, grad_mode=mode, reduction=reduction)
            total = sum(t.sum() for t in loss) if isinstance(loss, list) else loss.sum()
            found += [total, *torch.autograd.grad(2 * total, x)]
        return found

    before = losses()
    monkeypatch.setattr(ops, "operators", guards.Operators(torch.ops.fastfocal))
    assert all(torch.equal(a, b) for a, b in zip(losses(), before, strict=True))
