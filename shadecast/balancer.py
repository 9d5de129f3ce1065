"""The balancer of one deployment: reports go in, a routing table and recorded transitions come out.

`Balancer.on_tick` holds the order of the decisions; each decision itself lives in a module of its own (capacity, gate,
connection, service curve). It does no I/O and knows no clock: the coordinator actor, the simulator and the tests all
drive it in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from shadecast import capacity as cap
from shadecast.config import Config
from shadecast.connection import TRANSITIONS, Connection, Event, backoff_s, step
from shadecast.gate import Canary, Ruling, Trial, Verdict
from shadecast.service_curve import CurveLearner
from shadecast.sessions import steady_weight
from shadecast.types import (
    NodeReport,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
    Transition,
)
from shadecast.yardstick import SlowMean, Yardstick

_PAIRS_PER_S = 5.0
"""Pairs that a trial wants: with little traffic the mirrored fraction grows towards it."""
_BOOTSTRAP_REQUESTS = 20
_PACED_S = 5.0
_MAX_STREAM_S = 4.0
"""Stream-seconds that one report counts at most: those of one replica share what slows them."""
_SLOW_HALF_LIFE_S = 60.0
_CUSUM_LIMIT = 9.0
"""Log likelihood ratio at which an error guard trips; about one false alarm in e^9 requests."""
_MAX_SETBACKS = 2
_MAX_COPY_LOG_SPEED = math.log(1.5)
"""A copy on an idle newcomer is not taken for proof that it is much faster than the others."""
_SETTLED = 0.3
"""Change of log headroom from one sample to the next below which a node's load counts as steady."""
_REMEMBERED_S = 300.0
"""How long a node is remembered for a replica that served well there."""
_SILENT_S = 30.0
"""A node that falls silent is taken to be as it last said for so long: a hog starves the node's forecaster, too."""
_UNHEARD_S = 3.0
"""How long a new replica waits for the first word of its node, if the node has been silent."""
_UNSEEN_S = 3.0
"""A slow replica that nobody has asked for so long gets copies, which show whether it is well again."""
_SLOWER = 0.5
"""Part of the median capacity below which a replica is left out by scores alone."""
_REPLACING_S = 30.0
"""So long after a replica has left a machine that is well, the next one is reckoned to leave, too."""
_URGENT_STEP_S = 1.0
"""Least time on a step of the ramp where there is no time: two ticks, in which errors show."""
_WORTH_LOG_SPEED = math.log(0.1)
"""A machine that is merely slow, but faster than this, takes its part where there is no time for a trial."""
_OVERDUE = 2.0
"""Standard deviations beyond its expected log duration from which an unfinished request is evidence."""


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's wish: keep a replica, or all of a node's, out of traffic, or let them back in."""

    target: str
    """A replica_id or a node_id."""
    drain: bool


@dataclass(frozen=True, slots=True)
class TickInput:
    """What arrived since the last tick. `now_s` is the caller's monotonic clock."""

    now_s: float
    routers: tuple[RouterReport, ...] = ()
    nodes: tuple[NodeReport, ...] = ()
    commands: tuple[Command, ...] = ()


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
    """An operator keeps it out."""
    trial: str
    evidence: Mapping[str, float]
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class TickOutput:
    """The new table, what changed and why, and the state of each replica."""

    table: RoutingTable
    transitions: tuple[Transition, ...]
    replicas: tuple[ReplicaView, ...]
    slots: float
    batch_half: float
    gamma: tuple[float, float, float]
    load: float
    """Predicted load of the active set: offered work over capacity; NaN until it is known."""
    look_ahead_s: float
    dropped: int
    """Reports and samples refused so far because they cannot be true."""


@dataclass(slots=True)
class _Rates:
    """Decayed counts of a replica's live requests, for the guards and the display."""

    half_life_s: float = 10.0
    started: float = 0.0
    finished: float = 0.0
    failed: float = 0.0
    duration_sum_s: float = 0.0

    def fade(self, elapsed_s: float) -> None:
        keep = 0.5 ** (max(elapsed_s, 0.0) / self.half_life_s)
        self.started *= keep
        self.finished *= keep
        self.failed *= keep
        self.duration_sum_s *= keep

    @property
    def started_per_s(self) -> float:
        return self.started * math.log(2.0) / self.half_life_s

    @property
    def per_s(self) -> float:
        return self.finished * math.log(2.0) / self.half_life_s


@dataclass(slots=True)
class _Replica:
    connection: Connection
    speed: cap.SpeedEstimate
    capacity: float = 1.0
    """As published."""
    steady: float = 1.0
    """Capacity but for a veto, which comes and goes at once: only this one moves at a limited rate."""
    queue: float = 0.0
    max_ongoing: int = 1
    listed_s: float = 0.0
    progress_s: float = 0.0
    asked_s: float = 0.0
    """When a router last had live requests on it."""
    rates: _Rates = field(default_factory=_Rates)
    recent: _Rates = field(default_factory=lambda: _Rates(half_life_s=1.5))
    cusum: float = 0.0
    duration: SlowMean = field(default_factory=SlowMean)
    pace: SlowMean = field(default_factory=SlowMean)
    paced_s: float = -math.inf
    """When items of streams were last seen: until `_PACED_S` later they alone say how fast it is."""
    trial: Trial | None = None
    canary: Canary | None = None
    neighbours_before: float = math.nan
    """Log speed of the node's other replicas over that of other nodes', when the trial began."""
    expected: float = 0.0
    """Log speed, at most 0, that trials take for this machine's own: slower than the others, and known to be."""
    shown: float = -math.inf
    """Log speed that the last trial showed, if slowness alone ended it."""
    setbacks: int = 0
    unexplained: float = 0.0
    """Log speed that its node's telemetry does not explain."""
    ruling: Ruling | None = None
    mirror_fraction: float = 0.0
    slow_capacity: float = 1.0
    """Capacity with a half-life of a minute, which places sessions; a slowed replica they leave by their own rule."""
    session_weight: float = 0.0
    live_capacity: float = 1.0
    outlook: cap.Outlook = cap.NO_OUTLOOK
    vetoed: bool = False

    @property
    def is_of_use(self) -> bool:
        """Whether the last verdict was slowness alone, and not too much of it."""
        return self.shown > _WORTH_LOG_SPEED

    def note_speed(self, ruling: Ruling) -> None:
        """Remember what a harmful verdict says of its speed; what is of use is judged by that from now on."""
        self.shown = self.expected - ruling.evidence["mean_log_ratio"] if ruling.merely_slow else -math.inf
        if self.is_of_use:
            self.expected = min(self.shown, 0.0)


