"""Peak-EWMA: power of two choices by a latency average that jumps up at once and comes down slowly.

Source: twitter/finagle `loadbalancer/PeakEwma.scala` and `util/Ema.scala`, decay 10 s (`Balancers.p2cPeakEwma`): cost =
ewma(rtt) x (pending + 1); a value above the average replaces it; reading the load decays it; a node without history
that has requests pending gets a penalty.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm, two_of

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World

DECAY_S = 10.0
PENALTY = 1e6


class _Average:
    __slots__ = ("at_s", "value")

    def __init__(self) -> None:
        self.at_s = -1.0
        self.value = 0.0

    def observe(self, now_s: float, latency_s: float) -> float:
        if latency_s > self.value or self.at_s < 0.0:
            self.value = latency_s
        else:
            weight = math.exp(-(now_s - self.at_s) / DECAY_S)
            self.value = latency_s * (1.0 - weight) + self.value * weight
        self.at_s = now_s
        return self.value


class PeakEwma(Arm):
    """Two at random, the smaller peak-EWMA cost; each router has its own averages."""

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """No history."""
        super().start(sim, world, rng)
        self._averages: list[dict[int, _Average]] = [{} for _ in range(sim.routers)]

    def pick(self, request: Request) -> int:
        """The cheaper of two."""
        if not self.sim.members:
            return -1
        a, b = two_of(self.rng, self.sim.members)
        return a if self.score(request, a) <= self.score(request, b) else b

    def score(self, request: Request, replica: int) -> float:
        """Decayed latency times pending + 1."""
        pending = self.sim.mine[request.router][replica]
        average = self._averages[request.router].get(replica)
        cost = average.observe(self.sim.now_s, 0.0) if average is not None else 0.0
        if cost <= 0.0 and pending:
            return PENALTY + pending
        return cost * (pending + 1)

    def on_done(self, request: Request, ok: bool) -> None:
        """Learn the round-trip time."""
        averages = self._averages[request.router]
        average = averages.get(request.replica)
        if average is None:
            average = averages[request.replica] = _Average()
        average.observe(self.sim.now_s, self.sim.now_s - request.sent_s)
