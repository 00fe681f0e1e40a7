"""What a loss leaves in autograd's graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def nodes(loss: Tensor) -> list[Any]:
    """Every node that the loss's backward visits, leaves' accumulation included."""
    seen: dict[int, Any] = {}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in seen:
            seen[id(node)] = node
            todo += [following for following, _ in node.next_functions]
    return list(seen.values())


def fused_nodes(loss: Tensor) -> list[Any]:
    """Those of fastfocal."""
    functions = [(node, getattr(type(node), "_forward_cls", None)) for node in nodes(loss)]
    return [
        node for node, function in functions if function is not None and function.__module__ == "fastfocal.autograd"
    ]
