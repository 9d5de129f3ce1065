"""How a stream comes to its reader: when items were there, and at which pace its replica gives them.

An item shows when it was there only if its reader was waiting for it: slow readers do not make replicas look slow.
A stream's units are its tokens where these can be counted (`shadecast.tokens`), else its items.
"""

from __future__ import annotations

import math
from typing import Any

from shadecast.token_times import MARK_TOKENS
from shadecast.tokens import TokenCount

MARK = 32
"""Items of a stream whose times are kept: what is compared with a copy, of tokens `MARK_TOKENS` at most."""
_WAITED = 0.1
_PROMPT_S = 0.002
"""A reader that asks later than this, and spends less of its time waiting, does not show when an item was there."""


def _prompt(asked_s: float, last_s: float, now_s: float) -> bool:
    """Whether a reader that asked then, `last_s` being when it got the last item, shows when the next one is there."""
    return asked_s - last_s <= _PROMPT_S or now_s - asked_s >= _WAITED * (now_s - last_s)


class Reading:
    """One stream, or an answer that is sent by value. Written by its reader's thread, read by any; both only grow."""

    __slots__ = (
        *("_last_s", "_paced_s", "_paced_units", "_started_s", "_told"),
        *("answers", "asked_s", "count", "dropped", "items", "status", "times_s", "units", "units_at"),
    )

    def __init__(self, now_s: float) -> None:
        self._started_s = self._last_s = now_s
        self._paced_units, self._paced_s = 0.0, 0.0
        self._told = (0.0, 0.0)
        self.items = 0
        self.count: TokenCount | None = None
        """Of its tokens; set before the reader starts, and None again where the first item is no chunk of a model's."""
        self.units = 0.0
        """Tokens, or items, so far."""
        self.asked_s: float | None = None
        """Since when the reader has been waiting for an item."""
        self.times_s: list[float] = []
        """Of the first items, since the start; NaN where the reader was late to ask."""
        self.units_at: list[float] = []
        """Units until then."""
        self.answers: list[Any] | None = None
        """The first items themselves, if somebody wants them: set to a list before the reader starts."""
        self.status = 200
        """Of an HTTP answer."""
        self.dropped = False
        """The reader holds the result no more."""

    def got(self, item: Any, asked_s: float, now_s: float) -> None:
        """The reader has the item that it asked for at `asked_s`."""
        prompt = _prompt(asked_s, self._last_s, now_s)
        units = 1.0 if self.count is None else self._counted(item)
        self.units += units
        if prompt and self.items:
            self._paced_units += units
            self._paced_s += now_s - self._last_s
        self.asked_s = None
        self.items += 1
        if self.items <= MARK:
            self.units_at.append(self.units)
            self.times_s.append(now_s - self._started_s if prompt else math.nan)
            if self.answers is not None:
                self.answers.append(item)
        self._last_s = now_s

    def _counted(self, item: Any) -> float:
        tokens = self.count.add(item) if self.count is not None else None
        if tokens is None and not self.items:
            self.count = None
            return 1.0
        return tokens or 0.0

    @property
    def is_marked(self) -> bool:
        """Whether all that is compared with a copy has come."""
        return self.items >= MARK or (self.count is not None and self.units >= MARK_TOKENS)

    @property
    def per_item(self) -> float:
        """Units of an item, at least one."""
        return max(self.units / self.items, 1.0) if self.items else 1.0

    @property
    def first_item_s(self) -> float:
        """Time to the first item; NaN if there is none or the reader was late to ask."""
        return self.times_s[0] if self.times_s else math.nan

    @property
    def last_item_s(self) -> float:
        """When its reader got the last item; that never was if it is minus infinite."""
        return self._last_s if self.items else -math.inf

    def waited_s(self, now_s: float) -> float:
        """How long the reader has been waiting for the next item; 0 if it does not wait."""
        asked_s = self.asked_s
        return max(now_s - asked_s, 0.0) if asked_s is not None else 0.0

    def pace(self, now_s: float) -> tuple[float, float]:
        """Units after the first item that the reader was waiting for, and the time that they took, since the last call.

        The time of an item that has not come yet counts.
        """
        asked_s, last_s, waited_s = self.asked_s, self._last_s, self._paced_s
        if asked_s is not None and self.items and now_s > last_s:
            waited_s += now_s - last_s if _prompt(asked_s, last_s, now_s) else 0.0
        before, self._told = self._told, (self._paced_units, waited_s)
        return self._told[0] - before[0], self._told[1] - before[1]
