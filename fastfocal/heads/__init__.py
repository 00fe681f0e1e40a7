"""Logits that never exist: a detector's last layer and the loss of what it gives, as one node.

`functions.py` has what callers see, `head.py` the layer as it comes, `loss.py` the checks and the node, `compute.py` the loop,
`tiles.py` how the logits are cut.
"""

from fastfocal.heads.head import Head, head_of
from fastfocal.heads.loss import head_loss

__all__ = ["Head", "head_loss", "head_of"]
