"""The options that every loss takes, each in one place: its type, its default, its check.

What callers may write is `CommonOptions` (for type checkers and editors). What comes of it are two dataclasses, passed on by
name: `Options`, all that is known before there are tensors, and `Inputs`, all that comes with a call.
"""

# No `from __future__ import annotations` here: `help()` and editors then show the types, not their names.
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, get_type_hints

from torch import Tensor
from typing_extensions import dataclass_transform

from fastfocal import checks
from fastfocal import labels as label_conventions
from fastfocal.checks import ClassValues, Levels
from fastfocal.distributed import MODULE_DEFAULTS, ProcessGroup

Labels = Literal["torchvision", "detectron2", "mmdet", "effdet", "kuangliu", "segmentation"]
Reduced = Literal["sum", "level", "image", "mean"]
Reduction = Reduced | Literal["none"]
Normalizer = Literal["positives", "positives_per_image", "scores"] | float | Tensor | None
GradMode = Literal["auto", "save", "recompute", "inplace"]
ClassWeight = Sequence[float] | Sequence[Sequence[float]] | Tensor | None

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


# --- what callers may write -------------------------------------------------------------------------------------------


class KeptOptions(TypedDict, total=False):
    """Those that a module keeps, beside `reduction`."""

    labels: Labels | None
    background_index: int | None
    ignore_index: int
    class_weight: ClassWeight
    level_weights: Sequence[float] | None
    normalizer: Normalizer
    grad_mode: GradMode
    loss_weight: float


class ModuleOptions(KeptOptions, total=False):
    """All keywords of a module that do not depend on the loss."""

    reduction: Reduction
    sync_normalizer: bool
    process_group: ProcessGroup | None
    ema_momentum: float | None
    ema_start: float


class CommonOptions(KeptOptions, total=False):
    """All keywords of a function that do not depend on the loss, beside `reduction`, which says what comes back."""

    num_classes: int | None
    weight: Levels | None
    class_mask: Tensor | None


class ScoredOptions(CommonOptions, total=False):
    """Those of a function whose loss takes scores."""

    scores: Levels | None


# --- what is passed on ------------------------------------------------------------------------------------------------


def option(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A field with a check, which gets name and value and returns what is kept."""
    return field(default=default, metadata={"check": check})


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def checked(cls: type[T]) -> type[T]:
    """A frozen dataclass of which every field is an `option`. Equal is what is the same: tensors may be among the values."""
    made = dataclass(frozen=True, eq=False)(cls)
    made.checked_fields = tuple((f.name, f.default, f.metadata["check"]) for f in dataclasses.fields(made))  # type: ignore[attr-defined, arg-type]
    return made


class Checked:
    """The base of these."""

    checked_fields: ClassVar[tuple[tuple[str, Any, Callable[[str, Any], Any]], ...]] = ()

    def __post_init__(self) -> None:
        for name, default, check in self.checked_fields:
            value = getattr(self, name)
            if value is not default:
                kept = check(name, value)
                if kept is not value:
                    object.__setattr__(self, name, kept)


@checked
class Options(Checked):
    """All that is known before there are tensors, checked: a module makes it once.

    Once `num_classes` is known, `background_index` is a label and `labels` are resolved.
    """

    background_is_class: ClassVar[bool] = False
    num_classes: int | None = option(None, checks.num_classes_or_none)
    labels: str | None = option(None, checks.anything)
    background_index: int | None = option(None, checks.index_or_none)
    ignore_index: int = option(label_conventions.DEFAULT_IGNORE_INDEX, checks.index)
    level_weights: Sequence[float] | None = option(None, checks.level_weights)
    reduction: str = option("sum", checks.one_of(checks.REDUCTIONS))
    grad_mode: str = option("auto", checks.one_of(checks.GRAD_MODES))
    loss_weight: float = option(1.0, checks.finite)

    def __post_init__(self) -> None:
        super().__post_init__()
        background, ignored = label_conventions.resolve(
            self.labels, self.background_index, self.ignore_index, self.num_classes
        )
        if self.num_classes is not None:
            if self.background_is_class:
                background = checks.background_class(background, ignored, self.num_classes)
            else:
                background = checks.label_indices(background, ignored, self.num_classes)
            object.__setattr__(self, "background_index", background)
            object.__setattr__(self, "ignore_index", ignored)
            object.__setattr__(self, "labels", None)

    def of(self, num_classes: int) -> "Options":
        """With the number of classes, where it was left to the shape of the logits."""
        if self.num_classes is not None:
            return self
        return type(self)(**{**{name: getattr(self, name) for name in OPTIONS}, "num_classes": num_classes})


class OptionsOfClasses(Options):
    """Of a loss whose background, if there is one, is a class like others."""

    background_is_class = True


OPTIONS: dict[str, Any] = {name: default for name, default, _ in Options.checked_fields}


@dataclass(eq=False)  # not frozen, which costs half a microsecond; nothing changes it
class Inputs:
    """What comes with a call, as callers give it; prepare.py checks it."""

    logits: Levels
    targets: Levels
    weight: Levels | None = None
    normalizer: str | float | Tensor | None = "positives"
    scores: Levels | None = None
    class_weight: ClassWeight | ClassValues = None
    class_mask: Tensor | None = None
    name_of_weight: str = "weight"  # in errors


INPUTS: dict[str, Any] = {
    entry.name: entry.default
    for entry in dataclasses.fields(Inputs)
    if entry.name not in ("logits", "targets", "name_of_weight")
}


# --- signatures for help(), inspect and editors -----------------------------------------------------------------------


def defaults_of(parameters: type[Checked]) -> dict[str, Any]:
    """What each keyword of a loss is where it is not given; the loss's own word goes first."""
    own = {name: default for name, default, _ in parameters.checked_fields}
    return {**OPTIONS, **INPUTS, **MODULE_DEFAULTS, **own, **getattr(parameters, "defaults", {})}


def with_signature(parameters: type[Checked], keywords: type) -> Callable[[F], F]:
    """Gives a function of `**options: Unpack[keywords]` the signature that names each of them, with its type and default.

    Args:
        parameters: the loss, whose defaults they have.
        keywords: the TypedDict.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()
        assert rest.kind is rest.VAR_KEYWORD, rest
        defaults = {**defaults_of(parameters), "anchor_weight": None}
        named = [
            inspect.Parameter(name, rest.KEYWORD_ONLY, default=defaults[name], annotation=kind)
            for name, kind in get_type_hints(keywords).items()
        ]
        first = [parameter for parameter in own if parameter.kind is not rest.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=[*first, *named, *own[len(first) :]])  # type: ignore[attr-defined]
        return function

    return decorate
