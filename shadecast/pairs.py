"""A mirrored request: both halves, and what they say of the candidate once both are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shadecast.reading import Reading
from shadecast.token_pairs import TokenCopy
from shadecast.types import PairedSample

MISSING = object()
"""An answer that is not known."""


@dataclass(slots=True, eq=False)
class Pair:
    """`done` is called when both halves are known. Of streams the first items are compared: `reading` is the primary's,
    `times_s` are the copy's.
    """

    candidate_id: str
    primary_id: str
    primary_in_flight: float
    done: Callable[[Pair], None]
    reading: Reading | None = None
    shadow_in_flight: float = 0.0
    primary_s: float | None = None
    shadow_s: float | None = None
    primary_ok: bool = True
    shadow_ok: bool = True
    cold: bool = False
    """The copy asks for a multiplexed id that the candidate had not loaded."""
    void: bool = False
    """A half says nothing: the primary was cancelled or moved, or the candidate was full."""
    times_s: list[float] = field(default_factory=list)
    primary_answer: Any = MISSING
    shadow_answer: Any = MISSING
    copy: TokenCopy | None = None
    """Of a request to a language model."""

    def primary_done(self, duration_s: float | None, *, ok: bool) -> None:
        """The primary has ended; a duration of None (cancelled, moved) voids the pair.

        Of a stream also called at item `MARK`, which is as far as it is compared; the first call counts.
        """
        if self.primary_s is None and not self.void:
            self.primary_s, self.primary_ok, self.void = duration_s, ok, duration_s is None
            self._check()

    def shadow_done(self, duration_s: float | None) -> None:
        """The copy has ended; None: it says nothing."""
        self.shadow_s, self.void = duration_s, self.void or duration_s is None
        self._check()

    def _check(self) -> None:
        if self.void or self.primary_s is None or self.shadow_s is None:
            return
        if self.reading is not None and self.reading.items and not self.times_s:
            self.shadow_ok = False  # an empty stream where the primary's was not
        elif self.copy is not None and self.reading is not None and (theirs := self.reading.count) is not None:
            self.primary_ok = self.primary_ok and not theirs.failed
            self.shadow_ok = self.shadow_ok and self.copy.is_good(theirs)
        self.done(self)

    def sample(self, equal: bool | None) -> PairedSample | None:
        """What the pair shows; `equal` says whether the answers are. None where the two cannot be compared."""
        seconds, loads = self._seconds(), (self.primary_in_flight, self.shadow_in_flight)
        ok, reading = self.primary_ok and self.shadow_ok, self.reading
        if self.copy is not None and reading is not None and reading.count is not None and ok:
            found = self.copy.seconds(reading, self.times_s, loads)
            seconds, loads = found[:2] if found is not None else None, (0.0, 0.0)  # for the same work: nothing is left
            self.cold = self.cold or found is None or not found[2]
        if seconds is None:
            return None
        return PairedSample(
            self.candidate_id,
            self.primary_id,
            *seconds,
            *loads,
            self.primary_ok,
            self.shadow_ok,
            equal,
            cold=self.cold,
        )

    def _seconds(self) -> tuple[float, float] | None:
        """Seconds on the primary and on the copy for the same work."""
        primary_s, shadow_s = self.primary_s, self.shadow_s
        if primary_s is None or shadow_s is None:
            return None
        if self.reading is None or not (self.primary_ok and self.shadow_ok):
            return primary_s, shadow_s
        if not self.reading.items and not self.times_s:
            return primary_s, shadow_s
        both = zip(self.reading.times_s, self.times_s, strict=False)
        return next((times for times in reversed(list(both)) if not math.isnan(times[0])), None)

    def answers(self) -> tuple[Any, Any]:
        """Both answers; of streams the first items."""
        return (self.reading.answers if self.reading is not None else self.primary_answer), self.shadow_answer
