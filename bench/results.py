"""Rows, intervals and verdicts that the simulated and the live benchmark have in common."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
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
    code: str = ""
    """What was measured: a commit (`code_version`), or "before 0059" once that decision has changed what it shows."""

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


_PRODUCT = ("shadecast", "serve_app", "actors", "models")
_ROOT = Path(__file__).resolve().parents[1]


@cache
def code_version() -> str:
    """The last commit that changed the product, "-dirty" if it has changes since; "unknown" outside a git clone.

    Commits that change the benchmarks, their rows or the documents alone are left out: they measure the same code.
    """
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [git, "-C", str(_ROOT), *arguments, "--", *_PRODUCT]
        return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words

    commit = ask("log", "-1", "--format=%h", "--abbrev=7").stdout.strip()
    if not commit:
        return "unknown"
    return commit if ask("diff", "--quiet", "HEAD").returncode == 0 else f"{commit}-dirty"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student); half width 0 for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, half


def is_older(code: str) -> bool:
    """Whether a decision has changed since what rows of this code show."""
    return code.startswith("before ")


def comparable(rows: Iterable[Row], reference: str = "shadecast") -> list[Row]:
    """Rows that may stand side by side.

    Of each arm those of its newest code; then, where an arm has seeds that the reference arm has too, only those.
    """
    found = list(rows)
    newest: dict[tuple[str, str], str] = {}
    for row in found:
        key = row.scenario, row.arm
        newest[key] = max(newest.get(key, ""), _age(row))
    found = [row for row in found if _age(row) == newest[row.scenario, row.arm]]
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in found:
        seeds.setdefault((row.scenario, row.arm), set()).add(row.seed)
    kept = {key: each & seeds.get((key[0], reference), set()) or each for key, each in seeds.items()}
    return [row for row in found if row.seed in kept[row.scenario, row.arm]]


def _age(row: Row) -> str:
    """The newer the code the larger."""
    return row.code.removeprefix("before ") if is_older(row.code) else "now"


def by_arm(rows: Iterable[Row], scenario: str, order: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """arm -> metric -> values by seed, arms in `order`; a metric that a run did not give has fewer values."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.scenario == scenario:
            found.setdefault(row.arm, {}).setdefault(row.metric, []).append(row.value)
    return {arm: found[arm] for arm in order if arm in found}
