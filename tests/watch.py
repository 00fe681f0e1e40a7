"""Watching a call from outside: which operators it runs, how much memory it holds, on how many threads it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    operator: torch._ops.OpOverload
    args: tuple[Any, ...]  # copied before the call, so that an operator's writes do not show
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return self.operator.name()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()  # preserve_format: dense strides are kept
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(entry) for entry in value)
    return value


class Recorder(TorchDispatchMode):
    """Records every operator that runs under it; `calls` keeps those of one namespace, `names` all of them."""

    def __init__(self, namespace: str = "fastfocal") -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[Call] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = func.namespace == self.namespace
        before = (_copy(args), {name: _copy(value) for name, value in kwargs.items()}) if mine else None
        result = func(*args, **kwargs)
        self.names.append(func.name())
        if before is not None:
            self.calls.append(Call(func, *before, result))
        return result


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that have memory of their own size, also of those within nodes of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= t.numel() * t.itemsize:  # not expanded
                self.seen.add(tuple(t.shape))
        return result


def peak_bytes(backend: Backend, body: Callable[[], object]) -> int:
    """Most memory held at once beyond what was there, while `body` runs; what it returns is still held."""
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        body()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = body()
    del result
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(0, *(int(held) for held in np.cumsum([nbytes for _, nbytes in steps]))) if steps else 0


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
