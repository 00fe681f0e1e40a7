"""mmcv-lite has no compiled operators; mmdet imports them everywhere, and calls none of them in these tests.

To be imported before mmdet; the test is skipped where there is no mmcv at all.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest


class Absent(types.ModuleType):
    """Has every name, so that mmdet can be imported, and raises when one is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"mmcv._ext.{name} is not there: this is mmcv-lite")

        return missing


pytest.importorskip("mmcv")
if importlib.util.find_spec("mmcv._ext") is None:
    sys.modules["mmcv._ext"] = Absent("mmcv._ext")