@dataclass(slots=True)
class _Node:
    report: NodeReport
    made_s: float
    changes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Change of log headroom between the last four samples, the greatest of all resources."""
    back_s: float = -math.inf
    """When it was heard of again after silence."""


class Balancer:
    """Decides for one deployment; every call is made from one thread."""

    def __init__(self, deployment: str, config: Config, epoch: int) -> None:
        self.deployment = deployment
        self.config = config
        self._epoch = epoch
        self._version = 0
        self._replicas: dict[str, _Replica] = {}
        self._nodes: dict[str, _Node] = {}
        self._routers: dict[str, tuple[float, RouterReport]] = {}
        self._curve = CurveLearner(config.balance.slots, config.balance.batch_half)
        self._sensitivity = cap.Sensitivity()
        self._duration = Yardstick()
        """Processing time of a request alone on a replica."""
        self._pace = Yardstick()
        """Time per item of a stream alone on a replica."""
        self._first_seen_s: float | None = None
        self._finished_total = 0
        self._last_tick_s: float | None = None
        self._able_before = 0.0
        """What served, in nominal replicas, before Serve began to replace some."""
        self._transitions: list[Transition] = []
        self._all_rates = self._all_recent = _Rates()
        self._veto = cap.Veto()
        self._left: dict[str, tuple[float, float]] = {}
        """When a node lost a replica that served well, and its log speed: the machine's own, whatever runs there."""
        self._dropped = 0
        self._load = math.nan
        self._usual = 0.0
        """Median log speed of the replicas that serve, at this moment."""
        self._copyable = True

    # ------------------------------------------------------------------ life

    def restore(self, table: RoutingTable, now_s: float) -> None:
        """Take over from a table that a router still holds, after the coordinator was restarted.

        Replicas on trial or on the ramp begin their trial anew; the others go on as they were.
        """
        for row in table.rows:
            if row.replica_id in self._replicas:
                continue
            kept = row.state if row.state in (State.ACTIVE, State.DRAINING) else State.INACTIVE
            held = row.state is State.DRAINING
            again_s = now_s + backoff_s(row.rejections, self.config.trial)
            connection = Connection(
                row.replica_id, row.node_id, kept, now_s, 0, row.rejections, again_s, row.proven, held
            )
            known = self._add(connection, now_s)
            known.capacity = known.steady = known.live_capacity = known.slow_capacity = max(row.capacity, 0.01)
        if table.rows:
            self._first_seen_s = now_s - self.config.balance.bootstrap_s
            self._finished_total = _BOOTSTRAP_REQUESTS

    def continue_versions(self, version: int) -> None:
        """Number the tables on from `version`, within the same epoch."""
        self._version = version

    def on_tick(self, tick: TickInput) -> TickOutput:
        """One round: take in what arrived, estimate, decide, publish. Never raises on bad reports: it drops them."""
        now_s = tick.now_s
        if self._last_tick_s is not None:
            now_s = max(now_s, self._last_tick_s)
        elapsed_s = now_s - self._last_tick_s if self._last_tick_s is not None else self.config.balance.tick_s
        self._last_tick_s = now_s
        self._transitions = []
        for known in self._replicas.values():
            known.speed.advance(now_s)
            known.rates.fade(elapsed_s)
            known.recent.fade(elapsed_s)
        for node in tick.nodes:
            self._take_node(node, now_s)
        taken = [report for report in tick.routers if self._take_router(report, now_s)]
        self._all_rates = _summed(r.rates for r in self._replicas.values())
        self._all_recent = _summed(r.recent for r in self._replicas.values())
        for report in taken:  # only now: a replica's errors are judged by the others' rates of the same time
            self._take_observations(report, now_s)
        self._count_queues(now_s)
        self._estimate(now_s, elapsed_s)
        for command in tick.commands:
            self._command(command, now_s)
        self._lose(now_s)
        self._judge(now_s)
        self._admit(now_s)
        self._plan_mirrors(now_s)
        return self._publish(now_s)

    # ------------------------------------------------------------------ intake

    def _add(self, connection: Connection, now_s: float) -> _Replica:
        known = _Replica(connection, cap.SpeedEstimate(self.config.balance.half_life_s, now_s))
        known.listed_s = known.progress_s = now_s
        self._replicas[connection.replica_id] = known
        return known

    def _take_node(self, report: NodeReport, now_s: float) -> None:
        if not (math.isfinite(report.age_s) and report.age_s >= 0.0):
            self._dropped += 1
            return
        made_s = now_s - report.age_s
        before = self._nodes.get(report.node_id)
        if before is None:
            self._nodes[report.node_id] = _Node(report, made_s)
            return
        was, is_ = cap.headroom_now(before.report.snapshot), cap.headroom_now(report.snapshot)
        change = max(abs(b - a) for a, b in zip(was, is_, strict=True))
        back_s = now_s if made_s - before.made_s > self.config.balance.lost_after_s else before.back_s
        self._nodes[report.node_id] = _Node(report, made_s, (change, *before.changes[:2]), back_s)

    def _take_router(self, report: RouterReport, now_s: float) -> bool:
        """Membership and counts of one report; False if it cannot be true."""
        ids = [r.replica_id for r in report.replicas]
        last = self._routers.get(report.router_id)
        stale = last is not None and report.seq <= last[1].seq
        if len(set(ids)) != len(ids) or stale or report.deployment != self.deployment:
            self._dropped += 1
            return False
        if self._first_seen_s is None:
            self._first_seen_s = now_s
        self._routers[report.router_id] = (now_s, report)
        for view in report.replicas:
            known = self._replicas.get(view.replica_id)
            if known is None:
                known = self._add(Connection(view.replica_id, view.node_id, since_s=now_s), now_s)
            known.listed_s = now_s
            known.max_ongoing = max(view.max_ongoing, 1)
            if view.finished > 0 or view.in_flight == 0:
                known.progress_s = now_s
            if view.started > 0 or view.in_flight > 0:
                known.asked_s = now_s
            finished = max(view.finished, 0)
            self._finished_total += finished
            for rates in (known.rates, known.recent):
                rates.started += max(view.started, 0)
                rates.finished += finished
                rates.failed += min(max(view.failed, 0), finished)
        return True

    def _take_observations(self, report: RouterReport, now_s: float) -> None:
        """Outcomes and mirrored pairs of one report."""
        for view in report.replicas:
            known = self._replicas[view.replica_id]
            self._observe_pace(known, view, now_s)
            self._take_outcomes(known, view, now_s)
        for pair in report.pairs:
            candidate = self._replicas.get(pair.candidate_id)
            if candidate is None:
                continue
            if candidate.trial is not None:
                primary = self._replicas.get(pair.primary_id)
                candidate.trial.observe(
                    pair,
                    now_s - max(pair.age_s, 0.0),
                    primary_log_speed=self._advantage(primary),
                    candidate_log_speed=candidate.expected,
                )
            self._observe_pair(candidate, pair)
        if report.mirrored + report.uncopyable > 0:
            self._copyable = report.mirrored > 0

    def _observe_pair(self, candidate: _Replica, pair: PairedSample) -> None:
        """A candidate's speed from its copy, relative to the primary's: pairs may cover only a stream's first items."""
        primary = self._replicas.get(pair.primary_id)
        whole = pair.primary_ok and pair.shadow_ok and min(pair.primary_s, pair.shadow_s) > 0.0
        sides = ((pair.primary_s, pair.primary_in_flight), (pair.shadow_s, pair.shadow_in_flight))
        if primary is None or not whole or not all(_plausible(*side, 1.0) and side[0] < 1e6 for side in sides):
            return
        gamma, curve = self._sensitivity.gamma, self._curve.curve
        log_ratio = math.log(pair.primary_s / pair.shadow_s) + math.log(
            curve.correction(pair.shadow_in_flight) / curve.correction(pair.primary_in_flight)
        )
        log_primary = self._log_speed(primary)
        explained = cap.explained(gamma, self._headroom(candidate.connection.node_id))
        candidate.speed.observe(min(log_primary + log_ratio, _MAX_COPY_LOG_SPEED) - explained)

    def _advantage(self, known: _Replica | None) -> float:
        """Log speed against the usual one of this moment: what slows all is in both sides of a pair."""
        return self._log_speed(known) - self._usual if known is not None else 0.0

    def _log_speed(self, known: _Replica) -> float:
        """Of this moment, against a usual moment: what its requests and its node's telemetry say together."""
        explained = cap.explained(self._sensitivity.gamma, self._headroom(known.connection.node_id))
        return known.speed.residual(self._noise(known)) + explained

    def _take_outcomes(self, known: _Replica, view: ReplicaReport, now_s: float) -> None:
        per_outcome = max(view.finished, 0) / max(len(view.outcomes), 1)  # a long list was cut to the newest
        for outcome in view.outcomes:
            if not _plausible(outcome.duration_s, outcome.in_flight_at_start, outcome.cost):
                self._dropped += 1
                continue
            self._observe_error(known, outcome.ok)
            self._observe_canaries(known, outcome, now_s)
            if outcome.ok:
                known.rates.duration_sum_s += outcome.duration_s * per_outcome
                self._observe_speed(known, outcome)

    def _observe_canaries(self, known: _Replica, outcome: Outcome, now_s: float) -> None:
        if known.canary is not None:
            known.canary.observe(candidate=True, outcome=outcome, now_s=now_s, log_speed=known.expected)
        elif known.connection.state is State.ACTIVE:
            canaries = [r.canary for r in self._replicas.values() if r.canary is not None]
            log_speed = self._advantage(known) if canaries else 0.0
            for canary in canaries:
                canary.observe(candidate=False, outcome=outcome, now_s=now_s, log_speed=log_speed)

    def _observe_error(self, known: _Replica, ok: bool) -> None:
        """CUSUM of errors against the other replicas' own rate (Page 1954): errors that all share never trip it."""
        usual = max(
            _error_rate(self._all_rates, known.rates),
            _error_rate(self._all_recent, known.recent),
        )
        usual = min(max(2.0 * usual, 0.02), 0.8)
        raised = usual + 0.1
        score = math.log((1.0 - raised) / (1.0 - usual)) if ok else math.log(raised / usual)
        known.cusum = max(known.cusum + score, 0.0)

    def _observe_speed(self, known: _Replica, outcome: Outcome) -> None:
        if not outcome.duration_s > 0.0:
            return
        log_duration = math.log(outcome.duration_s) - math.log(outcome.cost)
        headroom = self._headroom(known.connection.node_id)
        before = known.speed.residual(self._noise(known))
        explained = cap.explained(self._sensitivity.gamma, headroom)
        self._curve.observe(outcome.in_flight_at_start, log_duration + explained + before)
        log_alone = log_duration - math.log(self._curve.curve.correction(outcome.in_flight_at_start))
        settled = self._settled(known.connection.node_id)
        shown = self._duration.observe(known.duration, log_alone, headroom, self._sensitivity, before, settled=settled)
        if not self._is_paced(known):
            known.speed.observe(shown)

    def _observe_pace(self, known: _Replica, view: ReplicaReport, now_s: float) -> None:
        """Items that streams gave since the last report: the speed of this moment, whatever was asked."""
        if not (math.isfinite(view.stream_s) and view.stream_s > 0.0 and view.items >= 0):
            return
        known.paced_s = now_s
        log_time = math.log(view.stream_s) - math.log(max(float(view.items), 0.5))
        curve = self._curve.curve
        beside = max(min(known.queue, curve.slots) - 1.0, 0.0)  # those that wait for a slot slow no item
        log_alone = log_time - math.log(curve.correction(beside))
        headroom = self._headroom(known.connection.node_id)
        before = known.speed.residual(self._noise(known))
        settled = self._settled(known.connection.node_id)
        shown = self._pace.observe(known.pace, log_alone, headroom, self._sensitivity, before, settled=settled)
        known.speed.observe(shown, min(view.stream_s, _MAX_STREAM_S))

    def _is_paced(self, known: _Replica) -> bool:
        return (self._last_tick_s or 0.0) - known.paced_s <= _PACED_S

    def _noise(self, known: _Replica) -> float:
        """Spread of one observation of the kind that says how fast the replica is."""
        return self._pace.noise if self._is_paced(known) else self._duration.noise

    def _headroom(self, node_id: str) -> cap.Headroom:
        node = self._nodes.get(node_id)
        known = node is not None and self._age(node) <= max(_SILENT_S, self.config.forecast.ttl_s)
        return cap.headroom_now(node.report.snapshot) if node is not None and known else cap.NO_HEADROOM

    def _settled(self, node_id: str) -> bool:
        node = self._nodes.get(node_id)
        return node is not None and max(node.changes) < _SETTLED

    def _age(self, node: _Node) -> float:
        return (self._last_tick_s or 0.0) - node.made_s

    # ------------------------------------------------------------------ estimates

    def _fresh_routers(self, now_s: float) -> list[RouterReport]:
        limit_s = self.config.balance.lost_after_s
        for router_id in [k for k, (seen_s, _) in self._routers.items() if now_s - seen_s > limit_s]:
            del self._routers[router_id]
        return [report for _, report in self._routers.values()]

    def _count_queues(self, now_s: float) -> None:
        for known in self._replicas.values():
            known.queue = 0.0
        for report in self._fresh_routers(now_s):
            for view in report.replicas:
                known_or_none = self._replicas.get(view.replica_id)
                if known_or_none is not None:
                    known_or_none.queue += max(view.in_flight, 0)

    def _estimate(self, now_s: float, elapsed_s: float) -> None:
        config = self.config.balance
        gamma = self._sensitivity.solve()
        self._curve.fit()
        serving = [r for r in self._replicas.values() if _takes_traffic(r)]
        self._duration.refer(r.duration for r in serving)
        self._pace.refer(r.pace for r in serving)
        ahead_s = self._look_ahead_s()
        nodes = {r.connection.node_id for r in self._replicas.values()}
        outlooks = {}
        for node_id in nodes:
            node = self._nodes.get(node_id)
            if node is not None and self._age(node) <= self.config.forecast.ttl_s:
                outlooks[node_id] = cap.outlook(
                    node.report.forecast, node.report.snapshot, gamma, self._age(node), ahead_s
                )
            else:
                outlooks[node_id] = cap.NO_OUTLOOK
        vetoed = self._veto.step(outlooks, config, self.config.trial.memory_limit, now_s)
        unfinished = self._unfinished(now_s)
        for replica_id, known in self._replicas.items():
            node_id = known.connection.node_id
            explained = cap.explained(gamma, self._headroom(node_id))
            known.speed.settle(self._noise(known))
            residual = self._with_unfinished(known, unfinished.get(replica_id, ()), explained)
            known.unexplained = residual
            log_live = max(explained + residual, math.log(0.01))
            known.live_capacity = math.exp(log_live)
            known.outlook = outlooks[node_id]
            known.vetoed = node_id in vetoed
            view = known.outlook
            wanted = math.exp(cap.blend(log_live, view.log_change, config, view.error_sigma))
            known.steady = max(cap.limit_rate(known.steady, wanted, elapsed_s, config), 0.01)
            known.capacity = max(known.steady * config.veto_factor, 0.01) if known.vetoed else known.steady
            keep = 0.5 ** (max(elapsed_s, 0.0) / _SLOW_HALF_LIFE_S)
            known.slow_capacity = keep * known.slow_capacity + (1.0 - keep) * known.steady
        self._usual = median([self._log_speed(r) for r in serving] or [0.0])
        self._load = self._predicted_load()

    def _unfinished(self, now_s: float) -> dict[str, list[tuple[float, float, float]]]:
        """Per replica the (age now, in-flight at start, cost) of live requests, of all routers."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for seen_s, report in self._routers.values():
            for view in report.replicas:
                for entry in view.unfinished:
                    if _plausible(entry.age_s, entry.in_flight_at_start, entry.cost):
                        age_s = entry.age_s + (now_s - seen_s)
                        found.setdefault(view.replica_id, []).append((age_s, entry.in_flight_at_start, entry.cost))
        return found

    def _with_unfinished(
        self,
        known: _Replica,
        unfinished: Iterable[tuple[float, float, float]],
        explained: float,
    ) -> float:
        """The residual log speed after counting requests that have run far longer than expected.

        Only far longer: of those under way at any time the long ones are the most, and slowness of the replica is not
        what makes them long.
        """
        residual = known.speed.residual(self._noise(known))
        reference = self._duration.reference
        if reference is None or self._is_paced(known):
            return residual
        sigma = max(self._duration.noise, 0.1)
        extra_sum = extra_weight = 0.0
        for age_s, others, cost in unfinished:
            expected = reference + math.log(cost) + math.log(self._curve.curve.correction(others))
            over = math.log(max(age_s, 1e-6)) - (expected - explained - residual)
            if over > _OVERDUE * sigma:
                extra_sum += residual - sigma * cap.censored_excess(over / sigma)
                extra_weight += 1.0
        if not extra_weight:
            return residual
        return max(known.speed.residual(sigma, extra_sum, extra_weight), math.log(0.01))

    def _reference_s(self) -> float:
        """Nominal processing time of a request alone on a replica; 0 until it is known."""
        reference = self._duration.reference
        return math.exp(reference) if reference is not None else 0.0

    def _look_ahead_s(self) -> float:
        """H: the median residence of a request, at least a tick, at most 10 s."""
        if self.config.forecast.residence_s > 0.0:
            return self.config.forecast.residence_s
        residence_s = self._reference_s() or 1.0
        return min(max(residence_s, self.config.balance.tick_s), 10.0)

    def _predicted_load(self) -> float:
        serving = [r for r in self._replicas.values() if _takes_traffic(r)]
        reference_s = self._reference_s()
        if not reference_s or not serving:
            return math.nan
        spread = min(self._duration.noise, 1.5)
        mean_s = reference_s * math.exp(0.5 * spread * spread)  # the reference is a median, work is skewed
        offered = self._all_rates.started_per_s * mean_s
        return offered / max(self._able(serving) * self._curve.curve.throughput(), 1e-9)

    # ------------------------------------------------------------------ decisions

    def _apply(self, known: _Replica, event: Event, now_s: float, reason: str, ruling: Ruling | None = None) -> bool:
        """Carry out an event if the table allows it in the present state; say whether it did."""
        before = known.connection.state
        if (before, event) not in TRANSITIONS:
            return False
        known.connection = step(known.connection, event, now_s, self.config.trial)
        evidence = dict(ruling.evidence) if ruling is not None else {}
        c = known.connection
        self._transitions.append(
            Transition(self.deployment, c.replica_id, c.node_id, now_s, before, event.value, c.state, reason, evidence)
        )
        self._enter(known, event, now_s)
        return True

    def _enter(self, known: _Replica, event: Event, now_s: float) -> None:
        """Prepare what the new state needs."""
        known.trial = known.canary = known.ruling = None
        match known.connection.state:
            case State.SHADOWING:
                known.setbacks = 0
                known.neighbours_before = self._neighbours(known)[0]
                self._begin_trial(known, now_s)
            case State.SHIFTING:
                if event is Event.STEP_FAILED:
                    known.setbacks += 1
                self._begin_step(known, now_s)
            case State.ACTIVE:
                known.cusum = 0.0
            case State.INACTIVE | State.DRAINING:
                pass

    def _begin_trial(self, known: _Replica, now_s: float) -> None:
        curve = self._curve.curve
        left = self._lost_lately(known, now_s)
        known.expected = left[1] if left is not None else 0.0
        known.trial = Trial(
            self.config.trial,
            now_s,
            batch_half=curve.batch_half,
            slots=curve.slots if curve.learned else math.inf,
            short=known.connection.proven,
        )

    def _begin_step(self, known: _Replica, now_s: float) -> None:
        curve, alpha = self._curve.curve, self.config.trial.alpha / 5.0
        slots = curve.slots if curve.learned else math.inf
        known.canary = Canary(self.config.trial, now_s, alpha=alpha, batch_half=curve.batch_half, slots=slots)
        known.trial = Trial(self.config.trial, now_s, alpha=alpha, batch_half=curve.batch_half, slots=slots)

    def _command(self, command: Command, now_s: float) -> None:
        for known in self._replicas.values():
            c = known.connection
            if command.target not in (c.replica_id, c.node_id):
                continue
            if not command.drain:
                known.connection = replace(c, held=False)
            elif not self._apply(known, Event.DRAIN, now_s, "operator asked to drain"):
                known.connection = replace(c, held=True)

    def _lose(self, now_s: float) -> None:
        limit_s = self.config.balance.lost_after_s
        reports = self._fresh_routers(now_s)
        if not reports:
            return  # nobody to ask: keep what is known
        listed = {view.replica_id for report in reports for view in report.replicas}
        for replica_id, known in list(self._replicas.items()):
            if replica_id not in listed:
                if known.connection.state is State.ACTIVE and not known.connection.rejections:
                    recent = {n: left for n, left in self._left.items() if left[0] > now_s - _REMEMBERED_S}
                    self._left = {**recent, known.connection.node_id: (now_s, _own_pace(known.slow_capacity))}
                self._apply(known, Event.LOST, now_s, "no router lists the replica any more")
                del self._replicas[replica_id]
            elif _takes_traffic(known) and self._unreachable(known, now_s, limit_s):
                self._apply(known, Event.LOST, now_s, f"node silent and no request finished for {limit_s:g} s")

    def _unreachable(self, known: _Replica, now_s: float, limit_s: float) -> bool:
        node = self._nodes.get(known.connection.node_id)
        silent = node is not None and now_s - node.made_s > limit_s
        return silent and known.queue > 0 and now_s - known.progress_s > limit_s

    def _judge(self, now_s: float) -> None:
        for known in list(self._replicas.values()):
            match known.connection.state:
                case State.SHADOWING:
                    self._judge_trial(known, now_s)
                case State.SHIFTING:
                    self._judge_step(known, now_s)
                case State.ACTIVE:
                    self._guard(known, now_s)
                case State.DRAINING:
                    waited_s = now_s - known.connection.since_s
                    if known.queue <= 0:
                        self._apply(known, Event.DRAINED, now_s, "empty")
                    elif waited_s > self.config.trial.drain_s:
                        self._apply(known, Event.DRAINED, now_s, f"deadline: {known.queue:g} requests still open")
                case State.INACTIVE:
                    pass

    def _memory_fraction(self, known: _Replica) -> float:
        """Of its node; NaN where that is not known, or is from before the node went away."""
        node = self._nodes.get(known.connection.node_id)
        fresh = node is not None and self._age(node) <= self.config.forecast.ttl_s
        return node.report.snapshot.memory_fraction if node is not None and fresh else math.nan

    def _lost_lately(self, known: _Replica, now_s: float) -> tuple[float, float] | None:
        """When its node lost a replica that served well, and how fast that was; None if it did not lately."""
        left = self._left.get(known.connection.node_id)
        return left if left is not None and left[0] > now_s - _REMEMBERED_S else None

    def _has_returned(self, known: _Replica, now_s: float) -> bool:
        """Whether its node served well, went silent and is back: the same machine, not a new version of the code."""
        node_id = known.connection.node_id
        node, left = self._nodes.get(node_id), self._lost_lately(known, now_s)
        return node is not None and left is not None and node.back_s > left[0]

    def _neighbours(self, known: _Replica) -> tuple[float, float]:
        """Mean log speed of ACTIVE replicas on the same node less that of those elsewhere, and its standard error."""
        groups: tuple[list[_Replica], list[_Replica]] = ([], [])
        for other in self._replicas.values():
            if other is not known and other.connection.state is State.ACTIVE and other.speed.weight > 0.5:
                groups[other.connection.node_id != known.connection.node_id].append(other)
        if not groups[0] or not groups[1]:
            return math.nan, math.nan
        means = [sum(r.speed.recent for r in group) / len(group) for group in groups]
        variance = sum(1.0 / sum(r.speed.weight for r in group) for group in groups)
        return means[0] - means[1], self._noise(known) * math.sqrt(variance)

    def _neighbours_rise(self, known: _Replica) -> float:
        """By how much a trial has slowed the primaries beside it, at least; NaN where there are none.

        Against primaries on other nodes, because a burst slows all; two standard errors are taken off.
        """
        now, error = self._neighbours(known)
        if math.isnan(now) or math.isnan(known.neighbours_before):
            return math.nan
        return math.exp(max(known.neighbours_before - now - 2.0 * error, 0.0)) - 1.0

    def _judge_trial(self, known: _Replica, now_s: float) -> None:
        if known.trial is None:
            return
        ruling = known.trial.rule(
            now_s,
            candidate_memory_fraction=self._memory_fraction(known),
            primary_p99_rise=self._neighbours_rise(known),
        )
        known.ruling = ruling
        waited_s = now_s - known.connection.since_s
        no_pairs = not ruling.evidence.get("pairs", 0.0)
        if ruling.verdict is Verdict.CONTINUE and no_pairs and not self._copyable:
            if waited_s >= self.config.trial.step_s:
                reason = "requests cannot be copied: goes on as a small live canary"
                self._apply(known, Event.TRIAL_INCONCLUSIVE, now_s, reason, ruling)
            return
        if ruling.verdict is Verdict.UNFAVOURABLE:
            known.note_speed(ruling)
        if waited_s < self.config.trial.timeout_s and self._is_past(known, ruling, now_s):
            self._begin_trial(known, now_s)
            return
        events = {
            Verdict.FAVOURABLE: Event.TRIAL_PASSED,
            Verdict.UNFAVOURABLE: Event.TRIAL_FAILED,
            Verdict.INCONCLUSIVE: Event.TRIAL_INCONCLUSIVE,
        }
        if ruling.verdict in events:
            self._apply(known, events[ruling.verdict], now_s, ruling.reason, ruling)

    def _is_past(self, known: _Replica, ruling: Ruling, now_s: float) -> bool:
        """Whether to look afresh at a replica on a known machine: it was slow, or slow at first, while it was cold."""
        if ruling.evidence["errors_shadow_only"] > 0.0:
            return False
        if known.connection.proven:  # a short trial takes few pairs, all of them good
            undecided = ruling.verdict is Verdict.CONTINUE
            return ruling.merely_slow or (undecided and ruling.evidence["judged"] >= 2.0 * self.config.trial.min_pairs)
        return ruling.merely_slow and self._lost_lately(known, now_s) is not None

    def _judge_step(self, known: _Replica, now_s: float) -> None:
        """On the ramp: live requests decide by the unpaired test, mirrored pairs, where there are any, too."""
        if known.canary is None or known.trial is None:
            return
        rulings = [
            known.canary.rule(now_s),
            known.trial.rule(now_s, candidate_memory_fraction=self._memory_fraction(known)),
        ]
        known.ruling = rulings[0]
        for ruling in rulings:
            if ruling.verdict is Verdict.UNFAVOURABLE:
                known.note_speed(ruling)
                if known.is_of_use and (self._urgent(now_s) or self._has_returned(known, now_s)):
                    self._begin_step(known, now_s)
                    break
                errors = ruling.evidence.get("errors_shadow_only", 0.0) + ruling.evidence.get("errors", 0.0)
                last_chance = known.connection.step == 0 or known.setbacks >= _MAX_SETBACKS or errors > 0
                event = Event.GUARD_TRIPPED if last_chance else Event.STEP_FAILED
                self._apply(known, event, now_s, ruling.reason, ruling)
                return
        waited_s = now_s - known.connection.since_s
        trial = self.config.trial
        good = any(r.verdict is Verdict.FAVOURABLE for r in rulings) or self._seems_harmless(known, rulings[0], now_s)
        least_s = min(trial.step_s, _URGENT_STEP_S) if self._urgent(now_s) else trial.step_s
        if waited_s >= trial.step_timeout_s or (waited_s >= least_s and good):
            share = known.connection.share(trial.ramp)
            if share >= 1.0:
                self._apply(known, Event.RAMP_DONE, now_s, "last step of the ramp passed", rulings[0])
            else:
                self._apply(known, Event.STEP_PASSED, now_s, f"no harm at a share of {share:g}", rulings[0])

    def _seems_harmless(self, known: _Replica, ruling: Ruling, now_s: float) -> bool:
        """Whether a step of the ramp may end before its proof: enough was seen, or there is no time to see more."""
        margin = math.log(self.config.trial.margin)
        level = ruling.evidence.get("mean_log_ratio", math.nan)
        if self._urgent(now_s):  # its capacity says how slow it is, and keeps from it what it cannot do
            return ruling.evidence.get("errors_shadow_only", 0.0) == 0.0 and not level > -_WORTH_LOG_SPEED
        if self._is_paced(known) and known.speed.weight >= self.config.trial.warmup_pairs:
            return known.speed.recent >= -margin  # streams tell their pace long before they end
        return ruling.evidence.get("candidate_outcomes", 0.0) >= self.config.trial.min_pairs and level <= margin

    def _guard(self, known: _Replica, now_s: float) -> None:
        """An ACTIVE replica: errors that the others do not have drain it; long good service is a clean slate."""
        c = known.connection
        if c.rejections and now_s - c.since_s > self.config.trial.backoff_max_s:
            known.connection = replace(c, rejections=0)
        if known.cusum < _CUSUM_LIMIT or known.rates.failed < 3.0:
            return
        others = sum(1 for r in self._replicas.values() if r is not known and r.connection.state is State.ACTIVE)
        if (others / max(len(self._proven()), 1)) < self.config.balance.panic_fraction:
            return  # never drain below the panic threshold
        rate = known.rates.failed / max(known.rates.finished, 1e-9)
        self._apply(known, Event.GUARD_TRIPPED, now_s, f"{rate:.0%} of its requests fail, unlike the others'")

    def _proven(self) -> list[_Replica]:
        return [r for r in self._replicas.values() if r.connection.proven and not r.connection.held]

    def _panic(self) -> bool:
        """Too few of the replicas that were good once take traffic."""
        proven = self._proven()
        serving = [r for r in proven if _takes_traffic(r)]
        return bool(proven) and len(serving) < self.config.balance.panic_fraction * len(proven)

    def _admit(self, now_s: float) -> None:
        waiting = [r for r in self._replicas.values() if r.connection.state is State.INACTIVE and not r.connection.held]
        early = now_s - (self._first_seen_s or now_s) < self.config.balance.bootstrap_s
        untouched = self._finished_total < _BOOTSTRAP_REQUESTS
        serving = any(_takes_traffic(r) for r in self._replicas.values())
        panic = self._panic()
        if early or untouched or panic or not serving:
            why = "panic: too few replicas serve" if panic else "first start" if serving else "nothing else serves"
            unproven = [r for r in self._replicas.values() if r.connection.state in (State.SHADOWING, State.SHIFTING)]
            entering = [r for r in [*waiting, *unproven] if not r.connection.rejections and not r.connection.held]
            if not serving and not entering:
                entering = waiting
            event = Event.ADMIT_UNTRIED if early or untouched else Event.ADMIT_URGENT
            for known in entering:
                self._apply(known, event, now_s, why)
            return
        fit = [r for r in waiting if now_s >= r.connection.not_before_s and not r.vetoed and self._heard(r, now_s)]
        urgent = self._urgent(now_s)
        if not self._is_replacing(now_s):
            self._able_before = self._able([r for r in self._replicas.values() if _takes_traffic(r)])
        for known in fit:
            if self._has_returned(known, now_s) and not known.connection.rejections:
                event = Event.ADMIT_UNTRIED if urgent else Event.ADMIT_URGENT
                self._apply(known, event, now_s, "its machine served well, was away and is back")
        fit = [r for r in fit if r.connection.state is State.INACTIVE]
        if urgent:
            shadowed = [r for r in self._replicas.values() if r.connection.state is State.SHADOWING]
            for known in [*fit, *shadowed]:
                if not known.connection.rejections or known.is_of_use:
                    self._apply(known, Event.ADMIT_URGENT, now_s, f"{urgent}: no time for a trial")
            fit = [r for r in fit if r.connection.state is State.INACTIVE]
        on_trial = sum(1 for r in self._replicas.values() if r.connection.state is State.SHADOWING)
        trial = self.config.trial
        by_mirrors = int(trial.mirror_budget / max(trial.mirror_fraction, 1e-9))
        by_count = math.ceil(trial.candidate_budget * len(self._replicas))
        free = max(by_mirrors, by_count, 1) - on_trial
        for known in sorted(fit, key=lambda r: (r.connection.rejections, -r.capacity, r.connection.replica_id))[:free]:
            again = f", after {known.connection.rejections} rejections" if known.connection.rejections else ""
            self._apply(known, Event.ADMIT, now_s, f"alive and waiting{again}")

    def _heard(self, known: _Replica, now_s: float) -> bool:
        """Whether a replica's node is well enough for a trial: its telemetry, if there ever was any, arrives.

        After a restart it may take a moment longer than the replica; a forecaster that stays away keeps nobody out.
        """
        node = self._nodes.get(known.connection.node_id)
        silent = node is not None and now_s - node.made_s > self.config.balance.lost_after_s
        return not silent or (known.queue == 0 and now_s - known.connection.since_s > _UNHEARD_S)

    def _urgent(self, now_s: float) -> str:
        """Why there is no time for trials, "" if there is: what serves is about to be overloaded, or crowded already.

        Load and queues say so only once the service curve is known: what looks like a queue may be parallel work.
        """
        serving = [r for r in self._replicas.values() if _takes_traffic(r)]
        if not self._curve.curve.learned:
            left = self._able_without_next(serving)
            halved = left < self.config.balance.panic_fraction * self._able_before
            return "less than half of what served will be left" if halved and self._is_replacing(now_s) else ""
        load = self._foreseen_load(serving, now_s)
        if load > self.config.balance.urgent_load:
            return f"predicted load {load:.2f} of what serves"
        crowded = sum(r.queue for r in serving) > self._curve.curve.slots * len(serving)
        return "more wait than are served" if crowded else ""

    def _foreseen_load(self, serving: list[_Replica], now_s: float) -> float:
        """Predicted load of the replicas that serve; while Serve replaces them, of those that the next one leaves."""
        if len(serving) < 2 or not self._is_replacing(now_s):
            return self._load
        return self._load * self._able(serving) / max(self._able_without_next(serving), 1e-9)

    def _able_without_next(self, serving: list[_Replica]) -> float:
        next_one = max(serving, key=lambda r: r.capacity * r.connection.share(self.config.trial.ramp), default=None)
        return self._able([r for r in serving if r is not next_one])

    def _able(self, serving: list[_Replica]) -> float:
        """Nominal replicas that these are worth; where none is ACTIVE, they take all there is, whatever their share."""
        ramped = any(r.connection.state is State.ACTIVE for r in serving)
        return sum(r.capacity * (r.connection.share(self.config.trial.ramp) if ramped else 1.0) for r in serving)

    def _is_replacing(self, now_s: float) -> bool:
        """Whether Serve seems to be replacing replicas: one left a machine that is well, and it will stop the next one
        as soon as a new one runs, whether our trials are over or not.
        """
        well = {n: node for n, node in self._nodes.items() if self._age(node) <= self.config.forecast.ttl_s}
        return any(
            left_s > now_s - _REPLACING_S and node_id in well and well[node_id].back_s <= left_s
            for node_id, (left_s, _) in self._left.items()
        )

    def _plan_mirrors(self, now_s: float) -> None:
        """Split the mirrored budget; with little traffic it grows, up to a candidate's fair share."""
        trial = self.config.trial
        capacities = [r.capacity for r in self._replicas.values() if _takes_traffic(r)]
        slow = _SLOWER * median(capacities) if len(capacities) > 1 else 0.0
        candidates = [r for r in self._replicas.values() if r.trial is not None or _is_unseen(r, slow, now_s)]
        for known in self._replicas.values():
            known.mirror_fraction = 0.0
        if not candidates:
            return
        rate = self._all_rates.per_s
        serving = sum(1 for r in self._replicas.values() if _takes_traffic(r))
        wanted = _PAIRS_PER_S / rate if rate > 0.0 else 1.0
        each = min(trial.mirror_fraction, trial.mirror_budget / len(candidates))
        grown = min(wanted, trial.mirror_fraction_max, 1.0 / (serving + 1))
        for known in candidates:
            known.mirror_fraction = max(each, grown) if wanted > trial.mirror_fraction else each

    # ------------------------------------------------------------------ output

    def _publish(self, now_s: float) -> TickOutput:
        self._version += 1
        ramp = self.config.trial.ramp
        panic = self._panic()
        rows, views = [], []
        for known in self._replicas.values():
            c = known.connection
            share = 1.0 if panic and not c.held and not c.rejections else c.share(ramp)
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
            views.append(self._view(known, share, now_s))
        curve = self._curve.curve
        table = RoutingTable(
            self.deployment,
            self._epoch,
            self._version,
            max(len(self._routers), 1),
            tuple(rows),
            curve.slots,
            curve.batch_half,
            self._reference_s(),
            panic,
        )
        return TickOutput(
            table,
            tuple(self._transitions),
            tuple(views),
            curve.slots,
            curve.batch_half,
            self._sensitivity.gamma,
            self._load,
            self._look_ahead_s(),
            self._dropped,
        )

    def _view(self, known: _Replica, share: float, now_s: float) -> ReplicaView:
        c, rates, ruling = known.connection, known.rates, known.ruling
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
            c.held,
            ruling.reason if ruling is not None else "",
            dict(ruling.evidence) if ruling is not None else {},
            max(c.not_before_s - now_s, 0.0) if c.state is State.INACTIVE else 0.0,
        )


