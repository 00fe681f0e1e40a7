"""What is compared: one class for a call, and the table of rows, by name.

Every row takes raw logits of all levels and leaves gradients in their memory, except `copy`, `copy_into` and `mul_`, which
are the floor: a copy of the logits to fresh or to warm memory, and a pass over them in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastfocal
from benchmarks.cases import ALPHA, LOSS_SCALE, MEMBERS, Case, Inputs, flatten
from fastfocal import reference

# (case, levels, inputs) -> loss
LossFunction = Callable[[Case, list[Tensor], Inputs], Tensor]


# --- losses -------------------------------------------------------------------------------------------------------


def normalizer_of(inputs: Inputs) -> str | float:
    """Strings count positives, which dense targets have not."""
    return "positives" if inputs.soft is None else float(max(1, inputs.positives))


def scores_of(inputs: Inputs) -> dict[str, Tensor]:
    return {} if inputs.scores is None else {"scores": inputs.scores}


def fast(case: Case) -> LossFunction:
    criterion = MEMBERS[case.loss].module(
        case.pyramid.classes,
        **case.options,
        grad_mode=case.grad_mode,
        reduction="none" if case.form == "unreduced" else "sum",
    )

    def loss(_: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
        weight = inputs.weights if case.form == "weighted" else None
        found = criterion(levels, inputs.targets, weight, normalizer_of(inputs), **scores_of(inputs))
        return torch.stack([level.sum() for level in found]).sum() if case.form == "unreduced" else found

    return loss


def package_reference(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    given = {"num_classes": case.pyramid.classes, "normalizer": normalizer_of(inputs), **scores_of(inputs)}
    loss: Tensor = getattr(reference, case.loss)(levels, inputs.targets, **given, **case.options)
    return loss


def sigmoid_focal_loss(x: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """The formula as torchvision.ops.sigmoid_focal_loss and fvcore write it."""
    p = torch.sigmoid(x)
    ce = torch.nn.functional.binary_cross_entropy_with_logits(x, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * (ce * ((1 - p_t) ** gamma))


Formula = Callable[[Tensor, Tensor, float, float], Tensor]


def summed(x: Tensor, labels: Tensor, soft: Tensor | None, case: Case, formula: Formula) -> Tensor:
    """Sum of the losses of logits (N, M, K). 16-bit logits are computed in float32, as fvcore and autocast do."""
    x = x.float()
    if soft is not None:
        return formula(x, soft.float(), ALPHA, case.gamma).sum()
    # One-hot; background and ignored are no class. Twice as fast as F.one_hot, which goes over int64.
    classes = torch.arange(case.pyramid.classes, device=x.device)
    target = (labels.unsqueeze(-1) == classes).to(x.dtype)
    loss = formula(x, target, ALPHA, case.gamma)
    # Masked per anchor rather than per logit: the cheapest way to leave ignored anchors out.
    return torch.where(labels == -1, 0.0, loss.sum(dim=-1)).sum()


def divide(loss: Tensor, case: Case, inputs: Inputs) -> Tensor:
    if inputs.soft is not None:
        return loss / max(1, inputs.positives)
    labels = inputs.labels
    return loss / ((labels >= 0) & (labels < case.pyramid.classes)).sum().clamp(min=1)


def per_level(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    """What detectors do: permute, one-hot and loss of every level, then the sum over levels."""
    k = case.pyramid.classes
    sums = []
    for index, labels in enumerate(inputs.labels.split(case.pyramid.level_anchors, dim=1)):
        soft = None if inputs.soft is None else flatten(inputs.soft[index], k)
        sums.append(summed(flatten(levels[index], k), labels, soft, case, sigmoid_focal_loss))
    return divide(torch.stack(sums).sum(), case, inputs)


def _concatenated(case: Case, levels: list[Tensor], inputs: Inputs, formula: Formula) -> Tensor:
    k = case.pyramid.classes
    x = torch.cat([flatten(level, k) for level in levels], dim=1)
    soft = None if inputs.soft is None else torch.cat([flatten(level, k) for level in inputs.soft], dim=1)
    return divide(summed(x, inputs.labels, soft, case, formula), case, inputs)


def concatenated(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    """The other habit: permute and concatenate all levels, then one loss."""
    return _concatenated(case, levels, inputs, sigmoid_focal_loss)


def torchvision_op(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    """torchvision's own function over concatenated levels, as its RetinaNet calls it."""
    from torchvision.ops import sigmoid_focal_loss as op

    return _concatenated(case, levels, inputs, op)


