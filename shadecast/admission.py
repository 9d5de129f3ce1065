"""Who may enter: untried at a first start, at once where there is no time, else through a trial within its budget."""

from __future__ import annotations

import math
from statistics import median

from shadecast.config import LOST_AFTER_S
from shadecast.connection import Event
from shadecast.fleet import BOOTSTRAP_REQUESTS, Fleet
from shadecast.replica import Replica
from shadecast.trials import Trials
from shadecast.types import State
from shadecast.urgency import Urgency

_PAIRS_PER_S = 5.0
"""Pairs that a trial wants: with little traffic the mirrored fraction grows towards it."""
_UNHEARD_S = 3.0
"""How long a new replica waits for the first word of its node, if the node has been silent."""
_UNSEEN_S = 3.0
"""A slow replica that nobody has asked for so long gets copies, which show whether it is well again."""
_RARER_S, _LEAST_PAIRS_PER_S = 30.0, 0.2
"""From then on these copies get rarer, half as many after twice as long and so on; but no fewer than these."""
_FULL_COPIES = 0.5
"""Speed down to which a candidate gets as many copies as an equal one: it has room, and the trial stays short."""
_LEFT_OUT = 0.9
"""Part of the best capacity below which a replica is left out by scores alone where nobody is busy."""


class Admission:
    """Begins trials, and shares the mirrored budget among them."""

    def __init__(self, fleet: Fleet, urgency: Urgency, trials: Trials) -> None:
        self._fleet, self._urgency, self._trials = fleet, urgency, trials

    def admit(self) -> None:
        """Let in who may."""
        replicas = list(self._fleet.replicas.values())
        waiting = [r for r in replicas if r.connection.state is State.INACTIVE and not self._fleet.is_held(r)]
        if self._admit_untried(waiting):
            return
        now_s = self._fleet.now_s
        fit = [r for r in waiting if now_s >= r.connection.not_before_s and not r.vetoed and self._heard(r)]
        urgent = self._urgency.why()
        for known in fit:
            if self._fleet.has_returned(known) and not known.connection.rejections:
                event = Event.ADMIT_UNTRIED if urgent else Event.ADMIT_URGENT
                self._trials.apply(known, event, "its machine served well, was away and is back")
        fit = [r for r in fit if r.connection.state is State.INACTIVE]
        if urgent:
            shadowed = [r for r in replicas if r.connection.state is State.SHADOWING]
            for known in [*fit, *shadowed]:
                if not known.connection.rejections:
                    self._trials.apply(known, Event.ADMIT_URGENT, f"{urgent}: no time for a trial")
            fit = [r for r in fit if r.connection.state is State.INACTIVE]
        on_trial = sum(1 for r in replicas if r.connection.state is State.SHADOWING)
        trial = self._fleet.config.trial
        by_mirrors = int(trial.mirror_budget / max(trial.mirror_fraction, 1e-9))
        by_count = math.ceil(trial.candidate_budget * len(replicas))
        free = max(by_mirrors, by_count, 1) - on_trial
        for known in sorted(fit, key=lambda r: (r.connection.rejections, -r.capacity, r.connection.replica_id))[:free]:
            again = f", after {known.connection.rejections} rejections" if known.connection.rejections else ""
            self._trials.apply(known, Event.ADMIT, f"alive and waiting{again}")

    def _admit_untried(self, waiting: list[Replica]) -> bool:
        """At a first start, under panic and where nothing serves there is nobody to be tried beside."""
        fleet = self._fleet
        since_first_s = fleet.now_s - (fleet.first_seen_s or fleet.now_s)
        first_start = (
            since_first_s < self._fleet.config.balance.bootstrap_s or fleet.finished_total < BOOTSTRAP_REQUESTS
        )
        serving, panic = bool(fleet.serving()), fleet.panic()
        if not first_start and not panic and serving:
            return False
        why = "panic: too few replicas serve" if panic else "first start" if serving else "nothing else serves"
        unproven = [r for r in fleet.replicas.values() if r.connection.state in (State.SHADOWING, State.SHIFTING)]
        entering = [r for r in [*waiting, *unproven] if not r.connection.rejections and not fleet.is_held(r)]
        if not serving and not entering:
            entering = waiting
        for known in entering:
            self._trials.apply(known, Event.ADMIT_UNTRIED if first_start else Event.ADMIT_URGENT, why)
        return True

    def _heard(self, known: Replica) -> bool:
        """Whether a replica's node is well enough for a trial: its telemetry, if there ever was any, arrives.

        After a restart it may take a moment longer than the replica; a forecaster that stays away keeps nobody out.
        """
        node, now_s = self._fleet.nodes.get(known.connection.node_id), self._fleet.now_s
        silent = node is not None and now_s - node.made_s > LOST_AFTER_S
        return not silent or (known.queue == 0 and now_s - known.connection.since_s > _UNHEARD_S)

    def plan_mirrors(self) -> None:
        """Split the mirrored budget; with little traffic it grows.

        No candidate gets more copies than an equal replica would get requests, or a few a second, and a slow one fewer:
        more would queue on it, and its own queue would be taken for its speed.
        """
        trial, replicas, serving = self._fleet.config.trial, self._fleet.replicas.values(), self._fleet.serving()
        capacities = [r.capacity for r in serving] if len(serving) > 1 else [0.0]
        usual, best = median(capacities), max(capacities)
        for known in replicas:
            known.mirror_fraction = 0.0
            if not self._is_doubtful(known, usual, best):
                known.doubted_s = None
            elif known.doubted_s is None:
                known.doubted_s = self._fleet.now_s
        candidates = [r for r in replicas if self._pairs_per_s(r) > 0.0]
        if not candidates:
            return
        rate = self._fleet.all_rates.per_s
        each = min(trial.mirror_fraction, trial.mirror_budget / len(candidates))
        fair = min(trial.mirror_fraction_max, 1.0 / (len(serving) + 1))
        for known in candidates:
            wanted = self._pairs_per_s(known) / rate if rate > 0.0 else 1.0
            if known.trial is not None:
                fraction = min(max(each, wanted), max(fair, min(each, wanted)))
                known.mirror_fraction = fraction * min(known.trial.speed() / _FULL_COPIES, 1.0)
            else:
                known.mirror_fraction = min(max(each, min(wanted, fair)), wanted)

    def _pairs_per_s(self, known: Replica) -> float:
        if known.trial is not None:
            return _PAIRS_PER_S
        if known.doubted_s is None:
            return 0.0
        doubted_s = max(self._fleet.now_s - known.doubted_s, _RARER_S)
        wanted = max(_PAIRS_PER_S * _RARER_S / doubted_s, _LEAST_PAIRS_PER_S)
        return wanted - known.recent.started_per_s  # its requests show as much

    def _is_doubtful(self, known: Replica, usual: float, best: float) -> bool:
        """An ACTIVE replica whose score keeps requests away: without any, its estimate would stay for minutes.

        It stays so until it is as fast as the median: before that a faster one may get every request.
        """
        if known.connection.state is not State.ACTIVE:
            return False
        if known.doubted_s is not None:
            return known.capacity < usual
        by_requests = known.unexplained < math.log(_LEFT_OUT)  # what telemetry says, it also takes back
        unseen = known.queue < 0.5 and self._fleet.now_s - known.asked_s >= _UNSEEN_S
        return known.capacity < _LEFT_OUT * best and by_requests and unseen
