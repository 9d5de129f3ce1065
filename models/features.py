"""Causal features of node telemetry: every value is normalised by what the node itself did before.

Arrays are `[series, channel]` at one step; the same code runs one node live (one series) and thousands of
recordings side by side in training. Time counts in samples: the half-life of 60 is 60 s at 1 Hz.

Running mean, variance and absolute h-step changes are exponential averages with bias correction
(weights renormalised by the mass seen so far, as in Adam, Kingma and Ba 2015), so they are exact from the first sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.adaptive import AdaptiveRidge
from models.grid import CHANNELS, COVARIATES, LONGEST, N_HORIZONS, N_TARGETS, STEPS, Array

HALF_LIFE = 60.0
FAST_HALF_LIFE = 5.0
CLIP = 6.0
LARGEST = 1e15
"""Squares of greater values would overflow; no meter of bytes a second gets there."""
N_LAGS = 20
"""Differences of the last samples to the newest, straight to the model: short periods and shapes."""
FLOOR = 2e-6
"""Least spread of a fraction, well under the grain of any meter: a constant stays a constant."""
ANCHORS: tuple[str, ...] = ("last_value", "short_mean", "long_mean", "adaptive_ridge")
N_ANCHORS = len(ANCHORS)
_COMPARED = (0, 3, 5)
"""Horizons whose anchor errors are inputs: nearest, middle, farthest."""


@dataclass(slots=True)
class Running:
    """Exponential mean of whatever is fed, exact from the first sample; missing values leave it as it is."""

    shape: tuple[int, ...]
    half_life: float
    total: Array = field(init=False)
    mass: Array = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.mass = np.zeros(self.shape, np.float32), np.zeros(self.shape, np.float32)

    def add(self, value: Array, present: NDArray[np.bool_]) -> None:
        """Take one step of values; where `present` is False nothing changes."""
        keep = np.float32(0.5 ** (1.0 / self.half_life))
        self.total = np.where(present, self.total * keep + np.where(present, value, 0.0) * (1 - keep), self.total)
        self.mass = np.where(present, self.mass * keep + (1 - keep), self.mass)

    def mean(self) -> Array:
        """Current mean, 0 where nothing has been seen."""
        return self.total / np.maximum(self.mass, np.float32(1e-12))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of features yields.

    `inputs` [series, target, feature]; `anchors` [series, target, head, anchor] simple predictions that the model leans
    on; `scale` [series, target, horizon] the node's own usual absolute change over each horizon; `ready`
    [series, target] whether the value is there now.
    """

    inputs: Array
    anchors: Array
    scale: Array
    ready: NDArray[np.bool_]


