"""What a language model's tokens should take: the first one by what is to be computed before it, the next by the batch.

    first_s = a + b (P + u) + c n        next_s = d + e n

with P + u the prompt tokens to compute until then (those that wait there already, and this prompt's that are not
cached), n the other requests there. Learned from live streams; the parts are not negative (`shadecast.least_squares`).

A copy finds another cache and another batch than its primary. Each is compared with what it should take, so that an
empty cache does not make a newcomer look slow, nor an idle one make it look fast.

The same streams say what a choice costs (`Costs`): there the next tokens go by the context of the batch, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shadecast.least_squares import Fit
from shadecast.prefix_score import Costs

MARK_TOKENS = 16
"""Tokens of an answer over which a copy and its primary are compared; a copy asks for no more."""
_ENOUGH = 8
"""Streams before what they take counts as known."""
_ANSWERS = 100.0
"""Answers of which the length is a mean."""
_OUTLIER = 4.0
"""Times what is expected: what takes longer counts as so long."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request meets on its replica."""

    ahead_tokens: float
    """To compute until its first token: what waits there, and what of its own prompt is not cached."""
    others: float = 0.0
    """Other requests there."""
    context_tokens: float = 0.0
    """Of their prompts; only `costs` asks for it."""


class TokenTimes:
    """Of one router's live streams. All times are NaN as long as they are not known."""

    __slots__ = ("_answer_tokens", "_batch", "_costs", "_first", "_next", "_prefill")

    def __init__(self) -> None:
        self._first, self._next, self._prefill, self._batch = Fit(3), Fit(2), Fit(3), Fit(3)
        self._answer_tokens = 0.0
        self._costs: Costs | None = None

    @property
    def known(self) -> bool:
        """Whether streams enough were seen."""
        return self._first.count >= _ENOUGH

    def learn(
        self,
        work: Work,
        times_s: Sequence[float],
        units: Sequence[float],
        answer_tokens: float = 0.0,
        speed: float = 1.0,
    ) -> None:
        """A stream has given `units` tokens in all by each of these times since its start; NaN where nobody looked.

        Its answer had `answer_tokens`, or as many as by the last of the times. For `costs` a replica's `speed` is taken
        out of them.
        """
        seen = [(at_s, tokens) for at_s, tokens in zip(times_s, units, strict=False) if math.isfinite(at_s) and tokens]
        if not seen:
            return
        answer = max(answer_tokens, seen[-1][1])
        self._answer_tokens += (answer - self._answer_tokens) / min(self._first.count + 1.0, _ANSWERS)
        if self._first.count % _ENOUGH == 0:
            self._costs = None  # solved now and then: it is not done in no time
        (first_s, tokens), (last_s, all_tokens) = seen[0], seen[-1]
        if all_tokens > tokens:
            next_s = (last_s - first_s) / (all_tokens - tokens)
            _add(self._next, (1.0, work.others), next_s)
            _add(self._batch, (1.0, work.others, work.context_tokens), next_s * speed)
        if tokens <= MARK_TOKENS:  # else it says more of the answer than of its beginning
            before_s = (tokens - 1.0) * self._next.predict((1.0, work.others)) if tokens > 1.0 else 0.0
            parts, alone_s = (1.0, work.ahead_tokens, work.others), max(first_s - before_s, 0.0)
            _add(self._first, parts, alone_s)
            _add(self._prefill, parts, alone_s * speed)

    def costs(self) -> Costs | None:
        """What tokens cost on a replica of usual speed; None before streams enough were seen, or without prefill."""
        if self._costs is None and self._prefill.count >= _ENOUGH and self._batch.count >= _ENOUGH:
            prefill_s = self._prefill.part(1)
            if prefill_s > 0.0:
                step_s, sequence_s, context_s = (self._batch.part(i) for i in range(3))
                self._costs = Costs(prefill_s, step_s, sequence_s, context_s, self._answer_tokens)
        return self._costs

    def expected_s(self, work: Work, tokens: float) -> float:
        """Until so many tokens are there."""
        first_s = self._first.predict((1.0, work.ahead_tokens, work.others))
        next_s = self._next.predict((1.0, work.others)) if tokens > 1.0 else 0.0
        known = self._first.count >= _ENOUGH and (tokens <= 1.0 or self._next.count >= _ENOUGH)
        expected_s = first_s + max(tokens - 1.0, 0.0) * next_s
        return expected_s if known and expected_s > 0.0 else math.nan


def marked(times_s: Sequence[float], units: Sequence[float]) -> tuple[float, float] | None:
    """Time and tokens at the end of what is compared, as far as it is known: (seconds, tokens). None if nothing is."""
    found = None
    for at_s, tokens in zip(times_s, units, strict=False):
        if tokens > 0.0 and math.isfinite(at_s):
            found = at_s, tokens
        if tokens >= MARK_TOKENS:
            break
    return found


def _add(fit: Fit, of: Sequence[float], seen_s: float) -> None:
    if math.isfinite(seen_s):
        predict = fit.rough if fit.count % _ENOUGH else fit.predict  # solved now and then: it is not done in no time
        limit_s = _OUTLIER * predict(of) if fit.count >= _ENOUGH else math.inf
        fit.add(of, min(seen_s, limit_s))
