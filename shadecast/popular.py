"""Which prompts begin alike, lately: which copies leave most of what is to come in a newcomer's cache.

Prompts are counted by their blocks at some depths, two for each doubling. A copy is worth the tokens that a coming
prompt, on average, need not compute for it: at each depth beyond what the newcomer has, the part of recent prompts that
begin so. Copies are as many as they would be anyway; those worth more come first.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from shadecast.prompts import MOST_BLOCKS, Prompt

_REMEMBERED = 1000
"""Prompts after which all counts are halved."""
_FADE = 0.05
"""Weight of a request's gain in the usual one."""
_LEAST_TOKENS = 1.0
"""Added to every gain: where all that is popular has been copied, requests are copied by chance."""
_REPAID, _MOST_OWED = 0.2, 5.0
"""Copies that are missing for the fraction are made up for within five requests or so."""


def _depths() -> list[int]:
    depths, at = [1], 2
    while at <= MOST_BLOCKS:
        depths += [at, at * 3 // 2]
        at *= 2
    return depths


_DEPTHS = _depths()
"""Blocks: 1, 2, 3, 4, 6, 8, 12 and so on."""


class Popular:
    """Recent prompts of one router."""

    __slots__ = ("_counts", "_owed", "_total", "_usual")

    def __init__(self) -> None:
        self._counts: dict[bytes, float] = {}
        self._total = self._usual = self._owed = 0.0

    def add(self, prompt: Prompt) -> None:
        """A prompt was sent somewhere."""
        counts, hashes = self._counts, prompt.hashes
        for depth in _DEPTHS[: bisect_right(_DEPTHS, len(hashes))]:
            block = hashes[depth - 1]
            counts[block] = counts.get(block, 0.0) + 1.0
        self._total += 1.0
        if self._total >= _REMEMBERED:
            self._total /= 2.0
            self._counts = {block: count / 2.0 for block, count in counts.items() if count >= 2.0}

    def gain(self, prompt: Prompt, had_tokens: int) -> float:
        """Tokens of a coming prompt that are cached if this one, which was added, is: beyond `had_tokens` of it."""
        gain, before = 0.0, had_tokens
        for depth in _DEPTHS[: bisect_right(_DEPTHS, len(prompt.hashes))]:
            end, others = prompt.ends[depth - 1], self._counts.get(prompt.hashes[depth - 1], 0.0) - 1.0
            if others <= 0.0:
                break
            if end > before:
                gain, before = gain + (end - before) * others, end
        return gain / max(self._total, 1.0)

    def chance(self, gain: float, fraction: float) -> float:
        """Of being copied, for a request with this gain, while so many of the requests are."""
        worth = gain + _LEAST_TOKENS
        self._usual += _FADE * (worth - self._usual) if self._usual else worth
        by_worth = 1.0 - math.pow(1.0 - min(max(fraction, 0.0), 1.0), worth / self._usual)
        chance = min(max(by_worth + _REPAID * self._owed, 0.0), 1.0)
        self._owed = min(max(self._owed + fraction - chance, -_MOST_OWED), _MOST_OWED)
        return chance
