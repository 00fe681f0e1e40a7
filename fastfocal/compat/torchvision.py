"""torchvision's RetinaNet and FCOS with their classification loss computed by fastfocal.

    from fastfocal.compat.torchvision import accelerate
    model = accelerate(torchvision.models.detection.retinanet_resnet50_fpn_v2(...))

In training the classification head hands over the raw convolution outputs of every level, and one call computes loss and
gradient; torchvision permutes and concatenates all levels, makes a dense target for every image, and loops over the images.
Loss dict, state_dict and evaluation stay as they are. `restore` undoes it. With `fuse_head=True` the last convolution and the
loss are one, and training makes no logits.

Equivalent to torchvision.models.detection.retinanet.RetinaNetClassificationHead (alpha 0.25, gamma 2, each image by its own
number of positives, anchors between the thresholds ignored) and .fcos.FCOSHead (all images by their number of positives). The
loss has the dtype that theirs has: float32 under autocast, else the logits'. Unlike there, a label outside 0..K-1 is a
ValueError that names image and object (theirs: an IndexError for K, if an anchor is matched; -1 silently means the last class,
or background in FCOS).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torchvision.models.detection import fcos, retinanet

import fastfocal
from fastfocal.compat import fused_head, patching
from fastfocal.compat.conventions import check_classes, labels_of_matches
from fastfocal.sigmoid import entropy_dtype

Model = TypeVar("Model", bound=nn.Module)
HeadOutputs = dict[str, Any]


def _raw_outputs(head: Any, features: list[Tensor]) -> list[Tensor]:
    """What the classification heads' last convolution gives, (N, A*K, H, W) a level, neither permuted nor concatenated."""
    return [head.cls_logits(head.conv(x)) for x in features]


class FastRetinaNetClassificationHead(retinanet.RetinaNetClassificationHead):  # type: ignore[misc]
    """RetinaNet's classification head; in training `forward` returns a list of raw outputs, one per level."""

    def forward(self, x: list[Tensor]) -> Any:
        return _raw_outputs(self, x) if self.training else super().forward(x)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: HeadOutputs, matched_idxs: list[Tensor]
    ) -> Tensor:
        classes = [t["labels"] for t in targets]
        check_classes("labels", classes, self.num_classes)
        logits = head_outputs["cls_logits"]
        if isinstance(logits, Tensor):  # made in evaluation mode, by a frozen head
            return super().compute_loss(targets, head_outputs, matched_idxs)
        labels = labels_of_matches(matched_idxs, classes, self.num_classes, ignored=self.BETWEEN_THRESHOLDS)
        loss = fused_head.focal_loss(logits, labels, num_classes=self.num_classes, normalizer="positives_per_image")
        return loss.to(entropy_dtype(logits[0], logits[0]))


class FastFCOSClassificationHead(fcos.FCOSClassificationHead):  # type: ignore[misc]
    """FCOS's classification head; in training `forward` returns a list of raw outputs, one per level."""

    def forward(self, x: list[Tensor]) -> Any:
        return _raw_outputs(self, x) if self.training else super().forward(x)


class FastFCOSHead(fcos.FCOSHead):  # type: ignore[misc]
    """FCOS's head: the classification loss by fastfocal, those of boxes and center-ness by torchvision."""

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: HeadOutputs,
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        num_classes = self.classification_head.num_classes
        classes = [t["labels"] for t in targets]
        check_classes("labels", classes, num_classes)
        logits = head_outputs["cls_logits"]
        if isinstance(logits, Tensor):
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        labels = labels_of_matches(matched_idxs, classes, num_classes)
        # torchvision computes all three losses in one method: it gets a single class that costs next to nothing.
        one_class = head_outputs["bbox_ctrness"].new_zeros(()).expand(*labels.shape, 1)
        of_class_0 = [{**t, "labels": t["labels"].new_zeros(t["labels"].shape)} for t in targets]
        losses = super().compute_loss(of_class_0, {**head_outputs, "cls_logits": one_class}, anchors, matched_idxs)
        loss = fused_head.focal_loss(logits, labels, num_classes=num_classes)
        return {**losses, "classification": loss.to(entropy_dtype(logits[0], logits[0]))}


_ACCELERATED: patching.Swaps = {
    retinanet.RetinaNetClassificationHead: FastRetinaNetClassificationHead,
    fcos.FCOSClassificationHead: FastFCOSClassificationHead,
    fcos.FCOSHead: FastFCOSHead,
}


def _last_layer(module: nn.Module) -> str | None:
    return None if isinstance(module, fcos.FCOSHead) else "cls_logits"


def accelerate(model: Model, *, fuse_head: bool = False) -> Model:
    """Makes fastfocal compute the classification loss of every RetinaNet and FCOS inside `model`.

    The heads change their class, and nothing else: parameters, hooks and state_dict stay. Models wrapped for distributed
    training or compiled are found too; call it before compiling all the same, so that the faster head is what is compiled.

    Args:
        model: contains a torchvision RetinaNet or FCOS, whose heads are torchvision's own.
        fuse_head: whether in training the classification head's last convolution is computed together with the loss, in
            tiles, so that no logits are made: for hundreds of classes and more. What reads them in training all the same (a
            hook on a head, say) gets them, and a warning. With `torch.compile` the two are left out of the graph. Calling it
            again with the other value switches.

    Returns:
        The same model.

    Raises:
        ValueError: no head of torchvision's RetinaNet or FCOS is in it, or one is that was subclassed; with `fuse_head`, a last
            convolution that is not PyTorch's own, as it is.
    """
    expected = "torchvision's RetinaNetClassificationHead or FCOSHead"
    last_layer = _last_layer if fuse_head else None
    return patching.accelerate(model, _ACCELERATED, "model", expected, last_layer=last_layer)


def restore(model: Model) -> Model:
    """Undoes `accelerate`. A model that was not accelerated stays as it is.

    Args:
        model: as `accelerate` takes.

    Returns:
        The same model.
    """
    return patching.restore(model, _ACCELERATED)


@contextmanager
def fused_function() -> Iterator[None]:
    """Swaps `sigmoid_focal_loss` alone in torchvision's RetinaNet and FCOS, for as long as the context lasts.

    For heads that `accelerate` does not take: the loss is computed in one pass over what torchvision permuted and
    concatenated. It holds for every model of the process.
    """
    stock = retinanet.sigmoid_focal_loss, fcos.sigmoid_focal_loss
    retinanet.sigmoid_focal_loss = fcos.sigmoid_focal_loss = fastfocal.sigmoid_focal_loss
    try:
        yield
    finally:
        retinanet.sigmoid_focal_loss, fcos.sigmoid_focal_loss = stock
