"""One run: a rule, its routers and engines, and a list of requests, under a virtual clock."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from bench.llm.engine import Engine, Job, Machine
from bench.llm.routers import REPORT_S, TABLE_S, Router, Rule, new_index
from shadecast.prefix_mail import Mail

SLO_FIRST_S, SLO_TOKEN_S = 3.0, 0.1


@dataclass(frozen=True, slots=True)
class Change:
    """A replica is so fast from now on."""

    at_s: float
    replica: int
    speed: float


_What: TypeAlias = Change | tuple[str, int]


@dataclass(frozen=True, slots=True)
class Result:
    """What users got."""

    requests: int
    slo_fraction: float
    """Requests with their first token within SLO_FIRST_S and their others SLO_TOKEN_S apart on average."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    mean_s: float
    hit_fraction: float
    """Of all prompt tokens, those that engines had."""
    believed_fraction: float
    """Fraction that routers took for cached where they sent the prompts."""
    busiest: float
    """Requests of the replica with most over the mean."""


def simulate(
    rule: Rule,
    jobs: Sequence[Job],
    machine: Machine,
    speeds: Sequence[float],
    *,
    changes: Sequence[Change] = (),
    routers: int = 1,
    seed: int = 0,
) -> Result:
    """Serve the jobs. Each goes to a router at random; engines' speeds change as told."""
    jobs = [replace(job) for job in jobs]
    rng = random.Random(f"{seed}/routers")
    engines = [Engine(machine, speed) for speed in speeds]
    tree = new_index(rule, machine) if rule.one_tree else None
    fleet = [Router(rule, speeds, machine, seed * 1000 + number, engines, routers, tree) for number in range(routers)]
    mail, counts = Mail(), [[0.0] * len(speeds) for _ in range(routers)]
    due: list[tuple[float, int]] = []
    """Ends of engines' steps; one that was cut short leaves its old entry behind."""
    others = _Calendar(rule, routers, changes)

    def until(limit_s: float) -> None:
        while due and due[0][0] <= limit_s:
            now_s, i = heapq.heappop(due)
            if now_s != engines[i].due_s:
                continue
            firsts, ended = engines[i].advance()
            for job in firsts:
                fleet[job.router].first(job)
            for job in ended:
                fleet[job.router].ended(job)
            heapq.heappush(due, (engines[i].due_s, i))

    def happens(now_s: float, what: _What) -> None:
        until(now_s)
        match what:
            case Change(_, i, speed):
                engines[i].set_speed(speed, now_s)
                heapq.heappush(due, (engines[i].due_s, i))
            case "exchange", number:
                fleet[number].exchange(mail, now_s)
            case "report", number:
                counts[number] = [load.requests for load in fleet[number].mine]
            case _:
                sums = [sum(column) for column in zip(*counts, strict=True)]
                for router in fleet:
                    router.take_table(sums)

    for job in jobs:
        for now_s, what in others.before(job.at_s):
            happens(now_s, what)
        until(job.at_s)
        job.router = rng.randrange(routers)
        i = fleet[job.router].route(job)
        before_s = engines[i].due_s
        engines[i].submit(job, job.at_s)
        fleet[job.router].told(i, engines[i].requests)
        if engines[i].due_s != before_s:
            heapq.heappush(due, (engines[i].due_s, i))
    until(1e300)
    return _judge(jobs, len(engines))


class _Calendar:
    """What happens besides requests: reports, tables and exchanges of several routers, and changes of speed."""

    def __init__(self, rule: Rule, routers: int, changes: Sequence[Change]) -> None:
        self._due: list[tuple[float, int, _What, float]] = []
        for change in changes:
            self._add(change.at_s, change, math.inf)
        if routers > 1 and not rule.rival:
            for number in range(routers):
                phase = (number + 1) / routers
                self._add(phase * rule.exchange_s, ("exchange", number), rule.exchange_s)
                self._add(phase * REPORT_S, ("report", number), REPORT_S)
            self._add(TABLE_S, ("table", 0), TABLE_S)

    def _add(self, at_s: float, what: _What, every_s: float) -> None:
        heapq.heappush(self._due, (at_s, len(self._due), what, every_s))

    def before(self, limit_s: float) -> Iterator[tuple[float, _What]]:
        """All of it up to then, in order."""
        while self._due and self._due[0][0] <= limit_s:
            at_s, number, what, every_s = heapq.heappop(self._due)
            yield at_s, what
            if math.isfinite(every_s):
                heapq.heappush(self._due, (at_s + every_s, number, what, every_s))


def _judge(jobs: Sequence[Job], replicas: int) -> Result:
    assert all(math.isfinite(job.end_s) for job in jobs), "every request ends"
    firsts = sorted(job.first_s - job.at_s for job in jobs)
    paces = [(job.end_s - job.first_s) / max(job.answer_tokens - 1, 1) for job in jobs]
    kept = sum(
        job.first_s - job.at_s <= SLO_FIRST_S and pace <= SLO_TOKEN_S for job, pace in zip(jobs, paces, strict=True)
    )
    streams = sorted(pace for job, pace in zip(jobs, paces, strict=True) if job.answer_tokens > 1)
    counts = [0] * replicas
    for job in jobs:
        counts[job.replica] += 1
    return Result(
        len(jobs),
        kept / len(jobs),
        quantile(firsts, 0.5),
        quantile(firsts, 0.9),
        quantile(firsts, 0.99),
        1000.0 * quantile(streams, 0.5),
        1000.0 * quantile(streams, 0.99),
        sum(job.end_s - job.at_s for job in jobs) / len(jobs),
        sum(job.hits for job in jobs) / sum(job.prompt_tokens for job in jobs),
        1.0 - sum(job.uncached for job in jobs) / sum(job.prompt_tokens for job in jobs),
        max(counts) * replicas / len(jobs),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of values in order."""
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else math.nan
