"""The product's own code under virtual time: balancer, ledger, pick tables, sessions; only the transport is simulated.

Each router keeps `shadecast.calls.Calls`, a `Ledger` and a `PickTable` as `serve_app.routing` does, and reports once a
second through an `Inbox`; nodes report telemetry and forecasts once a second; `Balancer.on_tick` runs every tick with
jitter and its table reaches each router up to the scenario's delay late. Copies to replicas on trial take their real
capacity.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bench.simulate.arms.base import Arm
from bench.simulate.forecasts import Kind, NodeForecaster
from bench.simulate.workload import TOKEN_S
from shadecast.balancer import Balancer, TickInput
from shadecast.calls import Call, Calls, Event
from shadecast.config import CHOICES, REPORT_S, TICK_JITTER, Config
from shadecast.handover import HandOver, Running
from shadecast.inbox import Inbox
from shadecast.ledger import Ledger
from shadecast.pick import PickTable, ToldQueues, copied_to, cost_table
from shadecast.rescue import VERY_SLOW, budget, slow_replicas, worth_moving
from shadecast.sessions import SessionMap
from shadecast.tables import level
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    PairedSample,
    RouterReport,
    RoutingTable,
    State,
    Transition,
)

if TYPE_CHECKING:
    from bench.simulate.engine import Request, Simulation
    from bench.simulate.scenario import World

_DEPLOYMENT = "sim/model"
_TELEMETRY_S = 1.0
_TELEMETRY_NOISE = 0.02
_SHADOW_ITEMS = 32
"""Streams are compared over their first items, then the copy is cancelled (design section 7)."""
_MAX_ONGOING = 1_000


class _Forecaster(Protocol):
    def make(self, now_s: float, load_now: float, memory_now: float) -> Forecast | None: ...


class _Call(Call):
    """A call of the product's book, and the simulated request that it is of."""

    paid_s = 0.0

    def __init__(self, request: Request) -> None:
        self.request = request


@dataclass(slots=True)
class _Beginning:
    """A stream that is about to go on elsewhere."""

    router: _Router
    first: _Call
    second: _Call
    had: float


class _Router:
    """What one router process holds."""

    def __init__(self, arm: Product, number: int, secret: bytes) -> None:
        self.arm = arm
        self.calls: Calls[_Call] = Calls()
        self.open: dict[int, _Call] = {}
        """Live calls by their request."""
        self.ledger = Ledger(f"router-{number}", _DEPLOYMENT, self.calls)
        self.table: RoutingTable | None = None
        self.table_s = 0.0
        self.cost_key = (1.0, 0.0)
        self.cost = cost_table(*self.cost_key)
        self.picks = PickTable((), None, {}, {}, self.cost)
        self.counted: dict[str, int] = {}
        self.by_index: list[int] = []
        self.told = ToldQueues()
        self.mirrored: list[tuple[str, float]] = []
        self.copies: dict[str, int] = {}
        self.sessions = SessionMap(arm.config.session, secret, arm.config.trial.drain_s)
        self.rescue_budget = budget(arm.config.balance.rescue_fraction)
        self.very_slow: frozenset[str] = frozenset()
        self.streams: dict[int, tuple[Request, float, float]] = {}
        """Live streams: request, items counted, since when the next is waited for."""
        self.hand_over = HandOver()

    def take_table(self, table: RoutingTable) -> None:
        """Use a newer table; older ones are ignored."""
        held = self.table
        if held is not None and (table.epoch, table.version) <= (held.epoch, held.version):
            return
        self.table = table
        self.table_s = self.arm.made_s[table.version]
        self.lay_out()
        slow = slow_replicas(table)
        self.very_slow = frozenset(slow_replicas(table, VERY_SLOW)) if slow else frozenset()
        if slow:
            self.arm.rescue(self, table, slow)
        if self.arm.hands_over:
            self.arm.hand_over(self, table)

    def lay_out(self) -> None:
        """Precompute the picks for the present members and table."""
        table = self.table
        if table is not None and (table.slots, table.batch_half) != self.cost_key:
            self.cost_key = (table.slots, table.batch_half)
            self.cost = cost_table(*self.cost_key)
        self.by_index = list(self.arm.sim.members)
        ids = [self.arm.ids[member] for member in self.by_index]
        told = self.told.at(self.arm.sim.now_s)
        self.picks = PickTable(ids, table, self.calls.all_in_flight(), self.counted, self.cost, seen=told)
        rows = table.rows if table is not None else ()
        alive = self.picks.index
        self.mirrored = [
            (row.replica_id, row.mirror_fraction) for row in rows if row.mirror_fraction > 0 and row.replica_id in alive
        ]
        if self.arm.with_sessions:
            self.sessions.take(self.picks, table, self.arm.sim.now_s)

    def level(self) -> str:
        """The rung of the fail-open ladder, as `Routes.level`."""
        return level(self.table, self.arm.sim.now_s - self.table_s)

    def count(self, replica_id: str) -> None:
        """The number of calls on a replica has changed."""
        i = self.picks.index.get(replica_id)
        if i is not None:
            self.picks.count(i, self.calls.in_flight(replica_id))


