"""Forecasts of a given quality, made from the future that the simulator knows.

`perfect` shows the node's true speed. `realistic` foresees each change (a drop, a recovery) with a probability
(`recall`), sees drops that never come (`false_alarms_per_s`), errs by `error` in log speed, and has every change in
view `delay_s` later than the longest horizon allows. `wrong` shows another node's future with the confidence of a model
whose backtest was good. Skill, gate and the precision of alarms are learned from what comes, by the code that the node
forecasters run (`models.calibration`), so that a forecast is trusted only as far as a cluster would trust it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.simulate.nodes import NodeTrace
from bench.simulate.scenario import ForecastQuality
from models.calibration import AlarmRecord, QuantileCorrection, SkillGate, pinball
from models.grid import LONGEST, STEPS, Array
from shadecast.types import HORIZONS_S, QUANTILES, RESOURCES, Forecast

Kind = Literal["perfect", "realistic", "wrong"]
_Z90 = 1.2816
_CALM_SIGMA = 0.03
_MIN_SPEED = 0.02
_SLOW = 0.6
"""Speed below which a node counts as slow for alarms."""
_PRIOR_SKILL = 0.3
_PRIOR_PRECISION = 0.8
_TREND_S = 1.0
"""How long memory must have climbed before its end is foreseen."""
_REAL_HORIZON_S = 10.0


@dataclass(frozen=True, slots=True)
class _Change:
    """What is foreseen of one disturbance."""

    onset: bool
    end: bool
    factor: float


class NodeForecaster:
    """One node's simulated forecaster; call `make` once a second."""

    def __init__(self, kind: Kind, trace: NodeTrace, quality: ForecastQuality, known: bool, rng: random.Random) -> None:
        """`trace` is the future that is shown (another node's for `wrong`); `known`: it is announced, hence exact."""
        self._kind = kind
        self._trace = trace
        self._quality = quality
        self._exact = kind == "perfect" or known
        self._changes = [
            _Change(rng.random() < quality.recall, rng.random() < quality.recall, math.exp(rng.gauss(0, quality.error)))
            for _ in trace.events
        ]
        self._false = self._false_alarms(rng) if kind == "realistic" and not known else []
        self._trust = None if kind == "perfect" else _Trust()

    def _false_alarms(self, rng: random.Random) -> list[tuple[float, float, float]]:
        """(onset, end, speed) of drops that will be foreseen and not come."""
        found = []
        at_s = 0.0
        last_s = self._trace.times_s[-1] + 600.0
        while self._quality.false_alarms_per_s > 0.0:
            at_s += rng.expovariate(self._quality.false_alarms_per_s)
            if at_s > last_s:
                break
            found.append((at_s, at_s + rng.uniform(10.0, 20.0), rng.uniform(0.2, 0.5)))
        return found

    def make(self, now_s: float, load_now: float, memory_now: float) -> Forecast:
        """The forecast at `now_s`, when telemetry shows `load_now` and `memory_now`."""
        cpu = [self._cpu(now_s, horizon_s, load_now) for horizon_s in HORIZONS_S]
        memory = [self._memory(now_s, horizon_s, memory_now) for horizon_s in HORIZONS_S]
        calm = tuple((0.0, 0.05, 0.1) for _ in HORIZONS_S)
        quantiles = {"cpu": tuple(cpu), "memory": tuple(memory), "network": calm}
        if self._trust is None:
            full = dict.fromkeys(RESOURCES, 1.0)
            return Forecast(quantiles, skill=full, gate=full, model_version=self._kind, veto_allowed=True)
        trust = self._trust
        trust.learn(np.asarray([cpu, memory], np.float32), load_now, memory_now)
        return Forecast(
            quantiles, skill=trust.skill, gate=trust.gate, model_version=self._kind, veto_allowed=trust.veto_allowed
        )

    def _cpu(self, now_s: float, horizon_s: float, load_now: float) -> tuple[float, float, float]:
        current = max(1.0 - load_now, _MIN_SPEED)
        at_s = now_s + horizon_s
        if self._exact:
            speed = max(self._trace.speed_at(at_s), _MIN_SPEED) if self._trace.visible else current
            return _quantiles(speed, _CALM_SIGMA)
        speed = self._foreseen(now_s, at_s, current)
        changed = abs(math.log(speed / current)) > 0.1
        return _quantiles(speed, self._quality.error if changed else _CALM_SIGMA)

    def _foreseen(self, now_s: float, at_s: float, current: float) -> float:
        trace, in_view = self._trace, at_s - now_s <= _REAL_HORIZON_S - self._quality.delay_s
        if not trace.visible or not in_view:
            return current
        for k, event in enumerate(trace.events):
            if event.end_s <= now_s or event.kind == "crash":
                continue
            if event.start_s > at_s:
                break
            change = self._changes[k]
            if event.start_s <= now_s:  # under way: the way down is known if it was foreseen, the way out if seen
                if at_s >= event.end_s:
                    return max(trace.speed_at(at_s), _MIN_SPEED) if change.end else current
                return min(trace.speed_at(at_s) * change.factor, 1.0) if change.onset else current
            if not change.onset:
                continue
            if at_s >= event.end_s and change.end:
                continue
            return min(max(trace.speed_at(min(at_s, event.end_s - 1e-6)), _MIN_SPEED) * change.factor, 1.0)
        for start_s, end_s, speed in self._false:
            if now_s < start_s <= at_s < end_s:
                return min(speed, current)
        return current

    def _memory(self, now_s: float, horizon_s: float, memory_now: float) -> tuple[float, float, float]:
        value = memory_now
        if self._trace.memory_climbs:
            at_s = now_s + horizon_s
            for k, (down_s, up_s) in enumerate(self._trace.downs_s):
                climbing = now_s >= down_s - LONGEST + _TREND_S or self._exact
                foreseen = self._exact or (climbing and self._changes[k].onset)
                if now_s < down_s and at_s < up_s and foreseen:
                    value = max(value, self._trace.memory_at(at_s))
        sigma = 0.01 if value == memory_now else 0.03
        return max(value - _Z90 * sigma, 0.0), value, min(value + _Z90 * sigma, 1.0)


