"""The balancer of one deployment: reports go in, a routing table and recorded transitions come out.

`Balancer.on_tick` holds the order of the decisions: what is known (`fleet`), how fast each replica is (`estimates`),
who is gone, who goes on (`trials`), who may enter (`admission`). It does no I/O and knows no clock: the coordinator
actor, the simulator and the tests all drive it in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shadecast.admission import Admission
from shadecast.config import LOST_AFTER_S, TICK_S, Config
from shadecast.connection import Connection, Event, backoff_s
from shadecast.estimates import Estimates, is_plausible
from shadecast.explain import explain_replica
from shadecast.fleet import Fleet
from shadecast.replica import Replica
from shadecast.sessions import steady_weight
from shadecast.trials import Trials
from shadecast.types import (
    NodeReport,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
    Transition,
)
from shadecast.urgency import Urgency


@dataclass(frozen=True, slots=True)
class TickInput:
    """What arrived since the last tick. `now_s` is the caller's monotonic clock."""

    now_s: float
    routers: tuple[RouterReport, ...] = ()
    nodes: tuple[NodeReport, ...] = ()
    holds: frozenset[str] = frozenset()
    """Ids of replicas and nodes that are to be kept out of traffic."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as `shadecast status` and the live page show it."""

    replica_id: str
    node_id: str
    state: State
    since_s: float
    share: float
    capacity: float
    live_capacity: float
    forecast_log_change: float
    vetoed: bool
    queue: float
    rate_per_s: float
    mean_s: float
    error_fraction: float
    mirror_fraction: float
    held: bool
    """An operator, or Ray, keeps it out."""
    trial: str
    evidence: Mapping[str, float]
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class TickOutput:
    """The new table, what changed and why, and the state of each replica."""

    table: RoutingTable
    transitions: tuple[Transition, ...]
    slots: float
    batch_half: float
    gamma: tuple[float, float, float]
    load: float
    """Predicted load of the active set: offered work over capacity; NaN until it is known."""
    look_ahead_s: float
    dropped: int
    """Reports and samples refused so far because they cannot be true."""


