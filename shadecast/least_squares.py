"""What a cost is made of, learned from costs that were seen: least squares without negative parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

_KEEP = 0.98
"""Of an observation's weight after the next one: about fifty of them count."""
_SAME = 1e-9
"""Parts that cannot be told from one another, since they always came together, have no solution."""


class Fit:
    """Least squares without negative parts, of observations that fade: the parts of a cost only add.

    Two or three parts are so few that all choices of those that are not 0 are tried (Lawson and Hanson 1974 choose them
    step by step). Solved when asked.
    """

    __slots__ = ("_across", "_along", "_choices", "_parts", "_solved", "count")

    def __init__(self, parts: int) -> None:
        self._across = [[0.0] * parts for _ in range(parts)]
        self._along = [0.0] * parts
        self._choices = [of for size in range(parts, 0, -1) for of in combinations(range(parts), size)]
        self._parts, self._solved, self.count = [0.0] * parts, True, 0

    def add(self, of: Sequence[float], seen: float) -> None:
        """One observation."""
        for i, x in enumerate(of):
            self._along[i] = _KEEP * self._along[i] + x * seen
            for j, y in enumerate(of):
                self._across[i][j] = _KEEP * self._across[i][j] + x * y
        self.count += 1
        self._solved = False

    def predict(self, of: Sequence[float]) -> float:
        """Never negative; 0 before the first observation."""
        if not self._solved:
            self._solve()
        return self.rough(of)

    def part(self, number: int) -> float:
        """What one of that costs; 0 where it cannot be told from the others, or takes nothing."""
        if not self._solved:
            self._solve()
        return self._parts[number]

    def rough(self, of: Sequence[float]) -> float:
        """The same without what was added since the last prediction: that costs next to nothing."""
        return sum(part * x for part, x in zip(self._parts, of, strict=True))

    def _solve(self) -> None:
        self._parts, self._solved, best = [0.0] * len(self._along), True, 0.0
        for choice in self._choices:
            found = _solution([[*(self._across[i][j] for j in choice), self._along[i]] for i in choice])
            explained = sum(part * self._along[i] for part, i in zip(found, choice, strict=False))
            if found and min(found) >= 0.0 and explained > best * (1.0 + _SAME):
                best = explained
                for i in range(len(self._parts)):
                    self._parts[i] = found[choice.index(i)] if i in choice else 0.0


def _solution(rows: list[list[float]]) -> list[float]:
    """Of symmetric equations [coefficients, value], by elimination; empty where there is none, or more than one."""
    scales = [row[k] for k, row in enumerate(rows)]
    for k, row in enumerate(rows):
        if not row[k] > _SAME * scales[k]:
            return []
        for other in rows[k + 1 :]:
            factor = other[k] / row[k]
            for j in range(k, len(row)):
                other[j] -= factor * row[j]
    found: list[float] = []
    for k in range(len(rows) - 1, -1, -1):
        known = sum(rows[k][k + 1 + j] * part for j, part in enumerate(found))
        found.insert(0, (rows[k][-1] - known) / rows[k][k])
    return found
