"""What users send: arrivals, sizes, sessions, and the published trace formats."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, cast

TOKEN_S = 0.02
"""Seconds of work per generated token on an idle replica."""
PREFILL_TOKEN_S = 0.0001
"""Seconds of work per prompt token."""
MOONCAKE_GRID_S = 3.0
AZURE = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
"""Columns that Azure's traces have."""


def lognormal(rng: random.Random, mean: float, sigma: float) -> float:
    """A log-normal value of the given mean and log spread."""
    return rng.lognormvariate(math.log(mean) - sigma * sigma / 2.0, sigma)


def lognormal_median(mean: float, sigma: float) -> float:
    """Median of that distribution."""
    return mean * math.exp(-sigma * sigma / 2.0)


def poisson(rng: random.Random, rate_per_s: float, swing: float, period_s: float, until_s: float) -> Iterator[float]:
    """Poisson arrivals whose rate swings by +-`swing` along a sine of random phase (thinning, Lewis 1979)."""
    phase = rng.uniform(0.0, 2.0 * math.pi)
    peak = rate_per_s * (1.0 + swing)
    now_s = 0.0
    while True:
        now_s += rng.expovariate(peak)
        if now_s >= until_s:
            return
        rate = rate_per_s * (1.0 + swing * math.sin(2.0 * math.pi * now_s / period_s + phase))
        if rng.random() * peak < rate:
            yield now_s


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a recorded trace."""

    at_s: float
    prompt_tokens: int
    generated_tokens: int

    def work_s(self) -> float:
        """Work on an idle replica, from the token counts."""
        return max(self.prompt_tokens * PREFILL_TOKEN_S + self.generated_tokens * TOKEN_S, TOKEN_S)


def load_trace(path: Path, rng: random.Random) -> list[TraceRow]:
    """Read a trace in the Azure (csv, csv.gz) or the Mooncake (jsonl, jsonl.gz) format, times from 0, ascending.

    Mooncake's stamps lie on a 3 s grid: requests are spread evenly at random inside their cell.
    Raises ValueError that names file, line and what is wrong.
    """
    with open_trace(path) as lines:
        rows = mooncake_rows(path, lines, rng) if is_mooncake(path) else azure_rows(path, lines)
    if len(rows) < 2:
        raise ValueError(f"{path}: has {len(rows)} requests, at least 2 are needed")
    rows.sort(key=lambda row: row.at_s)
    first_s = rows[0].at_s
    return [TraceRow(row.at_s - first_s, row.prompt_tokens, row.generated_tokens) for row in rows]


@contextmanager
def open_trace(path: Path) -> Iterator[TextIO]:
    """A trace as text. Raises ValueError where its name says that it is none."""
    if not path.name.removesuffix(".gz").endswith((".csv", ".jsonl")):
        raise ValueError(f"{path}: a trace must end with .csv, .csv.gz, .jsonl or .jsonl.gz")
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
        yield cast("TextIO", lines)


def is_mooncake(path: Path) -> bool:
    """Whether a trace is JSON lines; else it is CSV."""
    return path.name.removesuffix(".gz").endswith(".jsonl")


def stamp_s(text: str) -> float:
    """Seconds since 1970 of a moment in ISO 8601, by UTC where it names no zone. Raises ValueError."""
    stamp, _, fraction = text.partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    moment = datetime.fromisoformat(stamp + fraction[len(digits) :])
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.timestamp() + float("0." + (digits or "0"))


def azure_rows(path: Path, lines: Iterator[str]) -> list[TraceRow]:
    """The rows of Azure's format as they stand there, times since 1970. Raises ValueError."""
    rows = []
    reader = csv.DictReader(lines)
    if not set(reader.fieldnames or ()) >= AZURE:
        raise ValueError(f"{path}: columns {reader.fieldnames} do not include {', '.join(sorted(AZURE))}")
    for number, row in enumerate(reader, 2):
        try:
            at_s = stamp_s(row["TIMESTAMP"])
            rows.append(TraceRow(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (AttributeError, TypeError, ValueError) as error:
            what = f"TIMESTAMP must be ISO 8601, ContextTokens and GeneratedTokens whole numbers ({error})"
            raise ValueError(f"{path}, line {number}: {what}") from error
    return rows


def mooncake_rows(path: Path, lines: Iterator[str], rng: random.Random | None) -> list[TraceRow]:
    """The rows of Mooncake's format; on their grid where there is no `rng` to spread them. Raises ValueError."""
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            at_s = float(row["timestamp"]) / 1000.0 + (rng.random() * MOONCAKE_GRID_S if rng is not None else 0.0)
            rows.append(TraceRow(at_s, int(row["input_length"]), int(row["output_length"])))
        except (KeyError, TypeError, ValueError) as error:
            what = f"must be JSON with timestamp (ms), input_length, output_length ({type(error).__name__} {error})"
            raise ValueError(f"{path}, line {number}: {what}") from error
    return rows