class Balancer:
    """Decides for one deployment; every call is made from one thread."""

    def __init__(self, deployment: str, config: Config, epoch: int) -> None:
        self.deployment = deployment
        self._epoch = epoch
        self._version = 0
        self._last_tick_s: float | None = None
        self._fleet = Fleet(deployment, config)
        self._estimates = Estimates(self._fleet)
        self._urgency = Urgency(self._fleet, self._estimates)
        self._trials = Trials(self._fleet, self._estimates, self._urgency)
        self._admission = Admission(self._fleet, self._urgency, self._trials)

    @property
    def config(self) -> Config:
        """In force since the last `reconfigure`."""
        return self._fleet.config

    def reconfigure(self, config: Config) -> None:
        """Go by other settings from the next tick on; states, counts, evidence and holds stay as they are."""
        self._fleet.config = config
        self._estimates.reconfigure()

    def outrank(self, epoch: int) -> None:
        """A router holds a table of that epoch: ours are newer, also where the clock was set back meanwhile."""
        if epoch > self._epoch:
            self._epoch = epoch + 1

    def restore(self, table: RoutingTable, now_s: float) -> None:
        """Take over from a table that a router still holds, after the coordinator was restarted.

        Replicas on trial or on the ramp begin their trial anew; the others go on as they were.
        """
        for row in table.rows:
            if row.replica_id in self._fleet.replicas:
                continue
            kept = row.state if row.state in (State.ACTIVE, State.DRAINING) else State.INACTIVE
            again_s = now_s + backoff_s(row.rejections, self.config.trial)
            connection = Connection(row.replica_id, row.node_id, kept, now_s, 0, row.rejections, again_s, row.proven)
            known = self._fleet.add(connection, now_s)
            known.capacity = known.steady = known.live_capacity = known.slow_capacity = max(row.capacity, 0.01)
        self._fleet.assume_used(table, now_s)

    def on_tick(self, tick: TickInput) -> TickOutput:
        """One round: take in what arrived, estimate, decide, publish. Never raises on bad reports: it drops them."""
        now_s, elapsed_s = tick.now_s, TICK_S
        if self._last_tick_s is not None:
            now_s = max(now_s, self._last_tick_s)
            elapsed_s = now_s - self._last_tick_s
        self._last_tick_s = now_s
        self._trials.begin()
        self._fleet.advance(now_s, elapsed_s)
        for node in tick.nodes:
            self._fleet.take_node(node)
        taken = [report for report in tick.routers if self._fleet.take_router(report)]
        self._fleet.sum_rates()
        for report in taken:  # only now: a replica's errors are judged by the others' rates of the same time
            self._observe(report)
        self._fleet.forget()
        self._estimates.update(elapsed_s)
        self._urgency.update(elapsed_s)
        self._fleet.holds = tick.holds
        self._hold()
        self._lose()
        self._trials.judge(elapsed_s)
        self._admission.admit()
        self._admission.plan_mirrors()
        return self._publish()

    def _observe(self, report: RouterReport) -> None:
        """Outcomes and mirrored pairs of one report."""
        replicas = self._fleet.replicas
        for view in report.replicas:
            self._estimates.observe_pace(replicas[view.replica_id], view)
            self._observe_outcomes(replicas[view.replica_id], view)
        for pair in report.pairs:
            candidate, primary = replicas.get(pair.candidate_id), replicas.get(pair.primary_id)
            if candidate is not None:
                self._trials.observe_pair(candidate, pair)
                self._estimates.observe_pair(candidate, primary, pair)
        if report.mirrored + report.uncopyable > 0:
            self._fleet.copyable = report.mirrored > 0

    def _observe_outcomes(self, known: Replica, view: ReplicaReport) -> None:
        per_outcome = max(view.finished, 0) / max(len(view.outcomes), 1)  # a long list was cut to the newest
        good = []
        for outcome in view.outcomes:
            if not is_plausible(outcome.duration_s, outcome.in_flight_at_start, outcome.cost):
                self._fleet.dropped += 1
                continue
            self._trials.observe_outcome(known, outcome)
            if outcome.ok:
                known.rates.duration_sum_s += outcome.duration_s * per_outcome
                good.append(outcome)
        if good:
            self._estimates.observe_outcomes(known, good)

    def _hold(self) -> None:
        """What an operator keeps out, or Ray is about to take away, gets no new traffic."""
        if self._fleet.holds:
            for known in self._fleet.replicas.values():
                if self._fleet.is_held(known):
                    self._trials.apply(known, Event.DRAIN, "an operator, or Ray, drains it")

    def _lose(self) -> None:
        if not self._fleet.routers:
            return  # nobody to ask: keep what is known
        for known in list(self._fleet.replicas.values()):
            if not known.listed:
                if known.connection.state is State.ACTIVE and not known.connection.rejections:
                    self._fleet.note_left(known)
                self._trials.apply(known, Event.LOST, "no router lists the replica any more")
                self._fleet.remove(known)
            elif known.takes_traffic and self._unreachable(known):
                self._trials.apply(known, Event.LOST, f"node silent and no request finished for {LOST_AFTER_S:g} s")

    def _unreachable(self, known: Replica) -> bool:
        node, now_s = self._fleet.nodes.get(known.connection.node_id), self._fleet.now_s
        silent = node is not None and now_s - node.made_s > LOST_AFTER_S
        return silent and known.queue > 0 and now_s - known.progress_s > LOST_AFTER_S

    # ------------------------------------------------------------------ output

    def _publish(self) -> TickOutput:
        self._version += 1
        panic = self._fleet.panic()
        rows = []
        for known in self._fleet.replicas.values():
            c = known.connection
            share = self._share(known, panic=panic)
            known.session_weight = steady_weight(known.session_weight or 1.0, known.slow_capacity * share)
            rows.append(
                TableRow(
                    c.replica_id,
                    c.node_id,
                    c.state,
                    share,
                    known.capacity,
                    known.queue,
                    known.mirror_fraction,
                    known.session_weight,
                    c.proven,
                    c.rejections,
                    known.live_capacity,
                )
            )
        curve, chosen_by = self._estimates.curve, self._estimates.cautious_curve
        table = RoutingTable(
            self.deployment,
            self._epoch,
            self._version,
            max(len(self._fleet.routers), 1),
            tuple(rows),
            chosen_by.slots,
            chosen_by.batch_half,
            self._estimates.reference_s,
            panic,
        )
        return TickOutput(
            table,
            tuple(self._trials.transitions),
            curve.slots,
            curve.batch_half,
            self._estimates.gamma,
            self._estimates.load,
            self._estimates.look_ahead_s(),
            self._fleet.dropped,
        )

    def _share(self, known: Replica, *, panic: bool) -> float:
        c = known.connection
        everybody = panic and not c.rejections and not self._fleet.is_held(known)
        return 1.0 if everybody else c.share(self.config.trial.ramp)

    def held(self) -> int:
        """How many replicas an operator, or Ray, keeps out."""
        return sum(self._fleet.is_held(known) for known in self._fleet.replicas.values()) if self._fleet.holds else 0

    def views(self) -> tuple[ReplicaView, ...]:
        """What people see of each replica, as of the last tick."""
        panic = self._fleet.panic()
        return tuple(self._view(known, self._share(known, panic=panic)) for known in self._fleet.replicas.values())

    def explain(self, replica_id: str, why: str = "", ejected_by: int = 0) -> dict[str, Any] | None:
        """Why a replica stands where it does, as of the last tick; None where there is none of that id.

        As `shadecast.explain`: plain values and `sentences`. `why` is the reason of its last change of state.
        """
        known = self._fleet.replicas.get(replica_id)
        if known is None:
            return None
        panic = self._fleet.panic()
        share = self._share(known, panic=panic)
        urgent = self._urgency.why()
        return explain_replica(
            known, self._fleet, self._estimates, share=share, panic=panic, urgent=urgent, why=why, ejected_by=ejected_by
        )

    def _view(self, known: Replica, share: float) -> ReplicaView:
        c, rates, ruling, now_s = known.connection, known.rates, known.ruling, self._fleet.now_s
        succeeded = max(rates.finished - rates.failed, 1e-9)
        return ReplicaView(
            c.replica_id,
            c.node_id,
            c.state,
            now_s - c.since_s,
            share,
            known.capacity,
            known.live_capacity,
            known.outlook.log_change,
            known.vetoed,
            known.queue,
            rates.per_s,
            rates.duration_sum_s / succeeded if rates.finished > 0.5 else math.nan,
            rates.failed / rates.finished if rates.finished > 0.5 else math.nan,
            known.mirror_fraction,
            self._fleet.is_held(known),
            ruling.reason if ruling is not None else "",
            dict(ruling.evidence) if ruling is not None else {},
            max(c.not_before_s - now_s, 0.0) if c.state is State.INACTIVE else 0.0,
        )
