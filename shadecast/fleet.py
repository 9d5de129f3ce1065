"""What a deployment's balancer knows of its replicas, of their nodes, and of the routers that report.

State and plain questions about it. What follows is decided elsewhere: `estimates` (how fast is each replica),
`admission` (who may enter, and when there is no time), `trials` (who goes on, who is turned away).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shadecast import capacity as cap
from shadecast.config import LOST_AFTER_S, Config
from shadecast.connection import Connection
from shadecast.replica import MOST_USUAL_ERRORS, Node, Rates, Replica, Router
from shadecast.types import NodeReport, ReplicaReport, RouterReport, RoutingTable, State

BOOTSTRAP_REQUESTS = 20
"""Of a deployment that has finished fewer, nothing is known that a trial could compare with."""
_SETTLED = 0.3
"""Change of log headroom from one sample to the next below which a node's load counts as steady."""
_REMEMBERED_S = 300.0
"""How long a node is remembered for a replica that served well there."""
_SILENT_S = 30.0
"""A node that falls silent is taken to be as it last said for so long: a hog starves the node's forecaster, too."""
_REMEMBERED_WEIGHT = 50.0
"""Requests that the memory of a machine is worth for the next replica on it."""
_LEAST_USUAL = 0.005
"""An error rate that is always taken for usual."""


