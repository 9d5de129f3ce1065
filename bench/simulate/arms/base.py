"""What a routing policy is to the simulator."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World


class Arm(ABC):
    """One policy for all routers of a run; state that routers do not share is kept per router.

    The engine calls `start` once, `on_members` when replicas join or leave, then for every request `pick`, `on_sent`
    and `on_done` (also for one that was lost with its replica). `pick` returns an index into `sim.replicas`, or -1 to
    be asked again after `backoff_s`.
    """

    sticky = True
    """Whether the simulator keeps sessions in place for this arm (`sticky.Sticky`); False where it does so itself."""

    sim: Simulation
    world: World
    rng: random.Random

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Bind to a run, before any replica has joined."""
        self.sim, self.world, self.rng = sim, world, rng

    @abstractmethod
    def pick(self, request: Request) -> int:
        """The replica for a request that has come to `request.router` now."""

    def score(self, request: Request, replica: int) -> float:
        """How bad one replica looks to the request's router; decides whether a session moves."""
        return 1.0 + self.sim.mine[request.router][replica]

    def on_members(self) -> None:  # noqa: B027 - hooks are optional
        """`sim.members` has changed."""

    def on_sent(self, request: Request) -> None:  # noqa: B027 - hooks are optional
        """`request.replica` has accepted the request."""

    def on_done(self, request: Request, ok: bool) -> None:  # noqa: B027 - hooks are optional
        """The request has left its replica."""

    def on_rejected(self, request: Request, replica: int) -> None:  # noqa: B027 - hooks are optional
        """`replica` was full."""

    def extra_metrics(self) -> dict[str, float]:
        """Counters of the arm itself, after the run."""
        return {}

    def backoff_s(self, attempt: int) -> float:
        """Pause before a request that found no place is routed again (Ray 2.60: 25 ms, doubling to 500 ms)."""
        return min(0.025 * 2.0 ** (attempt - 1), 0.5) if attempt < 10 else 0.5


def two_of(rng: random.Random, members: list[int]) -> tuple[int, int]:
    """Two different members at random (the same one twice if there is only one)."""
    count = len(members)
    a = int(rng.random() * count)
    if count == 1:
        return members[0], members[0]
    b = int(rng.random() * (count - 1))
    return members[a], members[b + 1 if b >= a else b]
