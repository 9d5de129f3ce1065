"""A user's own requests: when they came, and how long each takes alone on an idle replica.

Read are Azure's LLM traces (CSV), Mooncake's (JSON lines), and any CSV with a column of times; each may be gzipped.
Whatever is wrong is one ConfigError that names the file, the request and what to do.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.simulate.workload import (
    AZURE,
    MOONCAKE_GRID_S,
    PREFILL_TOKEN_S,
    TOKEN_S,
    TraceRow,
    azure_rows,
    is_mooncake,
    lognormal,
    mooncake_rows,
    open_trace,
    stamp_s,
)
from shadecast.errors import ConfigError

Sizes = Literal["tokens", "durations", "sizes", "drawn"]
TIMES = ("timestamp", "time", "arrived_at", "start_time")
DURATIONS = ("duration_s", "duration")
SIZES = ("size", "tokens", "bytes")
_DRAWN_SIGMA = 0.6
_LEAST_WORK_S = 0.001
"""A request that takes no time at all could not be slow."""
_LONGEST_WORK_S = 86_400.0
_LONGEST_DAYS = 366.0
_SINCE_1970_S = 946_684_800.0
"""Greater times are taken for calendar time: 2000-01-01."""
_LATEST_S = 4_102_444_800.0
"""2100-01-01. What is greater is no number of seconds."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What turns a trace's numbers into seconds of work on an idle replica."""

    prompt_token_s: float = PREFILL_TOKEN_S
    token_s: float = TOKEN_S
    mean_s: float = 0.1
    """Of requests whose durations the trace does not tell."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A plain CSV's columns; empty: the usual names are looked for."""

    time: str = ""
    duration: str = ""
    size: str = ""


@dataclass(frozen=True, slots=True)
class OwnTrace:
    """Requests in order, times from 0. `works_s` is empty where sizes are drawn, by each seed its own."""

    name: str
    sizes: Sizes
    at_s: tuple[float, ...]
    works_s: tuple[float, ...]
    mean_s: float
    began_wall_s: float = math.nan
    """Calendar time of the first request; NaN where the trace does not tell."""
    notes: tuple[str, ...] = ()

    @property
    def length_s(self) -> float:
        """From the first to the last request."""
        return self.at_s[-1]

    @property
    def streams(self) -> bool:
        """Whether its requests are token streams."""
        return self.sizes == "tokens"

    def works(self, seed: int) -> Sequence[float]:
        """Seconds of work of each request."""
        if self.works_s:
            return self.works_s
        rng = random.Random(f"{seed}/sizes")
        return [lognormal(rng, self.mean_s, _DRAWN_SIGMA) for _ in self.at_s]

    def first(self, most_s: float) -> OwnTrace:
        """Its requests of the first `most_s` seconds."""
        count = sum(1 for _ in itertools.takewhile(lambda at_s: at_s <= most_s, self.at_s))
        if count == len(self.at_s):
            return self
        if count < 2:
            raise ConfigError(f"--for: only {count} request of {self.name} comes in the first {most_s:g} s; give more")
        return replace(self, at_s=self.at_s[:count], works_s=self.works_s[:count])


