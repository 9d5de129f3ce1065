"""Weighted rendezvous hashing: every router finds the same replica for a session, without a shared map.

Each replica draws an exponential time -ln(h) / w from the hash h in (0, 1) of (session, replica) and its weight w; the
least wins (Thaler and Ravishankar 1998; weights after Schindelhauer and Schomaker 2005: the same order as the greatest
-w / ln h). A replica wins in proportion to its weight. One that leaves moves only its own sessions, one that joins or
gains weight only takes the share that it gains, and the order of the replicas is of no consequence.

Keys are hashed with a secret, so that a client cannot choose its node by choosing its session id.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele, Lea and Flood 2014)
_LN_RANGE = math.log(2.0**64)
_LOOP_UP_TO = 16
"""With more replicas numpy is faster than a plain loop (measured)."""
_HEAD = 512
"""Of a long session id, so many characters from each end are hashed, and its length."""


def session_key(session_id: str | bytes, secret: bytes) -> int:
    """64-bit key of a session. Takes any text and any length in bounded time; `secret` counts up to 64 bytes."""
    if len(session_id) > 2 * _HEAD:
        middle = f"{len(session_id)}"
        if isinstance(session_id, str):
            session_id = session_id[:_HEAD] + middle + session_id[-_HEAD:]
        else:
            session_id = session_id[:_HEAD] + middle.encode() + session_id[-_HEAD:]
    data = session_id.encode("utf-8", "surrogatepass") if isinstance(session_id, str) else session_id
    return int.from_bytes(blake2b(data, digest_size=8, key=secret[:64]).digest(), "little")


def mix(x: int) -> int:
    """A bijection of 64-bit numbers whose upper bits depend on all input bits."""
    x = x * _M1 & _MASK
    return (x ^ x >> 32) * _M2 & _MASK


def unit(key: int, salt: int) -> float:
    """A number in [0, 1) that is fixed for (key, salt) and independent of every placement."""
    return (mix(key ^ salt) >> 11) * 2.0**-53


class Rendezvous:
    """Placement over one set of weighted replicas; immutable, made anew when a weight changes."""

    __slots__ = ("_inverse", "_rows", "_seeds", "ids", "weights")

    def __init__(self, weights: Mapping[str, float], secret: bytes) -> None:
        """`weights`: replica id to weight; those that are not positive and finite get no session."""
        usable = {k: w for k, w in weights.items() if 0.0 < w < math.inf}
        self.weights: Mapping[str, float] = usable
        self.ids = tuple(sorted(usable))
        seeds = [session_key(replica_id, secret) for replica_id in self.ids]
        self._rows = [(seed, -1.0 / usable[k], k) for seed, k in zip(seeds, self.ids, strict=True)]
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._inverse = np.array([row[1] for row in self._rows])

    def place(self, key: int) -> str | None:
        """The replica of the session with this key; None without replicas."""
        rows = self._rows
        if len(rows) > _LOOP_UP_TO:
            return self.ids[self._fastest(key)]
        best, best_time = None, math.inf
        log, mask, m1, m2, ln_range = math.log, _MASK, _M1, _M2, _LN_RANGE
        for seed, inverse, replica_id in rows:
            x = (key ^ seed) * m1 & mask  # `mix`, in place: a call would cost as much again
            time = (log((x ^ x >> 32) * m2 & mask | 1) - ln_range) * inverse
            if time < best_time:
                best, best_time = replica_id, time
        return best

    def place_among(self, key: int, among: Container[str]) -> str | None:
        """The replica of this key if only those of `among` were there; None if none of them is."""
        best, best_time = None, math.inf
        for seed, inverse, replica_id in self._rows:
            if replica_id in among:
                time = (math.log(mix(key ^ seed) | 1) - _LN_RANGE) * inverse
                if time < best_time:
                    best, best_time = replica_id, time
        return best

    def _fastest(self, key: int) -> int:
        x = self._seeds ^ np.uint64(key)
        x *= np.uint64(_M1)
        x ^= x >> np.uint64(32)
        x *= np.uint64(_M2)
        x |= np.uint64(1)
        times = np.log(x.astype(np.float64))
        times -= _LN_RANGE
        times *= self._inverse
        return int(times.argmin())