@dataclass(slots=True)
class Features:
    """Running features of `series` nodes. Feed one row per sample; NaN means missing."""

    series: int
    _level: Array = field(init=False)
    _seen: NDArray[np.int64] = field(init=False)
    _mean: Running = field(init=False)
    _square: Running = field(init=False)
    _fast: Running = field(init=False)
    _slow: Running = field(init=False)
    _short: Running = field(init=False)
    _adaptive: AdaptiveRidge = field(init=False)
    _issued: Array = field(init=False)
    _error: Running = field(init=False)
    _peak: Array = field(init=False)

    def __post_init__(self) -> None:
        s, c = self.series, len(CHANNELS)
        self._level = np.zeros((s, c), np.float32)
        self._seen = np.zeros((s, c), np.int64)
        self._mean, self._square = Running((s, c), HALF_LIFE), Running((s, c), HALF_LIFE)
        self._short = Running((s, c), FAST_HALF_LIFE)
        self._fast, self._slow = Running((s, c), FAST_HALF_LIFE), Running((s, c), HALF_LIFE)
        self._adaptive = AdaptiveRidge(s)
        self._issued = np.full((LONGEST, s, N_TARGETS, N_HORIZONS, N_ANCHORS), np.nan, np.float32)
        self._error = Running((s, N_TARGETS, N_HORIZONS, N_ANCHORS), HALF_LIFE)
        self._peak = np.zeros((s, c), np.float32)

    def step(self, values: Array, announced: Array | None = None) -> Step:
        """Take one sample [series, channel]; `announced` [series, horizon] is the known strength of events ahead."""
        values = np.asarray(values, np.float32)
        present = np.isfinite(values)
        values = np.clip(values, -LARGEST, LARGEST)
        filled = np.where(present, values, self._level)
        first = present & (self._seen == 0)
        jump = np.where(first, 0.0, filled - self._level).astype(np.float32)
        deviation = np.where(first, 0.0, filled - self._mean.mean())
        self._level = filled
        self._seen += present
        self._mean.add(filled, present)
        self._short.add(filled, present)
        self._square.add(deviation**2, present & ~first)
        self._fast.add(np.abs(jump), present & ~first)
        self._slow.add(np.abs(jump), present & ~first)
        self._peak = np.maximum(self._peak * np.float32(0.9995), np.abs(filled))

        mean, short = self._mean.mean(), self._short.mean()
        floor = np.where(np.arange(len(CHANNELS)) < 2, FLOOR, FLOOR * np.abs(mean) + 1e-12).astype(np.float32)
        spread = np.maximum(np.sqrt(self._square.mean()), floor)
        slow = np.maximum(self._slow.mean(), floor)
        z = _squash((filled - mean) / spread)
        trend = _squash((short - mean) / spread)
        d = _squash(jump / slow)
        roughness = _squash(np.log(slow / spread))
        burst = _squash(np.log(np.maximum(self._fast.mean(), 0.1 * floor) / slow))
        level = filled / np.where(np.arange(len(CHANNELS)) < 2, 1.0, np.maximum(self._peak, 1e-9))
        targets = slice(0, N_TARGETS)
        self._judge_anchors(np.where(present, filled, np.nan)[:, targets])
        anchors = self._anchors(filled[:, targets], short[:, targets], mean[:, targets], spread[:, targets])
        error = np.maximum(self._error.mean(), floor[:, targets, None, None])
        scale = error[..., 0]
        ratios = _squash(np.log(error[..., 1:] / scale[..., None])[:, :, list(_COMPARED)]).reshape(
            self.series, N_TARGETS, -1
        )
        lags = self._adaptive.lags(N_LAGS) - filled[:, targets, None]
        shape = _squash(lags / scale[..., :1])
        inputs = self._assemble(z, d, trend, roughness, burst, level, present, scale, announced)
        return Step(np.concatenate([inputs, ratios, shape], axis=-1), anchors, scale, present[:, targets])

    def _anchors(self, last: Array, short: Array, mean: Array, spread: Array) -> Array:
        """Simple predictions [series, target, head, anchor]; those of the horizons are remembered to be judged."""
        ridge = self._adaptive.step(last, mean, spread)
        flat = np.stack([last, short, mean], axis=-1)[:, :, None]
        near = np.concatenate([np.repeat(flat, N_HORIZONS, axis=2), ridge[..., None]], axis=-1).astype(np.float32)
        self._issued = np.concatenate([near[None], self._issued[:-1]])
        window = np.stack([near.mean(axis=2), near.max(axis=2)], axis=2)
        return np.concatenate([near, window], axis=2)

    def _judge_anchors(self, now: Array) -> None:
        due = np.stack([self._issued[h - 1][:, :, i] for i, h in enumerate(STEPS)], axis=2)
        error = np.abs(now[:, :, None, None] - due)
        self._error.add(error, np.isfinite(error))

    def _assemble(  # noqa: PLR0917 - columns of one table
        self,
        z: Array,
        d: Array,
        trend: Array,
        roughness: Array,
        burst: Array,
        level: Array,
        present: NDArray[np.bool_],
        scale: Array,
        announced: Array | None,
    ) -> Array:
        """Own value first, then what the node's other channels do, then masks and the target's identity."""
        known = np.where(present, 1.0, 0.0)
        columns = []
        for t in range(N_TARGETS):
            others = [(t + 1) % N_TARGETS, (t + 2) % N_TARGETS]
            growth = _squash(np.log(scale[:, t, -1] / np.maximum(scale[:, t, 0], 1e-12)))
            own = [z[:, t], d[:, t], trend[:, t], roughness[:, t], burst[:, t], level[:, t], growth]
            rest = [z[:, o] * known[:, o] for o in (*others, *range(N_TARGETS, len(CHANNELS)))]
            rest += [x[:, o] * known[:, o] for x in (d, trend) for o in (*others, *range(N_TARGETS, len(CHANNELS)))]
            masks = [known[:, t], known[:, others[0]], known[:, others[1]], np.minimum(self._seen[:, t] / 60.0, 1.0)]
            identity = [np.full(self.series, float(t == k)) for k in range(N_TARGETS)]
            columns.append(np.stack([*own, *rest, *masks, *identity], axis=-1))
        inputs = np.stack(columns, axis=1)
        ahead: Array = np.zeros((self.series, len(STEPS))) if announced is None else np.nan_to_num(announced)
        ahead = np.repeat(ahead[:, None, :], N_TARGETS, axis=1)
        return np.concatenate([inputs, ahead], axis=-1).astype(np.float32)


N_FEATURES = 7 + 3 * (2 + len(COVARIATES)) + 4 + N_TARGETS + len(STEPS) + len(_COMPARED) * (N_ANCHORS - 1) + N_LAGS


def _squash(x: Array) -> Array:
    """Odd, close to the identity near 0 and logarithmic far out: an outlier stays visible and cannot dominate."""
    return np.clip(np.arcsinh(x), -CLIP, CLIP).astype(np.float32)
