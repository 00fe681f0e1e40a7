"""Loads the compiled extension, and names the numbers that its operators take for choices.

Everything else calls them through `operators`, so that a test can point it at another build of them. What PyTorch is told about
them in Python (shapes, derivatives, vmap) is in registration.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

try:
    from fastfocal import _C  # registers torch.ops.fastfocal
except ImportError as error:
    raise ImportError(
        "fastfocal's compiled extension could not be loaded; build it with `pip install .` in the environment that has the "
        f"torch it is to run with (torch {torch.__version__} here). The loader said: {error}"
    ) from error
from fastfocal import guards

# On the CPU the error that an operator words itself is torch's already.
operators: Any = torch.ops.fastfocal if torch.version.cuda is None else guards.Operators(torch.ops.fastfocal)

# A loss's number is in its file. These take an anchor's classes together: one loss for each anchor.
ANCHOR_LOSSES = frozenset(loss["number"] for loss in _C.losses() if loss["takes_anchors"])
# Reduction and Count in csrc/.
SUM, LEVEL, IMAGE, NONE = range(4)
COUNT_NOTHING, COUNT_POSITIVES, COUNT_POSITIVES_PER_IMAGE, COUNT_LOGITS, COUNT_SCORES, COUNT_ANCHORS_PER_IMAGE = range(
    6
)


@dataclass(eq=False)  # not frozen, which costs a microsecond; nothing changes it
class OperatorOptions:
    """What `pyramid_loss`, its in-place twin and its derivatives take beside logits and flags, in the schema's order.

    They are passed on by name; `arguments` and `named` are the only places that know of an order.
    """

    packed_labels: Tensor | None
    soft_targets: list[Tensor] | None
    scores: Tensor | None
    anchor_weight: Tensor | None
    class_weights: Tensor | None
    class_mask: Tensor | None
    divisor: Tensor | None
    level_scales: list[float]
    positive_weight: float
    negative_weight: float
    loss: int
    loss_parameters: list[float]
    num_classes: int
    first_class: int
    reduction: int

    def arguments(self, needs_grad: list[int]) -> tuple[Any, ...]:
        if is_compiling():  # torch 2.10 cannot trace the other
            return (*[getattr(self, name) for name in OPTION_NAMES], needs_grad)
        return (*self.__dict__.values(), needs_grad)

    @staticmethod
    def named(arguments: Sequence[Any]) -> tuple[OperatorOptions, list[int]]:
        """The options, and the flag per level, of an operator's arguments."""
        *values, needs_grad = arguments
        return OperatorOptions(*values), needs_grad

    @property
    def takes_anchors(self) -> bool:
        return self.loss in ANCHOR_LOSSES

    def tensors(self) -> list[Tensor | None]:
        """Those that a node saves for backward, which hands them back to `with_tensors`."""
        return [*(self.soft_targets or ()), *[getattr(self, name) for name in TENSOR_NAMES]]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> OperatorOptions:
        levels = len(tensors) - len(TENSOR_NAMES)
        found = dict(zip(TENSOR_NAMES, tensors[levels:], strict=True))
        return self.changed(soft_targets=list(tensors[:levels]) or None, **found)

    def without_tensors(self) -> OperatorOptions:
        return self.changed(**NO_TENSORS)

    def changed(self, **values: Any) -> OperatorOptions:
        """As `dataclasses.replace`, which takes five microseconds."""
        new = object.__new__(OperatorOptions)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(values)
        return new


TENSOR_NAMES = ("packed_labels", "scores", "anchor_weight", "class_weights", "class_mask", "divisor")
NO_TENSORS: dict[str, None] = dict.fromkeys(("soft_targets", *TENSOR_NAMES))
OPTION_NAMES = tuple([entry.name for entry in fields(OperatorOptions)])


# --- the calls --------------------------------------------------------------------------------------------------------


