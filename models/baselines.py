"""Simple forecasts that a model has to beat, all direct (one prediction per horizon), all causal.

`last_value`; `ewma` (simple smoothing, half-life 5 samples); `mean10`; `ridge60`, ridge regression on the differences
of the last 60 samples to the newest (Hoerl and Kennard, 1970). `NLinear` is the same without a penalty;
`DLinear` splits off a moving average first (both Zeng et al., AAAI 2023). A point forecast gets its quantiles from
residuals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from models.grid import LONGEST, N_TARGETS, STEPS, Array
from models.running import HALF_LIFE, Running
from shadecast.types import QUANTILES

LAGS = 60
NAMES: tuple[str, ...] = ("last_value", "ewma", "mean10", "ridge60")
EWMA_HALF_LIFE = 5.0


@dataclass(frozen=True, slots=True)
class Ridge:
    """Weights [horizon, lag] on (sample - newest), oldest lag first, and intercepts [horizon]."""

    weight: Array
    intercept: Array

    def predict(self, lags: Array) -> Array:
        """Lags [..., 60], oldest first -> predictions [..., horizon]."""
        newest = lags[..., -1:]
        predicted: Array = newest + (lags - newest) @ self.weight.T + self.intercept
        return predicted.astype(np.float32)


def fit_ridge(
    values: Iterable[Array], penalty: float = 1.0, intercept: bool = True, basis: Array | None = None
) -> Ridge:
    """Fit one target's series [time] by normal equations; `penalty` counts in thousandths of the features' mean square.

    `basis` [feature, lag] maps lags to the features that are penalised, by default the lags themselves.
    Windows with a missing sample are left out. Without any window the fit is the last value.
    """
    gram = np.zeros((LAGS + 1, LAGS + 1))
    moment = np.zeros((LAGS + 1, len(STEPS)))
    for series in values:
        if len(series) < LAGS + LONGEST:
            continue
        windows = sliding_window_view(series.astype(np.float64), LAGS + LONGEST)
        windows = windows[np.isfinite(windows).all(axis=1)]
        newest = windows[:, LAGS - 1 : LAGS]
        lags = np.concatenate([windows[:, :LAGS] - newest, np.full_like(newest, float(intercept))], axis=1)
        ahead = windows[:, [LAGS - 1 + h for h in STEPS]] - newest
        gram += lags.T @ lags
        moment += lags.T @ ahead
    square = np.trace(gram[:LAGS, :LAGS]) / LAGS
    if not square > 0:
        return Ridge(np.zeros((len(STEPS), LAGS), np.float32), np.zeros(len(STEPS), np.float32))
    features = np.eye(LAGS) if basis is None else basis
    whole = np.zeros((len(features) + 1, LAGS + 1))
    whole[:-1, :LAGS], whole[-1, -1] = features, 1.0
    diagonal = np.full(len(features) + 1, (penalty * 1e-3 + 1e-9) * square)
    diagonal[-1] = 1e-9 * square if intercept else 1.0
    solved = np.linalg.solve(whole @ gram @ whole.T + np.diag(diagonal), whole @ moment)
    weight = features.T @ solved[:-1]
    return Ridge(weight.T.astype(np.float32), solved[-1].astype(np.float32))


def fit_dlinear(values: Iterable[Array], penalty: float = 1.0) -> Ridge:
    """DLinear in closed form: one linear map on a 25-sample moving average, one on the rest, as a single `Ridge`.

    The penalty acts on both maps apart, which is all that the decomposition changes for least squares.
    """
    trend = np.zeros((LAGS, LAGS))
    for i in range(LAGS):
        window = np.clip(np.arange(i - 12, i + 13), 0, LAGS - 1)  # edges repeated, as in the paper
        np.add.at(trend[i], window, 1.0 / len(window))
    basis = np.concatenate([trend, np.eye(LAGS) - trend])
    return fit_ridge(values, penalty, basis=basis)


@dataclass(slots=True)
class Baselines:
    """All baselines stepped side by side. `ridge` holds one regression per target."""

    series: int
    ridge: tuple[Ridge, ...]
    _lags: Array = field(init=False)
    _ewma: Array = field(init=False)
    _seen: NDArray[np.bool_] = field(init=False)
    _issued: Array = field(init=False)
    _error: Running = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.series, N_TARGETS, len(NAMES), len(STEPS))
        self._issued = np.full((LONGEST, *shape), np.nan, np.float32)
        self._error = Running(shape, HALF_LIFE)
        self._lags = np.zeros((self.series, N_TARGETS, LAGS), np.float32)
        self._ewma = np.zeros((self.series, N_TARGETS), np.float32)
        self._seen = np.zeros((self.series, N_TARGETS), np.bool_)

    def step(self, values: Array) -> Array:
        """Take [series, target] (NaN repeats the last value); predictions [series, target, baseline, horizon]."""
        last = self._lags[..., -1]
        now = np.where(np.isfinite(values), values, last).astype(np.float32)
        first = ~self._seen & np.isfinite(values)
        self._lags = np.concatenate([self._lags[..., 1:], now[..., None]], axis=-1)
        if first.any():  # before a first value there is only that value
            self._lags = np.where(first[..., None], now[..., None], self._lags)
        keep = np.float32(0.5 ** (1.0 / EWMA_HALF_LIFE))
        self._ewma = np.where(first, now, keep * self._ewma + (1 - keep) * now)
        self._seen |= first
        flat = [now, self._ewma, self._lags[..., -10:].mean(axis=-1)]
        rows = [np.repeat(x[..., None], len(STEPS), axis=-1) for x in flat]
        rows.append(np.stack([r.predict(self._lags[:, t]) for t, r in enumerate(self.ridge)], axis=1))
        points = np.stack(rows, axis=2).astype(np.float32)
        due = np.stack([self._issued[h - 1][..., i] for i, h in enumerate(STEPS)], axis=-1)
        error = np.abs(values[:, :, None, None] - due)
        self._error.add(error, np.isfinite(error))
        self._issued = np.concatenate([points[None], self._issued[:-1]])
        return points

    def usual_error(self, scale: Array) -> Array:
        """What each baseline is usually off by on this node, [series, target, baseline, horizon].

        `scale` [series, target, horizon], the node's usual change, stands in until the first forecast is judged and
        bounds it from below: a thousandth of it is no error but luck.
        """
        scale = scale[:, :, None]
        return np.where(self._error.mass > 0, np.maximum(self._error.mean(), 1e-3 * scale), scale).astype(np.float32)


def residual_quantiles(truth: Array, predicted: Array) -> Array:
    """Quantiles of (truth - predicted) over the first axis, missing left out: [n, horizon] -> [horizon, quantile]."""
    residual = (truth - predicted).astype(np.float64)
    columns = []
    for i in range(residual.shape[1]):
        known = residual[np.isfinite(residual[:, i]), i]
        columns.append(np.quantile(known, QUANTILES) if len(known) else np.zeros(len(QUANTILES)))
    return np.asarray(columns, np.float32)
