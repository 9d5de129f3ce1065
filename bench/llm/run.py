"""One run: a rule, its routers and engines, and a list of requests, under a virtual clock."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.llm.engine import Engine, Job, Machine
from bench.llm.routers import Router, Rule

SLO_FIRST_S, SLO_TOKEN_S = 3.0, 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """What users got. Requests that had not ended when the run was cut off have missed their SLO."""

    requests: int
    first_p50_s: float
    first_p99_s: float
    token_p50_ms: float
    token_p99_ms: float
    mean_s: float
    hits: float
    """Fraction of all prompt tokens that engines had."""
    believed: float
    """Fraction that routers took for cached where they sent the prompts."""
    busiest: float
    """Requests of the replica with most over the mean."""
    in_slo: float


def simulate(
    rule: Rule, jobs: Sequence[Job], machine: Machine, speeds: Sequence[float], *, routers: int = 1, seed: int = 0
) -> Result:
    """Serve the jobs. Each goes to a router at random."""
    jobs = [replace(job) for job in jobs]
    rng = random.Random(f"{seed}/routers")
    engines = [Engine(machine, speed) for speed in speeds]
    fleet = [Router(rule, speeds, machine.cache_tokens, seed * 1000 + number, routers) for number in range(routers)]
    due: list[tuple[float, int]] = []
    """Ends of engines' steps; one that was cut short leaves its old entry behind."""
    report_s = rule.report_s if routers > 1 else math.inf

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

    for job in jobs:
        while report_s <= job.at_s:
            until(report_s)
            _exchange(fleet)
            report_s += rule.report_s
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


def _exchange(fleet: Sequence[Router]) -> None:
    reports = [router.report() for router in fleet]
    for i, router in enumerate(fleet):
        router.hear(fleet, [each for k, decisions in enumerate(reports) if k != i for each in decisions])


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
        quantile(firsts, 0.5),
        quantile(firsts, 0.99),
        1000.0 * quantile(streams, 0.5),
        1000.0 * quantile(streams, 0.99),
        sum(job.end_s - job.at_s for job in jobs) / len(jobs),
        sum(job.hits for job in jobs) / sum(job.prompt_tokens for job in jobs),
        1.0 - sum(job.uncached for job in jobs) / sum(job.prompt_tokens for job in jobs),
        max(counts) * replicas / len(jobs),
        kept / len(jobs),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of values in order."""
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else math.nan
