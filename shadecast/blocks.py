"""Intervals for sums over time, by resampling blocks of half a minute.

Requests that come together share queues and slow nodes: their latencies are not independent, those of different half
minutes nearly are. So whole blocks are drawn with replacement (Carlstein 1986), for both sides of a comparison the same
ones, and the interval is what the middle 95 % of the draws give.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK_S = 30.0
LEAST_BLOCKS = 20
"""Of fewer blocks no interval is told: it would be too narrow."""
LEAST_REQUESTS = 200
DRAWS = 1000


def too_little(blocks: int, requests: float) -> str:
    """Why nothing can be said yet; empty where it can."""
    if requests < LEAST_REQUESTS:
        return f"not enough data: {requests:.0f} requests, {LEAST_REQUESTS} are needed"
    if blocks < LEAST_BLOCKS:
        return (
            f"not enough data: requests in {blocks} half-minutes, {LEAST_BLOCKS} are needed "
            f"({LEAST_BLOCKS * BLOCK_S / 60:.0f} minutes)"
        )
    return ""


def draws(blocks: int, rng: np.random.Generator, count: int = DRAWS) -> Array:
    """[draw, block]: how often each block was drawn, with replacement."""
    return rng.multinomial(blocks, np.full(blocks, 1.0 / blocks), size=count)


def middle(values: Array) -> tuple[float, float] | None:
    """The bounds of the middle 95 % of what the draws gave; None where some draws gave nothing."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def ratio(above: Array, below: Array, drawn: Array) -> tuple[float, tuple[float, float] | None]:
    """sum(above) / sum(below) over blocks [block], and its interval; NaN and None where `below` has nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(np.float64(above.sum()) / np.float64(below.sum()))
        return value, middle((drawn @ above) / (drawn @ below))
