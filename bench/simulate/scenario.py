"""The experiments: what is served, on what machines, under what load. Defaults as in the design's reference runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.simulate.engine import Request, Session, batching_share, slots_share
from bench.simulate.nodes import (
    Disturb,
    NodeTrace,
    antagonists,
    availability,
    calm,
    crashes,
    pauses,
    periodic,
    ramps,
    replays,
    restarts,
)
from bench.simulate.workload import TOKEN_S, load_trace, lognormal, lognormal_median, poisson


@dataclass(frozen=True, slots=True)
class Work:
    """What one request costs and what a replica can do."""

    mean_s: float
    sigma: float
    slots: int
    batch_half: float
    slo_factor: float
    slo_medians: float
    """SLO: latency <= slo_factor x work + slo_medians x median work."""

    def share(self) -> list[float]:
        """share(n) for the engine."""
        return batching_share(self.batch_half, self.slots) if self.batch_half else slots_share(self.slots)

    def throughput(self) -> float:
        """Work units a second that a nominal replica does when full."""
        return self.slots * self.share()[-1]

    def slo_s(self, work_s: float) -> float:
        """The latency that a request of this size may have."""
        return self.slo_factor * work_s + self.slo_medians * lognormal_median(self.mean_s, self.sigma)


TOKENS = Work(mean_s=3.84, sigma=0.9, slots=32, batch_half=16.0, slo_factor=4.0, slo_medians=0.0)
SHORT = Work(mean_s=0.1, sigma=0.6, slots=4, batch_half=0.0, slo_factor=3.0, slo_medians=5.0)
TURNS = Work(mean_s=1.0, sigma=0.6, slots=8, batch_half=0.0, slo_factor=3.0, slo_medians=5.0)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A replica on a node of its own that joins during the run."""

    at_fraction: float
    """Of the horizon."""
    speed: float = 1.0
    fail_fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class ForecastQuality:
    """How good the simulated forecaster is. See `forecasts.py`."""

    recall: float = 0.7
    """Of changes of a node's speed that are foreseen."""
    false_alarms_per_s: float = 1.0 / 600.0
    """Foreseen drops per node that never come."""
    error: float = 0.15
    """Log error of a predicted speed."""
    delay_s: float = 0.0
    """How much later than at full lead a change comes into view."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One experiment."""

    name: str
    work: Work
    disturb: Disturb = calm
    load: float = 0.7
    """Offered work over what all replicas can do, disturbances counted (`nodes.availability`)."""
    replicas: int = 16
    routers: int = 8
    horizon_s: float = 600.0
    warmup_s: float = 20.0
    """Requests that arrive before it are not counted."""
    swing: float = 0.3
    swing_period_s: float = 120.0
    tick_s: float = 0.5
    table_delay_s: float = 0.5
    """Tables arrive up to this much late."""
    newcomers: tuple[Newcomer, ...] = ()
    session_turns: int = 0
    think_s: float = 3.0
    move_cost_s: float = 0.0
    beginning_s: float = 0.1
    """Work that a stream costs which goes on from another replica: a prompt of 1,000 tokens."""
    quality: ForecastQuality = field(default_factory=ForecastQuality)
    announced: bool = False
    """The disturbances are scheduled and known to the forecaster exactly (`perfect` and `realistic` alike)."""
    trace: Path | None = None
    recorded: bool = False
    """Whether it plays recordings (`bench.recordings`)."""
    arms: tuple[str, ...] = ()
    """Those that say something here; empty for all."""
    note: str = ""

    def capacity(self) -> float:
        """Work units a second that the first replicas can do, on average over their disturbances."""
        return self.replicas * self.work.throughput() * availability(self.disturb)

    def quick(self) -> Scenario:
        """A shorter run of the same."""
        return replace(self, horizon_s=self.horizon_s / 5.0 + self.warmup_s)


@dataclass(slots=True)
class World:
    """One seed of a scenario: everything that is the same for every arm."""

    scenario: Scenario
    nodes: list[NodeTrace]
    requests: Callable[[], Iterator[Request]]
    """Arrivals in order of time; sessions' later turns are added by the runner."""
    seed: int


