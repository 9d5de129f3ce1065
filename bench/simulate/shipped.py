"""What is shipped, on simulated telemetry: the very loop that runs on every node, with the shipped model.

The other forecasts of the simulator have a quality that a scenario sets. This one has its own: the model with its gate,
the detector of disturbances that recur, announced events. No precursor shows in the telemetry of a random neighbour, so
of such a drop it can foresee the end at best.
"""

from __future__ import annotations

from functools import cache

import torch

from actors.node_forecaster import NodeForecaster as NodeLoop
from actors.telemetry import Sample
from bench.recordings import IDLE
from bench.simulate.nodes import NodeTrace
from models.forecaster import Model
from models.registry import SHIPPED, Registry
from shadecast.types import Forecast, NodeReport, NodeSnapshot

_NO_RECORDING = (0.0, 0.0, 0.05, float("nan"), float("nan"), float("nan"))
"""Channels of a scenario that has none of its own beside CPU and memory."""
_GAP_S = 5.0
"""A node that was silent for longer comes back with a new forecaster."""


@cache
def _champion() -> Model:
    torch.set_num_threads(1)
    registry = Registry(str(SHIPPED))
    return registry.load(registry.champion())


class ShippedForecaster:
    """One node's; `trace` is read for what is announced, and for the recorded channels of this moment."""

    def __init__(self, trace: NodeTrace, announced: bool) -> None:
        self._trace = trace
        self._announced = announced
        self._now_s = 0.0
        self._sample = Sample(NodeSnapshot(), "simulated")
        self._loop = self._begin()

    def _begin(self) -> NodeLoop:
        loop = NodeLoop("", self, _drop, lambda: self._now_s, lambda: self._now_s)
        loop.use(_champion())
        if self._announced:
            for event in self._trace.events:
                if event.end_s > self._now_s:
                    start_s = max(event.start_s, self._now_s)
                    strength = 1.0 - self._trace.speed_at(start_s)
                    loop.announce(start_s - self._now_s, event.end_s - start_s, strength)
        return loop

    def read(self) -> Sample:
        """The sample that the node's loop takes."""
        return self._sample

    def make(self, now_s: float, load_now: float, memory_now: float) -> Forecast | None:
        """The forecast at `now_s`, when telemetry shows `load_now` and `memory_now`; None for the first samples."""
        silent_s, self._now_s = now_s - self._now_s, now_s
        if silent_s > _GAP_S:
            self._loop = self._begin()
        rows = self._trace.shown(now_s) or IDLE if self._trace.plays else _NO_RECORDING
        network, switches, load1, disk = rows[2:]
        snapshot = NodeSnapshot(load_now, load_now, memory_now, network, network)
        self._sample = Sample(
            snapshot, "simulated", disk_busy_fraction=disk, load1=load1, context_switches_per_s=switches
        )
        report = self._loop.tick()
        if self._loop.failures:
            raise RuntimeError("the shipped forecaster failed on simulated telemetry; the log says how")
        return report.forecast


def _drop(report: NodeReport) -> None:
    """Reports reach the coordinator through the arm."""
