"""Whether there is time for trials: what serves is about to be overloaded, is crowded already, or is being replaced."""

from __future__ import annotations

from shadecast.estimates import Estimates
from shadecast.fleet import Fleet, Replica

STEP_S = 1.0
"""Least time on a step of the ramp where there is no time: two ticks, in which errors show."""


class Urgency:
    """Why there is no time for trials."""

    def __init__(self, fleet: Fleet, estimates: Estimates) -> None:
        self._fleet, self._estimates = fleet, estimates
        self._able_before = 0.0
        """What served, in nominal replicas, before Serve began to replace some."""

    def note_serving(self) -> None:
        """Remember what serves, unless Serve is replacing it."""
        if not self._fleet.is_replacing():
            self._able_before = self._fleet.able(self._fleet.serving())

    def why(self) -> str:
        """The reason in words, "" if there is time.

        Load and queues say so only once the service curve is known: what looks like a queue may be parallel work.
        """
        serving, curve = self._fleet.serving(), self._estimates.curve
        if not curve.learned:
            halved = self._able_without_next(serving) < self._fleet.config.balance.panic_fraction * self._able_before
            return "less than half of what served will be left" if halved and self._fleet.is_replacing() else ""
        load = self._foreseen_load(serving)
        if load > self._fleet.config.balance.urgent_load:
            return f"predicted load {load:.2f} of what serves"
        crowded = sum(r.queue for r in serving) > curve.slots * len(serving)
        return "more wait than are served" if crowded else ""

    def _foreseen_load(self, serving: list[Replica]) -> float:
        """Predicted load of the replicas that serve; while Serve replaces them, of those that the next one leaves."""
        load = self._estimates.load
        if len(serving) < 2 or not self._fleet.is_replacing():
            return load
        return load * self._fleet.able(serving) / max(self._able_without_next(serving), 1e-9)

    def _able_without_next(self, serving: list[Replica]) -> float:
        ramp = self._fleet.config.trial.ramp
        next_one = max(serving, key=lambda r: r.capacity * r.connection.share(ramp), default=None)
        return self._fleet.able([r for r in serving if r is not next_one])