def make_world(scenario: Scenario, seed: int) -> World:
    """Draw the machines and the arrivals of one seed."""
    nodes = []
    for index in range(scenario.replicas + len(scenario.newcomers)):
        trace = NodeTrace()
        if index < scenario.replicas:
            scenario.disturb(trace, random.Random(f"{seed}/node/{index}"), scenario.horizon_s, index)
        else:
            trace.visible = False
            trace.set_from(0.0, scenario.newcomers[index - scenario.replicas].speed)
        nodes.append(trace)
    make = _trace_requests if scenario.trace is not None else _drawn_requests
    return World(scenario, nodes, lambda: make(scenario, seed), seed)


def _drawn_requests(scenario: Scenario, seed: int) -> Iterator[Request]:
    rng = random.Random(f"{seed}/arrivals")
    work = scenario.work
    per_arrival_s = work.mean_s * max(scenario.session_turns, 1)
    rate = scenario.load * scenario.capacity() / per_arrival_s
    for number, at_s in enumerate(poisson(rng, rate, scenario.swing, scenario.swing_period_s, scenario.horizon_s)):
        works_s = [lognormal(rng, work.mean_s, work.sigma) for _ in range(max(scenario.session_turns, 1))]
        request = Request(number, at_s, works_s[0], rng.randrange(scenario.routers))
        if scenario.session_turns:
            thinks_s = [rng.expovariate(1.0 / scenario.think_s) for _ in works_s]
            request.session = Session(number, works_s, thinks_s)
        if work.batch_half:
            request.items = max(round(request.work_s / TOKEN_S), 1)
        yield request


def _trace_requests(scenario: Scenario, seed: int) -> Iterator[Request]:
    """The trace at a pace that makes the scenario's load, over and over until the horizon."""
    assert scenario.trace is not None
    rng = random.Random(f"{seed}/trace")
    rows = load_trace(scenario.trace, rng)
    length_s = rows[-1].at_s * len(rows) / (len(rows) - 1)
    offered = sum(row.work_s() for row in rows) / length_s
    pace = scenario.load * scenario.capacity() / offered
    start_s = rng.random() * length_s
    number = 0
    for lap in range(1_000_000):
        for row in rows:
            at_s = (row.at_s + lap * length_s - start_s) / pace
            if at_s < 0.0:
                continue
            if at_s >= scenario.horizon_s:
                return
            request = Request(number, at_s, row.work_s(), rng.randrange(scenario.routers))
            request.items = max(row.generated_tokens, 1)
            number += 1
            yield request


_TOKENS_ANTAGONIST = Scenario(
    "tokens-antagonist", TOKENS, antagonists(0.35, 10.0, 30.0, 60.0), note="noisy neighbours, token streams"
)
_SHORT_ANTAGONIST = Scenario(
    "short-antagonist", SHORT, antagonists(0.3, 5.0, 20.0, 60.0), load=0.75, horizon_s=300.0,
    note="noisy neighbours, 100 ms requests",
)  # fmt: skip
_STALE = replace(_SHORT_ANTAGONIST, name="stale-table", note="how often tables are made")
_NEWCOMER = Scenario("newcomer-slow", SHORT, load=0.6, horizon_s=240.0)
_BETTER = ForecastQuality(recall=0.9)
_HANDING_OVER = ("live_capacity_handover", "shadecast_shipped_handover")
_JUDGED = ("p2c_true", "live_capacity", "shadecast_shipped", "shadecast_perfect", *_HANDING_OVER, "clairvoyant")
"""What can be foreseen is what the shipped forecaster is judged by: no oracle of some recall beside it."""
_REPLAY = Scenario(
    "replay", TOKENS, replays(150.0), load=0.5, recorded=True, arms=_JUDGED,
    note="recorded jobs of machines that the model has not seen",
)  # fmt: skip
_HAND_OVER = replace(
    _TOKENS_ANTAGONIST, name="hand-over", note="noisy neighbours; streams that go on elsewhere cost .1 s of work",
    arms=("p2c_true", "live_capacity", "shadecast_shipped", *_HANDING_OVER, "shadecast_handover"),
)  # fmt: skip
_PAUSES = Scenario(
    "short-pauses", SHORT, pauses(0.02, 1.0, 30.0), horizon_s=300.0, quality=_BETTER, announced=True,
    note="scheduled pauses of 1 s",
)  # fmt: skip
_SCALE_ARMS = ("random", "p2c_ray", "p2c_true", "prequal_tuned", "live_capacity", "shadecast")
"""The others take too long at 1,000 replicas, or say nothing new there."""