def read_trace(path: Path, costs: Costs, columns: Columns) -> OwnTrace:
    """Read a user's trace. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"--trace {path}: no such file")
    try:
        with open_trace(path) as lines:
            if is_mooncake(path):
                return _of_tokens(path, mooncake_rows(path, lines, None), costs, "Mooncake")
            first = next(lines, "")
            header = next(csv.reader([first]), [])
            again = itertools.chain([first], lines)
            if set(header) >= AZURE and not (columns.time or columns.duration or columns.size):
                return _of_tokens(path, azure_rows(path, again), costs, "Azure")
            return _plain(path, header, again, costs, columns)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, csv.Error) as error:
        text = str(error)
        raise ConfigError(
            f"--trace {text if text.startswith(str(path)) else f'{path}: cannot be read ({error})'}"
        ) from None


def _of_tokens(path: Path, rows: Sequence[TraceRow], costs: Costs, kind: str) -> OwnTrace:
    for number, row in enumerate(rows, 1):
        if min(row.prompt_tokens, row.generated_tokens) < 0:
            raise ConfigError(f"--trace {path}, request {number}: a negative number of tokens")
    works_s = [row.prompt_tokens * costs.prompt_token_s + row.generated_tokens * costs.token_s for row in rows]
    at_s, began_s = _rising(path, [row.at_s for row in rows])
    notes = [
        f"{kind} trace: a request takes {costs.prompt_token_s * 1000:g} ms for each token of its prompt and "
        f"{costs.token_s * 1000:g} ms for each one it generates, alone on an idle replica"
    ]
    if kind == "Mooncake":
        rng = random.Random("grid")
        spread = sorted((t + rng.random() * MOONCAKE_GRID_S, work_s) for t, work_s in zip(at_s, works_s, strict=True))
        at_s = [t - spread[0][0] for t, _ in spread]
        works_s = [work_s for _, work_s in spread]
        notes.append("its times lie on a grid of 3 s: requests are spread inside it")
    return _made(path, "tokens", at_s, works_s, costs, began_s, notes)


def _plain(path: Path, header: Sequence[str], lines: Iterator[str], costs: Costs, columns: Columns) -> OwnTrace:
    time = _column(path, header, columns.time, TIMES, "--time-column")
    duration = _column(path, header, columns.duration, DURATIONS, "--duration-column", needed=False)
    size = "" if duration else _column(path, header, columns.size, SIZES, "--size-column", needed=False)
    stamps: list[float] = []
    numbers: list[float] = []
    for number, row in enumerate(csv.DictReader(lines), 1):
        stamps.append(_time(path, number, row[time]))
        if duration or size:
            numbers.append(_number(path, number, duration or size, row[duration or size]))
    at_s, began_s = _rising(path, stamps)
    if duration:
        for number, took_s in enumerate(numbers, 1):
            if took_s > _LONGEST_WORK_S:
                raise ConfigError(
                    f"--trace {path}, request {number}: {duration} = {took_s:g}: more than a day; give seconds"
                )
        note = f"{duration} is taken for the time that a request needs alone on an idle replica"
        return _made(path, "durations", at_s, numbers, costs, began_s, [note])
    if size:
        mean = sum(numbers) / max(len(numbers), 1)
        if mean <= 0.0:
            raise ConfigError(f"--trace {path}: {size} is 0 in every request")
        works_s = [each / mean * costs.mean_s for each in numbers]
        note = (
            f"a request's time on an idle replica is in proportion to {size}, {costs.mean_s:g} s on average (--mean-s)"
        )
        return _made(path, "sizes", at_s, works_s, costs, began_s, [note])
    note = f"the trace tells no sizes: times on an idle replica are drawn, {costs.mean_s:g} s on average (--mean-s)"
    return _made(path, "drawn", at_s, [], costs, began_s, [note])


def _made(  # noqa: PLR0917 - called here alone
    path: Path,
    sizes: Sizes,
    at_s: Sequence[float],
    works_s: Sequence[float],
    costs: Costs,
    began_s: float,
    notes: Sequence[str],
) -> OwnTrace:
    works = tuple(max(work_s, _LEAST_WORK_S) for work_s in works_s)
    mean_s = sum(works) / len(works) if works else costs.mean_s
    return OwnTrace(path.name, sizes, tuple(at_s), works, mean_s, began_s, tuple(notes))


def _column(
    path: Path, header: Sequence[str], given: str, usual: Sequence[str], option: str, *, needed: bool = True
) -> str:
    """The column of that name, or of one of the usual names; empty where there is none and none is needed."""
    if given:
        if given not in header:
            raise ConfigError(f"{option} {given!r}: {path} has no such column; it has {', '.join(header) or 'none'}")
        return given
    by_name = {name.strip().lower(): name for name in header}
    found = next((by_name[name] for name in usual if name in by_name), "")
    if needed and not found:
        raise ConfigError(
            f"--trace {path}: no column of times; it has {', '.join(header) or 'none'}: name one by {option}"
        )
    return found


def _time(path: Path, number: int, text: str | None) -> float:
    where = f"--trace {path}, request {number}: time {text!r}"
    try:
        at_s = float(text or "")
    except ValueError:
        try:
            return stamp_s((text or "").strip())
        except (ValueError, OverflowError):
            raise ConfigError(f"{where}: must be seconds or ISO 8601 (2026-01-31 14:30:00.5)") from None
    if not 0.0 <= at_s <= _LATEST_S:
        raise ConfigError(f"{where}: must be seconds from 0 to {_LATEST_S:.0f} (the year 2100); no ms, no us")
    return at_s


def _number(path: Path, number: int, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ConfigError(f"--trace {path}, request {number}: {column} = {text!r}: must be a number of at least 0")
    return value


def _rising(path: Path, stamps: Sequence[float]) -> tuple[list[float], float]:
    """Times from 0, and the calendar time of the first. Raises ConfigError where they go back, or are too far apart."""
    if len(stamps) < 2:
        raise ConfigError(f"--trace {path}: has {len(stamps)} requests, at least 2 are needed")
    for number, (before, at_s) in enumerate(itertools.pairwise(stamps), 2):
        if not at_s >= before:
            raise ConfigError(
                f"--trace {path}, request {number}: comes {before - at_s:g} s before the one above it; "
                "sort the file by time"
            )
    days = (stamps[-1] - stamps[0]) / 86_400.0
    if not 0.0 < days <= _LONGEST_DAYS:
        what = "all requests come at once" if not days else f"{days:.0f} days lie between first and last request"
        raise ConfigError(f"--trace {path}: {what}; times must be seconds or ISO 8601")
    return [at_s - stamps[0] for at_s in stamps], stamps[0] if stamps[0] > _SINCE_1970_S else math.nan
