"""What Serve's own routing did, and what ours would have done: by the requests that an observing router saw.

As Serve chooses, the router notes the predicted relative time on the replica that Serve takes (s) and on the one that
we would have taken (s'). When the request has ended after d seconds, ours would have taken about

    d' = d * (s' / s) ** trust

What is particular to the request (its size, say) is in d, and cancels out. `trust`, from 0 to 1, says how far such
predictions have held: the slope of log d over log s among the requests of the same half minute. Predictions that say
nothing have trust 0, and then nothing is claimed; as predictions err, choosing the least of them would otherwise
promise more yet than it does. The estimate is of each request alone: that the others would have gone elsewhere, too, is not in it.

Requests that Serve sent to a replica that would have got none from us (on trial, drained, not let in) are told apart:
keeping them away was right where they failed or missed the objective.

Kept are counts by half minute, in bins of a quarter of an octave, so that any objective can be asked for later.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shadecast.blocks import BLOCK_S, draws, middle, too_little
from shadecast.ledger import LONGEST_PREDICTED
from shadecast.types import Outcome

Array = NDArray[Any]

MOST_BLOCKS = 2880
"""A day of half minutes; older ones are forgotten."""
_PER_OCTAVE = 4
_SHORTEST_S = 0.001
_MOST_BINS = 100
_WIDEST = 28
"""Bins that s' / s may lie from 1: LONGEST_PREDICTED either way."""
_LEAST_SPREAD = 1e-4
"""Of log s, squared, in a half minute on average; with less all replicas were alike, and there is nothing to trust."""