def pack_labels(
    labels: list[Tensor],
    logits: list[Tensor],
    scores: Tensor | None,
    num_classes: int,
    background: int,
    ignored: int,
    count: int,
    minimum: float,
    background_is_class: bool = False,
    one_channel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Labels in the order and the form that the kernels read, and what was counted on the way, as a divisor.

    background_is_class: the labels are 0..K-1, and background, if it is one of them, is only not counted as positive.
    one_channel: the logits are still to come; these have one channel where they will have an anchor's K.
    """
    more = (background_is_class, one_channel) if background_is_class or one_channel else ()
    return operators.pack_labels(labels, logits, scores, num_classes, background, ignored, count, minimum, *more)  # type: ignore[no-any-return]


def pyramid_loss(
    logits: list[Tensor], options: OperatorOptions, needs_grad: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and the gradient of each level whose flag is set; no gradients at all where none is."""
    return operators.pyramid_loss(logits, *options.arguments(needs_grad))  # type: ignore[no-any-return]


def pyramid_loss_(logits: list[Tensor], losses: list[Tensor], options: OperatorOptions, needs_grad: list[int]) -> None:
    """Writes the losses, and over the logits of each level whose flag is set their gradient."""
    operators.pyramid_loss_(logits, losses, *options.arguments(needs_grad))


def pyramid_loss_backward(
    grad_outputs: list[Tensor],
    logits: list[Tensor],
    options: OperatorOptions,
    needs_grad: list[int],
    namespace: Any = None,
) -> list[Tensor]:
    """The gradients, of the incoming ones and the logits."""
    of = operators if namespace is None else namespace
    return of.pyramid_loss_backward(grad_outputs, logits, *options.arguments(needs_grad))  # type: ignore[no-any-return]


def pyramid_loss_double_backward(
    grad_gradients: list[Tensor],
    grad_outputs: list[Tensor],
    logits: list[Tensor],
    options: OperatorOptions,
    needs_grad: list[int],
    namespace: Any = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of `pyramid_loss_backward`: of its incoming gradients, and of the logits.

    grad_gradients: as the gradients lie; an empty tensor for a level that has none.
    """
    of = operators if namespace is None else namespace
    arguments = options.arguments(needs_grad)
    return of.pyramid_loss_double_backward(grad_gradients, grad_outputs, logits, *arguments)  # type: ignore[no-any-return]


# --- facts ------------------------------------------------------------------------------------------------------------


def images(logits: Tensor) -> int:
    """N; one for 2-D logits."""
    return 1 if logits.dim() == 2 else logits.shape[0]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def anchor_shape(logits: Tensor, num_classes: int) -> tuple[int, ...]:
    """Of one number for each anchor: (N, H, W, A), without A where that is 1; (N, M); (M,)."""
    if logits.dim() != 4:
        return tuple(logits.shape[:-1])
    n, channels, h, w = logits.shape
    a = channels // num_classes
    return (n, h, w) if a == 1 else (n, h, w, a)


def new_losses(logits: list[Tensor], options: OperatorOptions) -> list[Tensor]:
    """Memory for the result."""
    reduction = options.reduction
    if reduction == NONE:
        if options.takes_anchors:
            return [t.new_empty(anchor_shape(t, options.num_classes)) for t in logits]
        return [torch.empty_like(t) for t in logits]
    shape = {LEVEL: (len(logits),), IMAGE: (images(logits[0]),)}.get(reduction, ())
    return [logits[0].new_empty(shape, dtype=accumulation_dtype(logits[0].dtype))]


def build_info() -> dict[str, Any]:
    """Facts of this build and of what it runs with.

    Returns:
        dict with ``version`` (of fastfocal), ``torch_built_for`` (whose headers it was compiled with) and ``torch`` (it runs
        with; any torch from 2.10 on will do), ``cuda`` (version of the toolkit, None for a build without CUDA),
        ``cuda_archs`` (list of compute capabilities compiled in, "+PTX" where later ones can be compiled from),
        ``cpu_capability`` (instruction set in use: "AVX512", "AVX2" or "default") and ``compiler``.
    """
    from fastfocal import __version__

    facts = _C.build_facts()
    return {
        "version": __version__,
        "torch_built_for": facts["torch_built_for"],
        "torch": torch.__version__,
        "cuda": facts["cuda"] or None,
        "cuda_archs": [arch for arch in facts["cuda_archs"].split(";") if arch],
        "cpu_capability": facts["cpu_capability"],
        "compiler": facts["compiler"],
    }
