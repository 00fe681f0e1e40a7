"""The normalizer of a step that many processes make together, and its running mean over steps.

DistributedDataParallel and FSDP average the gradients of R ranks. With S_r the summed loss of rank r and C the count over all
of them, S_r / (C / R) on each rank averages to sum(S_r) / C: the step of one process that has the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from fastfocal import checks
from fastfocal.checks import Levels
from fastfocal.saved import has_hooks

if TYPE_CHECKING or distributed.is_available():
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = type(None)

# Keywords of every module, and what they are where they are not given.
MODULE_DEFAULTS: dict[str, Any] = {
    "sync_normalizer": False,
    "process_group": None,
    "ema_momentum": None,
    "ema_start": 100.0,
}
COUNTS = ("positives", "scores")  # one number for all images


# --- over ranks -------------------------------------------------------------------------------------------------------


class Ranks:
    """Those of a process group, None for the default one.

    Raises:
        RuntimeError: there is no such group in this process.
        TypeError: it is no process group.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "sync_normalizer: expected an initialised process group, got none in this process; call "
                "torch.distributed.init_process_group first, or leave sync_normalizer False"
            )
        check_group("process_group", group)
        self.group: Any = distributed.group.WORLD if group is None else group
        self.size: int = distributed.get_world_size(self.group)
        if self.size < 1:
            raise RuntimeError(
                "sync_normalizer: expected a process_group of this process, got one that it is no rank of"
            )

    def start_sum(self, share: Tensor) -> Callable[[], Tensor]:
        """Starts to add this rank's share to the others', in its memory; returns what waits for the sum.

        Waiting for nccl orders the device's streams, and the host goes on.
        """
        if self.size == 1:
            return lambda: share
        if is_compiling():  # as an operator of the graph, which the compiler may move
            from torch.distributed import _functional_collectives

            total = _functional_collectives.all_reduce(share, "sum", self.group)
            return lambda: total
        work = distributed.all_reduce(share, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return share

        return wait


def check_group(name: str, group: object) -> None:
    if group is None or (distributed.is_available() and isinstance(group, ProcessGroup)):
        return
    if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
        return  # what new_group gives to those outside, who may make the module but not call it
    hint = " (its get_group() is one)" if hasattr(group, "get_group") else ""
    raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}{hint}")


class SharedGroup:
    """A process group in a module: copies of the module share it, as it can neither be copied nor pickled."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError(
                "process_group: a process group cannot be pickled; set it to None before, and anew afterwards"
            )
        return SharedGroup, (None,)


# --- over calls -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Running:
    """A running mean on the device: ``value = momentum * value + (1 - momentum) * normalizer``, by which is then divided."""

    value: Tensor  # 0-d, float64
    momentum: float

    def next(self, normalizer: Tensor) -> Tensor:
        """The new value; another tensor than the one that is kept, which may be written to before backward."""
        with torch.no_grad():
            # Two products and their sum, as Python's floats have them: nothing that would fuse them.
            new = self.value.to(normalizer.device) * self.momentum + normalizer * (1 - self.momentum)
            if is_compiling() or is_lasting(new):
                # By a view of one element: torch 2.13 compiles a write to a 0-d float64 tensor to nothing.
                self.value.view(1).copy_(new.view(1))
        return new


def is_lasting(t: Tensor) -> bool:
    """Whether it is an ordinary tensor with numbers: not fake, traced, wrapped by torch.func, or without data."""
    return type(t) is Tensor and not t.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def computed_again() -> bool:
    """Whether this is the second computation of a checkpoint without reentrant autograd, which must find what the first had.

    One with reentrant autograd computes first without gradients, where nothing is updated, so its second counts.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1 and has_hooks()


# --- what goes together -----------------------------------------------------------------------------------------------


def check_normalizer(normalizer: object, reduction: str, synced: bool, running: bool) -> None:
    """Whether it is something to be summed over ranks, or averaged over calls."""
    if running:
        if reduction == "mean":
            raise ValueError('ema_momentum: reduction "mean" has no normalizer; expected another reduction, or None')
        if not (normalizer in COUNTS if isinstance(normalizer, str) else is_count(normalizer)):
            raise ValueError(
                "normalizer: ema_momentum expects one count for all images, a 0-d tensor or one of "
                f"{', '.join(map(repr, COUNTS))}; got {described(normalizer)}"
            )
    if synced and reduction != "mean" and not isinstance(normalizer, str) and not is_count(normalizer):
        raise ValueError(
            "normalizer: sync_normalizer expects what adds up over the ranks, the name of a count or a 0-d tensor with this "
            f"rank's count; got {described(normalizer)}"
        )


def is_count(normalizer: object) -> bool:
    return isinstance(normalizer, Tensor) and normalizer.dim() == 0


def described(normalizer: object) -> str:
    return f"a tensor of shape {tuple(normalizer.shape)}" if isinstance(normalizer, Tensor) else repr(normalizer)


def check_not_transformed(option: str) -> None:
    """Raises: RuntimeError where torch.func would call a collective or a write to a buffer once for each of its levels."""
    if not is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{option}: is not supported within torch.func; compute the normalizer outside of it and pass it to forward()"
        )


# --- in a module ------------------------------------------------------------------------------------------------------

