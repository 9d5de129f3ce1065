"""Whether two answers to the same request are equal: exactly, or within a tolerance of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_NUMBERS = "biufc"


def answers_equal(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Compare two answers; numbers may differ by `tolerance`, relative or absolute, whichever allows more.

    Looks into mappings, lists, tuples and whatever turns into a numpy array (tensors too). NaN equals NaN.
    Raises whatever the answers' own `==` raises.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(
            answers_equal(value, second[key], tolerance) for key, value in first.items()
        )
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(answers_equal, first, second, [tolerance] * len(first)))
    if isinstance(first, (bool, str, bytes, type(None))):
        return bool(first == second)
    if isinstance(first, (int, float, complex)) or hasattr(first, "__array__"):
        return _arrays_equal(np.asarray(first), np.asarray(second), tolerance)
    return bool(first == second)


def _arrays_equal(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], tolerance: float) -> bool:
    if first.shape != second.shape:
        return False
    if first.dtype.kind in _NUMBERS and second.dtype.kind in _NUMBERS:
        if tolerance > 0.0:
            with np.errstate(invalid="ignore"):  # inf - inf is no number and no news
                return bool(np.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True))
        inexact = first.dtype.kind in "fc" or second.dtype.kind in "fc"
        return bool(np.array_equal(first, second, equal_nan=inexact))
    return bool(np.array_equal(first, second))
