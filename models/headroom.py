"""What a forecast of a load is worth to routing: the log of the headroom that is expected, and how far off that is."""

from __future__ import annotations

import numpy as np

from models.grid import Array
from shadecast.capacity import QUANTILE_WEIGHTS, log_headroom


def log_headroom_of(load: Array) -> Array:
    """`shadecast.capacity.log_headroom` of a whole array; NaN stays."""
    left: Array = np.log1p(-np.clip(np.asarray(load, np.float64), 0.0, 1.0 - 1e-12))
    return np.maximum(left, log_headroom(1.0))


def headroom_errors(quantiles: Array, truth: Array) -> Array:
    """How far the expected log headroom of quantiles [..., quantile] is from what came [...]; NaN stays.

    Compare forecasts by its square: the expectation makes that least. The absolute value is least for the median, and
    a forecast that never warns of what is possible, but not likely, looks better by it.
    """
    expected = log_headroom_of(quantiles) @ np.asarray(QUANTILE_WEIGHTS)
    return np.asarray(expected - log_headroom_of(truth))
