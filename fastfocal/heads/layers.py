"""The two kinds of last layer: what it makes of features, and what its backward makes of the logits' gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[int, int]
Needs = tuple[bool, bool, bool]  # of features, weight, bias
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Linear:
    """(n, M, C) -> (n, M, K)."""

    groups = 1

    def outputs(self, features: Tensor, weight: Tensor) -> tuple[int, ...]:
        return (*features.shape[:-1], weight.shape[0])

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return nn.functional.linear(features, weight, bias)

    def backward(self, gradient: Tensor, features: Tensor, weight: Tensor, needs: Needs, groups: int) -> Gradients:
        rows = gradient.flatten(0, 1)
        of_features = torch.matmul(gradient, weight) if needs[0] else None
        of_weight = rows.t() @ features.flatten(0, 1) if needs[1] else None
        return of_features, of_weight, rows.sum(0) if needs[2] else None


@dataclass(frozen=True)
class Conv:
    """(n, C, H, W) -> (n, A*K, H', W')."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def outputs(self, features: Tensor, weight: Tensor) -> tuple[int, ...]:
        n, _, *size = features.shape
        sides = zip(size, weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return (n, weight.shape[0], *[(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in sides])

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return torch.conv2d(features, weight, bias, self.stride, self.padding, self.dilation, groups)

    def backward(self, gradient: Tensor, features: Tensor, weight: Tensor, needs: Needs, groups: int) -> Gradients:
        found = torch.ops.aten.convolution_backward(
            gradient,
            features,
            weight,
            [weight.shape[0]] if needs[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            groups,
            needs,
        )
        # Under some of PyTorch's modes it gives what was not asked for, too.
        of_features, of_weight, of_bias = [t if need else None for t, need in zip(found, needs, strict=True)]
        return of_features, of_weight, of_bias


Layer = Linear | Conv
