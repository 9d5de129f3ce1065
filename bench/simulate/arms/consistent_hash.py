"""Consistent hashing on the session id."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from bench.simulate.arms.base import Arm

if TYPE_CHECKING:
    from bench.simulate.engine import Request

_VIRTUAL_NODES = 100


class ConsistentHash(Arm):
    """A ring with 100 virtual nodes a replica, keyed by session, or by request where there is none.

    Source: Ray 2.60 `serve/experimental/consistent_hash_router.py` (same number of virtual nodes; the clockwise
    successor is tried when a replica is full). The hash here is splitmix64 instead of MurmurHash3.
    """

    sticky = False

    def on_members(self) -> None:
        """Lay the ring out anew."""
        points = sorted(
            (_splitmix64((member << 20) + k), member) for member in self.sim.members for k in range(_VIRTUAL_NODES)
        )
        self._hashes = [point for point, _ in points]
        self._owners = [owner for _, owner in points]

    def pick(self, request: Request) -> int:
        """The owner of the request's point; after rejections the next different ones."""
        if not self._owners:
            return -1
        key = request.session.id if request.session is not None else request.id
        at = bisect_left(self._hashes, _splitmix64(key ^ 0xF9B4CA77))
        seen: list[int] = []
        for k in range(len(self._owners)):
            owner = self._owners[(at + k) % len(self._owners)]
            if owner not in seen:
                seen.append(owner)
                if len(seen) > request.attempts % 3:
                    return owner
        return seen[-1]


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
