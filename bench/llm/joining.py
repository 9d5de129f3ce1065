"""A third replica joins two that serve: what its first live requests get, with and without a trial by copies.

A trial copies requests to the newcomer, as `shadecast.admission` does: a third of them, but five a second and four at
once at most, each asking for 16 tokens. It ends once 29 have ended (what the proof of soundness takes), after 3 s at
least and 30 s at most. Which requests are copied is by chance, or by what their beginnings are worth
(`shadecast.popular`). Then, as without a trial at once, the newcomer has its full share: there is no ramp here.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.llm.engine import Engine, Job, Machine
from bench.llm.routers import NOW, Router, prompt_of
from bench.llm.rules import RULES
from bench.llm.run import quantile
from bench.llm.settings import GPU, HOST
from bench.llm.traffic import TOOLS, Agents, agents
from shadecast.popular import Popular
from shadecast.token_times import MARK_TOKENS

JOINS_S = 150.0
"""Into the traffic: the others' caches are as they usually are."""
FIRST = 100
"""Live requests of the newcomer that are looked at, or as many as it gets in five minutes."""
_LEAST_S, _MOST_S, _PROOF, _AT_ONCE, _PER_S, _FAIR = 3.0, 30.0, 29, 4, 5.0, 1.0 / 3.0


@dataclass(frozen=True, slots=True)
class Arm:
    """How the newcomer is let in."""

    name: str
    copies: bool = False
    by_worth: bool = False
    late: bool = False
    """Without copies, but as late as after a trial: what the others' queues are then is alike."""


ARMS = (
    Arm("at once, untried"),
    Arm("untried, as late as after a trial", late=True),
    Arm("trial, copies by chance", copies=True),
    Arm("trial, popular beginnings first", copies=True, by_worth=True),
)


@dataclass(frozen=True, slots=True)
class Joined:
    """What the newcomer's first live requests got."""

    first_p50_s: float
    first_mean_s: float
    first_p99_s: float
    hits: float
    """Fraction of their prompt tokens that it had."""
    waited_s: float
    """From its joining to its first share."""
    copies: int
    took_s: float
    """From then on to the last of those requests."""
    all_p50_s: float
    """Of all requests, on any replica, in the minute after it has joined."""


ASSISTANTS = Agents(prompts=100, prompt_tokens=(4_000, 12_000), zipf=0.8, calls=(1, 2), grows_tokens=250.0)
"""Long instructions, of which there are many, and short questions."""


def _drawn(shape: Agents) -> Callable[[float, int], list[Job]]:
    return lambda rate, seed: agents(shape, rate, JOINS_S + 300.0, seed)


TRAFFIC: dict[str, tuple[Callable[[float, int], list[Job]], float, Machine]] = {
    "agents": (_drawn(Agents()), 2.75, GPU),
    "many agents": (_drawn(Agents(prompts=150, zipf=0.6)), 2.75, GPU),
    "tool agents": (_drawn(TOOLS), 3.7, GPU),
    "assistants": (_drawn(ASSISTANTS), 6.0, GPU),
    "assistants, host tier": (_drawn(ASSISTANTS), 10.0, HOST),
}
"""Requests, how many of them a second, and the engines."""


def join(arm: Arm, jobs: Sequence[Job], machine: Machine, *, seed: int = 0, late_s: float = 0.0) -> Joined:
    """One run. `late_s` is how long an arm that is `late` waits."""
    jobs = [replace(job) for job in jobs]
    rng = random.Random(f"{seed}/copies")
    rate = len(jobs) / jobs[-1].at_s
    fraction = min(max(0.1, _PER_S / rate), max(_FAIR, min(0.1, _PER_S / rate)))
    engines = [Engine(machine) for _ in range(3)]
    router = Router(RULES[NOW], (1.0, 1.0), machine, seed)
    popular, due = Popular(), list[tuple[float, int]]()
    copies, ended, in_s = set[int](), 0, math.inf

    def until(limit_s: float) -> None:
        nonlocal ended
        while due and due[0][0] <= limit_s:
            now_s, i = heapq.heappop(due)
            if now_s != engines[i].due_s:
                continue
            firsts, over = engines[i].advance()
            for job in firsts:
                if job.number not in copies:
                    router.first(job)
            for job in over:
                if job.number in copies:
                    ended += 1
                else:
                    router.ended(job)
            heapq.heappush(due, (engines[i].due_s, i))

    def submit(i: int, job: Job) -> None:
        before_s = engines[i].due_s
        engines[i].submit(job, job.at_s)
        if engines[i].due_s != before_s:
            heapq.heappush(due, (engines[i].due_s, i))

    for job in jobs:
        until(job.at_s)
        waited_s = job.at_s - JOINS_S
        if waited_s >= 0.0 and math.isinf(in_s):
            proven = waited_s >= _MOST_S or (ended >= _PROOF and waited_s >= _LEAST_S)
            if proven if arm.copies else waited_s >= late_s * arm.late:
                in_s = job.at_s
                router.join()
        prompt, trial = prompt_of(job), arm.copies and waited_s >= 0.0 and math.isinf(in_s)
        popular.add(prompt)
        if trial:
            gain = popular.gain(prompt, router.index.match(prompt).get(_NEW, 0))
            chance = popular.chance(gain, fraction) if arm.by_worth else fraction
            if rng.random() < chance and len(copies) - ended < _AT_ONCE:
                copy = replace(job, number=-1 - job.number, answer_tokens=min(job.answer_tokens, MARK_TOKENS))
                copies.add(copy.number)
                router.index.insert(_NEW, prompt)
                submit(2, copy)
        i = router.route(job)
        submit(i, job)
        router.told(i, engines[i].requests)
    until(1e300)
    return _judge(jobs, in_s, len(copies))


_NEW = "r2"


def _judge(jobs: Sequence[Job], in_s: float, copies: int) -> Joined:
    first = [job for job in jobs if job.replica == 2][:FIRST]
    assert len(first) >= FIRST // 2, f"the newcomer has had {len(first)} requests only"
    waits = sorted(job.first_s - job.at_s for job in first)
    minute = sorted(job.first_s - job.at_s for job in jobs if JOINS_S <= job.at_s < JOINS_S + 60.0)
    return Joined(
        quantile(waits, 0.5),
        sum(waits) / len(waits),
        quantile(waits, 0.99),
        sum(job.hits for job in first) / sum(job.prompt_tokens for job in first),
        in_s - JOINS_S,
        copies,
        first[-1].at_s - in_s,
        quantile(minute, 0.5),
    )


def compare(name: str, seed: int, load: float) -> dict[str, Joined]:
    """All arms, the same requests for each."""
    make, rate, machine = TRAFFIC[name]
    jobs = make(load * rate, seed)
    found = {arm.name: join(arm, jobs, machine, seed=seed) for arm in ARMS if not arm.late}
    late_s = found[ARMS[-1].name].waited_s
    late = {arm.name: join(arm, jobs, machine, seed=seed, late_s=late_s) for arm in ARMS if arm.late}
    return {arm.name: {**found, **late}[arm.name] for arm in ARMS}
