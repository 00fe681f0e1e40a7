"""Loads the compiled extension and gives its operators their shape functions, which ``torch.compile`` needs.

Everything else calls them through `operators`, so that a test can point it at another build of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

# Family, Reduction and Count in csrc/.
FOCAL_LOSS, FOCAL_LOSS_STAR = range(2)
SUM, LEVEL, IMAGE, NONE = range(4)
COUNT_NOTHING, COUNT_POSITIVES, COUNT_POSITIVES_PER_IMAGE, COUNT_LOGITS = range(4)


def images(logits: Tensor) -> int:
    """N; one for 2-D logits."""
    return 1 if logits.dim() == 2 else logits.shape[0]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_losses(logits: list[Tensor], reduction: int) -> list[Tensor]:
    """Memory for the result."""
    if reduction == NONE:
        return [torch.empty_like(t) for t in logits]
    shape = {LEVEL: (len(logits),), IMAGE: (images(logits[0]),)}.get(reduction, ())
    return [logits[0].new_empty(shape, dtype=accumulation_dtype(logits[0].dtype))]


def register_shapes(namespace: str) -> None:
    """Registers the shape ("fake") functions of the operators in a namespace."""

    def label_codes(
        labels: list[Tensor],
        logits: list[Tensor],
        num_classes: int,
        background: int,
        ignore: int,
        count: int,
        least: float,
    ) -> tuple[Tensor, Tensor]:
        anchors = sum(t.numel() // num_classes for t in logits)
        codes = logits[0].new_empty(anchors, dtype=torch.int16 if num_classes < 2**15 else torch.int32)
        shape = {COUNT_NOTHING: (0,), COUNT_POSITIVES_PER_IMAGE: (images(logits[0]),)}.get(count, ())
        return codes, logits[0].new_empty(shape, dtype=torch.float64)

    def gradients(logits: list[Tensor], needs_grad: list[int]) -> list[Tensor]:
        return [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(logits, needs_grad, strict=False)]

    # *options ends with num_classes, reduction, needs_grad.
    def focal_loss(logits: list[Tensor], *options: Any) -> tuple[list[Tensor], list[Tensor]]:
        return new_losses(logits, options[-2]), gradients(logits, options[-1]) if any(options[-1]) else []

    def focal_loss_(logits: list[Tensor], losses: list[Tensor], *options: Any) -> None:
        return None

    def focal_loss_backward(grad_outputs: list[Tensor], logits: list[Tensor], *options: Any) -> list[Tensor]:
        return gradients(logits, options[-1])

    def scale_gradients(grads: list[Tensor], grad_output: Tensor, reduction: int) -> list[Tensor]:
        return [torch.empty_like(t) for t in grads]

    def scale_gradients_(grads: list[Tensor], grad_output: Tensor, reduction: int) -> None:
        return None

    no_autograd = torch.library.Library(namespace, "IMPL", "Autograd")
    for fake in (label_codes, focal_loss, focal_loss_, focal_loss_backward, scale_gradients, scale_gradients_):
        torch.library.register_fake(f"{namespace}::{fake.__name__}", guards.on_one_device(fake))
        # autograd.py records what is to be differentiated: no operator is recorded by itself.
        no_autograd.impl(fake.__name__, torch.library.fallthrough_kernel)
    _libraries.append(no_autograd)


_libraries: list[torch.library.Library] = []  # registrations last as long as these
register_shapes("fastfocal")


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
