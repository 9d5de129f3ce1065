"""What a running forecaster learns from its own mistakes: quantile offsets, skill, the gate, alarm precision.

All states are arrays with leading [series, target, expert, horizon]; expert 0 is the model, the others the baselines.
A forecast made at step t for t + h is judged at t + h, so nothing looks ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.grid import LONGEST, STEPS, Array
from shadecast.types import QUANTILES

TAU = np.asarray(QUANTILES, np.float32)
STEP_SIZE = 0.02
HALF_LIFE = 120.0
FULL_SKILL = 0.15
CLOSE_AFTER = 10
OPEN_AFTER = 60
OPEN_SKILL = 0.05


def pinball(quantiles: Array, truth: Array) -> Array:
    """Mean pinball loss over the last axis of `quantiles` [..., quantile] against `truth` [...]."""
    gap = truth[..., None] - quantiles
    loss: Array = np.maximum(TAU * gap, (TAU - 1) * gap).mean(axis=-1)
    return loss.astype(np.float32)


@dataclass(slots=True)
class Ring:
    """The last forecasts by age: `issued` h steps ago for each horizon, [..., horizon, quantile]."""

    shape: tuple[int, ...]
    slots: Array = field(init=False)
    at: int = 0

    def __post_init__(self) -> None:
        self.slots = np.full((LONGEST + 1, *self.shape), np.nan, np.float32)

    def push(self, value: Array) -> None:
        """Remember what is forecast now."""
        self.at = (self.at + 1) % (LONGEST + 1)
        self.slots[self.at] = value

    def due(self) -> Array:
        """For each horizon h, what was forecast h steps before the step that is about to be pushed."""
        axis_last = [self.slots[(self.at + 1 - h) % (LONGEST + 1)][..., i, :] for i, h in enumerate(STEPS)]
        return np.stack(axis_last, axis=-2)


@dataclass(slots=True)
class QuantileCorrection:
    """Offsets c per quantile with `c += 0.02 * scale * (1{y > q + c} - (1 - tau))`.

    Online gradient descent on the pinball loss, as in adaptive conformal inference (Gibbs and Candes, 2021). Offsets
    are kept in multiples of `scale`, so a node that becomes lively widens its bands at once.
    """

    shape: tuple[int, ...]
    offset: Array = field(init=False)

    def __post_init__(self) -> None:
        self.offset = np.zeros((*self.shape, len(QUANTILES)), np.float32)

    def apply(self, quantiles: Array, scale: Array) -> Array:
        """Corrected quantiles, made rising again."""
        return np.sort(quantiles + self.offset * scale[..., None], axis=-1)

    def learn(self, issued: Array, truth: Array) -> None:
        """`issued` corrected quantiles that are due now, `truth` [...] what came; NaN teaches nothing."""
        known = np.isfinite(issued) & np.isfinite(truth)[..., None]
        above = np.where(truth[..., None] > issued, 1.0, 0.0)
        self.offset += np.where(known, STEP_SIZE * (above - (1 - TAU)), 0.0).astype(np.float32)


@dataclass(slots=True)
class SkillGate:
    """Skill of expert 0 against the best of the others, and the gate that follows from it.

    `skill = 1 - L_model / min L_baseline` with losses averaged over a half-life of 120 samples and started from the
    backtest (`prior`, mass of one half-life), gate = clip(skill / 0.15, 0, 1). It closes after 10 samples in a row
    below 0 and opens after 60 in a row above 0.05. It starts open where the
    backtest was won, without a backtest closed.
    """

    shape: tuple[int, ...]
    prior: Array | None = None
    loss: Array = field(init=False)
    mass: Array = field(init=False)
    is_open: Array = field(init=False)
    below: Array = field(init=False)
    _skill: Array = field(init=False)
    above: Array = field(init=False)

    def __post_init__(self) -> None:
        series, target, _, horizon = self.shape
        self.loss = np.zeros(self.shape, np.float32)
        self.mass = np.zeros(self.shape, np.float32)
        self.is_open = np.zeros((series, target, horizon), np.bool_)
        self.below = np.zeros((series, target, horizon), np.int32)
        self.above = np.zeros((series, target, horizon), np.int32)
        self._skill = self._blend()
        if self.prior is not None:
            self.is_open[:] = self.prior > 0

    def learn(self, losses: Array) -> None:
        """Take the losses [series, target, expert, horizon] that became known; NaN teaches nothing."""
        keep = np.float32(0.5 ** (1.0 / HALF_LIFE))
        known = np.isfinite(losses).all(axis=2)
        each = np.asarray(known)[:, :, None]
        self.loss = np.where(each, keep * self.loss + (1 - keep) * np.where(each, losses, 0.0), self.loss)
        self.mass = np.where(each, keep * self.mass + (1 - keep), self.mass)
        skill = self._skill = self._blend()
        self.below = np.where(known, np.where(skill < 0, self.below + 1, 0), self.below)
        self.above = np.where(known, np.where(skill > OPEN_SKILL, self.above + 1, 0), self.above)
        self.is_open = np.asarray(self.is_open & (self.below < CLOSE_AFTER) | (self.above >= OPEN_AFTER))

    def skill(self) -> Array:
        """Skill [series, target, horizon]; the backtest's share fades as live evidence grows."""
        return self._skill

    def _blend(self) -> Array:
        best = self.loss[:, :, 1:].min(axis=2)
        live = 1.0 - self.loss[:, :, 0] / np.maximum(best, np.float32(1e-12))
        mass = self.mass[:, :, 0]
        prior = np.zeros_like(live) if self.prior is None else self.prior
        trust = np.minimum(2.0 * mass, 1.0)
        quiet = best <= 1e-9  # nothing moves: nothing to win, nothing to lose
        return np.where(mass > 0, trust * np.where(quiet, 0.0, live) + (1 - trust) * prior, prior).astype(np.float32)

    def gate(self) -> Array:
        """Trust in [0, 1] per [series, target, horizon]."""
        return np.where(self.is_open, np.clip(self._skill / FULL_SKILL, 0.0, 1.0), 0.0).astype(np.float32)

    def best_baseline(self) -> Array:
        """Index (from 1) of the baseline with the least recent loss, per [series, target, horizon]."""
        return 1 + np.asarray(np.argmin(self.loss[:, :, 1:], axis=2))