class Fleet:
    """All replicas of one deployment. `now_s` is the time of the tick under way."""

    def __init__(self, deployment: str, config: Config) -> None:
        self.deployment = deployment
        self.config = config
        self.now_s = 0.0
        self.replicas: dict[str, Replica] = {}
        self.nodes: dict[str, Node] = {}
        self.routers: dict[str, Router] = {}
        self.first_seen_s: float | None = None
        self.finished_total = 0
        self.all_rates = self.all_recent = self.all_long = Rates()
        self.holds: frozenset[str] = frozenset()
        """Ids of replicas and nodes that are to be kept out of traffic."""
        self.copyable = True
        """Whether requests can be copied, as far as is known."""
        self.dropped = 0
        """Reports and samples refused so far because they cannot be true."""
        self._left: dict[str, tuple[float, float]] = {}
        """When a node lost a replica that served well, and its log speed: the machine's own, whatever runs there."""

    # ------------------------------------------------------------------ intake

    def add(self, connection: Connection, now_s: float) -> Replica:
        """A replica that was not known."""
        known = Replica(connection, cap.SpeedEstimate(cap.HALF_LIFE_S, now_s))
        known.progress_s = now_s
        self.replicas[connection.replica_id] = known
        return known

    def assume_used(self, table: RoutingTable, now_s: float) -> None:
        """The deployment has served for long: this is no first start."""
        if table.rows:
            self.first_seen_s = now_s - self.config.balance.bootstrap_s
            self.finished_total = BOOTSTRAP_REQUESTS

    def advance(self, now_s: float, elapsed_s: float) -> None:
        """Let time pass for what decays."""
        self.now_s = now_s
        for known in self.replicas.values():
            known.speed.advance(now_s)
            known.rates.fade(elapsed_s)
            known.recent.fade(elapsed_s)
            known.long.fade(elapsed_s)

    def take_node(self, report: NodeReport) -> None:
        """Telemetry and forecast of a node; what has no possible age is dropped."""
        if not (math.isfinite(report.age_s) and report.age_s >= 0.0):
            self.dropped += 1
            return
        made_s, headroom = self.now_s - report.age_s, cap.headroom_now(report.snapshot)
        before = self.nodes.get(report.node_id)
        if before is None:
            self.nodes[report.node_id] = Node(report, made_s, headroom)
            return
        change = max(abs(b - a) for a, b in zip(before.headroom, headroom, strict=True))
        back_s = self.now_s if made_s - before.made_s > LOST_AFTER_S else before.back_s
        headroom = cap.smoothed(before.headroom, headroom)
        self.nodes[report.node_id] = Node(report, made_s, headroom, (change, *before.changes[:2]), back_s)

    def take_router(self, report: RouterReport) -> bool:
        """Membership and counts of one report; False if it cannot be true."""
        now_s = self.now_s
        ids = {view.replica_id for view in report.replicas}
        router = self.routers.get(report.router_id)
        stale = router is not None and report.seq <= router.report.seq
        if len(ids) != len(report.replicas) or stale or report.deployment != self.deployment:
            self.dropped += 1
            return False
        if self.first_seen_s is None:
            self.first_seen_s = now_s
        if router is None:
            router = self.routers[report.router_id] = Router(report, now_s)
        router.report, router.heard_s = report, now_s
        for replica_id in report.gone if report.partial else [r for r in router.in_flight if r not in ids]:
            self._unlist(report.router_id, router, replica_id)
        for view in report.replicas:
            self._take_view(report.router_id, router, view)
        return True

    def _take_view(self, router_id: str, router: Router, view: ReplicaReport) -> None:
        now_s, replica_id = self.now_s, view.replica_id
        known = self.replicas.get(replica_id)
        if known is None:
            known = self.add(Connection(replica_id, view.node_id, since_s=now_s), now_s)
            self._remember(known)
        before, now = router.in_flight.get(replica_id), view.in_flight if view.in_flight > 0 else 0
        if before is None:
            known.listed += 1
            before = 0
        known.max_ongoing = view.max_ongoing if view.max_ongoing > 1 else 1
        started, finished = view.started if view.started > 0 else 0, view.finished if view.finished > 0 else 0
        failed = min(view.failed, finished) if view.failed > 0 else 0
        if finished or not now or known.queue <= 0:
            known.progress_s = now_s
        if started or now or before:
            known.asked_s = now_s
        router.in_flight[replica_id] = now
        known.queue += now - before
        if view.kv_own >= 0.0 or view.kv_told >= 0.0:
            known.kv[router_id] = view.kv_own, view.kv_told
        else:
            known.kv.pop(router_id, None)
        if view.unfinished:
            known.open[router_id] = view.unfinished
        else:
            known.open.pop(router_id, None)
        self.finished_total += finished
        for rates in (known.rates, known.recent, known.long):
            rates.started += started
            rates.finished += finished
            rates.failed += failed

    def _unlist(self, router_id: str, router: Router, replica_id: str) -> None:
        """A router does not list a replica any more."""
        in_flight, known = router.in_flight.pop(replica_id, None), self.replicas.get(replica_id)
        if in_flight is not None and known is not None:
            known.listed -= 1
            known.queue -= in_flight
            known.open.pop(router_id, None)
            known.kv.pop(router_id, None)

    def sum_rates(self) -> None:
        """Over all replicas, of this moment."""
        self.all_rates = _summed(r.rates for r in self.replicas.values())
        self.all_recent = _summed(r.recent for r in self.replicas.values())
        self.all_long = _summed(r.long for r in self.replicas.values())

    # ------------------------------------------------------------------ questions

    def forget(self) -> None:
        """Routers that report no more, with their counts, and nodes that are gone for long."""
        for router_id in [k for k, router in self.routers.items() if self.now_s - router.heard_s > LOST_AFTER_S]:
            router = self.routers.pop(router_id)
            for replica_id in list(router.in_flight):
                self._unlist(router_id, router, replica_id)
        used = {r.connection.node_id for r in self.replicas.values()}
        for node_id in [n for n, node in self.nodes.items() if n not in used and self.age_s(node) > _REMEMBERED_S]:
            del self.nodes[node_id]

    def serving(self) -> list[Replica]:
        """Those that take live traffic."""
        return [r for r in self.replicas.values() if r.takes_traffic]

    def is_held(self, known: Replica) -> bool:
        """Whether it, or its node, is to be kept out of traffic."""
        return bool(self.holds) and not self.holds.isdisjoint((known.connection.replica_id, known.connection.node_id))

    def proven(self) -> list[Replica]:
        """Those that were good once, and that are not to be kept out."""
        return [r for r in self.replicas.values() if r.connection.proven and not self.is_held(r)]

    def usual_errors(self, known: Replica) -> float:
        """The greatest error rate of a replica that is still taken for usual: the others', three deviations up.

        The less is known of them, the more is usual: after n requests without an error up to 3 / n (the rule of three,
        Hanley and Lippman-Hand 1983).
        """
        finished = max(self.all_long.finished - known.long.finished, 0.0)
        failed = max(self.all_long.failed - known.long.failed, 0.0)
        usual = (failed + 3.0 * math.sqrt(failed) + 3.0) / max(finished, 1.0)
        recent = max(self.all_recent.finished - known.recent.finished, 0.0)
        at_once = max(self.all_recent.failed - known.recent.failed, 0.0) / max(recent, 1.0)  # an outage that all share
        return min(max(usual, 2.0 * at_once, _LEAST_USUAL), MOST_USUAL_ERRORS)

    @property
    def waiting(self) -> int:
        """Requests that wait in routers for a replica that has room."""
        return sum(max(router.report.waiting, 0) for router in self.routers.values())

    @property
    def silence(self) -> float:
        """How far nobody asks for anything: 0 with requests under way, or one a second and more; 1 without any."""
        replicas = self.replicas.values()
        if self.waiting or any(r.queue > 0.0 for r in replicas):
            return 0.0
        return max(1.0 - sum(r.recent.per_s for r in replicas), 0.0)

    def panic(self) -> bool:
        """Too few of the replicas that were good once take traffic."""
        proven = self.proven()
        serving = [r for r in proven if r.takes_traffic]
        return bool(proven) and len(serving) < self.config.balance.panic_fraction * len(proven)

    def able(self, serving: list[Replica]) -> float:
        """Nominal replicas that these are worth; where none is ACTIVE, they take all there is, whatever their share."""
        return sum(r.capacity * part for r, part in zip(serving, self._parts(serving), strict=True))

    def shares(self, serving: list[Replica]) -> float:
        """Of picks, summed; where none is ACTIVE, each counts as one."""
        return sum(self._parts(serving))

    def _parts(self, serving: list[Replica]) -> list[float]:
        ramped = any(r.connection.state is State.ACTIVE for r in serving)
        return [r.connection.share(self.config.trial.ramp) if ramped else 1.0 for r in serving]

    def age_s(self, node: Node) -> float:
        """Of a node's last report."""
        return self.now_s - node.made_s

    def headroom(self, known: Replica) -> cap.Headroom:
        """Log headroom of a replica's node, as that last said; the memory of a language model is that of its engine."""
        if known.kv_used_s != self.now_s:  # reports are taken in before anybody asks
            known.kv_used, known.kv_used_s = known.kv_fraction, self.now_s
        node, kv_fraction = self.nodes.get(known.connection.node_id), known.kv_used
        heard = node is not None and self.age_s(node) <= max(_SILENT_S, self.config.forecast.ttl_s)
        headroom = node.headroom if node is not None and heard else cap.NO_HEADROOM
        return headroom if math.isnan(kv_fraction) else (headroom[0], cap.log_headroom(kv_fraction), headroom[2])

    def settled(self, node_id: str) -> bool:
        """Whether a node's load has been steady for the last samples."""
        node = self.nodes.get(node_id)
        return node is not None and max(node.changes) < _SETTLED

    def fresh_node(self, node_id: str) -> Node | None:
        """A node whose telemetry is young enough to be believed; None if there is none."""
        node = self.nodes.get(node_id)
        return node if node is not None and self.age_s(node) <= self.config.forecast.ttl_s else None

    def memory_fraction(self, known: Replica) -> float:
        """Of its node; NaN where that is not known, or is from before the node went away."""
        node = self.fresh_node(known.connection.node_id)
        return node.report.snapshot.memory_fraction if node is not None else math.nan

    # ------------------------------------------------------------------ what is gone

    def remove(self, known: Replica) -> None:
        """No router lists the replica any more."""
        del self.replicas[known.connection.replica_id]

    def note_left(self, known: Replica) -> None:
        """A replica that served well is leaving its node: the machine is remembered for it."""
        recent = {n: left for n, left in self._left.items() if left[0] > self.now_s - _REMEMBERED_S}
        log_speed = min(math.log(known.slow_capacity), 0.0)
        self._left = {**recent, known.connection.node_id: (self.now_s, log_speed)}

    def has_returned(self, known: Replica) -> bool:
        """Whether its node served well, went silent and is back: the same machine, not a new version of the code."""
        node, (left_s, _) = self.nodes.get(known.connection.node_id), self._left_by(known)
        return node is not None and node.back_s > left_s > self.now_s - _REMEMBERED_S

    def _left_by(self, known: Replica) -> tuple[float, float]:
        """When a replica that served well left its node, and how fast that was."""
        return self._left.get(known.connection.node_id, (-math.inf, 0.0))

    def _remember(self, known: Replica) -> None:
        """What a machine was like lately is what its next replica begins with."""
        left_s, log_speed = self._left_by(known)
        if left_s > self.now_s - _REMEMBERED_S:
            known.speed.observe(log_speed, _REMEMBERED_WEIGHT)
            known.capacity = known.steady = known.live_capacity = known.slow_capacity = math.exp(log_speed)


def _summed(rates: Iterable[Rates]) -> Rates:
    total = Rates()
    for each in rates:
        total.started += each.started
        total.finished += each.finished
        total.failed += each.failed
    return total
