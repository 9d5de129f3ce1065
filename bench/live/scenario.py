"""The live scenarios: a deployment, an arrival process and a timeline of faults each, as data.

Times of faults are fractions of a run's length, so that `--quick` shortens all of it alike.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from bench.live.cgroups import LabError
from bench.simulate.workload import load_trace

QUOTA = 0.25
"""Cores of a worker."""
CPU_S = 0.01
RATE_PER_S = 24.0
REQUESTS = 2000
_ITEM_CPU_S = 0.003
WARM_UP_S = 20.0
"""Replicas of a first start enter untried for 15 s, and queues and estimates settle; nothing of it is counted."""
Kind = Literal["unary", "stream", "http"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong from `start` to `end` of the run's length; before 0 is before the warm-up.

    `kind` is a function of `bench.live.faults`. `bad`: whether the oracle is told that the node is bad meanwhile.
    """

    kind: str
    start: float
    end: float
    value: float = 0.0
    bad: bool = True
    node: int = 0
    """Which node: 0 is the run's, others are counted on from it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario; see the table below."""

    name: str
    note: str
    faults: tuple[Fault, ...] = ()
    kind: Kind = "unary"
    rate_per_s: float = RATE_PER_S
    requests: int = REQUESTS
    cpu_s: float = CPU_S
    payload_bytes: int = 0
    batched: bool = False
    """Whether the model answers what is there together (`@serve.batch`)."""
    sessions: int = 0
    stream_s: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest stream when nothing is slow; log-uniform between."""
    stream_fraction: float = 0.0
    """Of unary requests, that are streams instead."""
    item_gap_s: float = 0.2
    slo_s: float = 0.3
    """Of a request; of a stream, its first item's, and its mean gap must be within twice `item_gap_s`."""
    replicas: int = 4
    joins: int = 0
    """Replicas that the fault `newcomer` adds."""
    memory_limit_bytes: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trace: bool = False
    soak: bool = False
    """Whether growth and leftovers are looked for."""
    warm_up_s: float = WARM_UP_S
    seconds: float = 0.0
    """Length of the run; 0 takes what `requests` need."""

    @property
    def length_s(self) -> float:
        """Of the measured part."""
        return self.seconds or self.requests / self.rate_per_s

    def shortened(self) -> Scenario:
        """A third of the requests."""
        return replace(self, requests=max(self.requests // 3, 1), seconds=self.seconds / 3)


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send, `at_s` after the warm-up."""

    at_s: float
    x: int
    cpu_s: float
    items: int = 0
    session: str = ""


_COMPARED = {"trial": {"compare": "bench.live.workload:same_value"}}


def _every_minute(minutes: int) -> tuple[Fault, ...]:
    """A hog from second 10 to second 30 of each."""
    part = 1.0 / minutes
    return tuple(Fault("hog", (k + 1 / 6) * part, (k + 1 / 2) * part, 8) for k in range(minutes))


_REPLAY = (Fault("replay", 0.0, 1.0, bad=False),)
_REPLAY_MEMORY_BYTES = 1 << 30
_STREAMS = Scenario(
    "streams",
    "streams of 2-20 s of items every 0.2 s, a hog arrives mid-stream",
    (Fault("hog", 0.3, 0.75, 8),),
    kind="stream",
    rate_per_s=3.2,
    cpu_s=0.003,
    stream_s=(2.0, 20.0),
    slo_s=1.0,
    settings={"balance": {"resume": "had"}},
)
_WELL = Scenario(
    "newcomer-well",
    "a fourth, equal replica joins",
    (Fault("newcomer_well", 0.15, 1.0, bad=False),),
    replicas=3,
    joins=1,
    rate_per_s=20,
)
_FEW = replace(
    _WELL, name="newcomer-well-few", note="a fourth, equal replica joins at 5 requests/s", rate_per_s=5, requests=600
)
_HALF_SPEED = replace(
    _WELL,
    name="newcomer-half-speed",
    note="a fourth replica joins on a machine of half the speed: every request takes twice the CPU time",
    faults=(Fault("newcomer_slow", 0.15, 1.0, 2.0, bad=False),),
    rate_per_s=50,  # six tenths of what the four can do: at less a faster one is nearly always idle, and rightly chosen
    requests=4000,
)
_HALF_QUOTA = replace(
    _WELL,
    name="newcomer-half-quota",
    note="a fourth replica joins on half the others' quota, about what one request uses up",
    faults=(Fault("quota", -1.0, 1.1, 0.5 * QUOTA, bad=False), *_WELL.faults),
)
_SCALE_UP = replace(
    _WELL,
    name="scale-up-under-load",
    note="two replicas at .95 of what they can do become four",
    replicas=2,
    joins=2,
    rate_per_s=34,
)


def _batched(scenario: Scenario, rate_per_s: float) -> Scenario:
    return replace(
        scenario,
        name=f"{scenario.name}-batched",
        note=f"{scenario.note}; behind @serve.batch",
        batched=True,
        rate_per_s=rate_per_s,
    )


_ALL = (
    Scenario("calm", "four equal nodes, nothing happens"),
    Scenario("hog", "eight-process CPU hog in one node's group", (Fault("hog", 0.3, 0.75, 8),)),
    _STREAMS,
    replace(
        _STREAMS,
        name="streams-periodic",
        note="streams as above; the hog is there 20 s of every 60",
        faults=_every_minute(11),
        requests=2112,
    ),
    Scenario(
        "replay", "recorded jobs as CPU, memory and network load on every node", _REPLAY, seconds=300.0,
        memory_limit_bytes=_REPLAY_MEMORY_BYTES,
    ),
    replace(
        _STREAMS, name="streams-replay", note="streams as above; recorded jobs as load on every node",
        faults=_REPLAY, seconds=600.0, memory_limit_bytes=_REPLAY_MEMORY_BYTES,
    ),
    Scenario("newcomer-none", "three replicas, the baseline of the newcomers", replicas=3, rate_per_s=18),
    _WELL,
    _FEW,
    _batched(_WELL, 28),
    _HALF_SPEED,
    _batched(_HALF_SPEED, 28),
    _HALF_QUOTA,
    _SCALE_UP,
    _batched(_SCALE_UP, 40),
    Scenario(
        "newcomer-slow", "a fourth replica joins, five times as slow", (Fault("newcomer_slow", 0.15, 1.0, 5.0),),
        replicas=3, joins=1, rate_per_s=18,
    ),
    Scenario(
        "newcomer-failing", "a fourth replica joins and fails 20 %", (Fault("newcomer_failing", 0.15, 1.0, 0.2),),
        replicas=3, joins=1, rate_per_s=18,
    ),
    Scenario(
        "newcomer-wrong", "a fourth replica joins and answers wrong", (Fault("newcomer_wrong", 0.15, 1.0, 1),),
        replicas=3, joins=1, rate_per_s=18, settings=_COMPARED,
    ),
    Scenario("node-kill", "one node loses power", (Fault("kill", 0.4, 1.0),)),
    Scenario("coordinator-kill", "the coordinator is killed", (Fault("coordinator_kill", 0.4, 0.5, bad=False),)),
    Scenario("partition", "one node's link is down for 10 s", (Fault("link_down", 0.4, 0.4 + 10 * 24 / 2000),)),
    Scenario(
        "sessions-hot", "sticky sessions, one node slows to a tenth", (Fault("hog", 0.3, 0.8, 8),), sessions=100,
    ),
    Scenario("hog-periodic", "the hog is there 20 s of every 60", _every_minute(3), requests=4320),
    Scenario("forecaster-kill", "one node's forecaster is killed", (Fault("forecaster_kill", 0.4, 0.5, bad=False),)),
    Scenario("slow-node", "one node at 40 % of the others' quota", (Fault("quota", -1.0, 1.1, 0.4 * QUOTA),)),
    Scenario(
        "memory-leak", "one node's memory fills up to its limit", (Fault("leak", 0.2, 0.85, 1.1),),
        memory_limit_bytes=1 << 30,
    ),
    Scenario(
        "slow-link", "one node's link cut to 1 MB/s, requests of 200 kB", (Fault("slow_link", 0.3, 0.75, 1e6),),
        payload_bytes=200_000, cpu_s=0.005,
    ),
    Scenario("rolling-update", "a new version rolls over all replicas", (Fault("rolling", 0.15, 1.0, bad=False),)),
    Scenario("overload", "1.3 times what the nodes can do", rate_per_s=75, requests=3000, slo_s=2.0),
    Scenario("trace", "arrivals of the Azure code trace, Mooncake's lengths; hog", (Fault("hog", 0.3, 0.75, 8),),
             rate_per_s=12, trace=True),
    Scenario("gateway-kill", "one of two gateways is killed, over HTTP", (Fault("gateway_kill", 0.4, 0.5, bad=False),),
             kind="http", rate_per_s=18),
)  # fmt: skip
SCENARIOS: Mapping[str, Scenario] = {scenario.name: scenario for scenario in _ALL}


def find_scenarios(names: str) -> list[Scenario]:
    """Scenarios by comma separated names, or "all". Raises LabError that lists what there is."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        return list(_ALL)
    for name in wanted:
        if name not in SCENARIOS:
            raise LabError(f"--scenario {name!r}: unknown; known are all, soak, {', '.join(SCENARIOS)}, chaos")
    if not wanted:
        raise LabError("--scenario is empty: name one, several with commas, or all")
    return [SCENARIOS[name] for name in dict.fromkeys(wanted)]


def requests(scenario: Scenario, seed: int) -> list[Request]:
    """The requests of one seed, in order, from `-warm_up_s` on: the same for every arm.

    Scenarios that differ in their faults alone have the same requests, too.
    """
    rng = random.Random(f"requests {seed}")
    made = []
    for at_s in _arrivals(scenario, rng):
        cpu_s = scenario.cpu_s * rng.uniform(0.7, 1.3)
        items = 0
        if scenario.kind == "stream" or rng.random() < scenario.stream_fraction:
            low_s, high_s = scenario.stream_s
            items = max(round(low_s * (high_s / low_s) ** rng.random() / scenario.item_gap_s), 2)
            cpu_s = min(scenario.cpu_s, _ITEM_CPU_S)
        session = f"session-{seed}-{rng.randrange(scenario.sessions)}" if scenario.sessions else ""
        made.append(Request(at_s, rng.randrange(1 << 30), cpu_s, items, session))
    if scenario.trace:
        made = _with_lengths(made, scenario.cpu_s, rng)
    return made


def _arrivals(scenario: Scenario, rng: random.Random) -> Iterator[float]:
    if scenario.trace:
        rows = load_trace(trace_file("AzureLLMInferenceTrace_code.csv.gz"), rng)
        mean_rate = len(rows) / rows[-1].at_s
        faster = scenario.rate_per_s / mean_rate
        span_s = (scenario.length_s + scenario.warm_up_s) * faster
        wanted = scenario.rate_per_s * (scenario.length_s + scenario.warm_up_s)
        for _ in range(200):  # parts of the trace differ several-fold: one with about the requests that are wanted
            first_s = rng.uniform(0.0, rows[-1].at_s - span_s)
            part = [row.at_s - first_s for row in rows if first_s <= row.at_s < first_s + span_s]
            if abs(len(part) - wanted) < 0.1 * wanted:
                break
        yield from (at_s / faster - scenario.warm_up_s for at_s in part)
        return
    at_s = -scenario.warm_up_s
    while (at_s := at_s + rng.expovariate(scenario.rate_per_s)) < scenario.length_s:
        yield at_s


def _with_lengths(made: list[Request], mean_cpu_s: float, rng: random.Random) -> list[Request]:
    """Work in proportion to the Mooncake requests' lengths, at most four times the mean."""
    rows = load_trace(trace_file("conversation_trace.jsonl.gz"), rng)
    works = [row.work_s() for row in islice(rows, rng.randrange(len(rows) // 2), None)]
    mean_s = sum(works) / len(works)
    return [replace(r, cpu_s=mean_cpu_s * min(works[i % len(works)] / mean_s, 4.0)) for i, r in enumerate(made)]


def trace_file(name: str) -> Path:
    """A public trace. Raises LabError that says where it was looked for."""
    data = os.environ.get("SHADECAST_DATA") or str(Path(__file__).resolve().parents[2] / ".." / "shared" / "data")
    path = Path(data) / "traces" / name
    if not path.exists():
        raise LabError(f"scenario trace: {path.name} is not in {path.parent}: set SHADECAST_DATA to the data's folder")
    return path
