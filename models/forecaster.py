"""A trained model at work: features, net, baselines, correction and gate stepped together, one sample at a time.

One node live and a benchmark over many recordings run exactly this code; only `series` differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from models.baselines import NAMES, Baselines, Ridge
from models.calibration import AlarmRecord, QuantileCorrection, Ring, SkillGate, pinball
from models.features import Features
from models.grid import N_HEADS, N_HORIZONS, N_TARGETS, TARGETS, Array
from models.headroom import headroom_errors
from models.lstm import ForecastNet, State
from shadecast.capacity import VETO_SPEED
from shadecast.types import QUANTILES, Forecast

MIN_SAMPLES = 10
SLOW_LOAD = 0.4
"""Of the node's CPU, taken by others: beyond it the node is slow."""
VETO_PRECISION = 0.7
_CPU = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A version's tensors. `ridge` one per target; `residuals` [target, baseline, horizon, quantile] in multiples of
    what the baseline is usually off by on the node; `prior_skill` [target, horizon] from the backtest, NaN where there
    was none.
    """

    version: str
    net: ForecastNet
    ridge: tuple[Ridge, ...]
    residuals: Array
    prior_skill: Array
    alarm_precision: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """One step's forecasts for all series, in the unit of the values fed.

    `quantiles` [series, target, horizon, quantile] of the model, corrected; `gated` the same where the gate is open,
    the best baseline's where it is closed; `skill` and `gate` [series, target, horizon]; `alarm` [series]
    whether a node that is well will be slow within the horizons, more likely than not; `ready` [series, target] whether
    the value is known now and enough came before.
    """

    quantiles: Array
    gated: Array
    skill: Array
    gate: Array
    alarm: Array
    veto_allowed: Array
    ready: Array


@dataclass(slots=True)
class OnlineForecaster:
    """Steps `series` nodes through one model. Upper bounds: fractions never leave [0, 1], rates never fall below 0."""

    model: Model
    series: int = 1
    ceiling: tuple[float, ...] = (1.0, 1.0, 1.0)
    _features: Features = field(init=False)
    _baselines: Baselines = field(init=False)
    _state: State | None = None
    _correction: QuantileCorrection = field(init=False)
    _gate: SkillGate = field(init=False)
    _issued: Ring = field(init=False)
    _alarms: AlarmRecord = field(init=False)
    _samples: Array = field(init=False)
    experts: Array = field(init=False)
    """Corrected quantiles of the model and each baseline, [series, target, expert, horizon, quantile]."""
    headroom_error: tuple[float, float] = (math.nan, math.nan)
    """Of series 0 at the last step: mean squared error, over horizons, of the log headroom of the CPU that the model,
    and the last value, had expected; NaN where one of them had nothing to say."""
    points: Array = field(init=False)
    """Point forecasts of the baselines at the last step, [series, target, baseline, horizon]."""

    def __post_init__(self) -> None:
        self._samples = np.zeros((self.series, N_TARGETS), np.float32)
        self._features = Features(self.series, self.model.net.config.extended)
        self._baselines = Baselines(self.series, self.model.ridge)
        self._start_scoring()

    def _start_scoring(self) -> None:
        shape = (self.series, N_TARGETS, 1 + len(NAMES), N_HORIZONS)
        prior = None if np.isnan(self.model.prior_skill).all() else np.nan_to_num(self.model.prior_skill)[None]
        self._state = None
        self.headroom_error = (math.nan, math.nan)
        self._correction = QuantileCorrection(shape)
        self._gate = SkillGate(shape, prior)
        self._issued = Ring((*shape, len(QUANTILES)))
        self._alarms = AlarmRecord(self.series, self.model.alarm_precision)

    def swap(self, model: Model) -> None:
        """Go on with another version: what was learned about the node stays, what was learned about the model goes."""
        if model.net.config.extended != self.model.net.config.extended:
            self._features = Features(self.series, model.net.config.extended)  # of other channels: it starts anew
        self.model = model
        self._baselines.ridge = model.ridge
        self._start_scoring()

    def forget(self) -> None:
        """Start afresh, as after a long gap."""
        self.__post_init__()

    def live_skill(self) -> dict[str, float]:
        """Recent skill of series 0 by target, mean over horizons."""
        return {name: float(self._gate.skill()[0, t].mean()) for t, name in enumerate(TARGETS)}

    def step(self, values: Array, announced: Array | None = None) -> Prediction:
        """Take one sample [series, channel], NaN where missing; `announced` [series, horizon] known events."""
        step = self._features.step(values, announced)
        targets = np.asarray(values, np.float32)[:, :N_TARGETS]
        self._judge(targets)
        model = self._run(step.inputs, step.anchors, step.spread)
        points = self.points = self._baselines.step(targets)
        usual = self._baselines.usual_error(step.scale)
        simple = points[..., None] + self.model.residuals * usual[..., None]
        experts = np.concatenate([model[:, :, None], simple], axis=2)
        units = np.concatenate([step.spread[:, :, None, :N_HORIZONS], usual], axis=2)
        experts = self._bounded(self._correction.apply(experts, units))
        self.experts = experts
        self._issued.push(np.where(step.ready[:, :, None, None, None], experts, np.nan))
        gate, skill = self._gate.gate(), self._gate.skill()
        best = np.take_along_axis(experts, self._gate.best_baseline()[:, :, None, :, None], axis=2)[:, :, 0]
        gated = np.where(self._gate.is_open[..., None], experts[:, :, 0], best)
        self._samples += step.ready
        load = targets[:, _CPU]
        alarm = (load <= SLOW_LOAD) & (experts[:, _CPU, 0, :, 1].max(axis=-1) > SLOW_LOAD)
        self._alarms.step(alarm, load > SLOW_LOAD)
        ready = step.ready & (self._samples >= MIN_SAMPLES)
        return Prediction(
            quantiles=experts[:, :, 0],
            gated=gated,
            skill=skill,
            gate=gate,
            alarm=alarm,
            veto_allowed=self._alarms.precision() >= VETO_PRECISION,
            ready=ready,
        )

    def _judge(self, targets: Array) -> None:
        """Compare what is due with what came, before anything new is forecast."""
        due = self._issued.due()
        truth = np.broadcast_to(targets[:, :, None, None], due.shape[:-1])
        self._correction.learn(due, truth)
        self._gate.learn(pinball(due, truth))
        model, last = (headroom_errors(due[0, _CPU, :2], truth[0, _CPU, :2]) ** 2).mean(
            axis=-1
        )  # NAMES begins with last_value
        self.headroom_error = (float(model), float(last))

    def _run(self, inputs: Array, anchors: Array, spread: Array) -> Array:
        def rows(x: Array) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(x, np.float32)).flatten(0, 1).unsqueeze(1)

        with torch.inference_mode():
            found, self._state = self.model.net(rows(inputs), rows(anchors), rows(spread), self._state)
        quantiles: Array = found[:, 0].reshape(self.series, N_TARGETS, N_HEADS, -1).numpy()
        return quantiles[:, :, :N_HORIZONS]

    def _bounded(self, quantiles: Array) -> Array:
        top = np.asarray(self.ceiling, np.float32).reshape(1, N_TARGETS, 1, 1, 1)
        return np.clip(quantiles, 0.0, top)


def forecast_of(prediction: Prediction, version: str, announced: Array | None = None) -> Forecast | None:
    """The message of series 0; None while CPU is unknown or too few samples have come.

    What was `announced` [series, horizon] is known, not forecast: it counts in full whatever the model's skill, and
    around it the best forecast, gated, stands in for the model's. It allows a veto if it leaves so little itself.
    """
    ready = prediction.ready[0]
    if not ready[_CPU]:
        return None
    known = [t for t in range(N_TARGETS) if ready[t] and np.isfinite(prediction.quantiles[0, t]).all()]

    def pooled(values: Array) -> dict[str, float]:
        return {TARGETS[t]: float(values[0, t].mean()) for t in known}

    rows = {TARGETS[t]: prediction.quantiles[0, t] for t in known}
    gate, veto_allowed = pooled(prediction.gate), bool(prediction.veto_allowed[0])
    if announced is not None and announced[0].any() and _CPU in known:
        rows[TARGETS[_CPU]] = np.maximum(prediction.gated[0, _CPU], announced[0][:, None])
        gate[TARGETS[_CPU]] = 1.0
        veto_allowed = veto_allowed or bool(announced.max() > 1.0 - VETO_SPEED)
    return Forecast(
        quantiles={name: tuple(tuple(map(float, row)) for row in each) for name, each in rows.items()},
        skill=pooled(prediction.skill),
        gate=gate,
        model_version=version,
        veto_allowed=veto_allowed,
    )
