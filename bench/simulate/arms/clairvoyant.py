"""The bound: greedy with true sizes, true queues and the nodes' future speeds."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm

if TYPE_CHECKING:
    from bench.simulate.engine import Request


class Clairvoyant(Arm):
    """The replica on which this request would end first, if nothing more came.

    Sizes of all requests there, the queue's order and the speed of each node at all times are known. Greedy: the
    request's own end is minimised, not the sum over all (which would need the arrivals to come, too).
    """

    sticky = False

    def pick(self, request: Request) -> int:
        """The least predicted end; ties at random."""
        members = self.sim.members
        if not members:
            return -1
        start = int(self.rng.random() * len(members))
        best, best_s = -1, 0.0
        for k in range(len(members)):
            member = members[k + start - len(members)]
            end_s = self.ends_s(request, member)
            if best < 0 or end_s < best_s:
                best, best_s = member, end_s
        return best

    def ends_s(self, request: Request, member: int) -> float:
        """When the request would end on `member`."""
        replica = self.sim.replicas[member]
        work_s = request.work_s
        session = request.session
        if session is not None and 0 <= session.replica != member:
            work_s += self.sim.move_cost_s
        trace = self.world.nodes[replica.node]
        served = trace.served(self.sim.now_s)
        share = self.sim.share
        if replica.running < replica.max_active:
            # a place is free; with batching the occupancy stays about as it is, since others come as these leave
            return trace.when_served(served + work_s / share[replica.running + 1])
        active, waiting = replica.works_left()
        if share[-1] < 1.0:
            wait = (active[0] + sum(waiting) / replica.max_active) / share[-1]
        else:
            for work in waiting:  # FIFO slots: list scheduling; `active` ascends, so it is a heap
                heapq.heapreplace(active, active[0] + work)
            wait = active[0]
        return trace.when_served(served + wait + work_s / share[-1])
