"""fastfocal.compat.mmdet3d against the real mmdet3d's CenterHead.

Installed as it says, mmdet3d brings open3d and an older NumPy. Its head needs neither:
`pip install --no-deps mmdet3d==1.4.0 numba llvmlite`, beside what tests/hosts.txt has.
"""

from __future__ import annotations

import copy
from typing import Any

import mmcv_stub  # noqa: F401
import pytest
import torch
from graph import fused_nodes
from torch import Tensor, nn

pytest.importorskip("mmdet", exc_type=Exception)
pytest.importorskip("mmdet3d.models.dense_heads", exc_type=Exception)

from mmdet3d.models.dense_heads import CenterHead
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from fastfocal.compat import mmdet3d as compat

TASKS = [["car"], ["truck", "bus"], ["barrier", "cone", "bike"]]
GRID = 32


def make(**loss: Any) -> Any:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet3d"):  # mmdet's tests may have set another in this process
        return build(**loss)


def build(**loss: Any) -> Any:
    return CenterHead(
        in_channels=8,
        tasks=[{"num_class": len(names), "class_names": names} for names in TASKS],
        common_heads={"reg": (2, 2), "height": (1, 2), "dim": (3, 2), "rot": (2, 2), "vel": (2, 2)},
        bbox_coder={
            "type": "CenterPointBBoxCoder",
            "pc_range": [-16, -16],
            "out_size_factor": 1,
            "voxel_size": [1.0, 1.0],
        },
        share_conv_channel=8,
        loss_cls={"type": "mmdet.GaussianFocalLoss", "reduction": "mean", "loss_weight": 1.5, **loss},
        loss_bbox={"type": "mmdet.L1Loss", "reduction": "mean", "loss_weight": 0.25},
        separate_head={"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3},
        train_cfg=ConfigDict(
            grid_size=[GRID, GRID, 1],
            voxel_size=[1.0, 1.0, 8],
            point_cloud_range=[-16.0, -16, -5, 16, 16, 3],
            out_size_factor=1,
            dense_reg=1,
            gaussian_overlap=0.1,
            max_objs=20,
            min_radius=2,
            code_weights=[1.0] * 10,
        ),
    )


def objects() -> list[InstanceData]:
    """Two clouds of points; the second has no object of two tasks."""
    found = []
    for labels in ([0, 1, 4, 5], [2]):
        places = 10 * torch.rand(len(labels), 2, generator=torch.Generator().manual_seed(len(labels)))
        boxes = torch.cat([places, torch.tensor([[-1.0, 4, 2, 1.5, 0.3, 0.1, 0.2]]).expand(len(labels), 7)], dim=1)
        boxes = LiDARInstance3DBoxes(boxes, box_dim=9)
        found.append(InstanceData(bboxes_3d=boxes, labels_3d=torch.tensor(labels)))
    return found


def step(head: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Some logits are beyond what mmdet3d clips."""
    head = head.to(dtype)
    feature = 3 * torch.randn(2, 8, GRID, GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    feature = feature.to(dtype).requires_grad_()
    head.zero_grad()
    predictions = head([feature])
    for (task,) in predictions:
        task["heatmap"] = 20 * task["heatmap"]
    assert any(task["heatmap"].abs().max() > 12 for (task,) in predictions)
    losses = head.loss_by_feat(predictions, objects())
    sum(losses.values()).backward()
    return losses, [feature.grad, *(p.grad.clone() for p in head.parameters())]


@pytest.mark.parametrize("loss", [{}, {"alpha": 1.5, "gamma": 3.0}, {"pos_weight": 0.5, "neg_weight": 2.0}], ids=str)
def test_the_head(loss: dict[str, float]) -> None:
    """Its targets are float32, and so are its powers of them, whatever its logits are."""
    head = make(**loss)
    before = list(head.state_dict())
    stock, expected = step(copy.deepcopy(head))
    assert compat.accelerate(head) is head and type(head) is compat.FastCenterHead
    ours, gradients = step(head)
    assert list(ours) == list(stock) and list(head.state_dict()) == before
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    largest = max(float(g.abs().max()) for g in expected)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7 * largest)


def test_float32() -> None:
    """The dtypes are mmdet3d's."""
    stock, _ = step(make(), torch.float32)
    ours, _ = step(compat.accelerate(make()), torch.float32)
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=0)  # its float32 1 - p


def test_one_node_for_all_tasks() -> None:
    losses, _ = step(compat.accelerate(make()))
    of_heatmaps = [loss for name, loss in losses.items() if name.endswith("loss_heatmap")]
    assert len(of_heatmaps) == len(TASKS) and len({id(node) for loss in of_heatmaps for node in fused_nodes(loss)}) == 1


def test_restore() -> None:
    head = make()
    stock, _ = step(head)
    step(compat.accelerate(head))
    again, _ = step(compat.restore(head))
    assert type(head) is CenterHead
    assert all(torch.equal(again[name], value) for name, value in stock.items())


def test_errors() -> None:
    with pytest.raises(ValueError, match="model: expected one with mmdet3d's CenterHead, found none in a Linear"):
        compat.accelerate(nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"CenterHead\.loss_cls: expected mmdet's GaussianFocalLoss with reduction 'mean'"
    ):
        compat.accelerate(make(reduction="sum"))