def _quantiles(speed: float, sigma: float) -> tuple[float, float, float]:
    spread = math.exp(_Z90 * sigma)
    return max(1.0 - speed * spread, 0.0), max(1.0 - speed, 0.0), min(1.0 - speed / spread, 1.0)


class _Trust:
    """Skill, gate and alarm record of one node's forecasts of CPU and memory, against the last value with quantiles."""

    def __init__(self) -> None:
        shape = (1, 2, 2, len(STEPS))
        self._gate = SkillGate(shape, np.full((1, 2, len(STEPS)), _PRIOR_SKILL, np.float32))
        self._correction = QuantileCorrection((1, 2, len(STEPS)))
        self._alarms = AlarmRecord(1, prior=_PRIOR_PRECISION)
        self._issued: list[Array] = []
        self.skill = dict.fromkeys(RESOURCES, _PRIOR_SKILL)
        self.gate = dict.fromkeys(RESOURCES, 1.0)
        self.veto_allowed = True

    def learn(self, quantiles: NDArray[np.float32], load_now: float, memory_now: float) -> None:
        """Judge what was forecast for now; remember `quantiles` [target, horizon, quantile]."""
        truth = np.asarray([load_now, memory_now], np.float32)
        last = np.repeat(truth[None, :, None, None], len(STEPS), axis=2).repeat(len(QUANTILES), axis=3)
        scale = np.full((1, 2, len(STEPS)), 0.1, np.float32)
        baseline = self._correction.apply(last, scale)
        experts = np.stack([quantiles[None], baseline], axis=2)  # [1, target, expert, horizon, quantile]
        if len(self._issued) == LONGEST:
            due = np.stack([self._issued[-step][..., i, :] for i, step in enumerate(STEPS)], axis=-2)
            target = np.broadcast_to(truth[None, :, None], (1, 2, len(STEPS)))
            self._correction.learn(due[:, :, 1], target)
            self._gate.learn(pinball(due, np.broadcast_to(truth[None, :, None, None], due.shape[:-1])))
            gate, skill = self._gate.gate()[0].mean(axis=-1), self._gate.skill()[0].mean(axis=-1)
            self.gate = {"cpu": float(gate[0]), "memory": float(gate[1]), "network": 0.0}
            self.skill = {"cpu": float(skill[0]), "memory": float(skill[1]), "network": 0.0}
            self._issued.pop(0)
        self._issued.append(experts)
        alarm = bool((quantiles[0, :, 1] > 1.0 - _SLOW).any() or (quantiles[1, :, 1] > 0.92).any())
        slow = load_now > 1.0 - _SLOW or memory_now > 0.92
        self._alarms.step(np.asarray([alarm and not slow]), np.asarray([slow]))
        self.veto_allowed = bool(self._alarms.precision()[0] >= 0.7)
