"""Loads the compiled extension, and names the numbers that its operators take for choices.

Everything else calls them through `operators`, so that a test can point it at another build of them. What PyTorch is told about
them in Python (shapes, derivatives, vmap) is in registration.py.
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

# LossKind, Reduction and Count in csrc/.
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
