"""One run: a scenario, an arm, a seed; and what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.simulate.arms.base import Arm
from bench.simulate.engine import Replica, Request, Simulation
from bench.simulate.scenario import Scenario, World, make_world

_DRAIN_S = 120.0
"""How long after the last arrival requests may still end; those that have not count as that late."""
_SLICE_S = 10.0
"""Of the simulated time, between two words on how far it is."""


@dataclass(slots=True)
class _Record:
    arrived_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    works_s: list[float] = field(default_factory=list)
    counted: int = 0
    failed: int = 0
    lost: int = 0
    turns: int = 0
    moved: int = 0


class _Runner:
    def __init__(self, scenario: Scenario, world: World, arm: Arm, seed: int) -> None:
        self.scenario = scenario
        self.world = world
        self.record = _Record()
        self.sim = sim = Simulation(scenario.routers, scenario.work.share(), str(seed))
        sim.move_cost_s = scenario.move_cost_s
        sim.bind(arm)
        sim.on_end = self.ended
        sim.on_lost = self.lost
        self._routers = random.Random(f"{seed}/routers")
        self._arrivals = world.requests()
        self._next_id = 1 << 40
        self._original: dict[int, float] = {}
        self.open: dict[int, Request] = {}
        arm.start(sim, world, random.Random(f"{seed}/arm"))
        self._on_node: dict[int, Replica] = {}
        for index, trace in enumerate(world.nodes):
            newcomer = index - scenario.replicas
            if newcomer < 0:
                self._on_node[index] = sim.join(index, trace.speeds[0])
            else:
                sim.at(scenario.newcomers[newcomer].at_fraction * scenario.horizon_s, self._newcomer, index)
            for time_s, speed in zip(trace.times_s[1:], trace.speeds[1:], strict=True):
                sim.at(time_s, self._speed, (index, speed))
            for down_s, up_s in trace.downs_s:
                sim.at(down_s, self._down, index)
                sim.at(up_s, self._up, index)
        self._schedule_arrival()

    def _speed(self, change: tuple[int, float]) -> None:
        replica = self._on_node.get(change[0])
        if replica is not None:
            replica.set_speed(change[1])

    def _down(self, node: int) -> None:
        self.sim.leave(self._on_node.pop(node))

    def _up(self, node: int) -> None:
        self._on_node[node] = self.sim.join(node, self.world.nodes[node].speed_at(self.sim.now_s))

    def _newcomer(self, node: int) -> None:
        newcomer = self.scenario.newcomers[node - self.scenario.replicas]
        self._on_node[node] = self.sim.join(node, newcomer.speed, newcomer.fail_fraction)

    def _schedule_arrival(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            self.sim.at(request.arrived_s, self._arrive, request)

    def _arrive(self, request: Request) -> None:
        self._schedule_arrival()
        self._begin(request)

    def _begin(self, request: Request) -> None:
        self.open[request.id] = request
        if self.sim.move_cost_s:
            self._original[request.id] = request.work_s
        self.sim.dispatch(request)

    def lost(self, request: Request) -> None:
        if request.arrived_s >= self.scenario.warmup_s:
            self.record.lost += 1

    def ended(self, request: Request, ok: bool) -> None:
        del self.open[request.id]
        work_s = self._original.pop(request.id, request.work_s) if self.sim.move_cost_s else request.work_s
        if request.fails:
            work_s = request.work_s / 0.05
        self.count(request, ok, work_s)
        session = request.session
        if session is not None and request.turn + 1 < len(session.works_s):
            turn = request.turn + 1
            self._next_id += 1
            at_s = self.sim.now_s + session.thinks_s[turn]
            follow = Request(self._next_id, at_s, session.works_s[turn], self._routers.randrange(self.sim.routers))
            follow.session, follow.turn = session, turn
            self.sim.at(at_s, self._begin, follow)

    def count(self, request: Request, ok: bool, work_s: float) -> None:
        record, scenario = self.record, self.scenario
        if not scenario.warmup_s <= request.arrived_s < scenario.horizon_s:
            return
        record.counted += 1
        if request.session is not None and request.turn:
            record.turns += 1
        if not ok:
            record.failed += 1
            return
        record.arrived_s.append(request.arrived_s)
        record.latencies_s.append(self.sim.now_s - request.arrived_s)
        record.works_s.append(work_s)


@dataclass(frozen=True, slots=True)
class Played:
    """What came of the requests of one run that ended well, in the order in which they ended."""

    metrics: Mapping[str, float]
    arrived_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    slo_s: NDArray[np.float64]
    """The latency that each may have."""


def simulate(scenario: Scenario, make_arm: Callable[[], Arm], seed: int) -> Mapping[str, float]:
    """Run one arm on one seed; returns its metrics (seconds, fractions, counts)."""
    return play(make_world(scenario, seed), make_arm()).metrics


def play(world: World, arm: Arm, on_progress: Callable[[float], None] = lambda done: None) -> Played:
    """Run one arm in a world; `on_progress` hears now and then what fraction of its time is over."""
    scenario = world.scenario
    runner = _Runner(scenario, world, arm, world.seed)
    sim = runner.sim
    while sim.now_s < scenario.horizon_s:
        sim.run(min(sim.now_s + _SLICE_S, scenario.horizon_s))
        on_progress(sim.now_s / scenario.horizon_s)
    end_s = scenario.horizon_s + _DRAIN_S
    while runner.open and sim.now_s < end_s:
        sim.run(min(sim.now_s + 1.0, end_s))
    unfinished = list(runner.open.values())
    for request in unfinished:
        runner.count(request, True, request.work_s)
    record, work = runner.record, scenario.work
    works_s = np.asarray(record.works_s)
    return Played(
        {**_metrics(runner), "unfinished": float(len(unfinished)), **arm.extra_metrics()},
        np.asarray(record.arrived_s),
        np.asarray(record.latencies_s),
        work.slo_factor * works_s + work.slo_s(0.0),
    )


def _metrics(runner: _Runner) -> dict[str, Any]:
    record, scenario = runner.record, runner.scenario
    latency = np.asarray(record.latencies_s)
    work = np.asarray(record.works_s)
    slowdown = latency / work
    slo = scenario.work.slo_factor * work + scenario.work.slo_s(0.0)
    decisions = np.asarray(runner.sim.decision_s)
    p50, p99, p999 = np.quantile(latency, [0.5, 0.99, 0.999])
    s50, s99, s999 = np.quantile(slowdown, [0.5, 0.99, 0.999])
    return {
        "p50_s": float(p50),
        "p99_s": float(p99),
        "p999_s": float(p999),
        "slo_miss_fraction": float(np.mean(latency > slo)),
        "p50_slowdown": float(s50),
        "p99_slowdown": float(s99),
        "p999_slowdown": float(s999),
        "lost_requests": float(record.lost),
        "moved_sessions": float(runner.sim.moved_sessions),
        "moved_fraction": runner.sim.moved_sessions / record.turns if record.turns else 0.0,
        "error_fraction": record.failed / max(record.counted, 1),
        "requests": float(record.counted),
        "decision_us": float(np.median(decisions) * 1e6) if len(decisions) else 0.0,
    }