def _families() -> dict[str, list[Scenario]]:
    """Scenarios by the name that the command line takes; the first of each bears the plain name."""
    tokens = _TOKENS_ANTAGONIST
    listed = [
        [tokens] + [replace(tokens, name=f"{tokens.name}@{load}", load=load) for load in (0.6, 0.8, 0.9)],
        [replace(tokens, name="tokens-ramp", disturb=ramps(0.25, 10.0, 15.0, 60.0), quality=_BETTER,
                 note="throttling: 10 s down to .25, 15 s plateau")],
        [replace(tokens, name="tokens-crash", disturb=crashes(120.0, 20.0, 3.0, 0.3), quality=_BETTER,
                 note="nodes die with 10 s warning")],
        [_HAND_OVER] + [replace(_HAND_OVER, name=f"hand-over@{cost_s:g}", beginning_s=cost_s,
                                note=f"the same, {cost_s:g} s") for cost_s in (0.3, 1.0)],
        [_REPLAY, replace(_REPLAY, name="replay@0.6", load=0.6)],
        [Scenario("periodic", TOKENS, periodic(0.35, 20.0, 60.0, 120.0, 0.5), arms=_JUDGED,
                  note="neighbours of 20 s that come at intervals of 60 to 120 s, each node its own")],
        [_SHORT_ANTAGONIST],
        [_PAUSES, replace(_PAUSES, name="short-pauses@unannounced", announced=False, arms=_JUDGED,
                          note="the same, of which nobody tells the forecaster")],
        [Scenario("sessions", TURNS, antagonists(0.35, 10.0, 30.0, 60.0), load=0.6, session_turns=8,
                  note="conversations of 8 requests")],
        [Scenario("homogeneous", SHORT, load=0.75, horizon_s=240.0, note="no disturbance, 100 ms requests"),
         Scenario("homogeneous@tokens", TOKENS, note="no disturbance, token streams")],
        [Scenario("heterogeneous-cold", SHORT, restarts((0.5, 1.0, 1.0, 1.5), 90.0, 3.0, 10.0, 0.3), load=0.65,
                  horizon_s=300.0, note="unequal machines, restarts, cold starts")],
        [replace(_NEWCOMER, newcomers=(Newcomer(0.25, 0.2), Newcomer(0.4, 0.2)), note="two join, 5 x slower"),
         replace(_NEWCOMER, name="newcomer-slow@none", note="the same without them")],
        [replace(_NEWCOMER, name="newcomer-failing", note="two join that fail 20 %",
                 newcomers=(Newcomer(0.25, 1.0, 0.2), Newcomer(0.4, 1.0, 0.2)))],
        [_STALE] + [replace(_STALE, name=f"stale-table@{tick:g}", tick_s=tick) for tick in (0.25, 1.0, 5.0)],
        [replace(tokens, name="trace", note="recorded arrivals and token counts")],
        [replace(tokens, name="scale", replicas=1000, routers=100, horizon_s=20.0, warmup_s=8.0,
                 arms=_SCALE_ARMS, note="1,000 replicas, 100 routers")],
    ]  # fmt: skip
    return {family[0].name: family for family in listed}


FAMILIES = _families()
"""Name on the command line -> the scenarios that it runs."""


def find(name: str, exact: bool = False) -> list[Scenario]:
    """Scenarios of a family (or `all`), or the single one of that name; raises ValueError that lists what there is.

    With `exact`, only the one of that name: a family's plain name then means its first member.
    """
    if name == "all" and not exact:
        return [scenario for family in FAMILIES.values() for scenario in family]
    if name in FAMILIES and not exact:
        return FAMILIES[name]
    single = [scenario for family in FAMILIES.values() for scenario in family if scenario.name == name]
    if not single:
        raise ValueError(f"scenario {name!r}: unknown; known are all, {', '.join(FAMILIES)}")
    return single
