"""Onsets: others' CPU rises above .4 of the machine and stays there. How they are counted and forecasts of them judged.

At an onset live telemetry says "well" until it is too late; the end of a disturbance shows in telemetry soon enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.grid import Array
from models.headroom import headroom_errors
from shadecast.types import QUANTILES

ONSET_LOAD = 0.4
QUIET_S = 5.0
PRECISION = 0.7
Flags = NDArray[np.bool_]


def onsets(load: Array) -> Flags:
    """Whether an onset begins at each sample of `load` [..., time]: above .4 from one that was not, for two or more."""
    above = load > ONSET_LOAD
    begins = np.zeros(load.shape, bool)
    begins[..., 1:-1] = (load[..., :-2] <= ONSET_LOAD) & above[..., 1:-1] & above[..., 2:]
    return begins


def cold(load: Array, period_s: float) -> Flags:
    """Whether `load` [..., time] is at most .4 and has been for 5 s; a missing sample is not quiet."""
    quiet = load <= ONSET_LOAD
    samples = max(1, round(QUIET_S / period_s))
    found = quiet.copy()
    for k in range(1, samples):
        found[..., k:] &= quiet[..., : quiet.shape[-1] - k]
        found[..., :k] = False
    return found


def onset_within(load: Array, samples: int) -> Array:
    """1 where an onset begins in the next `samples` of `load` [..., time], 0 where none does, NaN if unknown."""
    begins, time = onsets(load), load.shape[-1]
    came = np.full(load.shape, np.nan, np.float32)
    whole = time - samples - 1  # the last of the next samples needs one more: does it stay?
    if whole > 0:
        known = np.all([np.isfinite(load[..., k : k + whole]) for k in range(samples + 2)], axis=0)
        any_begins = np.any([begins[..., k : k + whole] for k in range(1, samples + 1)], axis=0)
        came[..., :whole] = np.where(known, any_begins, np.nan)
    return came


def chance_above(quantiles: Array, level: float = ONSET_LOAD) -> Array:
    """Probability that a value forecast by quantiles [..., quantile] is above `level`.

    Between two quantiles the distribution is linear; beyond the outer ones it falls off exponentially with the density
    that it has there, so that of two unlikely events one is still the likelier.
    """
    low, middle, high = np.moveaxis(np.asarray(quantiles, np.float64), -1, 0)
    below, above = (np.maximum(gap, 1e-9) for gap in (middle - low, high - middle))
    t_low, t_mid, t_high = QUANTILES
    lower = t_low + (t_mid - t_low) * np.clip((level - low) / below, 0.0, 1.0)
    upper = t_mid + (t_high - t_mid) * np.clip((level - middle) / above, 0.0, 1.0)
    inside = np.where(level < middle, lower, upper)
    far_below = np.maximum(low - level, 0.0) / below * (t_mid - t_low) / t_low
    far_above = np.maximum(level - high, 0.0) / above * (t_high - t_mid) / (1.0 - t_high)
    chance = np.where(level < low, 1.0 - t_low * np.exp(-far_below), 1.0 - inside)
    return np.asarray(np.where(level > high, (1.0 - t_high) * np.exp(-far_above), chance))


def recall_at_precision(score: Array, came: Array, precision: float = PRECISION) -> float:
    """The greatest share of events that a threshold on `score` [n] warns of with at least this precision.

    0 where no threshold is precise enough, NaN where nothing came. Equal scores are warned of together.
    """
    events = float(came.sum())
    if not events:
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(came[order])
    ends = np.append(np.diff(score[order]) != 0, True)
    precise = ends & (hits / np.arange(1, len(hits) + 1) >= precision)
    return float(hits[precise].max() / events) if precise.any() else 0.0


def headroom_error(quantiles: Array, truth: Array) -> float:
    """Mean absolute error of the expected log headroom of quantiles [n, quantile] against what came [n]."""
    known = np.isfinite(truth) & np.isfinite(quantiles).all(axis=-1)
    if not known.any():
        return float("nan")
    return float(np.abs(headroom_errors(quantiles[known], truth[known])).mean())
