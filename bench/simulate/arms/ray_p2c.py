"""Ray Serve's default router: power of two choices over cached queue lengths.

Source: Ray 2.60, `serve/_private/request_router/`: `pow_2_router.py` (two candidates), `common.py`
(`ReplicaQueueLengthCache`, entries valid for 10 s), `request_router.py` (`_select_from_candidate_replicas`: cached
entries decide; a candidate without a valid one, or whose entry says full, is probed, in the background when the other
candidate can be used and before the choice when it cannot; `on_send_request` adds one; `decrement_queue_len_cache`
takes one off at completion) and `router.py` (the replica's answer to the request carries its true number of ongoing
requests, this one included, and sets the entry: `on_new_queue_len_info`).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm, two_of

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World

CACHE_TIMEOUT_S = 10.0
HANDSHAKE_S = 0.002
"""From sending a request or probe until the router knows the replica's answer."""


class RayPowerOfTwo(Arm):
    """Two at random, the shorter cached queue."""

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Empty caches."""
        super().start(sim, world, rng)
        self._cache: list[dict[int, tuple[int, float]]] = [{} for _ in range(sim.routers)]

    def on_members(self) -> None:
        """Forget replicas that are gone; probe new ones (`update_replicas` fills the cache for them)."""
        members = set(self.sim.members)
        for router, cache in enumerate(self._cache):
            for gone in [replica for replica in cache if replica not in members]:
                del cache[gone]
            for replica in members - cache.keys():
                self._probe(router, replica)

    def pick(self, request: Request) -> int:
        """As `_select_from_candidate_replicas`."""
        members = self.sim.members
        if not members:
            return -1
        router = request.router
        pair = two_of(self.rng, members)
        candidates = pair if pair[0] != pair[1] else pair[:1]
        chosen, least = -1, 0
        unknown: list[int] = []
        for replica in candidates:
            known = self._cached(router, replica)
            if known is None or known >= self.sim.max_ongoing:
                unknown.append(replica)
            elif chosen < 0 or known < least:
                chosen, least = replica, known
        if chosen < 0:  # probe and wait for the answer, which takes no time here
            for replica in unknown:
                length = self.sim.replicas[replica].load()
                self._cache[router][replica] = (length, self.sim.now_s)
                if length < self.sim.max_ongoing and (chosen < 0 or length < least):
                    chosen, least = replica, length
        else:
            for replica in unknown:
                self._probe(router, replica)
        return chosen

    def on_sent(self, request: Request) -> None:
        """Add one at once; a moment later the replica's own number arrives."""
        router, replica = request.router, request.replica
        self._cache[router][replica] = ((self._cached(router, replica) or 0) + 1, self.sim.now_s)
        self._learn_later(router, replica, request.others + 1)

    def on_rejected(self, request: Request, replica: int) -> None:
        """A rejection carries the true length too."""
        self._learn_later(request.router, replica, self.sim.replicas[replica].load())

    def on_done(self, request: Request, ok: bool) -> None:
        """Take one off, if there still is an entry."""
        router, replica = request.router, request.replica
        known = self._cached(router, replica)
        if known is not None:
            self._cache[router][replica] = (max(known - 1, 0), self.sim.now_s)

    def score(self, request: Request, replica: int) -> float:
        """One more than the cached queue."""
        return 1.0 + (self._cached(request.router, replica) or 0)

    def _cached(self, router: int, replica: int) -> int | None:
        entry = self._cache[router].get(replica)
        if entry is None or self.sim.now_s - entry[1] > CACHE_TIMEOUT_S:
            return None
        return entry[0]

    def _probe(self, router: int, replica: int) -> None:
        self._learn_later(router, replica, self.sim.replicas[replica].load())

    def _learn_later(self, router: int, replica: int, length: int) -> None:
        self.sim.at(self.sim.now_s + HANDSHAKE_S, self._learn, (router, replica, length))

    def _learn(self, news: tuple[int, int, int]) -> None:
        router, replica, length = news
        if self.sim.replicas[replica].alive:
            self._cache[router][replica] = (length, self.sim.now_s)
