"""What language-model services are sent: published traces with their shared prefixes, and shapes drawn from statistics.

Prompts are chains of blocks of `BLOCK_TOKENS`, as in Mooncake's traces; equal hashes are equal prefixes.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from bench.llm.engine import BLOCK_TOKENS, Job
from bench.simulate.workload import MOONCAKE_GRID_S, load_trace, lognormal, poisson
from shadecast.prompts import HASH_BYTES


@dataclass(frozen=True, slots=True)
class Agents:
    """Calls of agents: each session has one of a few system prompts, and grows with every call.

    The defaults are those on which the factor of the score was found.
    """

    prompts: int = 40
    prompt_tokens: tuple[int, int] = (2_000, 12_000)
    """Of a system prompt, evenly."""
    zipf: float = 1.0
    """Of the popularity of system prompts."""
    calls: tuple[int, int] = (1, 31)
    """Of a session, evenly."""
    grows_tokens: float = 900.0
    """A call's own tokens, mean; log-normal."""
    answer_tokens: float = 180.0
    spread: float = 0.8
    """Log spread of both."""
    think_s: float = 6.0
    """From one call's beginning to the next one's."""


_MOST_TOKENS = 120_000
TOOLS = Agents(
    prompts=12, prompt_tokens=(3_000, 9_000), zipf=0.8, calls=(1, 3), grows_tokens=3_100.0, answer_tokens=182.0,
    spread=1.0, think_s=20.0,
)  # fmt: skip
"""The shape of Mooncake's tool-and-agent trace: 8.6 k prompt tokens, 182 of answer, .59 of them shared at most."""