@dataclass(slots=True)
class AlarmRecord:
    """How many of the alarms "this node, now well, will be slow within 10 s" came true, per series.

    Half-life 600 samples; the backtest's precision counts as ten alarms. Under 70 % the veto is off.
    """

    series: int
    prior: float = 0.0
    alarms: Array = field(init=False)
    hits: Array = field(init=False)
    _pending: Array = field(init=False)

    def __post_init__(self) -> None:
        self.alarms = np.full(self.series, 10.0, np.float32)
        self.hits = np.full(self.series, 10.0 * self.prior, np.float32)
        self._pending = np.zeros((LONGEST, self.series), np.float32)

    def step(self, alarm: NDArray[np.bool_], slow_now: NDArray[np.bool_]) -> None:
        """`alarm` raised now about the next 10 samples; `slow_now` whether the node is slow at this sample."""
        keep = np.float32(0.5 ** (1.0 / 600.0))
        hit = np.where(slow_now, self._pending, 0.0).sum(axis=0)
        missed = np.where(slow_now, 0.0, self._pending[-1])
        self.alarms = keep * self.alarms + hit + missed
        self.hits = keep * self.hits + hit
        self._pending = np.where(slow_now, 0.0, self._pending)
        self._pending = np.roll(self._pending, 1, axis=0)
        self._pending[0] = alarm

    def precision(self) -> Array:
        """Share of alarms that came true, per series."""
        return self.hits / np.maximum(self.alarms, np.float32(1e-6))
