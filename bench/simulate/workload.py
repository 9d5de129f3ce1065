"""What users send: arrivals, sizes, sessions, and the published trace formats."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

TOKEN_S = 0.02
"""Seconds of work per generated token on an idle replica."""
PREFILL_TOKEN_S = 0.0001
"""Seconds of work per prompt token."""
MOONCAKE_GRID_S = 3.0


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
    name = path.name.removesuffix(".gz")
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
        if name.endswith(".csv"):
            rows = _azure(path, lines)
        elif name.endswith(".jsonl"):
            rows = _mooncake(path, lines, rng)
        else:
            raise ValueError(f"{path}: a trace must end with .csv, .csv.gz, .jsonl or .jsonl.gz")
    if len(rows) < 2:
        raise ValueError(f"{path}: has {len(rows)} requests, at least 2 are needed")
    rows.sort(key=lambda row: row.at_s)
    first_s = rows[0].at_s
    return [TraceRow(row.at_s - first_s, row.prompt_tokens, row.generated_tokens) for row in rows]


def _azure(path: Path, lines: Iterator[str]) -> list[TraceRow]:
    rows = []
    reader = csv.DictReader(lines)
    needed = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
    if not needed <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: columns {reader.fieldnames} do not include {', '.join(sorted(needed))}")
    for number, row in enumerate(reader, 2):
        try:
            stamp, _, fraction = row["TIMESTAMP"].partition(".")
            moment = datetime.fromisoformat(stamp)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            at_s = moment.timestamp() + float("0." + (fraction.split("+")[0] or "0"))
            rows.append(TraceRow(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def _mooncake(path: Path, lines: Iterator[str], rng: random.Random) -> list[TraceRow]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            at_s = float(row["timestamp"]) / 1000.0 + rng.random() * MOONCAKE_GRID_S
            rows.append(TraceRow(at_s, int(row["input_length"]), int(row["output_length"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__} {error}") from error
    return rows