def agents(shape: Agents, calls_per_s: float, until_s: float, seed: int) -> list[Job]:
    """Sessions that begin at random."""
    rng = random.Random(f"{seed}/agents")
    systems = [rng.randint(*shape.prompt_tokens) for _ in range(shape.prompts)]
    weights = [(rank + 1.0) ** -shape.zipf for rank in range(shape.prompts)]
    mean_calls = sum(shape.calls) / 2.0
    jobs: list[Job] = []
    for session, at_s in enumerate(poisson(rng, calls_per_s / mean_calls, 0.0, 1.0, until_s)):
        system = rng.choices(range(shape.prompts), weights)[0]
        tokens, call_s = systems[system], at_s
        for _ in range(rng.randint(*shape.calls)):
            tokens += max(round(lognormal(rng, shape.grows_tokens, shape.spread)), 1)
            answer = max(round(lognormal(rng, shape.answer_tokens, shape.spread)), 1)
            shared = systems[system] // BLOCK_TOKENS
            hashes = [
                _block(("system", system, i) if i < shared else (session, i)) for i in range(tokens // BLOCK_TOKENS)
            ]
            if call_s < until_s:
                jobs.append(Job(0, call_s, hashes, tokens, answer, session))
            tokens += answer
            call_s += rng.expovariate(1.0 / shape.think_s)
    return numbered(jobs)


_KINDS = (
    # of all requests, blocks that all of a kind share, own tokens (mean, log spread), tokens of the answer (the same)
    (0.36, 12, 600.0, 1.0, 10.0, 1.0),
    (0.22, 5, 580.0, 0.3, 21.0, 0.3),
    (0.42, 1, 0.0, 0.0, 360.0, 0.7),
)
_TURNS, _THINK_S, _FIRST_TOKENS = 0.45, 60.0, 7_500.0
"""Of conversations: whether there is another turn, until when, and the tokens of each turn's question."""


def tool_calls(calls_per_s: float, until_s: float, seed: int) -> list[Job]:
    """Two kinds of calls with one long instruction each and short answers, among conversations.

    The proportions are those of about a hundred consecutive requests of Mooncake's trace of tools and agents, read
    by hand: the trace itself was not to be had.
    """
    rng = random.Random(f"{seed}/tool calls")
    jobs: list[Job] = []
    turns = 1.0 / (1.0 - _TURNS)
    weights = [part / (turns if kind == 2 else 1.0) for kind, (part, *_) in enumerate(_KINDS)]
    for number, begin_s in enumerate(poisson(rng, calls_per_s * sum(weights), 0.0, 1.0, until_s)):
        kind = rng.choices(range(len(_KINDS)), weights)[0]
        _, shared, own, spread, answer, answer_spread = _KINDS[kind]
        tokens, at_s = shared * BLOCK_TOKENS, begin_s
        while at_s < until_s:
            asked, spread = (_FIRST_TOKENS, 1.2) if kind == 2 else (own, spread)
            tokens = min(tokens + max(round(lognormal(rng, asked, spread)), 1), _MOST_TOKENS)
            answered = max(round(lognormal(rng, answer, answer_spread)), 1)
            count = range(tokens // BLOCK_TOKENS)
            hashes = [_block(("kind", kind, i) if i < shared else ("call", number, i)) for i in count]
            jobs.append(Job(0, at_s, hashes, tokens, answered, number))
            if kind != 2 or rng.random() > _TURNS:
                break
            tokens, at_s = min(tokens + answered, _MOST_TOKENS), at_s + rng.expovariate(1.0 / _THINK_S)
    return numbered(jobs)


def trace(path: Path, seed: int, calls_per_s: float, until_s: float) -> list[Job]:
    """A published trace, from its beginning and as often as needed, at a pace that gives so many calls a second.

    Once if there is no end.

    In the Azure format nothing is known of prefixes: no two prompts share one. Laps share nothing either.
    """
    rng = random.Random(f"{seed}/trace")
    rows = _mooncake(path, rng) if ".jsonl" in path.name else _azure(path, rng)
    length_s = rows[-1].at_s * len(rows) / (len(rows) - 1)
    pace = calls_per_s / (len(rows) / length_s)
    jobs: list[Job] = []
    lap = 0
    while True:
        if lap and math.isinf(until_s):
            return numbered(jobs)
        for row in rows:
            at_s = (row.at_s + lap * length_s) / pace
            if at_s >= until_s:
                return numbered(jobs)
            hashes = [_block((lap, block)) for block in row.hashes]
            jobs.append(Job(0, at_s, hashes, row.prompt_tokens, row.answer_tokens))
        lap += 1


_JITTER_S = 1.0
"""Requests of traces with exact stamps come so much later, at random: that is what seeds differ in."""
_COMMON = 1
"""Blocks that conversations of many begin with."""


def numbered(jobs: Sequence[Job]) -> list[Job]:
    """Jobs in order of arrival. One without a session continues that of the longest prompt that it begins with."""
    ordered = sorted(jobs, key=lambda job: job.at_s)
    sessions: dict[bytes, int] = {}
    """Last block of a prompt -> its session."""
    for number, job in enumerate(ordered):
        job.number = number
        if job.session < 0:
            own = job.hashes[_COMMON:]
            job.session = next((sessions[block] for block in reversed(own) if block in sessions), number)
            if own:
                sessions[own[-1]] = job.session
    return ordered


def ceiling(jobs: Sequence[Job]) -> float:
    """Fraction of all prompt tokens that one replica with endless memory would have."""
    seen: set[bytes] = set()
    hits = 0
    for job in jobs:
        depth = next((i for i, block in enumerate(job.hashes) if block not in seen), len(job.hashes))
        hits += depth * BLOCK_TOKENS
        seen.update(job.hashes)
    return hits / sum(job.prompt_tokens for job in jobs)


@dataclass(frozen=True, slots=True)
class _Row:
    at_s: float
    hashes: Sequence[int]
    prompt_tokens: int
    answer_tokens: int


def _mooncake(path: Path, rng: random.Random) -> list[_Row]:
    rows = []
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                at_s, tokens = float(row["timestamp"]) / 1000.0, int(row["input_length"])
                whole = row["hash_ids"][: tokens // BLOCK_TOKENS]
                rows.append(_Row(at_s, whole, tokens, max(int(row["output_length"]), 1)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {type(error).__name__} {error}") from error
    whole = 2 * len({row.at_s for row in rows}) < len(rows)
    spread_s = MOONCAKE_GRID_S if whole else _JITTER_S  # the conversation's stamps are of 3 s; others are exact
    rows = [replace(row, at_s=row.at_s + rng.random() * spread_s) for row in rows]
    return sorted(rows, key=lambda row: row.at_s)


def _azure(path: Path, rng: random.Random) -> list[_Row]:
    rows, block = [], 0
    for row in load_trace(path, rng):
        count = row.prompt_tokens // BLOCK_TOKENS
        answer_tokens = max(row.generated_tokens, 1)
        at_s = row.at_s + rng.random() * _JITTER_S
        rows.append(_Row(at_s, range(block, block + count), max(row.prompt_tokens, 1), answer_tokens))
        block += count
    return sorted(rows, key=lambda row: row.at_s)


def _block(what: object) -> bytes:
    return blake2b(repr(what).encode(), digest_size=HASH_BYTES).digest()
