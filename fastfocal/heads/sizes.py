"""Which of a node's tensors are features, weights and biases, and what they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    levels: int
    weights: int
    dtype: torch.dtype  # that is computed in

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        end = self.levels + self.weights
        return list(values[: self.levels]), list(values[self.levels : end]), list(values[end:])

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features, weights, biases = self.split([t.to(self.dtype) for t in tensors])
        return features, weights, biases


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """What is computed in has been settled by then."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
