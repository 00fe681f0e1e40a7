"""Which of a node's tensors are features, weights and biases, and what they are computed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Each(Generic[T]):
    """Something for every level's features, and for each weight and bias (one for all levels or one for each, or no biases)."""

    features: list[T]
    weights: list[T]
    biases: list[T]

    def __iter__(self) -> Iterator[T]:
        yield from (*self.features, *self.weights, *self.biases)


@dataclass(frozen=True)
class Sizes:
    levels: int
    weights: int
    dtype: torch.dtype  # that is computed in

    def split(self, values: Sequence[T]) -> Each[T]:
        end = self.levels + self.weights
        return Each(list(values[: self.levels]), list(values[self.levels : end]), list(values[end:]))

    def parts(self, tensors: Sequence[Tensor]) -> Each[Tensor]:
        return self.split([t.to(self.dtype) for t in tensors])

    def kept(self, tensors: Sequence[Tensor]) -> Each[torch.dtype]:
        """The dtypes in which gradients wait for the incoming one: float16's range is too short for a weight's sums."""
        dtypes = self.split([t.dtype for t in tensors])
        wide = {torch.float16: torch.float32}
        dtypes.weights, dtypes.biases = ([wide.get(d, d) for d in of] for of in (dtypes.weights, dtypes.biases))
        return dtypes


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """What is computed in has been settled by then."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
