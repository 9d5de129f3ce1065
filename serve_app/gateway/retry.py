"""A budget for retries, so that they never multiply the load of a system that is already failing."""

from __future__ import annotations


class RetryBudget:
    """Token bucket: every request earns `fraction` of a retry, every retry spends one.

    At most `burst` retries can be saved up (a dying node takes all of its requests at once), the bucket starts with
    `initial`, and `floor_per_s` are earned with time, so that a service with little traffic may retry at all. After
    Finagle's `RetryBudget` (Twitter, 2016).
    """

    __slots__ = ("_burst", "_floor_per_s", "_fraction", "_last_s", "_tokens")

    def __init__(
        self, fraction: float = 0.2, burst: float = 100.0, initial: float = 10.0, floor_per_s: float = 0.5
    ) -> None:
        self._fraction = fraction
        self._burst = burst
        self._floor_per_s = floor_per_s
        self._tokens = min(initial, burst)
        self._last_s: float | None = None

    @property
    def tokens(self) -> float:
        """Retries that may be spent at once."""
        return self._tokens

    def request(self, now_s: float) -> None:
        """Counts one first attempt."""
        self._earn(self._fraction, now_s)

    def take(self, now_s: float) -> bool:
        """Spends one retry; False when there is none left."""
        self._earn(0.0, now_s)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _earn(self, tokens: float, now_s: float) -> None:
        if self._last_s is not None:
            tokens += max(now_s - self._last_s, 0.0) * self._floor_per_s
        self._last_s = now_s
        self._tokens = min(self._tokens + tokens, self._burst)
