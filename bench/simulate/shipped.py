"""The shipped model on simulated telemetry: what a node's forecaster would have said, with its real quality.

The other forecasts of the simulator have a quality that a scenario sets. This one has its own: no precursor shows in
the telemetry of a random antagonist, so of such a drop it can foresee the end at best.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from bench.simulate.nodes import NodeTrace
from models.forecaster import Model, OnlineForecaster, forecast_of
from models.grid import CHANNELS
from models.registry import SHIPPED, Registry
from shadecast.types import HORIZONS_S, Forecast

_NETWORK = 0.05
_GAP_S = 5.0
"""As a node's forecaster: after a longer silence it starts afresh."""


@cache
def _champion() -> Model:
    torch.set_num_threads(1)
    registry = Registry(str(SHIPPED))
    return registry.load(registry.champion())


class ShippedForecaster:
    """One node's; `trace` is read only for what is announced."""

    def __init__(self, trace: NodeTrace, announced: bool) -> None:
        self._trace = trace
        self._announced = announced
        self._online = OnlineForecaster(_champion())
        self._last_s = 0.0

    def make(self, now_s: float, load_now: float, memory_now: float) -> Forecast | None:
        """The forecast at `now_s`, when telemetry shows `load_now` and `memory_now`; None for the first samples."""
        if now_s - self._last_s > _GAP_S:
            self._online.forget()
        self._last_s = now_s
        values = np.full((1, len(CHANNELS)), np.nan, np.float32)
        values[0, :3] = load_now, memory_now, _NETWORK
        announced = None
        if self._announced:
            strengths = [1.0 - self._trace.speed_at(now_s + ahead_s) for ahead_s in HORIZONS_S]
            announced = np.asarray([strengths], np.float32)
        return forecast_of(self._online.step(values, announced), self._online.model.version, announced)
