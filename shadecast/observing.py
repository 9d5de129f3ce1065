"""What Serve's own routing did, and what ours would have done: by the requests that an observing router saw.

As Serve chooses, the router notes the predicted relative time on the replica that Serve takes (s) and on the one that
we would have taken (s'). What such predictions are worth is measured: m(s) is the mean of log d over the requests that
were predicted s and took d seconds, less what all requests of the same half minute have in common, and made to rise
with s (isotonic regression, Barlow 1972). Ours would have taken about

    d' = d * exp(m(s') - m(s))

What is particular to the request (its size, say) is in d, and cancels out. Predictions that say nothing have a flat m,
and then nothing is claimed. By the predictions alone more would be promised than comes: whoever takes the least of
several that err sees a gain in the errors. The estimate is of each request alone: that the others would have gone
elsewhere, too, is not in it.

Requests that Serve sent to a replica that would have got none from us (on trial, drained, not let in) are told apart:
keeping them away was right where they failed or missed the objective.

Kept are counts by half minute in bins of durations and predictions, so that any objective can be asked for later. When
there are too many half minutes, neighbours are merged: memory is bounded, however long a deployment is observed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shadecast.blocks import BLOCK_S, draws, middle, too_little
from shadecast.ledger import LONGEST_PREDICTED
from shadecast.types import Outcome

Array = NDArray[Any]

MOST_BLOCKS = 480
"""Four hours of half minutes; then of minutes, and so on."""
_PER_OCTAVE = 4
"""Bins of durations."""
_SCORES_PER_OCTAVE = 3
_SHORTEST_S = 0.001
_MOST_BINS = 100
_WIDEST = 21
"""Bins that a prediction may lie from 1: LONGEST_PREDICTED either way."""
_SCORES = np.arange(-_WIDEST, _WIDEST + 1)
_ROUNDS = 30
"""Of fitting what half minutes and predictions have to do with durations, each in turn."""
_DRAWN = 200
_AT_ONCE = 40
"""Draws that are looked at together: memory."""
_LEAST_GAIN = 1e-6
"""Mean predicted gain, in bins, below which all replicas were alike."""


@dataclass(slots=True)
class _Block:
    """Requests that ended in one half minute, or more of them where neighbours were merged."""

    at: int
    """Its number, by its length."""
    requests: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    refused_failed: float = 0.0
    logs: Counter[int] = field(default_factory=Counter)
    """Sums of log d of requests that went well, by the bin of s."""
    cells: Counter[tuple[int, int, int, int]] = field(default_factory=Counter)
    """Requests that went well, by bins of d, s and s', and whether we would have refused the replica."""

    def take(self, other: _Block) -> None:
        """Merge another one into it."""
        for name in ("requests", "failed", "refused", "refused_failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.logs.update(other.logs)
        self.cells.update(other.cells)


class Observations:
    """The half minutes of one deployment; the clock is the caller's and does not go back."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._length_s = BLOCK_S

    def add(self, now_s: float, outcome: Outcome, weight: float) -> None:
        """A request has ended, and stands for `weight` of them. Without predictions it says nothing."""
        took_s, taken, ours = outcome.duration_s, outcome.predicted, outcome.predicted_ours
        if not (0.0 < taken < math.inf and 0.0 < ours < math.inf and 0.0 <= took_s < math.inf):
            return
        if not self._blocks or self._blocks[-1].at < now_s // self._length_s:
            if len(self._blocks) == MOST_BLOCKS:
                self._merge()
            if not self._blocks or self._blocks[-1].at < now_s // self._length_s:
                self._blocks.append(_Block(int(now_s // self._length_s)))
        block = self._blocks[-1]
        block.requests += weight
        block.refused += weight * outcome.refused
        if not outcome.ok:
            block.failed += weight
            block.refused_failed += weight * outcome.refused
            return
        score = _score(taken)
        block.logs[score] += weight * math.log(max(took_s, _SHORTEST_S))  # type: ignore[assignment]
        block.cells[_bin(took_s), score, _score(ours), int(outcome.refused)] += weight  # type: ignore[assignment]

    def _merge(self) -> None:
        """From now on blocks are twice as long."""
        self._length_s *= 2.0
        merged: list[_Block] = []
        for block in self._blocks:
            block.at //= 2
            if merged and merged[-1].at == block.at:
                merged[-1].take(block)
            else:
                merged.append(block)
        self._blocks = merged

    def plain(self, now_s: float) -> list[dict[str, Any]]:
        """As plain values, oldest first; each block began `ago_s` and is `length_s` long."""
        return [
            {
                "ago_s": now_s - block.at * self._length_s,
                "length_s": self._length_s,
                "requests": block.requests,
                "failed": block.failed,
                "refused": block.refused,
                "refused_failed": block.refused_failed,
                "logs": [[*each] for each in block.logs.items()],
                "cells": [[*cell, weight] for cell, weight in block.cells.items()],
            }
            for block in self._blocks
        ]


def _bin(took_s: float) -> int:
    return min(max(math.floor(_PER_OCTAVE * math.log2(max(took_s, _SHORTEST_S) / _SHORTEST_S)), 0), _MOST_BINS)


def _score(predicted: float) -> int:
    """The bin of a prediction."""
    return min(max(round(_SCORES_PER_OCTAVE * math.log2(min(predicted, LONGEST_PREDICTED))), -_WIDEST), _WIDEST)


_TAIL = tuple(float(f"{10.0 ** (-k / 10):.3g}") for k in range(1, 41))
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
    tail: tuple[tuple[float, float], ...]
    """(seconds, fraction of the requests that took longer)."""


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
    """What part of the predicted gain (mean of log s / s') the durations bear out."""
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
        keys = sorted({tuple(cell[:-1]) for block in blocks for cell in block["cells"]})
        place = {key: k for k, key in enumerate(keys)}
        self.cells = np.zeros((len(blocks), len(keys)))
        for row, block in enumerate(blocks):
            for *key, count in block["cells"]:
                self.cells[row, place[tuple(key)]] += count
        took, taken, ours, refuses = np.array(keys, int).reshape(-1, 4).T
        self.took, self.refuses = took.astype(float), refuses.astype(float)
        self.taken, self.ours = taken + _WIDEST, ours + _WIDEST
        self.counts = self.cells @ np.eye(len(_SCORES))[self.taken]
        logs = np.zeros_like(self.counts)
        for row, block in enumerate(blocks):
            for score, total in block["logs"]:
                logs[row, score + _WIDEST] += total
        self.own_logs = logs - self.counts * self._shared(logs)

    def _shared(self, logs: Array) -> Array:
        """[block, 1]: the mean log duration of each half minute, less what its predictions say of it."""
        by_block = np.maximum(self.counts.sum(axis=1, keepdims=True), 1e-9)
        by_score = np.maximum(self.counts.sum(axis=0, keepdims=True), 1e-9)
        common = logs.sum(axis=1, keepdims=True) / by_block
        for _ in range(_ROUNDS):
            worth = (logs - self.counts * common).sum(axis=0, keepdims=True) / by_score
            common = (logs - self.counts * worth).sum(axis=1, keepdims=True) / by_block
        return np.asarray(common)

    def worth(self, drawn: Array) -> Array:
        """m, [draw, bin of a prediction]."""
        pairs = zip(drawn @ self.own_logs, drawn @ self.counts, strict=True)
        return np.stack([_rising(logs, counts) for logs, counts in pairs])


def _rising(logs: Array, counts: Array) -> Array:
    """The best m that does not fall (pool adjacent violators); beyond what was seen as at the last that was."""
    pools: list[tuple[float, float, int]] = []
    seen = np.flatnonzero(counts > 1e-9)
    for k in seen:
        total, weight, size = float(logs[k]), float(counts[k]), 1
        while pools and pools[-1][0] / pools[-1][1] > total / weight:
            before = pools.pop()
            total, weight, size = total + before[0], weight + before[1], size + before[2]
        pools.append((total, weight, size))
    fitted = [total / weight for total, weight, size in pools for _ in range(size)]
    return np.interp(_SCORES, _SCORES[seen], fitted) if fitted else np.zeros(len(_SCORES))


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
    drawn = once if why_not else draws(len(blocks), rng, _DRAWN).astype(float)
    slo = _PER_OCTAVE * math.log2(slo_s / _SHORTEST_S)
    now = _look(sums, once, slo)
    parts = [_look(sums, drawn[k : k + _AT_ONCE], slo) for k in range(0, len(drawn), _AT_ONCE)]
    many = {name: np.concatenate([part[name] for part in parts]) for name in now}
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
            tuple((_quantile(cells, counted, 1.0 - f), f) for f in _TAIL if f * counted.sum() >= 1.0),
        )

    trust = float(now["trust"][0])
    told = known and not why_not
    return Estimate(
        round(requests),
        int((sums.requests > 0).sum()),
        slo_s,
        why_not,
        side("serve", sums.took) if known else None,
        side("ours", sums.took + _shift(sums, once)[0]) if told else None,
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
        cells, requests = drawn @ sums.cells, drawn @ sums.requests
        went_well = cells.sum(axis=1)
        shift = _shift(sums, drawn)
        ours = sums.took + shift
        predicted = cells @ ((sums.ours - sums.taken) * (_PER_OCTAVE / _SCORES_PER_OCTAVE))
        there = np.abs(predicted) > _LEAST_GAIN * went_well
        trust = np.where(there, (cells * shift).sum(axis=1) / predicted, 1.0)
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


def _shift(sums: _Sums, drawn: Array) -> Array:
    """[draw, cell]: by how many bins of durations ours differs."""
    worth = sums.worth(drawn)
    return np.asarray((worth[:, sums.ours] - worth[:, sums.taken]) * (_PER_OCTAVE / math.log(2.0)))


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
