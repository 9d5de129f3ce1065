"""How long requests usually stay on a deployment's replicas, where nobody tells when they end.

Little's law: requests there = arrivals per second x time there. So the requests that replicas tell of, summed up over
time, over those that arrived in that time, is the mean time. Both sums fade, so that the mean follows the
traffic.
"""

from __future__ import annotations

import math

SHORTEST_S, LONGEST_S = 0.05, 600.0
_HALF_LIFE_S = 30.0
_FIRST_S = 1.0
_LEAST = 3.0
"""Requests that must have been seen before they count for more than the first guess."""


class Residence:
    """The mean time, from what replicas tell."""

    __slots__ = ("_arrivals", "_faded_s", "_request_s", "first_s")

    def __init__(self) -> None:
        self._request_s = self._arrivals = 0.0
        self._faded_s = -math.inf
        self.first_s = 0.0
        """What to go by before anything was seen, if known: the nominal time of a request."""

    def told(self, requests: float, over_s: float, arrivals: float, now_s: float) -> None:
        """Replicas had so many requests over a time in which so many arrived there, all routers' alike."""
        self._add(requests * over_s, arrivals, now_s)

    def _add(self, request_s: float, arrivals: float, now_s: float) -> None:
        if not (0.0 <= request_s < math.inf and 0.0 <= arrivals < math.inf):
            return
        fade = 0.5 ** max((now_s - self._faded_s) / _HALF_LIFE_S, 0.0)
        self._faded_s = max(now_s, self._faded_s)
        self._request_s = self._request_s * fade + request_s
        self._arrivals = self._arrivals * fade + arrivals

    @property
    def mean_s(self) -> float:
        """The usual time, from 0.05 to 600 s."""
        first_s = self.first_s or _FIRST_S
        missing = max(_LEAST - self._arrivals, 0.0)
        mean_s = (self._request_s + missing * first_s) / max(self._arrivals + missing, _LEAST)
        return min(max(mean_s, SHORTEST_S), LONGEST_S)
