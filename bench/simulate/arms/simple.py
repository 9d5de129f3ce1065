"""Random and round robin."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World


class RandomChoice(Arm):
    """Uniformly at random, blind to load."""

    def pick(self, request: Request) -> int:
        """Any member."""
        members = self.sim.members
        return members[int(self.rng.random() * len(members))] if members else -1


class RoundRobin(Arm):
    """Each router cycles through the replicas from its own random start.

    Source: Ray 2.60 `serve/experimental/round_robin_router.py` (a cursor per router, random start, the next in line
    when one is full).
    """

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Random cursors."""
        super().start(sim, world, rng)
        self._cursor = [rng.randrange(1 << 30) for _ in range(sim.routers)]

    def pick(self, request: Request) -> int:
        """The next member in line."""
        members = self.sim.members
        if not members:
            return -1
        self._cursor[request.router] += 1
        return members[self._cursor[request.router] % len(members)]
