"""What a fused head says of bad arguments, before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from head_problems import Calls
from torch import Tensor, nn

import fastfocal
from fastfocal import FastFocalLoss, FastSoftmaxFocalLoss, conv_focal_loss, linear_focal_loss

K, A, C = 3, 2, 4
Changes = dict[str, Any]


def conv_call() -> Changes:
    """Two levels, and every argument that may be wrong."""
    return {
        "features": [torch.ones(2, C, 3, 2), torch.ones(2, C, 1, 1)],
        "weight": torch.ones(A * K, C, 1, 1),
        "bias": torch.ones(A * K),
        "targets": [torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)],
        "num_classes": K,
    }


def linear_call() -> Changes:
    return {
        "features": [torch.ones(2, 5, C), torch.ones(2, 2, C)],
        "weight": torch.ones(K, C),
        "bias": torch.ones(K),
        "targets": [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)],
    }


def second(*size: int, **options: Any) -> list[Tensor]:
    return [torch.ones(2, C, 3, 2), torch.ones(*size, **options)]


V, T = ValueError, TypeError
CONV: list[tuple[Changes, type[Exception], str]] = [
    ({"features": []}, V, r"features: expected at least one level, got an empty sequence"),
    ({"features": "x"}, T, r"features: expected a tensor or a sequence of tensors, one per level; got str"),
    ({"features": [torch.ones(2, C, 3, 2), 1.0]}, T, r"features\[1\]: expected a tensor, got float"),
    ({"features": second(2, C, 1)}, V, r"features\[1\]: expected \(N, C, H, W\), got shape \(2, 4, 1\)"),
    (
        {"features": second(2, C, 1, 1, dtype=torch.float64)},
        T,
        r"features\[1\]: expected the dtype of level 0, torch.float32, got torch.float64",
    ),
    (
        {"features": second(2, C, 1, 1, dtype=torch.int64)},
        T,
        r"features\[1\]: expected float32, float16, bfloat16 or float64, got torch.int64",
    ),
    (
        {"features": second(3, C, 1, 1)},
        V,
        r"features\[1\]: expected batch size 2 as level 0 has, got shape \(3, 4, 1, 1\)",
    ),
    (
        {"features": second(2, 5, 1, 1)},
        V,
        r"features\[1\]: expected 4 channels, as the weight has, got shape \(2, 5, 1, 1\)",
    ),
    (
        {"features": second(2, C, 1, 1, device="meta")},
        V,
        r"features\[1\]: expected the device of level 0, cpu, got meta",
    ),
    (
        {"features": [torch.ones(2, C, 3, 2).to_sparse(), torch.ones(2, C, 1, 1)]},
        T,
        r"features\[0\]: expected an ordinary \(strided\) tensor",
    ),
    ({"weight": torch.ones(A * K, C)}, V, r"weight: expected \(A\*K, C / groups, kH, kW\), got shape \(6, 4\)"),
    (
        {"weight": torch.ones(A * K, C, 3, 3)},
        V,
        r"features\[0\]: smaller than the kernel \(3, 3\), got shape \(2, 4, 3, 2\)",
    ),
    (
        {"features": [torch.ones(2, C, 0, 2), torch.ones(2, C, 1, 1)], "padding": 1},
        V,
        r"features\[0\]: without cells, which padding would make some of; got shape \(2, 4, 0, 2\)",
    ),
    (
        {"weight": torch.ones(0, C, 1, 1), "bias": None},
        V,
        r"weight: expected at least one output, got shape \(0, 4, 1, 1\)",
    ),
    (
        {"weight": torch.ones(7, C, 1, 1), "bias": None},
        V,
        r"weight: expected a multiple of num_classes \(3\) outputs, got shape \(7, 4, 1, 1\)",
    ),
    (
        {"weight": torch.ones(A * K, C, 1, 1, dtype=torch.int32)},
        T,
        r"weight: expected float32, float16, bfloat16 or float64, got torch.int32",
    ),
    (
        {"weight": torch.ones(A * K, C, 1, 1, dtype=torch.float64), "bias": None},
        T,
        r"features\[0\]: expected torch.float64, the weight's dtype, got torch.float32",
    ),
    ({"weight": torch.ones(A * K, C, 1, 1, device="meta")}, V, r"weight: expected the features' device, cpu, got meta"),
    (
        {"weight": [torch.ones(A * K, C, 1, 1)] * 3},
        V,
        r"weight: expected one for all levels, or 2, one per level; got 3",
    ),
    ({"weight": []}, V, r"weight: expected one for all levels, or 2, one per level; got 0"),
    (
        {"weight": [torch.ones(A * K, C, 1, 1), torch.ones(9, C, 1, 1)]},
        V,
        r"weight\[1\]: expected 6 outputs as level 0 has, got shape \(9, 4, 1, 1\)",
    ),
    (
        {"weight": [torch.ones(A * K, C, 1, 1), torch.ones(A * K, 5, 1, 1)]},
        V,
        r"features\[1\]: expected 5 channels, as the weight has, got shape \(2, 4, 1, 1\)",
    ),
    ({"weight": None}, T, r"weight: expected a tensor or a sequence of tensors"),
    ({"bias": torch.ones(5)}, V, r"bias: expected shape \(6,\), got \(5,\)"),
    ({"bias": torch.ones(A * K, 1)}, V, r"bias: expected shape \(6,\), got \(6, 1\)"),
    (
        {"bias": torch.ones(A * K, dtype=torch.float64)},
        T,
        r"bias: expected torch.float32, the weight's dtype, got torch.float64",
    ),
    ({"bias": [torch.ones(A * K), torch.ones(5)]}, V, r"bias\[1\]: expected shape \(6,\), got \(5,\)"),
    ({"bias": [torch.ones(A * K)] * 3}, V, r"bias: expected one for all levels, or 2, one per level; got 3"),
    ({"bias": 0.0}, T, r"bias: expected a tensor or a sequence of tensors"),
    ({"num_classes": 4}, V, r"weight: expected a multiple of num_classes \(4\) outputs, got shape \(6, 4, 1, 1\)"),
    ({"num_classes": 0}, V, r"num_classes: "),
    ({"num_classes": None}, V, r"num_classes: needed with a convolution, got None"),
    ({"stride": 0}, V, r"stride: expected numbers >= 1, got 0"),
    ({"stride": 1.0}, T, r"stride: expected an integer or two, got 1.0"),
    ({"padding": -1}, V, r"padding: expected numbers >= 0, got -1"),
    ({"padding": "reflect"}, T, r"padding: expected an integer or two, got 'reflect'"),
    ({"padding": (1, 2, 3)}, T, r"padding: expected an integer or two, got \(1, 2, 3\)"),
    (
        {"padding": "same", "weight": torch.ones(A * K, C, 2, 1)},
        V,
        r'padding: "same" needs stride 1 and the same on both sides, got kernel \(2, 1\)',
    ),
    ({"padding": "same", "stride": 2}, V, r'padding: "same" needs stride 1'),
    (
        {"padding": "same", "weight": [torch.ones(A * K, C, 3, 3), torch.ones(A * K, C, 1, 1)]},
        V,
        r'weight\[1\]: expected a kernel of \(3, 3\) as level 0 has, with padding "same"; got shape \(6, 4, 1, 1\)',
    ),
    ({"dilation": (1, 0)}, V, r"dilation: expected numbers >= 1, got \(1, 0\)"),
    ({"dilation": True}, T, r"dilation: expected an integer or two, got True"),
    ({"groups": 0}, V, r"groups: expected a number >= 1, got 0"),
    ({"groups": "2"}, T, r"groups: expected an integer, got '2'"),
    ({"groups": 4, "weight": torch.ones(A * K, 1, 1, 1)}, V, r"groups: expected a divisor of 6 channels, got 4"),
    ({"groups": 2}, V, r"features\[0\]: expected 8 channels, as the weight has, got shape \(2, 4, 3, 2\)"),
    ({"chunk_bytes": 0}, V, r'chunk_bytes: expected "auto" or a number of bytes >= 1, got 0'),
    ({"chunk_bytes": "64MB"}, T, r"""chunk_bytes: expected "auto" or a number of bytes, got '64MB'"""),
    ({"chunk_bytes": 1e6}, T, r'chunk_bytes: expected "auto" or a number of bytes, got 1000000.0'),
    ({"chunk_bytes": True}, T, r'chunk_bytes: expected "auto" or a number of bytes, got True'),
    ({"reduction": "none"}, V, r'reduction: "none" gives a loss for each logit'),
    ({"reduction": "avg"}, V, r"reduction: expected one of"),
    ({"grad_mode": "fast"}, V, r"grad_mode: expected one of"),
    ({"gamma": -1.0}, V, r"gamma: expected a finite number >= 0, got -1"),
    ({"alpha": [0.5, 0.5]}, V, r"alpha: "),
    ({"gama": 1.0}, T, r"focal_loss\(\) got an unexpected keyword argument 'gama'"),
    ({"level_weights": [1.0]}, V, r"level_weights: expected 2 numbers, one per level, got 1"),
    ({"normalizer": "all"}, V, r"normalizer: expected one of"),
    ({"normalizer": torch.ones(3)}, V, r"normalizer: expected a 0-d tensor or one of shape \(2,\), got shape \(3,\)"),
    ({"class_mask": torch.ones(2, 4, dtype=torch.bool)}, V, r"class_mask: expected shape \(2, 3\)"),
    ({"class_weight": [1.0, 2.0]}, V, r"class_weight: "),
    (
        {"anchor_weight": [torch.ones(2, 12), torch.ones(2, 3)]},
        V,
        r"anchor_weight\[1\]: expected shape \(2, 2\) or \(2, 1, 1, 2\)",
    ),
    (
        {"anchor_weight": [torch.ones(2, 12), torch.ones(2, 2, dtype=torch.int64)]},
        T,
        r"anchor_weight\[1\]: expected floating weights, got torch.int64",
    ),
    ({"anchor_weight": [torch.ones(2, 12)]}, V, r"anchor_weight: expected 2 levels, or one tensor for all, got 1"),
    (
        {"targets": [torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)]},
        V,
        r"targets\[1\]: expected shape \(2, 2\) or \(2, 1, 1, 2\)",
    ),
    (
        {"targets": [torch.zeros(24, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]},
        V,
        r"targets\[0\]: expected shape .*got \(24,\)",
    ),
    (
        {"targets": torch.zeros(2, 13, dtype=torch.int64)},
        V,
        r"targets: expected one tensor of shape \(2, 14\) for all 2 levels",
    ),
    ({"targets": [torch.zeros(2, 12, dtype=torch.int64)]}, V, r"targets: expected 2 levels"),
    ({"targets": [torch.zeros(2, 12, dtype=torch.int64), torch.full((2, 2), 7)]}, V, r"targets\[1\].*7"),
    (
        {"targets": [torch.rand(2, 6, 3, 2), torch.rand(2, 6, 1, 2)], "normalizer": 1.0},
        V,
        r"targets\[1\]: expected soft targets of the logits' shape \(2, 6, 1, 1\), got \(2, 6, 1, 2\)",
    ),
    (
        {"targets": [torch.rand(2, 6, 3, 2), torch.rand(2, 6, 1, 1)]},
        V,
        r"normalizer: 'positives' counts labels, but the targets are soft",
    ),
]
LINEAR: list[tuple[Changes, type[Exception], str]] = [
    (
        {"features": [torch.ones(2, 5, C), torch.ones(2, C)]},
        V,
        r"features\[1\]: expected \(N, M, C\) or \(M, C\), got shape \(2, 4\)",
    ),
    ({"features": torch.ones(C)}, V, r"features\[0\]: expected \(N, M, C\) or \(M, C\), got shape \(4,\)"),
    ({"features": torch.ones(0, 2, 5, C)}, V, r"features: expected at least one level, got shape \(0, 2, 5, 4\)"),
    (
        {"features": [torch.ones(2, 5, C), torch.ones(2, 2, 5)]},
        V,
        r"features\[1\]: expected 4 channels, as the weight has, got shape \(2, 2, 5\)",
    ),
    ({"weight": torch.ones(0, C), "bias": None}, V, r"weight: expected at least one output, got shape \(0, 4\)"),
    ({"weight": torch.ones(K, C, 1, 1)}, V, r"weight: expected \(K, C\), got shape \(3, 4, 1, 1\)"),
    ({"num_classes": 2}, V, r"weight: expected 2 outputs, num_classes, got shape \(3, 4\)"),
    ({"bias": torch.ones(2)}, V, r"bias: expected shape \(3,\), got \(2,\)"),
    (
        {"targets": [torch.zeros(2, 5, 1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)]},
        V,
        r"targets\[0\]: expected shape \(2, 5\)",
    ),
    ({"chunk_bytes": -5}, V, r"chunk_bytes: .*got -5"),
]


def raises_before_anything(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with Calls() as calls, pytest.raises(error, match=f"^{words}"):
        call()
    computed = {"convolution", "pyramid_loss", "pyramid_loss_", "convolution_backward", "linear", "addmm", "mm"}
    assert not computed & set(calls.names)


@pytest.mark.parametrize("changes, error, words", CONV, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_errors_of_a_convolution(changes: Changes, error: type[Exception], words: str) -> None:
    conv_focal_loss(**conv_call())
    raises_before_anything(lambda: conv_focal_loss(**{**conv_call(), **changes}), error, words)


@pytest.mark.parametrize("changes, error, words", LINEAR, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_errors_of_a_linear_layer(changes: Changes, error: type[Exception], words: str) -> None:
    linear_focal_loss(**linear_call())
    raises_before_anything(lambda: linear_focal_loss(**{**linear_call(), **changes}), error, words)


@pytest.mark.parametrize(
    "name", ["conv_focal_loss", "conv_focal_loss_star", "linear_focal_loss", "linear_focal_loss_star"]
)
def test_a_weight_of_anchors_has_its_own_name(name: str) -> None:
    call = conv_call() if name.startswith("conv") else linear_call()
    features, weight, bias, targets = (call.pop(key) for key in ("features", "weight", "bias", "targets"))
    with pytest.raises(TypeError, match="weight"):
        getattr(fastfocal, name)(features, weight, bias, targets, weight=torch.ones(2, 14), **call)
    if name.startswith("conv"):
        with pytest.raises(TypeError, match="num_classes"):
            getattr(fastfocal, name)(features, weight, bias, targets)


# --- modules ----------------------------------------------------------------------------------------------------------


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, A * K, 1, **options)


def changed(change: Callable[[nn.Module], object], module: nn.Module | None = None) -> nn.Module:
    module = conv() if module is None else module
    change(module)
    return module


def own_forward_of_one(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # as accelerate's hooks and many monkey patches do


HEADS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a sequence": (
        lambda: nn.Sequential(conv()),
        T,
        r"head: expected an nn.Conv2d or an nn.Linear whose forward is PyTorch's, got Sequential",
    ),
    "no module": (
        lambda: torch.ones(3),
        T,
        r"head: expected an nn.Conv2d or an nn.Linear whose forward is PyTorch's, got Tensor",
    ),
    "another convolution": (lambda: nn.Conv1d(C, A * K, 1), T, r"head: .*got Conv1d"),
    "own forward": (lambda: OwnForward(C, A * K, 1), T, r"head: .*got OwnForward"),
    "own convolution": (lambda: OwnConvolution(C, A * K, 1), T, r"head: .*got OwnConvolution"),
    "own linear": (lambda: OwnLinear(C, K), T, r"head: .*got OwnLinear"),
    "own forward of one": (lambda: changed(own_forward_of_one), T, r"head: .*whose forward is PyTorch's"),
    "second of a list": (lambda: [conv(), OwnForward(C, A * K, 1)], T, r"head\[1\]: .*got OwnForward"),
    "an empty list": (
        lambda: nn.ModuleList(),
        V,
        r"head: expected a layer, or one for each level; got an empty sequence",
    ),
    "two kinds": (lambda: [conv(), conv(stride=2)], V, r"head\[1\]: expected a layer like that of level 0"),
    "one without bias": (lambda: [conv(), conv(bias=False)], V, r"head\[1\]: expected a layer like that of level 0"),
    "reflect": (
        lambda: conv(padding=1, padding_mode="reflect"),
        V,
        r'head: expected padding_mode "zeros", got \'reflect\'',
    ),
    "hook": (
        lambda: changed(lambda m: m.register_forward_hook(lambda *_: None)),
        V,
        r"head: has hooks, which would not run",
    ),
    "pre hook": (lambda: changed(lambda m: m.register_forward_pre_hook(lambda *_: None)), V, r"head: has hooks"),
    "backward hook": (lambda: changed(lambda m: m.register_full_backward_hook(lambda *_: None)), V, r"head: has hooks"),
    "backward pre hook": (
        lambda: changed(lambda m: m.register_full_backward_pre_hook(lambda *_: None)),
        V,
        r"head: has hooks",
    ),
    "second's hook": (
        lambda: [conv(), changed(lambda m: m.register_forward_hook(lambda *_: None))],
        V,
        r"head\[1\]: has hooks",
    ),
    "channels": (lambda: nn.Conv2d(5, A * K, 1), V, r"features\[0\]: expected 5 channels, as the weight has"),
    "outputs": (
        lambda: nn.Conv2d(C, 7, 1),
        V,
        r"head.weight: expected a multiple of num_classes \(3\) outputs, got shape \(7, 4, 1, 1\)",
    ),
    "dtype": (
        lambda: conv().double(),
        T,
        r"features\[0\]: expected torch.float64, the weight's dtype, got torch.float32",
    ),
    "three": (
        lambda: [conv(), conv(), conv()],
        V,
        r"head.weight: expected one for all levels, or 2, one per level; got 3",
    ),
    "same": (lambda: nn.Conv2d(C, A * K, 2, padding="same"), V, r'head.padding: "same" needs stride 1'),
}


@pytest.mark.parametrize("name", HEADS)
def test_errors_of_heads(name: str) -> None:
    make, error, words = HEADS[name]
    call = conv_call()
    head = make()
    criterion = FastFocalLoss(K)
    raises_before_anything(lambda: criterion.fused_with(head, call["features"], call["targets"]), error, words)


def test_errors_of_a_modules_call() -> None:
    call = conv_call()
    features, labels = call["features"], call["targets"]
    head = conv()
    for criterion in (FastFocalLoss(K), FastFocalLoss(K, alpha=[0.1, 0.2, 0.3]), FastFocalLoss(K, ema_momentum=0.9)):
        cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda c=criterion: c.fused_with(head, "x", labels), T, r"features: expected a tensor or a sequence"),
            (lambda c=criterion: c.fused_with(head, [features[0], 1], labels), T, r"features\[1\]: expected a tensor"),
            (lambda c=criterion: c.fused_with(head, [], labels), V, r"features: expected at least one level"),
            (lambda c=criterion: c.fused_with(head, features, labels, chunk_bytes=0), V, r"chunk_bytes: .*got 0"),
            (
                lambda c=criterion: c.fused_with(head, features, labels, [torch.ones(2, 12), torch.ones(2, 3)]),
                V,
                r"weight\[1\]: expected shape \(2, 2\)",
            ),
        ]
        for call_, error, words in cases:
            raises_before_anything(call_, error, words)
    running = FastFocalLoss(K, ema_momentum=0.9)
    padded, empty = nn.Conv2d(C, A * K, 1, padding=1), torch.ones(2, C, 0, 2)
    some = torch.zeros(2, 2 * 4 * A, dtype=torch.int64)
    raises_before_anything(lambda: running.fused_with(padded, empty, some), V, r"features\[0\]: without cells")
    assert running.ema_normalizer == 100  # a call that fails is no step
    none = FastFocalLoss(K, reduction="none")
    raises_before_anything(lambda: none.fused_with(head, features, labels), V, 'reduction: "none" gives')
    mask = torch.ones(2, K + 1, dtype=torch.bool)
    softmax = FastSoftmaxFocalLoss(K)
    raises_before_anything(
        lambda: softmax.fused_with(head, features, labels, class_mask=mask),
        V,
        rf"class_mask: expected shape \(2, {K}\), .* got \(2, {K + 1}\)",
    )


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_forward_pre_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_of_all_modules_do_not_run_unsaid(register: str) -> None:
    call = conv_call()
    criterion, head = FastFocalLoss(K), conv()
    seen: list[nn.Module] = []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="hooks registered for all modules do not run for the head") as caught:
            criterion.fused_with(head, call["features"], call["targets"])
    finally:
        handle.remove()
    assert head not in seen
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    try:  # a compiler cannot trace a warning
        torch.compile(lambda xs: criterion.fused_with(head, xs, call["targets"]), fullgraph=True, backend="eager")(
            call["features"]
        )
    finally:
        handle.remove()
    assert [Path(w.filename) for w in caught] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.fused_with(head, call["features"], call["targets"])


def test_layers_that_are_what_they_seem() -> None:
    """A parametrized weight, a subclass that only adds, eval, a frozen layer, a compiled one: computed as they are."""

    class Named(nn.Conv2d):
        pass

    call = conv_call()
    features, labels = [x + torch.rand_like(x) for x in call["features"]], call["targets"]
    criterion = FastFocalLoss(K)
    for head in (
        torch.nn.utils.parametrizations.weight_norm(conv()),
        Named(C, A * K, 1),
        conv().eval(),
        conv().requires_grad_(False),
    ):
        parameters = [p for p in head.parameters() if p.requires_grad]
        loss = criterion.fused_with(head, features, labels)
        want = criterion([head(x) for x in features], labels)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)  # float32: sums of a hundred terms
        assert loss.requires_grad == bool(parameters)
        if parameters:
            found, expected = (torch.autograd.grad(value, parameters) for value in (loss, want))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
