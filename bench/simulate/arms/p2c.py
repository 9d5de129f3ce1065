"""Power of two choices, with a router's own counts and with true queue lengths.

Source: Mitzenmacher, The power of two choices in randomized load balancing (IEEE TPDS 2001).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm, two_of

if TYPE_CHECKING:
    from bench.simulate.engine import Request


class LocalPowerOfTwo(Arm):
    """Of two at random, the one with fewer of this router's own requests (Envoy, finagle least-loaded)."""

    def pick(self, request: Request) -> int:
        """The less used of two."""
        if not self.sim.members:
            return -1
        a, b = two_of(self.rng, self.sim.members)
        mine = self.sim.mine[request.router]
        return a if mine[a] <= mine[b] else b


class TruePowerOfTwo(Arm):
    """Of two at random, the one that a free and instant probe shows to have fewer requests, of all routers."""

    def pick(self, request: Request) -> int:
        """The less loaded of two."""
        if not self.sim.members:
            return -1
        a, b = two_of(self.rng, self.sim.members)
        replicas = self.sim.replicas
        return a if replicas[a].load() <= replicas[b].load() else b

    def score(self, request: Request, replica: int) -> float:
        """One more than the true queue."""
        return 1.0 + self.sim.replicas[replica].load()
