"""Rows, intervals and verdicts that the simulated and the live benchmark have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t


@dataclass(frozen=True, slots=True)
class Row:
    """One number of one run."""

    scenario: str
    arm: str
    seed: int
    metric: str
    value: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Check:
    """A target and what was measured."""

    text: str
    measured: str
    met: bool

    def line(self) -> str:
        """For the terminal."""
        return f"{'met   ' if self.met else 'MISSED'} {self.text}: {self.measured}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student); half width 0 for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, half


def by_arm(rows: Iterable[Row], scenario: str, order: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """arm -> metric -> values by seed, arms in `order`; a metric that a run did not give has fewer values."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.scenario == scenario:
            found.setdefault(row.arm, {}).setdefault(row.metric, []).append(row.value)
    return {arm: found[arm] for arm in order if arm in found}
