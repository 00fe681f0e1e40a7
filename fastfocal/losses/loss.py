"""What every loss has: its parameters as a frozen dataclass, and its module. A new one is a file beside focal.py and a row in
`__init__.py`.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from fastfocal import checks
from fastfocal import labels as label_conventions
from fastfocal.checks import ClassValues, Levels
from fastfocal.distributed import KeptNormalizer, is_lasting
from fastfocal.options import OPTIONS, Checked, Inputs, Normalizer, Options, defaults_of
from fastfocal.pyramid import pyramid_loss

if TYPE_CHECKING:
    from fastfocal.heads import Head

Weight = float | tuple[float, ...] | Tensor  # one for all classes, or one for each
Alpha = float | Sequence[float] | Tensor | None


class Loss(Checked):
    """The parameters of a loss, each an `option` with its check; and the loss itself in pure PyTorch."""

    kind: ClassVar[int]  # its number to the operators: kKind in its header in csrc/losses/
    name: ClassVar[str]  # of the function
    # Defaults of shared options, where they are others than everybody's.
    defaults: ClassVar[Mapping[str, Any]] = {}
    takes_scores: ClassVar[bool] = False  # a positive's target is its anchor's score
    targets: ClassVar[Literal["either", "labels", "soft"]] = "either"
    positive_target: ClassVar[float | None] = None  # what a soft target is where normalizers count a positive
    takes_anchors: ClassVar[bool] = False  # an anchor's classes together: one loss for each anchor
    options: ClassVar[type[Options]] = Options

    def weights(self, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
        """Of positives and of negatives; numbers for each class are checked here, and tensors come on the device."""
        return 1.0, 1.0

    def parameters(self) -> list[float]:
        """As the operators take them (csrc/losses/): at least one number, at most four."""
        raise NotImplementedError

    def term(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """The loss of logits, before weights; autograd's derivative of it is the gradient.

        Args:
            x: (N, M, K); an ignored anchor's are 0.
            y: of the same shape and dtype: a one-hot target, or a soft one.
            score: of a positive, broadcast to the same shape: its anchor's score with labels, or y itself.
        """
        raise NotImplementedError

    @classmethod
    def soft_weight(cls, y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The weight of a target: the mixture of both; with scores, where any y > 0 is a positive, one of the two."""
        if cls.takes_scores:
            return torch.where(y > 0, positive, negative)
        return y * positive + (1 - y) * negative


def alpha_weights(alpha: Any, num_classes: int, device: torch.device) -> tuple[Weight, Weight]:
    """alpha of positives, 1 - alpha of negatives; None: neither is weighted."""
    if type(alpha) is float:  # checked where the loss was made
        return alpha, 1.0 - alpha
    if alpha is None:
        return 1.0, 1.0
    alpha = checks.alpha("alpha", alpha, num_classes)
    values: Any = alpha.on(device) if isinstance(alpha, ClassValues) else alpha
    return values, tuple([1.0 - a for a in values]) if isinstance(values, tuple) else 1.0 - values


# --- modules ----------------------------------------------------------------------------------------------------------


class PerClass:
    """An attribute of a module that may hold a number for each class.

    These are then a buffer: it moves with the module, is no part of its state, and stays float64 whatever the module is cast
    to.
    """

    def __init__(self, check: Callable[[str, Any, int], float | ClassValues | None], buffer: str) -> None:
        self.check, self.buffer = check, buffer

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.number, self.given = name, f"_{name}", f"_given_{name}"

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        values = module._buffers[self.buffer]
        return module.__dict__[self.number] if values is None else values

    def __set__(self, module: Any, value: Any) -> None:
        checked = None if value is None else self.check(self.name, value, module.num_classes)
        values = checked.values if isinstance(checked, ClassValues) else None
        if isinstance(values, tuple):
            values = torch.tensor(values, dtype=torch.float64, device="cpu")
        module.register_buffer(self.buffer, values, persistent=False)
        module.__dict__[self.number] = None if isinstance(checked, ClassValues) else value
        module.__dict__[self.given] = values  # what the buffer was made of, while it has no data


