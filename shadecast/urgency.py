"""Whether there is time for trials: what serves is about to be overloaded, is crowded already, or has become few."""

from __future__ import annotations

from shadecast.estimates import Estimates
from shadecast.fleet import Fleet

STEP_S = 1.0
"""Least time on a step of the ramp: two ticks, in which errors show."""
_REMEMBERED_HALF_LIFE_S = 60.0


class Urgency:
    """Why there is no time for trials."""

    def __init__(self, fleet: Fleet, estimates: Estimates) -> None:
        self._fleet, self._estimates = fleet, estimates
        self._served = 0.0
        """The most replicas that served lately, by their shares; a machine that slows down is none that is gone."""

    def update(self, elapsed_s: float) -> None:
        """Once a tick."""
        faded = self._served * 0.5 ** (elapsed_s / _REMEMBERED_HALF_LIFE_S)
        self._served = max(faded, self._fleet.shares(self._fleet.serving()))

    def why(self) -> str:
        """The reason in words, "" if there is time."""
        fleet, curve = self._fleet, self._estimates.curve
        serving = fleet.serving()
        if fleet.waiting >= max(len(serving), 1):
            return f"{fleet.waiting} requests wait for a replica"
        if fleet.shares(serving) < fleet.config.balance.panic_fraction * self._served:
            return "less than half of what served is left"
        if not curve.learned:
            return ""  # what looks like a queue may be parallel work
        if self._estimates.load > fleet.config.balance.urgent_load:
            return f"predicted load {self._estimates.load:.2f} of what serves"
        crowded = sum(r.queue for r in serving) > curve.slots * len(serving)
        return "more wait than are served" if crowded else ""
