"""torchvision's function, by the fused kernels."""

import torch
from torch import Tensor

from fastfocal import checks
from fastfocal.losses.focal import focal_loss


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, computed by the fused kernels.

    Args:
        inputs: logits of any shape, floating.
        targets: of the same shape, values in [0, 1], floating; not differentiated.
        alpha: weight of positives in [0, 1], or -1 for no weighting.
        gamma: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" (over the elements) or "sum".

    Returns:
        A tensor of the dtype that inputs and targets promote to, but float32 for 16 bits under autocast: of their shape for
        "none", 0-d for "mean" and "sum". A sum or mean is computed in float32 or float64 and rounded once, to that dtype: in
        float16, without autocast, one above 65504 is infinite, as torchvision's is.

    Raises:
        ValueError: alpha or reduction is not one of the above, with torchvision's words.
        TypeError: targets are not floating.
    """
    inputs, targets = checks.as_plain("inputs", inputs), checks.as_plain("targets", targets)
    alpha = checks.number("alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
    checks.floating("inputs", inputs)
    if not targets.is_floating_point():
        raise TypeError(f"targets: expected floating numbers in [0, 1], got {targets.dtype}")
    if targets.shape != inputs.shape:
        raise ValueError(f"Target size ({targets.size()}) must be the same as input size ({inputs.size()})")
    dtype = entropy_dtype(inputs, targets)
    # 16-bit logits are read as they are where float32 sums come of them; elementwise losses have the dtype of what is read.
    if reduction == "none" or dtype == torch.float64:
        inputs = inputs.to(dtype)
    logits, soft = inputs, targets
    if inputs.dim() != 4:  # 4-D is read in place, channels_last too
        logits, soft = inputs.reshape(-1, 1), targets.reshape(-1, 1)
    loss = focal_loss(  # type: ignore[call-overload]
        logits,
        soft,
        num_classes=1,
        alpha=alpha,
        gamma=gamma,
        normalizer=None,
        reduction=reduction,
    )
    assert isinstance(loss, Tensor)
    if reduction == "none":
        return loss.view(inputs.shape)
    if reduction == "mean" and inputs.numel() == 0:
        loss = loss * float("nan")
    return loss.to(dtype)


def entropy_dtype(inputs: Tensor, targets: Tensor) -> torch.dtype:
    """The dtype of a focal loss built on torch's binary_cross_entropy_with_logits.

    It is what inputs and targets promote to, but float32 for 16 bits under autocast, which computes that function in float32.
    """
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    device = inputs.device.type
    if dtype.itemsize == 2 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.float32
    return dtype