class Product(Arm):
    """`Balancer` and routers; `forecast` None is live capacity alone."""

    sticky = False

    def __init__(self, forecast: Kind | Literal["shipped"] | None, settings: Mapping[str, Any] | None = None) -> None:
        self._kind = forecast
        self._settings = dict(settings or {})
        self.transitions: list[Transition] = []
        self._mirrored = 0
        self._rescued = self._handed_over = self._kept = 0
        self._beginnings: dict[int, _Beginning] = {}
        """By the stream's number."""
        self._starting = False

    def start(self, sim: Simulation, world: World, rng: random.Random) -> None:
        """Make the balancer, the routers and the forecasters; schedule their clocks."""
        super().start(sim, world, rng)
        scenario = world.scenario
        work = scenario.work
        balance = {
            "slots": float(work.slots),
            "batch_half": work.batch_half,
            **self._settings.get("balance", {}),
        }
        trial = {"copy_methods": ["*"], **self._settings.get("trial", {})}
        self.config = Config.from_mapping({**self._settings, "balance": balance, "trial": trial})
        self.with_sessions = scenario.session_turns > 0
        self.hands_over = bool(self.config.balance.resume)
        self.ids: dict[int, str] = {}
        self.member_of: dict[str, int] = {}
        self.made_s: dict[int, float] = {}
        self._balancer = Balancer(_DEPLOYMENT, self.config, 1)
        self._routers = [_Router(self, k, b"simulation") for k in range(sim.routers)]
        self._inbox = Inbox()
        self._reports: list[RouterReport] = []
        self._node_reports: list[NodeReport] = []
        self._pairs: dict[int, tuple[_Router, dict[str, Any]]] = {}
        self._node_seq = [0] * len(world.nodes)
        self._forecasters = self._make_forecasters(world)
        self._noise = random.Random(f"{world.seed}/telemetry")
        for router in self._routers:
            sim.at(rng.random() * REPORT_S, self._report, router)
        for node in range(len(world.nodes)):
            sim.at(rng.random() * _TELEMETRY_S, self._telemetry, node)
        sim.at(rng.random() * scenario.tick_s, self._tick)

    def _make_forecasters(self, world: World) -> Sequence[_Forecaster] | None:
        if self._kind is None:
            return None
        scenario, nodes = world.scenario, world.nodes
        if self._kind == "shipped":
            from bench.simulate.shipped import ShippedForecaster  # noqa: PLC0415 - torch only where it is needed

            return [ShippedForecaster(node, scenario.announced) for node in nodes]
        shown = [nodes[(k + 1) % len(nodes)] if self._kind == "wrong" else node for k, node in enumerate(nodes)]
        known = scenario.announced and self._kind != "wrong"
        return [
            NodeForecaster(self._kind, trace, scenario.quality, known, random.Random(f"{world.seed}/forecast/{k}"))
            for k, trace in enumerate(shown)
        ]

    # ------------------------------------------------------------------ clocks

    def _pace(self, router: _Router) -> None:
        """What `serve_app.routing.reading` sees of streams: items since the last report and the time they took."""
        now_s = self.sim.now_s
        for number, (request, items, since_s) in router.streams.items():
            got = self._items(request)
            if got >= 1 and number not in self._beginnings:  # then its reader waits for another one's item
                if items >= 1:
                    self._paced(router, request, got - items, now_s - since_s)
                router.streams[number] = (request, got, now_s)

    def _items(self, request: Request) -> int:
        return int(self.sim.replicas[request.replica].received_s(request) / TOKEN_S + 1e-6)

    def _paced(self, router: _Router, request: Request, items: float, seconds: float) -> None:
        replica_id = self.ids[request.replica]
        router.ledger.pace(replica_id, items, seconds)
        router.hand_over.item.add(items, seconds, router.picks.score_within(replica_id))

    def _report(self, router: _Router) -> None:
        self._pace(router)
        alive = [
            (self.ids[member], f"node-{self.sim.replicas[member].node}", _MAX_ONGOING) for member in self.sim.members
        ]
        message = router.ledger.report(self.sim.now_s, alive, level=router.level(), table_epoch=1)
        report, acknowledged = self._inbox.take(message, self.sim.now_s)
        router.ledger.acknowledged(acknowledged)
        if report is not None:
            self._reports.append(report)
        router.counted = router.calls.all_in_flight()
        self.sim.at(self.sim.now_s + REPORT_S * self.rng.uniform(0.95, 1.05), self._report, router)

    def _telemetry(self, node: int) -> None:
        now_s = self.sim.now_s
        self.sim.at(now_s + _TELEMETRY_S * self.rng.uniform(0.99, 1.01), self._telemetry, node)
        trace = self.world.nodes[node]
        if any(down_s <= now_s < up_s for down_s, up_s in trace.downs_s):
            return
        since_s = max(now_s - _TELEMETRY_S, 0.0)
        load = 1.0 - trace.mean_speed(since_s, now_s) if trace.visible and now_s > since_s else 0.0
        noise = self._noise.gauss(0.0, _TELEMETRY_NOISE)
        row = trace.shown(now_s)
        if row is None:  # a recording has its own noise
            load = min(max(load + noise, 0.0), 1.0)
        memory = trace.memory_at(now_s)
        forecast = self._forecasters[node].make(now_s, load, memory) if self._forecasters is not None else None
        network = row[2] if row is not None else 0.0
        snapshot = NodeSnapshot(load, load, memory, max(network, 0.05), network, 1e6, 1e6)
        self._node_seq[node] += 1
        self._node_reports.append(NodeReport(f"node-{node}", self._node_seq[node], snapshot, forecast))

    def _tick(self, _: Any) -> None:
        now_s, scenario = self.sim.now_s, self.world.scenario
        routers, nodes = tuple(self._reports), tuple(self._node_reports)
        self._reports.clear()
        self._node_reports.clear()
        output = self._balancer.on_tick(TickInput(now_s, routers, nodes))
        self.transitions.extend(output.transitions)
        self.made_s[output.table.version] = now_s
        for router in self._routers:
            late_s = self.rng.random() * scenario.table_delay_s
            self.sim.at(now_s + late_s, router.take_table, output.table)
        jitter = self.rng.uniform(1.0 - TICK_JITTER, 1.0 + TICK_JITTER)
        self.sim.at(now_s + scenario.tick_s * jitter, self._tick)

    # ------------------------------------------------------------------ requests

    def on_members(self) -> None:
        """Serve's membership is authoritative: lay out the picks anew."""
        for member in self.sim.members:
            if member not in self.ids:
                replica_id = f"replica-{member}"
                self.ids[member] = replica_id
                self.member_of[replica_id] = member
        if self.sim.now_s > 0.0:
            self._lay_out()
        elif not self._starting:  # a thousand replicas that join at the start are laid out once
            self._starting = True
            self.sim.at(0.0, self._lay_out)

    def _lay_out(self, _: object = None) -> None:
        for router in self._routers:
            router.lay_out()

    def pick(self, request: Request) -> int:
        """The router's own decision."""
        router = self._routers[request.router]
        if request.session is not None:
            away = router.very_slow if router.level() == "table" else ()
            held = router.sessions.lookup(str(request.session.id), self.sim.now_s, away)
            if held is not None and held in router.picks.index:
                return self.member_of[held]
        picks, rng = router.picks, self.rng.random
        i = picks.power_of_two(rng) if router.level() == "power_of_two" else picks.pick(rng, CHOICES)
        if i < 0:
            return -1
        picks.commit(i)
        return router.by_index[i]

    def on_sent(self, request: Request) -> None:
        """Accounts for the request; copies it to a replica on trial now and then."""
        router = self._routers[request.router]
        replica_id, now_s = self.ids[request.replica], self.sim.now_s
        router.open[request.id] = call = _Call(request)
        router.calls.handle(call, Event.CHOOSE, now_s, replica_id=replica_id)
        router.calls.handle(call, Event.SEND, now_s)
        router.calls.handle(call, Event.ACCEPT, now_s, others=float(request.others))
        router.rescue_budget.request()
        if request.items:
            router.streams[request.id] = (request, 0, now_s)
            if self.hands_over:
                self.sim.replicas[request.replica].mark(request, TOKEN_S, self._first_item, request)
        router.count(replica_id)
        i = router.picks.index.get(replica_id)
        if i is not None:
            router.picks.note(i, request.others + 1.0)
            router.told.note(replica_id, request.others + 1.0, router.picks.in_flight[i], self.sim.now_s)
        if router.mirrored:
            candidate_id = copied_to(router.mirrored, self.rng.random())
            if candidate_id and candidate_id != replica_id:
                self._copy(router, request, candidate_id)

    def on_done(self, request: Request, ok: bool) -> None:
        """The request has ended or was lost."""
        router = self._routers[request.router]
        replica_id = self.ids[request.replica]
        stream = router.streams.pop(request.id, None)
        if (beginning := self._beginnings.pop(request.id, None)) is not None:
            self._stay(beginning)
        elif stream is not None and stream[1] >= 1 and ok:
            self._paced(router, request, max(request.items - stream[1], 0), self.sim.now_s - stream[2])
        if stream is not None and ok:
            router.hand_over.lengths.add(request.items)
        call = router.open.pop(request.id)
        router.calls.handle(call, Event.END, self.sim.now_s, ok=ok)
        router.ledger.record(call)
        router.count(replica_id)
        pair = self._pairs.get(request.id)
        if pair is not None and "primary_s" not in pair[1]:
            self._half(request.id, primary_s=call.duration_s, primary_ok=ok)

    def rescue(self, router: _Router, table: RoutingTable, slow: Collection[str]) -> None:
        """As `serve_app.routing.second_attempts`: send stuck requests again, once, within the budget.

        Streams have shown their first items: they stay.
        """
        now_s, picks = self.sim.now_s, router.picks
        held = [call for replica_id in slow for call in router.calls.running(replica_id)]
        stuck = [call for call in held if not call.request.items and call.request.attempts == 0]
        scores = {replica_id: picks.score(i) for i, replica_id in enumerate(picks.ids) if picks.share[i] >= 1.0}
        for call in worth_moving(stuck, table, scores, now_s):
            i = picks.pick(self.rng.random, CHOICES, picks.index.get(call.replica_id, -1))
            if i < 0 or picks.ids[i] == call.replica_id:
                continue
            if not router.rescue_budget.take():
                return
            request = call.request
            request.attempts += 1
            router.calls.handle(call, Event.MOVE, now_s)
            router.ledger.evidence(call)
            router.calls.handle(call, Event.DROP, now_s)
            router.count(call.replica_id)
            self._rescued += 1
            self.sim.move(request, router.by_index[i])

    # ------------------------------------------------------------------ hand-over

    def _first_item(self, request: Request) -> None:
        router = self._routers[request.router]
        if request.open:
            score = router.picks.score_within(self.ids[request.replica])
            router.hand_over.begun(1.0, 0, self.sim.now_s - request.sent_s, score)

    def _running(self, call: _Call) -> Running[_Call] | None:
        request = call.request
        if not request.items or request.id in self._beginnings:
            return None
        return Running(call, self._items(request), 1.0, call.paid_s)

    def hand_over(self, router: _Router, table: RoutingTable) -> None:
        """As `serve_app.routing.second_attempts`: let one stream go on elsewhere, if that pays."""
        picks = router.picks
        move = router.hand_over.choose(
            table, picks, router.calls, lambda: picks.pick(self.rng.random, CHOICES), self._running
        )
        if move is None:
            return
        i = picks.index[move.target]
        request, had = move.stream.call.request, move.stream.items
        left_s = max(request.work_s - had * TOKEN_S, 0.5 * TOKEN_S) + self.world.scenario.beginning_s
        chosen, now_s = router.by_index[i], self.sim.now_s
        begun = self.sim.begin_elsewhere(request, chosen, left_s, self._beginning_ended)
        if begun is None:
            return
        second = _Call(begun)
        router.calls.handle(second, Event.CHOOSE, now_s, replica_id=picks.ids[i])
        router.calls.handle(second, Event.SEND, now_s)
        router.calls.handle(second, Event.ACCEPT, now_s, others=float(begun.others))
        router.count(picks.ids[i])
        self._beginnings[request.id] = beginning = _Beginning(router, move.stream.call, second, had)
        first_item_s = min(self.world.scenario.beginning_s + TOKEN_S, 0.999 * left_s)
        self.sim.replicas[chosen].mark(begun, first_item_s, self._take_over, beginning)
        self.sim.at(now_s + move.patience_s, self._too_late, beginning)

    def _take_over(self, beginning: _Beginning) -> None:
        request, now_s = beginning.first.request, self.sim.now_s
        if self._beginnings.get(request.id) is not beginning or not beginning.second.request.open:
            return
        del self._beginnings[request.id]
        self._handed_over += 1
        router, first, second = beginning.router, beginning.first, beginning.second
        took_s = now_s - second.since_s
        self._learn(beginning, took_s)
        if request.id in self._pairs and "primary_s" not in self._pairs[request.id][1]:
            self._half(request.id, primary_s=None, primary_ok=True)
        self.sim.take_over(request, second.request)
        second.request, second.paid_s = request, first.paid_s + took_s
        router.open[request.id] = second
        router.calls.handle(first, Event.MOVE, now_s)
        router.calls.handle(first, Event.DROP, now_s)
        router.count(first.replica_id)
        router.streams[request.id] = (request, beginning.had + 1, now_s)

    def _learn(self, beginning: _Beginning, took_s: float) -> None:
        score = beginning.router.picks.score_within(beginning.second.replica_id)
        beginning.router.hand_over.begun(1.0, beginning.had, took_s, score)

    def _too_late(self, beginning: _Beginning) -> None:
        request = beginning.first.request
        if self._beginnings.get(request.id) is beginning:
            del self._beginnings[request.id]
            self._learn(beginning, self.sim.now_s - beginning.second.since_s)
            self._stay(beginning)
            beginning.router.streams[request.id] = (request, self._items(request), self.sim.now_s)

    def _beginning_ended(self, begun: Request, ok: bool) -> None:
        """It was lost with its replica."""
        beginning = self._beginnings.pop(begun.id)
        self.sim.mine[begun.router][begun.replica] -= 1
        self._forget(beginning)

    def _stay(self, beginning: _Beginning) -> None:
        self.sim.drop_beginning(beginning.second.request)
        self._forget(beginning)

    def _forget(self, beginning: _Beginning) -> None:
        self._kept += 1
        beginning.router.calls.handle(beginning.second, Event.DROP, self.sim.now_s)
        beginning.router.count(beginning.second.replica_id)

    # ------------------------------------------------------------------ copies

    def _copy(self, router: _Router, request: Request, candidate_id: str) -> None:
        limit = min(self.config.trial.mirror_concurrency, _MAX_ONGOING)
        work_s = request.work_s
        streams = request.items > 0
        if streams:
            work_s = min(work_s, _SHADOW_ITEMS * TOKEN_S)
        if router.copies.get(candidate_id, 0) >= limit or request.id in self._pairs:
            router.ledger.count("mirror_dropped")
            return
        if streams and work_s < request.work_s:
            primary = self.sim.replicas[request.replica]
            if not primary.mark(request, work_s, self._primary_half, request):
                return  # it waits for a place: its first items cannot be timed yet
        router.ledger.count("mirrored")
        self._mirrored += 1
        router.copies[candidate_id] = router.copies.get(candidate_id, 0) + 1
        facts = {
            "candidate_id": candidate_id,
            "primary_id": self.ids[request.replica],
            "primary_in_flight": float(request.others),
        }
        self._pairs[request.id] = (router, facts)
        copy = self.sim.send_copy(request, self.member_of[candidate_id], work_s, self._copy_ended)
        facts["shadow_in_flight"] = float(copy.others)
        self.sim.at(self.sim.now_s + self.config.trial.mirror_deadline_s, self._copy_late, copy)

    def _primary_half(self, request: Request) -> None:
        pair = self._pairs.get(request.id)
        if pair is not None and request.open and "primary_s" not in pair[1]:
            self._half(request.id, primary_s=self.sim.now_s - request.sent_s, primary_ok=True)

    def _copy_late(self, copy: Request) -> None:
        if copy.open:
            self.sim.replicas[copy.replica].cancel(copy)
            self._copy_ended(copy, False)

    def _copy_ended(self, copy: Request, ok: bool) -> None:
        pair = self._pairs.get(copy.id)
        if pair is None or "shadow_s" in pair[1]:
            return
        pair[0].copies[self.ids[copy.replica]] -= 1
        self._half(copy.id, shadow_s=self.sim.now_s - copy.sent_s, shadow_ok=ok)

    def _half(self, request_id: int, **facts: Any) -> None:
        router, known = self._pairs[request_id]
        known.update(facts)
        if "primary_s" in known and "shadow_s" in known:
            del self._pairs[request_id]
            if known["primary_s"] is not None:
                router.ledger.pair(PairedSample(**known))

    def extra_metrics(self) -> dict[str, float]:
        """Copies and trials."""
        trials = sum(1 for t in self.transitions if t.after is State.SHADOWING)
        refused = sum(1 for t in self.transitions if t.event in ("trial_failed", "guard_tripped"))
        return {
            "mirrored_requests": float(self._mirrored),
            "rescued_requests": float(self._rescued),
            "handed_over": float(self._handed_over),
            "handed_over_in_vain": float(self._kept),
            "trials": float(trials),
            "refused": float(refused),
            "transitions": float(len(self.transitions)),
        }
