"""How much hangs on an object: for tests that nothing grows with what is gone."""

from __future__ import annotations

import gc
import types
from collections import deque
from typing import Any

_NOT_OURS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)


def deep_size(root: Any, *without: Any) -> int:
    """Objects that are reached from `root`, functions, classes, modules and what hangs on `without` left out.

    Text and numbers count, so a set of ids is as large as it is long.
    """
    gc.collect()
    seen = {id(each) for each in without}
    left, count = deque([root]), 0
    while left:
        each = left.popleft()
        if id(each) in seen or isinstance(each, _NOT_OURS):
            continue
        seen.add(id(each))
        count += 1
        left.extend(gc.get_referents(each))
    return count