def triton_one_pass(case: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
    from benchmarks.triton_kernel import focal_loss

    return focal_loss(levels, inputs.labels, case.pyramid.classes, ALPHA, case.gamma)


# --- calls --------------------------------------------------------------------------------------------------------


class Call:
    """A timed call: forward and backward of a loss, to gradients in the logits' own memory order.

    It starts by releasing what the last call left, as a training step does. On a GPU calls go round over several
    sets of inputs, so that none is found in the L2 cache.
    """

    def __init__(self, case: Case, sets: list[Inputs], loss: LossFunction) -> None:
        self.case, self.sets, self.loss_function = case, sets, loss
        self.leaves = [[x.detach().requires_grad_() for x in inputs.levels] for inputs in sets]
        self.turn = 0
        self.loss: Tensor | None = None
        scale = LOSS_SCALE.get(case.dtype)
        self.incoming = None if scale is None else torch.tensor(scale, device=sets[0].labels.device)

    def prepare(self, calls: int) -> None:
        """What has to be made anew for the next calls, and is not timed."""

    def arguments(self, turn: int) -> list[Tensor]:
        return self.leaves[turn]

    def __call__(self) -> None:
        turn = self.turn = (self.turn + 1) % len(self.sets)
        for x in self.leaves[turn]:
            x.grad = None
        loss = self.loss_function(self.case, self.arguments(turn), self.sets[turn])
        loss.backward(self.incoming)
        self.loss = loss.detach()

    def result(self) -> tuple[Tensor, list[Tensor]]:
        """Loss, and gradients times the loss scale, of the first set."""
        assert self.turn == 0 and self.loss is not None
        return self.loss, [x.grad for x in self.leaves[0]]

    def release(self) -> None:
        for x in (x for leaves in self.leaves for x in leaves):
            x.grad = None


class InPlaceCall(Call):
    """With grad_mode="inplace" each call uses its logits up: they are outputs of an operation, copied beforehand.

    The last call's gradients lie in memory of its logits, which whoever made those has to release: not timed either.
    """

    def prepare(self, calls: int) -> None:
        self.release()
        self.copies: list[list[Tensor]] = []
        for i in range(calls):
            leaves = self.leaves[(self.turn + calls - i) % len(self.sets)]
            self.copies.append([x.clone() for x in leaves])

    def arguments(self, turn: int) -> list[Tensor]:
        return self.copies.pop()


class Copy(Call):
    """The floor: every logit read once, and as many written once, to fresh memory."""

    def __init__(self, case: Case, sets: list[Inputs]) -> None:
        self.case, self.sets, self.turn = case, sets, 0
        self.copies: list[list[Tensor]] = [[] for _ in sets]

    def __call__(self) -> None:
        turn = self.turn = (self.turn + 1) % len(self.sets)
        self.copies[turn].clear()
        self.copies[turn] += [torch.empty_like(x).copy_(x) for x in self.sets[turn].levels]

    def release(self) -> None:
        for copies in self.copies:
            copies.clear()


class CopyInto(Copy):
    """The same into memory that is there: what the memory's bandwidth allows, without the system's work for new pages."""

    def __init__(self, case: Case, sets: list[Inputs]) -> None:
        super().__init__(case, sets)
        self.copies = [[torch.empty_like(x) for x in inputs.levels] for inputs in sets]

    def __call__(self) -> None:
        turn = self.turn = (self.turn + 1) % len(self.sets)
        for target, x in zip(self.copies[turn], self.sets[turn].levels, strict=True):
            target.copy_(x)

    def release(self) -> None:
        """The memory is kept."""


class Multiply(Copy):
    """The floor of grad_mode="inplace": `mul_` over every level."""

    def __call__(self) -> None:
        turn = self.turn = (self.turn + 1) % len(self.sets)
        for x in self.sets[turn].levels:
            x.mul_(1.0)


class Operators(Copy):
    """Only fastfocal's operator calls, replayed: what remains of a call without Python's checks and autograd."""

    def __init__(self, case: Case, sets: list[Inputs]) -> None:
        super().__init__(case, sets)
        call = Call(case, sets[:1], fast(case))
        operators = fastfocal.ops.operators
        self.recorded: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

        class Recorder:
            def __getattr__(_, name: str) -> Callable[..., Any]:  # noqa: N805
                def operator(*args: Any) -> Any:
                    self.recorded.append((getattr(operators, name), args))
                    return getattr(operators, name)(*args)

                return operator

        fastfocal.ops.operators = Recorder()
        try:
            call()
        finally:
            fastfocal.ops.operators = operators
        self.result_of_last: Any = None

    def __call__(self) -> None:
        self.result_of_last = None
        for operator, args in self.recorded:
            self.result_of_last = operator(*args)

    def release(self) -> None:
        self.result_of_last = None


class Replay:
    """Any of the above, captured in one CUDA graph for each set of inputs: no launch from Python."""

    def __init__(self, call: Call) -> None:
        self.call, self.sets, self.turn = call, call.sets, 0
        self.graphs = [torch.cuda.CUDAGraph() for _ in call.sets]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3 * len(call.sets)):
                call()
        torch.cuda.synchronize()
        call.release()
        for graph in self.graphs[1:] + self.graphs[:1]:  # a call goes on to the next set first
            with torch.cuda.graph(graph):
                call()

    def prepare(self, calls: int) -> None:
        self.call.prepare(calls)

    def __call__(self) -> None:
        self.turn = (self.turn + 1) % len(self.graphs)
        self.graphs[self.turn].replay()

    def result(self) -> tuple[Tensor, list[Tensor]]:
        assert self.turn == 0
        return self.call.result()

    def release(self) -> None:
        """The graphs' memory is theirs."""


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An implementation: `make` builds its call; `needs` is the modules it imports; `slow` ones get few rounds."""

    name: str
    make: Callable[[Case, list[Inputs]], Any]
    memory: float  # bytes a logit of float32 at the peak, beyond the logits; for the choice of what fits
    checked: bool = True
    slow: bool = False
    needs: tuple[str, ...] = ()
    only_cuda: bool = False
    only_labels: bool = False

    def missing(self) -> str | None:
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


def plain(loss: LossFunction) -> Callable[[Case, list[Inputs]], Call]:
    return lambda case, sets: Call(case, sets, loss)


def fast_call(case: Case, sets: list[Inputs]) -> Call:
    return (InPlaceCall if case.grad_mode == "inplace" else Call)(case, sets, fast(case))


def compiled(
    loss: LossFunction, mode: str | None = None, fullgraph: bool = True
) -> Callable[[Case, list[Inputs]], Call]:
    def make(case: Case, sets: list[Inputs]) -> Call:
        torch._dynamo.reset()
        function = torch.compile(
            lambda levels, inputs: loss(case, levels, inputs), fullgraph=fullgraph, dynamic=False, mode=mode
        )

        def run(_: Case, levels: list[Tensor], inputs: Inputs) -> Tensor:
            if mode is not None:  # its CUDA graphs may reuse what the last call returned
                torch.compiler.cudagraph_mark_step_begin()
            return function(levels, inputs)

        return Call(case, sets, run)

    return make


def _replayed(make: Callable[[Case, list[Inputs]], Any]) -> Callable[[Case, list[Inputs]], Replay]:
    return lambda case, sets: Replay(make(case, sets))


_ROWS = [
    Row("fastfocal", fast_call, memory=4),
    Row("copy", Copy, memory=4, checked=False),
    Row("copy_into", CopyInto, memory=4, checked=False),
    Row("mul_", Multiply, memory=0, checked=False),
    Row("operators", Operators, memory=4, checked=False),
    Row("reference", plain(package_reference), memory=110, slow=True),
    Row("eager_per_level", plain(per_level), memory=80, slow=True),
    Row("eager_concatenated", plain(concatenated), memory=80, slow=True),
    Row("compile_per_level", compiled(per_level), memory=16, slow=True),
    Row("compile_concatenated", compiled(concatenated), memory=16, slow=True),
    Row("torchvision", plain(torchvision_op), memory=80, slow=True, needs=("torchvision",)),
    Row("compile_per_level_max_autotune", compiled(per_level, "max-autotune"), memory=16, slow=True, only_cuda=True),
    Row("triton", plain(triton_one_pass), memory=4, needs=("triton",), only_cuda=True, only_labels=True),
    Row("fastfocal_graph", _replayed(fast_call), memory=4, only_cuda=True),
    Row("copy_graph", _replayed(Copy), memory=4, checked=False, only_cuda=True),
    Row(
        "triton_graph",
        _replayed(plain(triton_one_pass)),
        memory=4,
        needs=("triton",),
        only_cuda=True,
        only_labels=True,
    ),
]
ROWS = {row.name: row for row in _ROWS}


def rows_of(case: Case, every: bool, cuda: bool) -> Iterable[Row]:
    """The rows of a group: all of them for the main case, and for the others what ratios are read against."""
    main = case == Case("main", case.pyramid)
    # The eager loop knows no grad mode; and where it would tell nothing new it is left out by default.
    eager = case.section != "main" or (case.gamma, case.targets, case.threads) == (2, "labels", None)
    eager = eager and case.grad_mode == "save" and case.form == "reduced"
    for row in _ROWS:
        if row.only_cuda and (not cuda or case.grad_mode == "inplace"):
            continue
        if row.only_labels and (case.targets != "labels" or case.dtype in LOSS_SCALE):
            continue
        if row.name == "compile_per_level_max_autotune" and not (main or every):  # a minute of tuning each
            continue
        if row.name == "mul_" and case.grad_mode != "inplace":
            continue
        if row.name == "copy_into" and case.section in ("scaling", "levels"):
            continue
        if row.name == "operators" and case.section != "small":
            continue
        few = not row.slow or row.only_cuda or (row.name == "eager_per_level" and eager)
        few = few or (row.name == "compile_per_level" and eager and case.section == "main")
        if few or every or main:
            yield row
