"""A budget for work that is done twice, so that it never multiplies the load of a system that is already failing."""

from __future__ import annotations


class Budget:
    """Token bucket: every request earns `fraction` of a token, and what is done again spends one, or part of one.

    At most `burst` tokens are kept (a dying node takes all of its requests at once), the bucket starts with `initial`,
    and `per_s` are earned with time, so that a service with little traffic may retry at all. A clock that steps back
    earns nothing. After Finagle's `RetryBudget` (Twitter, 2016).
    """

    __slots__ = ("_burst", "_fraction", "_last_s", "_per_s", "tokens")

    def __init__(self, fraction: float, burst: float, initial: float, per_s: float = 0.0) -> None:
        self._fraction, self._burst, self._per_s = fraction, burst, per_s
        self._last_s: float | None = None
        self.tokens = min(initial, burst)
        """That may be spent at once."""

    def request(self, now_s: float = 0.0) -> None:
        """Count one first attempt."""
        self._earn(self._fraction, now_s)

    def take(self, now_s: float = 0.0, cost: float = 1.0) -> bool:
        """Spend `cost`; False, and nothing spent, where there is not so much left."""
        self._earn(0.0, now_s)
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True

    def give_back(self, cost: float = 1.0) -> None:
        """What it was taken for was not done."""
        self.tokens = min(self.tokens + cost, self._burst)

    def _earn(self, tokens: float, now_s: float) -> None:
        if self._last_s is not None:
            tokens += max(now_s - self._last_s, 0.0) * self._per_s
        self._last_s = now_s
        self.tokens = min(self.tokens + tokens, self._burst)