EMA = "ema_normalizer"  # the buffer


class KeptNormalizer(nn.Module):
    """What a module keeps of the normalizer, beside `normalizer` itself.

    sync_normalizer: in training mode, what is counted (`normalizer`, or the logits of reduction "mean") is added over the
        ranks of a process group, and each of R ranks divides by an R-th of that, so that gradients averaged over ranks, as
        DistributedDataParallel and FSDP do, are those of one process with the whole batch. A 0-d tensor given as the normalizer
        is this rank's count: each rank divides by the mean. Other tensors and constants are refused. Every rank has to make the
        same calls, in the same order. Not within torch.func.
    process_group: these ranks; None: the default group.
    ema_momentum: detectron2's running normalizer: in training mode with gradients on, each call sets
        ``ema_normalizer = ema_momentum * ema_normalizer + (1 - ema_momentum) * normalizer`` and divides by that; any other call
        divides by what it is. A buffer, float64, on the logits' device, part of the state. It needs one count for all images.
        With `sync_normalizer` the ranks' mean goes in, so that it is the same on all of them. None: nothing is kept.
    ema_start: what it begins with: 100 as in detectron2's RetinaNet; its FCOS has 300.
    """

    sync_normalizer: bool
    ema_start: float
    _process_group: SharedGroup
    _ema_momentum: float | None

    def _keep_normalizer(self, options: dict[str, Any]) -> None:
        """Takes its own out of a constructor's keywords."""
        own = {name: options.pop(name) for name in MODULE_DEFAULTS}
        self.sync_normalizer = checks.flag("sync_normalizer", own["sync_normalizer"])
        self.process_group = own["process_group"]
        if self.process_group is not None and not self.sync_normalizer:
            raise ValueError("process_group: expected sync_normalizer=True beside it, got False")
        self.ema_start = checks.above_0("ema_start", own["ema_start"])
        self.ema_momentum = own["ema_momentum"]
        check_normalizer(
            options["normalizer"], options["reduction"], self.sync_normalizer, self.ema_momentum is not None
        )

    def _kept_normalizer(
        self, logits: Levels, normalizer: Any, reduction: str
    ) -> tuple[Any, Ranks | None, Running | None]:
        """For one call: the normalizer that it divides by, the ranks to add over, and the mean to go on with."""
        momentum = self._ema_momentum
        check_normalizer(
            normalizer, reduction, checks.flag("sync_normalizer", self.sync_normalizer), momentum is not None
        )
        running = None
        if momentum is not None:
            value = self._ema_normalizer_beside(logits)
            if not self.training or not torch.is_grad_enabled() or computed_again():
                return value.clone(), None, None  # a later call writes to it, maybe before this one's backward
            check_not_transformed("ema_momentum")
            running = Running(value, momentum)
        if not (self.sync_normalizer and self.training):
            return normalizer, None, running
        check_not_transformed("sync_normalizer")
        return normalizer, Ranks(self.process_group), running

    def _ema_normalizer_beside(self, logits: Levels) -> Tensor:
        """The buffer, on the logits' device from the first call on."""
        value = self._buffers[EMA]
        assert value is not None
        if not is_compiling():
            device = next((t.device for t in checks.as_levels("logits", logits)), value.device)
            if value.device != device:
                value = value.to(device)
                if is_lasting(value):
                    self._buffers[EMA] = value
        return value

    @property
    def process_group(self) -> ProcessGroup | None:
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        check_group("process_group", group)
        self.__dict__["_process_group"] = SharedGroup(group)

    @property
    def ema_momentum(self) -> float | None:
        return self._ema_momentum

    @ema_momentum.setter
    def ema_momentum(self, momentum: float | None) -> None:
        self.__dict__["_ema_momentum"] = None if momentum is None else checks.share("ema_momentum", momentum)
        if momentum is None:
            self._buffers.pop(EMA, None)
        elif self._buffers.get(EMA) is None:
            self.register_buffer(EMA, self._first_ema_normalizer(torch.device("cpu")))

    def _first_ema_normalizer(self, device: torch.device) -> Tensor:
        return torch.full((), checks.above_0("ema_start", self.ema_start), dtype=torch.float64, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What an earlier version did not know has its default."""
        super().__setstate__(state)
        self.__dict__.setdefault("sync_normalizer", False)
        self.__dict__.setdefault("ema_start", MODULE_DEFAULTS["ema_start"])
        self.__dict__.setdefault("_process_group", SharedGroup(None))
        self.__dict__.setdefault("_ema_momentum", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was = self._buffers.get(EMA)
        super()._apply(fn, recurse)
        moved = self._buffers.get(EMA)
        if was is not None and moved is not None:
            # From what it was: `fn` may cast, or hand back memory with nothing in it, as `to_empty` does.
            if not was.is_meta:
                self._buffers[EMA] = was.to(moved.device)
            elif not moved.is_meta:
                self._buffers[EMA] = self._first_ema_normalizer(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A state from before there was a running normalizer leaves it as it is."""
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != prefix + EMA]
        value = self._buffers.get(EMA)
        if value is not None and value.dtype != torch.float64:  # with assign=True
            self._buffers[EMA] = value.to(torch.float64)
