"""Least requests, by what each router itself has under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm

if TYPE_CHECKING:
    from bench.simulate.engine import Request


class LeastRequests(Arm):
    """The replica with the fewest of this router's own requests, ties at random.

    Source: nginx `least_conn` and Envoy `LEAST_REQUEST` in full-scan mode; each proxy counts only its own.
    """

    def pick(self, request: Request) -> int:
        """The member that this router uses least."""
        members = self.sim.members
        if not members:
            return -1
        mine = self.sim.mine[request.router]
        start = int(self.rng.random() * len(members))
        best, least = -1, 0
        for k in range(len(members)):
            member = members[k + start - len(members)]
            count = mine[member]
            if best < 0 or count < least:
                best, least = member, count
        return best