def _is_unseen(known: _Replica, slow: float, now_s: float) -> bool:
    """An ACTIVE replica whose score keeps all requests away: without any, its estimate would stay for minutes."""
    quiet = known.queue < 0.5 and now_s - known.asked_s >= _UNSEEN_S
    by_requests = known.unexplained < math.log(_SLOWER)  # what telemetry says, it also takes back
    return known.connection.state is State.ACTIVE and known.capacity < slow and quiet and by_requests


def _own_pace(capacity: float) -> float:
    """Log speed at which a machine may come back: as it was; what is too slow to be of use, or fast, is no excuse."""
    return min(max(math.log(capacity), _WORTH_LOG_SPEED), 0.0)


def _takes_traffic(known: _Replica) -> bool:
    return known.connection.state in (State.ACTIVE, State.SHIFTING)


def _summed(rates: Iterable[_Rates]) -> _Rates:
    total = _Rates()
    for each in rates:
        total.started += each.started
        total.finished += each.finished
        total.failed += each.failed
    return total


def _error_rate(together: _Rates, own: _Rates) -> float:
    """Fraction of failed requests on all but one replica, shrunk towards one in a hundred."""
    return (together.failed - own.failed + 0.1) / (together.finished - own.finished + 10.0)


def _plausible(duration_s: float, in_flight: float, cost: float) -> bool:
    return (
        math.isfinite(duration_s)
        and math.isfinite(in_flight)
        and math.isfinite(cost)
        and duration_s >= 0.0
        and in_flight >= 0.0
        and cost > 0.0
    )
