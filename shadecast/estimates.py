"""How fast each replica is, now and in a moment: from outcomes, unfinished requests, streams, copies and telemetry.

The parts are elsewhere: what a speed is and how a forecast changes it in `capacity`, how long n requests take together
in `service_curve`, what something usually takes in `baseline`. Here they meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median

from shadecast import capacity as cap
from shadecast.baseline import Baseline
from shadecast.config import TICK_S
from shadecast.fleet import Fleet
from shadecast.replica import Replica
from shadecast.service_curve import Curve, CurveLearner
from shadecast.types import Outcome, PairedSample, ReplicaReport

_PACED_S = 5.0
"""So long after items of streams were last seen, they alone say how fast a replica is."""
_MAX_STREAM_S = 4.0
"""Stream-seconds that one report counts at most: those of one replica share what slows them."""
_SLOW_HALF_LIFE_S = 60.0
_MAX_COPY_LOG_SPEED = math.log(1.5)
"""A copy on an idle newcomer is not taken for proof that it is much faster than the others."""
_UNSURE = 2.0
"""Standard errors by which a replica may differ from the median, and still counts as equal."""
_FEW_PER_S = 1.0
"""Requests of a replica in doubt that are too few to show a change."""
_OVERDUE = 2.0
"""Standard deviations beyond its expected log duration from which an unfinished request is evidence."""


class Estimates:
    """Speeds of a fleet's replicas. Feed observations, then `update` once a tick."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        balance = fleet.config.balance
        self._curve = CurveLearner(balance.slots, balance.batch_half)
        self._sensitivity = cap.Sensitivity()
        self._duration = Baseline()
        """Processing time of a request alone on a replica."""
        self._pace = Baseline()
        """Time per item of a stream alone on a replica."""
        self._veto = cap.Veto()
        self._usual = 0.0
        """Median log speed of the replicas that serve, at this moment."""
        self.load = math.nan
        """Predicted load of the replicas that serve: offered work over capacity; NaN until it is known."""

    # ------------------------------------------------------------------ observations

    def observe_outcomes(self, known: Replica, outcomes: Iterable[Outcome]) -> None:
        """Live requests that went well."""
        paced, sensitivity = self.is_paced(known), self._sensitivity
        headroom, settled = self._fleet.headroom(known), self._fleet.settled(known.connection.node_id)
        explained = cap.explained(sensitivity.gamma, headroom)
        for outcome in outcomes:
            if not outcome.duration_s > 0.0:
                continue
            log_duration = math.log(outcome.duration_s / outcome.cost)
            before = known.speed.residual(self._pace.noise if paced else self._duration.noise)
            self._curve.observe(outcome.in_flight_at_start, log_duration + explained + before)
            log_alone = log_duration - math.log(self._curve.curve.correction(outcome.in_flight_at_start))
            shown = self._duration.observe(known.duration, log_alone, headroom, sensitivity, before, settled=settled)
            if not paced:
                known.speed.observe(shown)

    def observe_pace(self, known: Replica, view: ReplicaReport) -> None:
        """Items that streams gave since the last report: the speed of this moment, whatever was asked."""
        if not (math.isfinite(view.stream_s) and view.stream_s > 0.0 and view.items >= 0):
            return
        known.paced_s = self._fleet.now_s
        log_time = math.log(view.stream_s) - math.log(max(float(view.items), 0.5))
        beside = max(min(known.queue, self.curve.slots) - 1.0, 0.0)  # those that wait for a slot slow no item
        log_alone = log_time - math.log(self.curve.correction(beside))
        headroom = self._fleet.headroom(known)
        before = known.speed.residual(self._noise(known))
        settled = self._fleet.settled(known.connection.node_id)
        shown = self._pace.observe(known.pace, log_alone, headroom, self._sensitivity, before, settled=settled)
        known.speed.observe(shown, min(view.stream_s, _MAX_STREAM_S))

    def observe_pair(self, candidate: Replica, primary: Replica | None, pair: PairedSample) -> None:
        """A candidate's speed from its copy, relative to the primary's: pairs may cover only a stream's first items."""
        whole = pair.primary_ok and pair.shadow_ok and not pair.cold and min(pair.primary_s, pair.shadow_s) > 0.0
        sides = ((pair.primary_s, pair.primary_in_flight), (pair.shadow_s, pair.shadow_in_flight))
        if primary is None or not whole or not all(is_plausible(*side, 1.0) and side[0] < 1e6 for side in sides):
            return
        log_ratio = math.log(pair.primary_s / pair.shadow_s) + math.log(
            self.curve.correction(pair.shadow_in_flight) / self.curve.correction(pair.primary_in_flight)
        )
        speed = min(self._log_speed(primary) + log_ratio, _MAX_COPY_LOG_SPEED)
        candidate.speed.observe(speed - self._explained(candidate))

    # ------------------------------------------------------------------ estimates

    def update(self, elapsed_s: float) -> None:
        """Capacities of all replicas, as published from now on."""
        fleet, weight = self._fleet, self._fleet.config.balance.forecast_weight
        gamma = self._sensitivity.solve()
        self._curve.fit()
        serving = fleet.serving()
        self._duration.refer(r.duration for r in serving)
        self._pace.refer(r.pace for r in serving)
        outlooks = {r.connection.node_id: cap.NO_OUTLOOK for r in fleet.replicas.values()}
        if any(r.kv for r in fleet.replicas.values()):  # what is forecast of a node's memory says nothing of theirs
            gamma = (gamma[0], 0.0, gamma[2])
        for node_id in outlooks:
            node = fleet.fresh_node(node_id)
            if node is not None:
                report, age_s = node.report, fleet.age_s(node)
                now = node.headroom if report.snapshot is not None else None
                outlooks[node_id] = cap.outlook(report.forecast, now, gamma, age_s, self.look_ahead_s())
        outlooks = cap.limit_down(outlooks)
        forecast = outlooks if weight > 0.0 else {}
        vetoed = self._veto.step(forecast, fleet.config.trial.memory_limit, fleet.now_s)
        for known in fleet.replicas.values():
            known.speed.settle(self._noise(known))
            if known.doubted_s is not None and known.recent.started_per_s < _FEW_PER_S:
                known.speed.renew()
            known.unexplained = self._with_unfinished(known, self._explained(known))
        usual = median([r.unexplained for r in serving] or [0.0])
        for known in fleet.replicas.values():
            node_id = known.connection.node_id
            # within its own uncertainty a replica is as fast as the others: the luckiest would get everything
            beyond = known.unexplained - usual
            unsure = _UNSURE * known.speed.uncertainty(self._noise(known))
            residual = usual + math.copysign(max(abs(beyond) - unsure, 0.0), beyond)
            log_live = max(self._explained(known) + residual, math.log(0.01))
            known.live_capacity = math.exp(log_live)
            known.outlook = outlooks[node_id]
            known.vetoed = node_id in vetoed
            view = known.outlook
            wanted = math.exp(log_live + weight * view.log_change)
            known.steady = max(cap.limit_rate(known.steady, wanted, elapsed_s), 0.01)
            known.capacity = max(known.steady * cap.VETO_FACTOR, 0.01) if known.vetoed else known.steady
            keep = 0.5 ** (max(elapsed_s, 0.0) / _SLOW_HALF_LIFE_S)
            known.slow_capacity = keep * known.slow_capacity + (1.0 - keep) * known.steady
        self._usual = median([self._log_speed(r) for r in serving] or [0.0])
        self.load = self._predicted_load()

    def reconfigure(self) -> None:
        """The fleet's configuration has changed."""
        balance = self._fleet.config.balance
        self._curve.fix(balance.slots, balance.batch_half)

    @property
    def curve(self) -> Curve:
        """How long n requests take together, as far as is known."""
        return self._curve.curve

    @property
    def cautious_curve(self) -> Curve:
        """What replicas are chosen by: the curve, as far as the loads that were seen bear it out."""
        return self._curve.cautious(streams=self._pace.reference is not None)

    @property
    def gamma(self) -> cap.Headroom:
        """How much each resource's headroom matters to this deployment."""
        return self._sensitivity.gamma

    @property
    def reference_s(self) -> float:
        """Nominal processing time of a request alone on a replica; 0 until it is known."""
        reference = self._duration.reference
        return math.exp(reference) if reference is not None else 0.0

    def look_ahead_s(self) -> float:
        """H: the median residence of a request, at least a tick, at most 10 s."""
        residence_s = self._fleet.config.forecast.residence_s
        return residence_s if residence_s > 0.0 else min(max(self.reference_s or 1.0, TICK_S), 10.0)

    def is_paced(self, known: Replica) -> bool:
        """Whether streams' items say how fast it is."""
        return self._fleet.now_s - known.paced_s <= _PACED_S

    def advantage(self, known: Replica | None) -> float:
        """Log speed against the usual one of this moment: what slows all is in both sides of a pair."""
        return self._log_speed(known) - self._usual if known is not None else 0.0

    def _log_speed(self, known: Replica) -> float:
        """Of this moment, against a usual moment: what its requests and its node's telemetry say together."""
        return known.speed.residual(self._noise(known)) + self._explained(known)

    def _explained(self, known: Replica) -> float:
        """Log speed that its node's telemetry explains."""
        return cap.explained(self._sensitivity.gamma, self._fleet.headroom(known))

    def by_telemetry(self, known: Replica) -> float:
        """Relative speed that its node's telemetry explains."""
        return math.exp(self._explained(known))

    def _noise(self, known: Replica) -> float:
        """Spread of one observation of the kind that says how fast the replica is."""
        return self._pace.noise if self.is_paced(known) else self._duration.noise

    def _with_unfinished(self, known: Replica, explained: float) -> float:
        """The residual log speed after counting requests that have run far longer than expected.

        Only far longer: of those under way at any time the long ones are the most, and slowness of the replica is not
        what makes them long.
        """
        residual = known.speed.residual(self._noise(known))
        reference = self._duration.reference
        if not known.open or reference is None or self.is_paced(known):
            return residual
        sigma = max(self._duration.noise, 0.1)
        extra_sum = extra_weight = 0.0
        for age_s, others, cost in self._unfinished(known):
            expected = reference + math.log(cost) + math.log(self.curve.correction(others))
            over = math.log(max(age_s, 1e-6)) - (expected - explained - residual)
            if over > _OVERDUE * sigma:
                extra_sum += residual - sigma * cap.censored_excess(over / sigma)
                extra_weight += 1.0
        if not extra_weight:
            return residual
        return max(known.speed.residual(sigma, extra_sum, extra_weight), math.log(0.01))

    def _unfinished(self, known: Replica) -> Iterator[tuple[float, float, float]]:
        """(age, in-flight at start, cost) of live requests on a replica, of all routers: as reported.

        Most have ended since: with the report's own age on top, equal replicas would look unequal.
        """
        for entries in known.open.values():
            for entry in entries:
                if is_plausible(entry.age_s, entry.in_flight_at_start, entry.cost):
                    yield entry.age_s, entry.in_flight_at_start, entry.cost

    def _predicted_load(self) -> float:
        serving = self._fleet.serving()
        if not self.reference_s or not serving:
            return math.nan
        spread = min(self._duration.noise, 1.5)
        mean_s = self.reference_s * math.exp(0.5 * spread * spread)  # the reference is a median, work is skewed
        offered = self._fleet.all_rates.started_per_s * mean_s
        places = median(r.max_ongoing for r in serving)  # what Serve lets in is what runs side by side at most
        curve = replace(self.curve, slots=min(self.curve.slots, places))
        return offered / max(self._fleet.able(serving) * curve.throughput(), 1e-9)


def is_plausible(duration_s: float, in_flight: float, cost: float) -> bool:
    """Whether an observation can be true."""
    return (
        math.isfinite(duration_s)
        and math.isfinite(in_flight)
        and math.isfinite(cost)
        and duration_s >= 0.0
        and in_flight >= 0.0
        and cost > 0.0
    )
