"""A copied request to a language model: how it is made short, and what it says of the candidate.

A copy asks for one answer of at most `MARK_TOKENS` tokens. Texts are not compared, since greedy answers differ between
batches: an answer is good if its chunks can be read, none is an error, and it ends with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadecast.prompts import find_body
from shadecast.reading import Reading
from shadecast.token_times import MARK_TOKENS, TokenTimes, Work, marked
from shadecast.tokens import TokenCount, get


def _nothing() -> None:
    """Nobody wants to know."""


@dataclass(slots=True, eq=False)
class TokenCopy:
    """A copy, beside `shadecast.pairs.Pair`: what both halves met, and what the copy gave."""

    times: TokenTimes
    ahead_tokens: tuple[float, float]
    """To compute until the first token, on the primary and for the copy (`Work`)."""
    comparable: bool = True
    """Whether the request is for one answer: several at once have another pace."""
    needs_reason: bool = False
    """Whether answers of this deployment end with a reason."""
    count: TokenCount = field(default_factory=TokenCount)
    units: list[float] = field(default_factory=list)
    """Tokens in all, by the items whose times the pair has."""
    ended: bool = False
    """The copy has ended by itself."""
    begun: Callable[[], None] = _nothing
    """Called with each item, and at the end."""

    def took(self, item: Any) -> bool:
        """The copy has given an item; whether it is enough."""
        self.begun()
        self.count.add(item)
        self.units.append(self.count.tokens)
        return self.count.tokens >= MARK_TOKENS

    def is_good(self, theirs: TokenCount) -> bool:
        """Whether the copy's answer is one; `theirs` is the primary's, which may have ended without a reason, too."""
        mine = self.count
        if mine.failed or (theirs.tokens > 0.0 and not mine.tokens > 0.0):
            return False
        without = self.needs_reason and self.ended and not mine.finish
        return not without or (theirs.tokens < MARK_TOKENS and not theirs.finish)

    def seconds(
        self, reading: Reading, times_s: Sequence[float], others: tuple[float, float]
    ) -> tuple[float, float, bool] | None:
        """Seconds that the primary would have taken for the copy's work, and that the copy took; whether that is known.

        `others` are the other requests on both. None where the times are not known; where only nobody knows what tokens
        should take, they are as they were.
        """
        primary, shadow = marked(reading.times_s, reading.units_at), marked(times_s, self.units)
        if primary is None or shadow is None:
            return None
        theirs, mine = (Work(*each) for each in zip(self.ahead_tokens, others, strict=True))
        ratio = self.times.expected_s(mine, shadow[1]) / self.times.expected_s(theirs, primary[1])
        known = self.comparable and math.isfinite(ratio)
        return primary[0] * (ratio if known else 1.0), shadow[0], known


def shortened(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a copy: those of the request, but for the answer that its body asks for. Never raises."""
    body = find_body(args, kwargs)
    try:
        short = _short(body)
    except Exception:  # a user's own class, say: it is copied as it is
        short = body
    args = [short if each is body else each for each in args]
    return args, {name: short if each is body else each for name, each in kwargs.items()}


def _short(body: Any) -> Any:
    if isinstance(body, Mapping):
        return {**body, **_changes(body)}
    if body is None or not hasattr(body, "model_copy"):
        return body
    changes = _changes(body)  # of pydantic's, as ray.serve.llm has them; only fields that they know
    known = getattr(type(body), "model_fields", changes)
    return body.model_copy(update={name: value for name, value in changes.items() if name in known})


def _changes(body: Any) -> dict[str, Any]:
    """Fields that make an answer short, and keep it out of a server's store."""
    limits = {name: told for name in ("max_tokens", "max_completion_tokens") if _is_count(told := get(body, name))}
    changes: dict[str, Any] = {name: min(told, MARK_TOKENS) for name, told in limits.items()}
    if not changes:
        changes["max_tokens"] = MARK_TOKENS
    if _is_count(least := get(body, "min_tokens")):
        changes["min_tokens"] = min(least, *(changes[name] for name in changes))
    for name, value in (("n", 1), ("best_of", None), ("store", False)):
        if get(body, name) not in (None, value):
            changes[name] = value
    return changes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