class Module(KeptNormalizer):
    """A loss with its options kept. `parameters_of_loss` says which."""

    parameters_of_loss: ClassVar[type[Loss]]
    _per_class: ClassVar[dict[str, PerClass]]
    _own: ClassVar[tuple[str, ...]]  # names of the loss's parameters
    _shared: ClassVar[tuple[str, ...]]  # names of Options that are kept
    _kept: ClassVar[tuple[str, ...]]  # the names in __dict__ of both
    _read: ClassVar[Any]  # a dict's values of these, fast

    num_classes: int
    level_weights: list[float] | None
    normalizer: Normalizer
    class_weight = PerClass(checks.class_weight, "_class_weight_values")

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not hasattr(cls, "parameters_of_loss"):
            return
        cls._per_class = {
            name: attribute
            for base in reversed(cls.__mro__)
            for name, attribute in vars(base).items()
            if isinstance(attribute, PerClass)
        }
        cls._own = tuple(name for name, _, _ in cls.parameters_of_loss.checked_fields)
        cls._shared = tuple(name for name in OPTIONS if name != "labels")  # these are two indices by then
        cls._kept = tuple(
            cls._per_class[name].number if name in cls._per_class else name for name in (*cls._own, *cls._shared)
        )
        cls._read = staticmethod(operator.itemgetter(*cls._kept))

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        per_call = ("num_classes", "weight", "scores", "class_mask")
        known = {n: v for n, v in defaults_of(self.parameters_of_loss).items() if n not in per_call}
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        options = {**known, **options}
        checks.normalizer("normalizer", options["normalizer"], self.parameters_of_loss.takes_scores)
        self.num_classes = checks.num_classes("num_classes", num_classes)
        labels = options.pop("labels")
        options["background_index"], options["ignore_index"] = label_conventions.resolve(
            labels, options["background_index"], options["ignore_index"], self.num_classes
        )
        options["level_weights"] = checks.level_weights("level_weights", options["level_weights"])
        self._keep_normalizer(options)
        for name, value in options.items():
            setattr(self, name, value)
        self._checked: Sequence[object] = ()
        self._make_loss_and_options({})

    def forward(
        self,
        logits: Levels,
        targets: Levels,
        weight: Levels | None = None,
        normalizer: Normalizer = None,
        *,
        class_mask: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Args: as the function takes them; `normalizer` replaces the constructor's where it is not None."""
        return self._call(logits, targets, weight, normalizer, None, class_mask)

    def fused_with(
        self,
        head: nn.Module | Sequence[nn.Module],
        features: Levels,
        targets: Levels,
        weight: Levels | None = None,
        normalizer: Normalizer = None,
        *,
        class_mask: Tensor | None = None,
        chunk_bytes: int | str = "auto",
    ) -> Tensor:
        """The loss of `head(features)`, and every gradient, without the logits ever being there as a whole.

        For hundreds of classes and more, where the logits are what fills the memory. The same number, and the same gradients of
        the features and of the head's parameters, as `criterion([head(x) for x in features], targets)`.

        >>> loss = criterion.fused_with(self.cls_logits, [tower(x) for x in pyramid], labels)

        Args:
            head: the last layer, an `nn.Conv2d` with A*K output channels or an `nn.Linear` with K; or one for each level.
            features: what it is called on: ``(N, C, H, W)`` for a convolution, ``(N, M, C)`` or ``(M, C)`` for a linear layer;
                a tensor, or a sequence with one per level. Under autocast in its dtype, else in the head's.
            targets, weight, normalizer, class_mask: as `forward` takes them.
            chunk_bytes: how much of the logits may be there at a time; "auto": what was measured to be fast.

        Raises:
            ValueError, TypeError: bad arguments; a head that is neither of the two layers as it is, or has hooks, which would
                not run; reduction "none", which is as large as the logits.
        """
        return self._fused(head, features, targets, weight, normalizer, None, class_mask, chunk_bytes)

    def _fused(
        self,
        head: nn.Module | Sequence[nn.Module],
        features: Levels,
        targets: Levels,
        weight: Levels | None,
        normalizer: Normalizer,
        scores: Levels | None,
        class_mask: Tensor | None,
        chunk_bytes: int | str,
    ) -> Tensor:
        from fastfocal.heads import head_of  # which imports the losses

        made = head_of(head, chunk_bytes)
        checks.as_levels("features", features)  # what reads them first calls them logits
        result = self._call(features, targets, weight, normalizer, scores, class_mask, made)
        assert isinstance(result, Tensor)
        return result

    def _call(
        self,
        logits: Levels,
        targets: Levels,
        weight: Levels | None,
        normalizer: Any,
        scores: Levels | None,
        class_mask: Tensor | None,
        head: "Head | None" = None,  # logits: the features that it makes them of
    ) -> Tensor | list[Tensor]:
        if normalizer is None:
            normalizer = self.normalizer
        # What is constant costs a compiler nothing.
        compiling = is_compiling()
        passing = {} if compiling else self._move_to_device_of(logits)
        loss, options = self._make_loss_and_options(passing) if compiling or passing else self._loss_and_options()
        weights = passing.get("class_weight", self._buffers["_class_weight_values"])  # where nn.Module finds it third
        inputs = Inputs(
            logits=logits,
            targets=targets,
            weight=weight,
            normalizer=normalizer,
            scores=scores,
            class_weight=None if weights is None else ClassValues(weights),
            class_mask=class_mask,
        )
        if self.sync_normalizer or self._ema_momentum is not None:
            inputs.normalizer, ranks, running = self._kept_normalizer(logits, normalizer, options.reduction)
        else:
            ranks = running = None
        if head is not None:
            from fastfocal.heads import head_loss

            return head_loss(loss, options, inputs, head, ranks, running)
        return pyramid_loss(loss, options, inputs, ranks, running)

    def _move_to_device_of(self, logits: Levels) -> dict[str, Tensor]:
        """The buffers, once: a copy to a GPU waits for it. Returns what may not be kept (fake, traced), for this call alone."""
        passing = {}
        for name, attribute in self._per_class.items():
            values = self._buffers[attribute.buffer]
            if values is not None:
                device = next((t.device for t in checks.as_levels("logits", logits)), values.device)
                if values.device != device:
                    given = self.__dict__[attribute.given]
                    values = (given if values.is_meta and given is not None else values).to(device)
                    if is_lasting(values):
                        self._buffers[attribute.buffer] = values
                    else:
                        passing[name] = values
        return passing

    def _loss_and_options(self) -> tuple[Loss, Options]:
        """The attributes, which are checked when one has changed."""
        # The same objects, not equal ones: 0 equals False, and a tensor answers with a tensor. A list may change inside.
        try:
            now: Sequence[object] = self._read(self.__dict__)
        except KeyError:  # set to a parameter or a module
            now = [getattr(self, name, None) for name in self._kept]
        weights = self.level_weights
        now = [*now, *self._buffers.values(), *(() if weights is None else weights)]
        if len(now) != len(self._checked) or not all(map(operator.is_, now, self._checked)):
            self._of_checked = self._make_loss_and_options({})
            self._checked = now
        return self._of_checked

    def _make_loss_and_options(self, passing: Mapping[str, Tensor]) -> tuple[Loss, Options]:
        own = {}
        for name in self._own:
            value = getattr(self, name)
            if name in self._per_class:
                value = passing.get(name, value)
                if isinstance(value, Tensor):
                    value = ClassValues(value)
            own[name] = value
        loss = self.parameters_of_loss
        return loss(**own), loss.options(**{name: getattr(self, name) for name in self._shared})

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, np.generic):  # torch.compile takes numpy's numbers for tensors
            value = value.item()
        if name in self._per_class:  # nn.Module would make a parameter or a buffer of that name, where it is one
            self._per_class[name].__set__(self, value)
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was checked, whose classes are nobody's business."""
        state = {name: value for name, value in self.__dict__.items() if name != "_of_checked"}
        return {**state, "_checked": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What an earlier version did not know has its default.
        defaults = defaults_of(self.parameters_of_loss)
        for name in (*self._own, *self._shared):
            if name not in self._per_class:
                self.__dict__.setdefault(name, defaults[name])
        for attribute in self._per_class.values():
            self._buffers.setdefault(attribute.buffer, None)
            self._non_persistent_buffers_set.add(attribute.buffer)
            self.__dict__.setdefault(attribute.number, None)
            self.__dict__.setdefault(attribute.given, self._buffers[attribute.buffer])
        self.__dict__.pop("_of_checked", None)
        self._checked = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for attribute in self._per_class.values():
            was, moved = before[attribute.buffer], self._buffers[attribute.buffer]
            if was is not None and moved is not None:
                # From what it was: `fn` may cast, or hand back memory with nothing in it, as `to_empty` does.
                if not was.is_meta:
                    self.__dict__[attribute.given] = was
                given = self.__dict__[attribute.given]
                if given is not None:
                    self._buffers[attribute.buffer] = given.to(moved.device)
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


class ScoredModule(Module):
    """A module of a loss that takes scores."""

    def forward(
        self,
        logits: Levels,
        targets: Levels,
        weight: Levels | None = None,
        normalizer: Normalizer = None,
        *,
        scores: Levels | None = None,
        class_mask: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Args: as the function takes them; `normalizer` replaces the constructor's where it is not None."""
        return self._call(logits, targets, weight, normalizer, scores, class_mask)

    def fused_with(
        self,
        head: nn.Module | Sequence[nn.Module],
        features: Levels,
        targets: Levels,
        weight: Levels | None = None,
        normalizer: Normalizer = None,
        *,
        scores: Levels | None = None,
        class_mask: Tensor | None = None,
        chunk_bytes: int | str = "auto",
    ) -> Tensor:
        """As :meth:`Module.fused_with`, with scores as `forward` takes them."""
        return self._fused(head, features, targets, weight, normalizer, scores, class_mask, chunk_bytes)


# --- the registry -----------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A loss: the reference makes its own function and module of it."""

    parameters: type[Loss]
    function: Callable[..., Any]
    module: type[Module]


def members_of(names: Mapping[str, Any]) -> tuple[Member, ...]:
    """The losses whose module and function are among these names, in the order of their numbers."""
    modules = [value for value in names.values() if isinstance(value, type) and issubclass(value, Module)]
    members = [Member(module.parameters_of_loss, names[module.parameters_of_loss.name], module) for module in modules]
    return tuple(sorted(members, key=lambda member: member.parameters.kind))