@dataclass(slots=True)
class _Block:
    """Requests that ended in one half minute."""

    at: int
    requests: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    refused_failed: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Weight, sums of x, y, x * x and x * y, with x = log s and y = log d."""
    cells: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """Requests that went well, by (bin of d, bin of s' / s, whether we would have refused the replica)."""


class Observations:
    """The half minutes of one deployment; the clock is the caller's."""

    def __init__(self) -> None:
        self._blocks: deque[_Block] = deque(maxlen=MOST_BLOCKS)

    def add(self, now_s: float, outcome: Outcome, weight: float) -> None:
        """A request has ended, and stands for `weight` of them. Without predictions it says nothing."""
        took_s, taken, ours = outcome.duration_s, outcome.predicted, outcome.predicted_ours
        if not (0.0 < taken < math.inf and 0.0 < ours < math.inf and 0.0 <= took_s < math.inf):
            return
        at = int(now_s // BLOCK_S)
        if not self._blocks or self._blocks[-1].at < at:
            self._blocks.append(_Block(at))
        block = self._blocks[-1]
        block.requests += weight
        block.refused += weight * outcome.refused
        if not outcome.ok:
            block.failed += weight
            block.refused_failed += weight * outcome.refused
            return
        taken, ours = min(taken, LONGEST_PREDICTED), min(ours, LONGEST_PREDICTED)
        x, y = math.log(taken), math.log(max(took_s, _SHORTEST_S))
        for k, value in enumerate((1.0, x, y, x * x, x * y)):
            block.moments[k] += weight * value
        ratio = round(_PER_OCTAVE * math.log2(ours / taken))
        block.cells[_bin(took_s), min(max(ratio, -_WIDEST), _WIDEST), int(outcome.refused)] += weight  # type: ignore[assignment]

    def plain(self, now_s: float) -> list[dict[str, Any]]:
        """As plain values, oldest first; `ago_s` is when each half minute began."""
        return [
            {
                "ago_s": now_s - block.at * BLOCK_S,
                "requests": block.requests,
                "failed": block.failed,
                "refused": block.refused,
                "refused_failed": block.refused_failed,
                "moments": list(block.moments),
                "cells": [[*cell, weight] for cell, weight in block.cells.items()],
            }
            for block in self._blocks
        ]


def _bin(took_s: float) -> int:
    return min(max(math.floor(_PER_OCTAVE * math.log2(max(took_s, _SHORTEST_S) / _SHORTEST_S)), 0), _MOST_BINS)


Bounds = tuple[float, float] | None
"""Of a 95 % interval; None where it cannot be told."""


@dataclass(frozen=True, slots=True)
class Side:
    """How requests fared. Times are of those that went well, fractions of all."""

    mean_s: float
    p50_s: float
    p99_s: float
    failed_fraction: float
    miss_fraction: float
    """Late or failed."""
    miss_bounds: Bounds


@dataclass(frozen=True, slots=True)
class Estimate:
    """Serve's routing and ours side by side."""

    requests: int
    blocks: int
    slo_s: float
    too_little: str
    """Why nothing is estimated; empty where it is."""
    serve: Side | None
    """None where no request went well."""
    ours: Side | None
    """None where there is too little data."""
    saved_fraction: float
    """Of the mean latency; NaN where nothing is estimated."""
    saved_bounds: Bounds
    avoided_fraction: float
    """Of all requests: those that would not have missed the objective any more; NaN as above."""
    avoided_bounds: Bounds
    trust: float
    trust_bounds: Bounds
    refused: int
    """Requests that Serve sent where we would have sent none."""
    refused_right: int
    """Of those, failed or late."""
    refused_right_bounds: Bounds
    """Of the fraction."""
    others_missed_fraction: float
    """Failed or late among all other requests."""


class _Sums:
    """Blocks as arrays: [block] and [block, cell]."""

    def __init__(self, blocks: Sequence[Mapping[str, Any]]) -> None:
        self.requests, self.failed, self.refused, self.refused_failed = (
            np.array([float(block[name]) for block in blocks])
            for name in ("requests", "failed", "refused", "refused_failed")
        )
        moments = np.array([block["moments"] for block in blocks], float).reshape(-1, 5)
        weight, x, y, xx, xy = moments.T
        known = np.maximum(weight, 1e-9)
        self.weight, self.spread, self.together = weight, xx - x * x / known, xy - x * y / known
        keys = sorted({tuple(cell[:3]) for block in blocks for cell in block["cells"]})
        place = {key: k for k, key in enumerate(keys)}
        self.cells = np.zeros((len(blocks), len(keys)))
        for row, block in enumerate(blocks):
            for *key, count in block["cells"]:
                self.cells[row, place[tuple(key)]] += count
        self.took, self.ratio, self.refuses = np.array(keys, float).reshape(-1, 3).T


def usual_s(blocks: Sequence[Mapping[str, Any]]) -> float:
    """The median duration; NaN without any."""
    sums = _Sums(blocks)
    return _quantile(sums.took, sums.cells.sum(axis=0), 0.5)


def estimate(blocks: Sequence[Mapping[str, Any]], slo_s: float, rng: np.random.Generator) -> Estimate:
    """What Serve's routing did, and ours would have done, from `Observations.plain`."""
    sums = _Sums(blocks)
    requests = float(sums.requests.sum())
    why_not = too_little(int((sums.requests > 0).sum()), requests)
    once = np.ones((1, len(blocks)))
    drawn = once if why_not else draws(len(blocks), rng).astype(float)
    slo = _PER_OCTAVE * math.log2(slo_s / _SHORTEST_S)
    now, many = _look(sums, once, slo), _look(sums, drawn, slo)
    known = sums.cells.sum() > 0

    def bounds(name: str) -> Bounds:
        return None if why_not else middle(many[name])

    def side(which: str, cells: Array) -> Side:
        counted = sums.cells.sum(axis=0)
        return Side(
            float(now[f"{which}_mean_s"][0]),
            _quantile(cells, counted, 0.5),
            _quantile(cells, counted, 0.99),
            float(now[f"{which}_failed"][0]),
            float(now[f"{which}_missed"][0]),
            bounds(f"{which}_missed"),
        )

    trust = float(now["trust"][0])
    told = known and not why_not
    return Estimate(
        round(requests),
        int((sums.requests > 0).sum()),
        slo_s,
        why_not,
        side("serve", sums.took) if known else None,
        side("ours", sums.took + trust * sums.ratio) if told else None,
        float(now["saved"][0]) if told else math.nan,
        bounds("saved"),
        float(now["avoided"][0]) if told else math.nan,
        bounds("avoided"),
        trust if told else math.nan,
        bounds("trust"),
        round(float(sums.refused.sum())),
        round(float(now["right"][0])) if known else 0,
        bounds("right_fraction"),
        float(now["others_missed"][0]),
    )


def _look(sums: _Sums, drawn: Array, slo: float) -> dict[str, Array]:
    """Everything that is told, for each draw [draw] of the blocks; `slo` is a place among the bins of durations."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spread, weight = drawn @ sums.spread, np.maximum(drawn @ sums.weight, 1e-9)
        slope = (drawn @ sums.together) / np.maximum(spread, 1e-12)
        trust = np.where(spread / weight > _LEAST_SPREAD, np.clip(slope, 0.0, 1.0), 1.0)
        cells, requests = drawn @ sums.cells, drawn @ sums.requests
        went_well = cells.sum(axis=1)
        ours = sums.took + trust[:, None] * sums.ratio
        serve_s, ours_s = cells @ _seconds(sums.took), (cells * _seconds(ours)).sum(axis=1)
        serve_late, ours_late = cells @ _above(sums.took, slo), (cells * _above(ours, slo)).sum(axis=1)
        failed, refused, refused_failed = drawn @ sums.failed, drawn @ sums.refused, drawn @ sums.refused_failed
        others = np.maximum(requests - refused, 1e-9)
        usual_failures = (failed - refused_failed) / others
        ours_failed = failed - refused_failed + refused * usual_failures
        right = refused_failed + (cells * sums.refuses) @ _above(sums.took, slo)
        missed = failed + serve_late
        return {
            "trust": trust,
            "serve_mean_s": serve_s / went_well,
            "ours_mean_s": ours_s / went_well,
            "serve_failed": failed / requests,
            "ours_failed": ours_failed / requests,
            "serve_missed": missed / requests,
            "ours_missed": (ours_failed + ours_late) / requests,
            "saved": 1.0 - ours_s / serve_s,
            "avoided": (missed - ours_failed - ours_late) / requests,
            "right": right,
            "right_fraction": right / refused,
            "others_missed": (missed - right) / others,
        }


def _seconds(place: Array) -> Array:
    return np.asarray(_SHORTEST_S * 2.0 ** ((place + 0.5) / _PER_OCTAVE))


def _above(place: Array, slo: float) -> Array:
    """What part of a bin that begins at `place` lies above the objective."""
    return np.clip(place + 1.0 - slo, 0.0, 1.0)


def _quantile(place: Array, counts: Array, q: float) -> float:
    if not counts.sum() > 0:
        return math.nan
    order = np.argsort(place)
    below = np.cumsum(counts[order])
    return float(_seconds(place[order])[np.searchsorted(below, q * below[-1])])
