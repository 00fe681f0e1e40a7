"""Focal loss as a module."""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from fastfocal import arguments
from fastfocal import labels as label_conventions
from fastfocal.functional import (
    Formula,
    GradMode,
    Labels,
    Levels,
    Normalizer,
    Reduced,
    Settings,
    make_settings,
    plain_formula,
    pyramid_loss,
    star_formula,
)


def is_lasting(t: Tensor) -> bool:
    """Whether it is an ordinary tensor with numbers: not fake, traced, wrapped by torch.func, or without data."""
    return type(t) is Tensor and not t.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(t)


class FastFocalLoss(nn.Module):
    """Sigmoid focal loss over every level of a feature pyramid; see :func:`fastfocal.focal_loss` for the arguments.

    >>> criterion = FastFocalLoss(num_classes=80)
    >>> loss = criterion(cls_logits, labels)  # list of (N, A*80, H, W); (N, sum of H*W*A) labels
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        alpha, gamma, labels, background_index, ignore_index, level_weights, label_smoothing, detach_modulating_factor,
            normalizer, reduction, grad_mode, loss_weight: as :func:`fastfocal.focal_loss` takes them.
        sync_normalizer: mean of the count over the ranks of the default process group; not there yet.
        ema_momentum: running mean of the normalizer; not there yet.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss`; what can be checked without tensors is checked here.
        NotImplementedError: sync_normalizer or ema_momentum is given.
    """

    class_alpha: Tensor | None
    _given_alpha: Tensor | None  # the values of class_alpha, where they were given

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        labels: Labels | None = None,
        background_index: int | None = None,
        ignore_index: int = -1,
        level_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        detach_modulating_factor: bool = False,
        normalizer: Normalizer = "positives",
        reduction: Reduced | Literal["none"] = "sum",
        grad_mode: GradMode = "auto",
        loss_weight: float = 1.0,
        sync_normalizer: bool = False,
        ema_momentum: float | None = None,
    ) -> None:
        super().__init__()
        # Their places in the signature are kept, so that nothing moves when they come; to ignore them would train wrongly.
        if sync_normalizer or ema_momentum is not None:
            name = "sync_normalizer" if sync_normalizer else "ema_momentum"
            raise NotImplementedError(f"{name}: is not there yet; compute the normalizer and pass it to forward()")
        arguments.check_normalizer(normalizer)
        self.num_classes = arguments.check_num_classes(num_classes)
        self.alpha = alpha
        self.gamma = gamma
        self.background_index, self.ignore_index = label_conventions.resolve(
            labels, background_index, ignore_index, self.num_classes
        )
        self.level_weights = arguments.check_level_weights(level_weights)
        self.label_smoothing = label_smoothing
        self.detach_modulating_factor = detach_modulating_factor
        self.normalizer = normalizer
        self.reduction = reduction
        self.grad_mode = grad_mode
        self.loss_weight = loss_weight
        self._checked: tuple[object, ...] = ()
        self._settings(self._alpha)

    def forward(
        self,
        logits: Levels,
        targets: Levels,
        weight: Levels | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor | list[Tensor]:
        """Args: as :func:`fastfocal.focal_loss`; `normalizer` replaces the constructor's where it is not None."""
        if normalizer is None:
            normalizer = self.normalizer
        class_alpha = self._buffers["class_alpha"]  # where nn.Module finds it third
        if class_alpha is not None and not is_compiling():
            device = next((t.device for t in arguments.as_levels("logits", logits)), class_alpha.device)
            if class_alpha.device != device:  # once: a copy to a GPU waits for it
                source = self._given_alpha if class_alpha.is_meta and self._given_alpha is not None else class_alpha
                class_alpha = source.to(device)
                if is_lasting(class_alpha):
                    self._buffers["class_alpha"] = class_alpha
        return pyramid_loss(self._settings(self._alpha), logits, targets, weight, normalizer, class_alpha)

    @property
    def alpha(self) -> float | Tensor | None:
        return self._alpha if self.class_alpha is None else self.class_alpha

    @alpha.setter
    def alpha(self, alpha: float | Sequence[float] | Tensor | None) -> None:
        number, per_class = arguments.split_alpha(alpha)
        arguments.check_alpha(number)
        values = None if per_class is None else arguments.check_class_alpha(per_class, self.num_classes)
        # Per class it moves with the module, is no part of its state, and stays float64 whatever the module is cast to.
        if isinstance(values, tuple):
            values = torch.tensor(values, dtype=torch.float64, device="cpu")
        self.register_buffer("class_alpha", values, persistent=False)
        self._alpha, self._given_alpha = number, values

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_given_alpha", self.class_alpha)  # pickled by an earlier version
        self._checked = ()  # nor are its Settings those of this one

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, np.generic):  # torch.compile takes numpy's numbers for tensors
            value = value.item()
        if name == "alpha":  # nn.Module would make a parameter or a buffer of that name, where it is one
            type(self).alpha.__set__(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    _make_formula: Callable[..., Formula] = staticmethod(plain_formula)

    def _formula_options(self) -> tuple[float, ...]:
        return self.gamma, self.label_smoothing, self.detach_modulating_factor

    def _settings(self, alpha: float | None) -> Settings:
        """The attributes, which are checked when one has changed."""
        weights = self.level_weights
        formula_options, options = (
            self._formula_options(),
            (
                self.num_classes,
                alpha,
                self.background_index,
                self.ignore_index,
                weights,
                self.reduction,
                self.grad_mode,
                self.loss_weight,
            ),
        )
        if is_compiling():  # what is constant costs nothing there
            return make_settings(self._make_formula(*formula_options), *options)
        # The same objects, not equal ones: 0 equals False, and a tensor answers with a tensor. A list may change inside.
        now = (*formula_options, *options, *(() if weights is None else weights))
        if len(now) != len(self._checked) or not all(map(operator.is_, now, self._checked)):
            self._of_checked = make_settings(self._make_formula(*formula_options), *options)
            self._checked = now
        return self._of_checked

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.class_alpha
        super()._apply(fn, recurse)
        moved = self.class_alpha
        if before is not None and moved is not None:
            # From what it was: `fn` may cast, or hand back memory with nothing in it, as `to_empty` does.
            if not before.is_meta:
                self._given_alpha = before
            if self._given_alpha is not None:
                self.class_alpha = self._given_alpha.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """num_classes, and every option that is not the default."""
        shown = [f"num_classes={self.num_classes}"]
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name in ("self", "num_classes") or not hasattr(self, name):
                continue
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value)
            if isinstance(value, Tensor):
                numbers = value.flatten()[:4].tolist() if is_lasting(value) else None
                values = "without data" if numbers is None else ", ".join(f"{v:g}" for v in numbers)
                shown.append(f"{name}=[{values}{', ...' if value.numel() > 4 else ''}]")
            elif value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class FastFocalLossStar(FastFocalLoss):
    """Focal loss star over every level of a feature pyramid; see :func:`fastfocal.focal_loss_star` for the arguments.

    >>> criterion = FastFocalLossStar(num_classes=20, background_index=0)  # as kuangliu/pytorch-retinanet trains
    >>> loss = criterion(cls_logits, labels)
    >>> loss.backward()

    Args:
        num_classes: K, the foreground classes.
        gamma, beta: slope and shift of the logit.
        alpha, labels, background_index, ignore_index, level_weights, normalizer, reduction, grad_mode, loss_weight: as
            :func:`fastfocal.focal_loss` takes them.

    Raises:
        ValueError, TypeError: as :func:`fastfocal.focal_loss_star`; what can be checked without tensors is checked here.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        beta: float = 1.0,
        labels: Labels | None = None,
        background_index: int | None = None,
        ignore_index: int = -1,
        level_weights: Sequence[float] | None = None,
        normalizer: Normalizer = "positives",
        reduction: Reduced | Literal["none"] = "sum",
        grad_mode: GradMode = "auto",
        loss_weight: float = 1.0,
    ) -> None:
        self.beta = beta  # before the base's constructor, which checks all of them
        super().__init__(
            num_classes,
            alpha=alpha,
            gamma=gamma,
            labels=labels,
            background_index=background_index,
            ignore_index=ignore_index,
            level_weights=level_weights,
            normalizer=normalizer,
            reduction=reduction,
            grad_mode=grad_mode,
            loss_weight=loss_weight,
        )

    _make_formula = staticmethod(star_formula)

    def _formula_options(self) -> tuple[float, ...]:
        return self.gamma, self.beta
