"""A scripted world around one `Balancer`: one router, requests of set speeds and errors, a clock that is a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from shadecast.balancer import Balancer, TickInput, TickOutput
from shadecast.config import Config
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    State,
    TableRow,
)

DEPLOYMENT = "app/model"


@dataclass
class Machine:
    """One replica: `speed` divides its 50 ms of work, `failing` of its requests raise."""

    node_id: str
    speed: float = 1.0
    failing: float = 0.0
    background: float = 0.0
    memory: float = 0.3
    alive: bool = True
    silent: bool = False
    forecast: Forecast | None = None


@dataclass
class World:
    """Ticks a balancer; requests follow the shares and capacities of its own tables."""

    settings: dict = field(default_factory=dict)
    rate_per_tick: int = 10
    seed: int = 1
    copyable: bool = True
    left_below: float = 0.0
    """Replicas with less than this part of the best capacity get no live request, as by the least score."""
    overflow: float = 0.0
    """But for this part of the best one's, as when those are busy for a moment."""
    bad_session: str = ""
    """The replica that has the session whose requests fail everywhere, four a second of them."""
    kept_session: str = ""
    """The replica that a session goes on asking, four times a second, until it is moved."""
    of_sessions: int = 0
    """Sessions that requests are of; 0: they are of none."""
    waiting: int = 0
    """Requests that wait in the router."""

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.balancer = Balancer(DEPLOYMENT, Config.from_mapping(self.settings), epoch=1)
        self.machines: dict[str, Machine] = {}
        self.now_s = 0.0
        self.seq = 0
        self.output: TickOutput | None = None
        self.transitions = []
        self.live = dict[str, int]()
        self.failed_live = 0
        self.mirrored = 0
        self.requests = 0
        self.routers = True
        self.holds: set[str] = set()

    def add(self, name: str, **kwargs) -> Machine:
        self.machines[name] = Machine(kwargs.pop("node_id", f"node-{name}"), **kwargs)
        return self.machines[name]

    def row(self, name: str) -> TableRow:
        return next(r for r in self.output.table.rows if r.replica_id == name)

    def state(self, name: str) -> State:
        return self.row(name).state

    def serve(self) -> RouterReport:
        """Requests of one tick, routed by the last table, and what the router would report of them."""
        rows = {r.replica_id: r for r in self.output.table.rows} if self.output else {}
        alive = {n: m for n, m in self.machines.items() if m.alive}
        weights = {n: rows[n].share * rows[n].capacity if n in rows else 0.0 for n in alive}
        best = max(weights.values(), default=0.0)
        weights = {n: w if w >= self.left_below * best else self.overflow * best for n, w in weights.items()}
        if not any(weights.values()):
            weights = dict.fromkeys(alive, 1.0)
        outcomes = {n: [] for n in alive}
        pairs = []
        mirrored = uncopyable = 0
        for _ in range(self.rate_per_tick if alive else 0):
            self.requests += 1
            primary = self.rng.choices(list(weights), list(weights.values()))[0]
            noise = self.rng.lognormvariate(0, 0.2)
            outcome = self.request(alive[primary], noise)
            outcomes[primary].append(outcome)
            self.live[primary] = self.live.get(primary, 0) + 1
            self.failed_live += not outcome.ok
            for name, row in rows.items():
                if name in alive and self.rng.random() < row.mirror_fraction:
                    if not self.copyable:
                        uncopyable += 1
                        continue
                    mirrored += 1
                    copy = self.request(alive[name], noise)
                    pairs.append(
                        PairedSample(name, primary, outcome.duration_s, copy.duration_s, 0, 0, outcome.ok, copy.ok)
                    )
        if self.bad_session in alive:
            outcomes[self.bad_session] += [Outcome(0.01, 0.0, False, origin="bad")] * 2
        if self.kept_session in alive:
            outcomes[self.kept_session] += [Outcome(0.05, 0.0, True)] * 2
        self.mirrored += mirrored
        self.seq += 1
        replicas = tuple(
            ReplicaReport(
                n, m.node_id, 8, 0, len(outcomes[n]), len(outcomes[n]), sum(not o.ok for o in outcomes[n]),
                tuple(outcomes[n]),
            )
            for n, m in alive.items()
        )  # fmt: skip
        return RouterReport(
            "router", DEPLOYMENT, self.seq, 0.5, replicas, tuple(pairs), mirrored, 0, uncopyable, level="table",
            waiting=self.waiting,
        )  # fmt: skip

    def request(self, machine: Machine, noise: float) -> Outcome:
        duration_s = 0.05 * noise / (machine.speed * self.rng.lognormvariate(0, 0.1))
        ok = self.rng.random() >= machine.failing
        origin = str(self.rng.randrange(self.of_sessions)) if self.of_sessions and not ok else ""
        return Outcome(duration_s, 0.0, ok, origin=origin)

    def nodes(self) -> tuple[NodeReport, ...]:
        return tuple(
            NodeReport(
                m.node_id,
                self.seq,
                NodeSnapshot(m.background, m.background, m.memory, 0.0, 0.0, 0.0, 0.0),
                m.forecast,
            )
            for m in self.machines.values()
            if m.alive and not m.silent
        )

    def tick(self) -> TickOutput:
        routers = (self.serve(),) if self.routers else ()
        self.now_s += 0.5
        self.output = self.balancer.on_tick(TickInput(self.now_s, routers, self.nodes(), frozenset(self.holds)))
        self.transitions += self.output.transitions
        return self.output

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            self.tick()

    def events(self, name: str) -> list[str]:
        return [t.event for t in self.transitions if t.replica_id == name]


def grown(count: int = 4, **kwargs) -> World:
    """A world with `count` equal replicas that are ACTIVE, past its first start."""
    world = World(**kwargs)
    for i in range(count):
        world.add(f"old{i}")
    world.run(20)
    assert all(world.state(f"old{i}") is State.ACTIVE for i in range(count))
    world.transitions.clear()
    world.live.clear()
    world.failed_live = 0
    return world
