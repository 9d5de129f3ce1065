"""Causal features of node telemetry: every value is normalised by what the node itself did before.

Arrays are `[series, channel]` at one step; the same code runs one node live (one series) and thousands of
recordings side by side in training. Time counts in samples: the half-life of 60 is 60 s at 1 Hz.

Running averages are stacked in few arrays, since a step of one node costs numpy calls and not arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.adaptive import AdaptiveRidge
from models.grid import CHANNELS, EXTENDED, LONGEST, N_HORIZONS, N_TARGETS, STEPS, Array
from models.running import HALF_LIFE, Running

SHORT_HALF_LIFE = 5.0
DRIFT_HALF_LIFE = 20.0
CLIP = 6.0
LARGEST = 1e15
"""Squares of greater values would overflow; no meter of bytes a second gets there."""
FLOOR = 2e-6
"""Least spread of a fraction, well under the grain of any meter: a constant stays a constant."""
N_LAGS = 20
"""Differences of the last samples to the newest, straight to the model: short periods and shapes."""
ANCHORS: tuple[str, ...] = ("last_value", "short_mean", "long_mean", "drift", "adaptive_ridge")
N_ANCHORS = len(ANCHORS)

_COMPARED = [0, 3, 5]
"""Horizons whose anchor errors are inputs: nearest, middle, farthest."""
_OTHERS = np.array([[c for c in np.roll(np.arange(len(CHANNELS)), -t - 1) if c != t] for t in range(N_TARGETS)])
"""Per target the other channels, [target, channel - 1]."""
_IS_FRACTION = np.array([*(c < 2 for c in range(len(CHANNELS))), *(n in ("system", "io_wait") for n in EXTENDED)])
_AHEAD = np.asarray(STEPS, np.float32)
_IDENTITY = np.eye(N_TARGETS, dtype=np.float32)

N_FEATURES = 7 + 3 * (len(CHANNELS) - 1) + 4 + N_TARGETS + len(_COMPARED) * (N_ANCHORS - 1) + N_LAGS + N_HORIZONS


N_EXTENDED_FEATURES = N_FEATURES + 4 * len(EXTENDED)
"""With the further channels: level, change and trend of each, and whether it is known."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of features yields.

    `inputs` [series, target, feature]; `anchors` [series, target, head, anchor] simple predictions that the model leans
    on; `spread` [series, target, head] how far off the best of them usually is on this node, the unit of the model's
    corrections; `scale` [series, target, horizon] the same of the last value alone: the node's usual absolute change;
    `ready` [series, target] whether the value is there now.
    """

    inputs: Array
    anchors: Array
    spread: Array
    scale: Array
    ready: NDArray[np.bool_]


_LEVEL, _SHORT, _ROUGH, _ROUGH_SHORT, _DRIFT, _SQUARE = range(6)
_HALF_LIVES = (HALF_LIFE, SHORT_HALF_LIFE, HALF_LIFE, SHORT_HALF_LIFE, DRIFT_HALF_LIFE, HALF_LIFE)


@dataclass(slots=True)
class Features:
    """Running features of `series` nodes. Feed one row per sample; NaN means missing.

    `extended` also makes inputs of the further channels, behind the others; without it rows may have them or not.
    """

    series: int
    extended: bool = False
    _level: Array = field(init=False)
    _seen: Array = field(init=False)
    _means: Running = field(init=False)
    _adaptive: AdaptiveRidge = field(init=False)
    _issued: Array = field(init=False)
    _error: Running = field(init=False)
    _peak: Array = field(init=False)

    def __post_init__(self) -> None:
        s, c = self.series, len(CHANNELS) + len(EXTENDED) * self.extended
        self._level = np.zeros((s, c), np.float32)
        self._seen = np.zeros((s, c), np.float32)
        self._means = Running((len(_HALF_LIVES), s, c), _HALF_LIVES)
        self._adaptive = AdaptiveRidge(s)
        self._issued = np.full((LONGEST, s, N_TARGETS, N_HORIZONS, N_ANCHORS), np.nan, np.float32)
        self._error = Running((s, N_TARGETS, N_HORIZONS, N_ANCHORS), HALF_LIFE)
        self._peak = np.zeros((s, c), np.float32)

    def step(self, values: Array, announced: Array | None = None) -> Step:
        """Take one sample [series, channel]; `announced` [series, horizon] is the known strength of events ahead."""
        values = self._seen_of(np.asarray(values, np.float32))
        present = np.isfinite(values)
        filled = np.where(present, np.clip(values, -LARGEST, LARGEST), self._level)
        again = present & (self._seen > 0)
        jump = np.where(again, filled - self._level, np.float32(0))
        off = np.where(again, filled - self._means.mean()[_LEVEL], np.float32(0))
        rough = np.abs(jump)
        fed = np.stack([filled, filled, rough, rough, jump, off * off])
        self._means.add(fed, np.stack([present, present, again, again, again, again]))
        self._level = filled
        self._seen += present
        self._peak = np.maximum(self._peak * np.float32(0.9995), np.abs(filled))

        means = self._means.mean()
        fraction = _IS_FRACTION[: values.shape[1]]
        floor = np.where(fraction, np.float32(FLOOR), FLOOR * np.abs(means[_LEVEL]) + np.float32(1e-12))
        spread = np.maximum(np.sqrt(means[_SQUARE]), floor)
        slow = np.maximum(means[_ROUGH], floor)
        fast = np.maximum(means[_ROUGH_SHORT], 0.1 * floor)
        z, trend, d = _squash(
            np.stack([(filled - means[_LEVEL]) / spread, (means[_SHORT] - means[_LEVEL]) / spread, jump / slow])
        )
        rough_now, burst = _squash(np.log(np.stack([slow / spread, fast / slow])))
        level = filled / np.where(fraction, np.float32(1), np.maximum(self._peak, np.float32(1e-9)))

        t = slice(0, N_TARGETS)
        self._judge_anchors(np.where(present, filled, np.nan)[:, t])
        anchors = self._anchors(means[:, :, t], filled[:, t], spread[:, t])
        error = np.maximum(self._error.mean(), floor[:, t, None, None])
        scale = error[..., 0]
        best = error.min(axis=-1)
        growth = np.log(scale[..., -1:] / scale[..., :1])
        ratios = np.log(error[:, :, _COMPARED, 1:] / scale[:, :, _COMPARED, None]).reshape(self.series, N_TARGETS, -1)
        lags = (self._adaptive.lags(N_LAGS) - filled[:, t, None]) / scale[..., :1]
        known = np.where(present, np.float32(1), np.float32(0))
        others = (np.stack([z, d, trend]) * known)[:, :, _OTHERS]
        ahead = np.zeros((1, N_HORIZONS), np.float32) if announced is None else np.nan_to_num(announced)
        columns = [
            np.stack([x[:, t] for x in (z, d, trend, rough_now, burst, level)], axis=-1),
            _squash(np.concatenate([growth, ratios, lags], axis=-1)),
            np.moveaxis(others, 0, -1).reshape(self.series, N_TARGETS, -1),
            known[:, :N_TARGETS, None],
            known[:, _OTHERS[:, :2]],
            np.minimum(self._seen[:, :N_TARGETS, None] / 60, 1),
            np.broadcast_to(_IDENTITY, (self.series, N_TARGETS, N_TARGETS)),
            np.broadcast_to(ahead[:, None], (self.series, N_TARGETS, N_HORIZONS)),
        ]
        if self.extended:
            more = np.stack([z * known, d * known, trend * known, known])[:, :, len(CHANNELS) :]
            flat = np.moveaxis(more, 0, 1).reshape(self.series, 1, -1)
            columns.append(np.broadcast_to(flat, (self.series, N_TARGETS, flat.shape[-1])))
        inputs = np.concatenate(columns, axis=-1, dtype=np.float32)
        unit = np.concatenate([best, best.mean(axis=-1, keepdims=True), best[..., -1:]], axis=-1)
        return Step(inputs, anchors, unit, scale, present[:, t])

    def _seen_of(self, values: Array) -> Array:
        """The channels that count here: further ones that are not wanted are cut off, wanted ones that lack are NaN."""
        lacking = self._level.shape[1] - values.shape[1]
        if lacking <= 0:
            return values[:, : self._level.shape[1]]
        return np.concatenate([values, np.full((len(values), lacking), np.nan, np.float32)], axis=1)

    def _anchors(self, means: Array, last: Array, spread: Array) -> Array:
        """Simple predictions [series, target, head, anchor]; those of the horizons are remembered to be judged."""
        near = np.empty((self.series, N_TARGETS, N_HORIZONS, N_ANCHORS), np.float32)
        near[..., 0] = last[..., None]
        near[..., 1] = means[_SHORT][..., None]
        near[..., 2] = means[_LEVEL][..., None]
        near[..., 3] = last[..., None] + means[_DRIFT][..., None] * _AHEAD
        near[..., 4] = self._adaptive.step(last, means[_LEVEL], spread)
        self._issued = np.concatenate([near[None], self._issued[:-1]])
        return np.concatenate([near, near.mean(axis=2, keepdims=True), near.max(axis=2, keepdims=True)], axis=2)

    def _judge_anchors(self, now: Array) -> None:
        due = np.stack([self._issued[h - 1][:, :, i] for i, h in enumerate(STEPS)], axis=2)
        error = np.abs(now[:, :, None, None] - due)
        self._error.add(error, np.isfinite(error))


def _squash(x: Array) -> Array:
    """Odd, close to the identity near 0 and logarithmic far out: an outlier stays visible and cannot dominate."""
    return np.clip(np.arcsinh(x), -CLIP, CLIP)
