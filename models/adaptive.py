"""A ridge regression that each node learns on its own, online: its periods and reversions, not the fleet's.

Direct for every horizon: `x[t+h] - x[t]` from the last `LAGS` differences to the newest value and the distance to the
running mean. All horizons share one Gram matrix (regressors of 10 samples ago, the newest whose answers are all
known), with exponential forgetting. Rows are divided by the node's present spread, so that one wild minute does not
decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from models.grid import LONGEST, N_TARGETS, STEPS, Array

LAGS = 30
FORGET_HALF_LIFE = 300.0
PRIOR_SAMPLES = 50.0
"""Strength of the pull to "nothing changes", in samples."""
SOLVE_EVERY = 3


@dataclass(slots=True)
class AdaptiveRidge:
    """State for [series, target]; feed every sample."""

    series: int
    _lags: Array = field(init=False)
    _means: Array = field(init=False)
    _gram: Array = field(init=False)
    _moment: Array = field(init=False)
    _weight: Array = field(init=False)
    _steps: int = 0

    def __post_init__(self) -> None:
        shape = (self.series, N_TARGETS)
        self._lags = np.zeros((*shape, LAGS + LONGEST + 1), np.float32)
        self._means = np.zeros((*shape, LONGEST + 1), np.float32)
        self._gram = np.zeros((*shape, LAGS + 1, LAGS + 1), np.float32)
        self._moment = np.zeros((*shape, LAGS + 1, len(STEPS)), np.float32)
        self._weight = np.zeros((*shape, LAGS + 1, len(STEPS)), np.float32)

    def step(self, values: Array, mean: Array, spread: Array) -> Array:
        """Take filled values, running mean and spread [series, target]; predictions [series, target, horizon]."""
        if self._steps == 0:
            self._lags[:], self._means[:] = values[..., None], mean[..., None]
        self._lags = np.concatenate([self._lags[..., 1:], values[..., None]], axis=-1)
        self._means = np.concatenate([self._means[..., 1:], mean[..., None]], axis=-1)
        self._steps += 1
        if self._steps > LAGS + LONGEST:
            self._learn(spread)
        row = self._row(self._lags[..., LONGEST:], self._means[..., -1])
        predicted: Array = values[..., None] + np.einsum("stk,stkh->sth", row, self._weight)
        return predicted

    def lags(self, count: int) -> Array:
        """The last `count` values before the newest, oldest first, [series, target, lag]."""
        return self._lags[..., -1 - count : -1]

    def _row(self, lags: Array, mean: Array) -> Array:
        newest = lags[..., -1:]
        return np.concatenate([lags[..., :-1] - newest, mean[..., None] - newest], axis=-1)

    def _learn(self, spread: Array) -> None:
        past = self._lags[..., : LAGS + 1]
        unit = np.maximum(spread, 1e-12)[..., None]
        row = np.clip(self._row(past, self._means[..., 0]) / unit, -5.0, 5.0)
        newest = past[..., -1:]
        ahead = np.clip((self._lags[..., [LAGS + h for h in STEPS]] - newest) / unit, -5.0, 5.0)
        keep = np.float32(0.5 ** (1.0 / FORGET_HALF_LIFE))
        self._gram = keep * self._gram + row[..., :, None] * row[..., None, :]
        self._moment = keep * self._moment + row[..., :, None] * ahead[..., None, :]
        if self._steps % SOLVE_EVERY == 0:
            prior = PRIOR_SAMPLES * np.eye(LAGS + 1, dtype=np.float32)
            self._weight = np.linalg.solve(self._gram + prior, self._moment)
