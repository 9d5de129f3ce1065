"""How replicas on trial, on the ramp and in use are judged, and what follows for their connections.

The tests are in `gate`, the states in `connection`. Here the evidence is brought to the tests, and guards choose the
event.
"""

from __future__ import annotations

import math
from dataclasses import replace

from shadecast.config import TrialConfig
from shadecast.connection import TRANSITIONS, Event, step
from shadecast.estimates import Estimates
from shadecast.fleet import WORTH_LOG_SPEED, Fleet, Rates, Replica
from shadecast.gate import Canary, Ruling, Trial, Verdict
from shadecast.types import Outcome, PairedSample, State, Transition
from shadecast.urgency import STEP_S, Urgency

_CUSUM_LIMIT = 9.0
"""Log likelihood ratio at which an error guard trips; about one false alarm in e^9 requests."""
_MAX_SETBACKS = 2
_TRIAL_EVENTS = {
    Verdict.FAVOURABLE: Event.TRIAL_PASSED,
    Verdict.UNFAVOURABLE: Event.TRIAL_FAILED,
    Verdict.INCONCLUSIVE: Event.TRIAL_INCONCLUSIVE,
}


class Trials:
    """Judges a fleet's connections; `transitions` are those of the tick under way."""

    def __init__(self, fleet: Fleet, estimates: Estimates, urgency: Urgency) -> None:
        self._fleet, self._estimates, self._urgency = fleet, estimates, urgency
        self._canaries: list[Canary] = []
        self._all_are_new = False
        """None is ACTIVE, after a rollout, say: those on the ramp are judged by each other."""
        self.transitions: list[Transition] = []

    @property
    def _config(self) -> TrialConfig:
        return self._fleet.config.trial

    def begin(self) -> None:
        """A tick begins: no transition yet, and these canaries want to know of other replicas' outcomes."""
        self.transitions = []
        replicas = self._fleet.replicas.values()
        self._canaries = [r.canary for r in replicas if r.canary is not None]
        self._all_are_new = not any(r.connection.state is State.ACTIVE for r in replicas)

    # ------------------------------------------------------------------ transitions

    def apply(self, known: Replica, event: Event, reason: str, ruling: Ruling | None = None) -> bool:
        """Carry out an event if the table allows it in the present state; say whether it did."""
        before, now_s = known.connection.state, self._fleet.now_s
        if (before, event) not in TRANSITIONS:
            return False
        known.connection = c = step(known.connection, event, now_s, self._config)
        evidence = dict(ruling.evidence) if ruling is not None else {}
        deployment = self._fleet.deployment
        self.transitions.append(
            Transition(deployment, c.replica_id, c.node_id, now_s, before, event.value, c.state, reason, evidence)
        )
        self._enter(known, event)
        return True

    def _enter(self, known: Replica, event: Event) -> None:
        """Prepare what the new state needs."""
        known.trial = known.canary = known.ruling = None
        match known.connection.state:
            case State.SHADOWING:
                known.setbacks = 0
                known.neighbours_before = self._estimates.neighbours(known)[0]
                self._begin_trial(known)
            case State.SHIFTING:
                if event is Event.STEP_FAILED:
                    known.setbacks += 1
                self._begin_step(known)
            case State.ACTIVE:
                known.cusum = 0.0
            case State.INACTIVE | State.DRAINING:
                pass

    def _begin_trial(self, known: Replica) -> None:
        curve = self._estimates.curve
        left = self._fleet.lost_lately(known)
        known.expected = left[1] if left is not None else 0.0
        known.trial = Trial(
            self._config,
            self._fleet.now_s,
            batch_half=curve.batch_half,
            slots=curve.slots if curve.learned else math.inf,
            short=known.connection.proven,
        )

    def _begin_step(self, known: Replica) -> None:
        curve, alpha, now_s = self._estimates.curve, self._config.alpha / 5.0, self._fleet.now_s
        slots = curve.slots if curve.learned else math.inf
        known.canary = Canary(self._config, now_s, alpha=alpha, batch_half=curve.batch_half, slots=slots)
        known.trial = Trial(self._config, now_s, alpha=alpha, batch_half=curve.batch_half, slots=slots)

    # ------------------------------------------------------------------ evidence

    def observe_outcome(self, known: Replica, outcome: Outcome) -> None:
        """A live request that has ended, for the error guards and the tests on the ramp."""
        self._observe_error(known, outcome.ok)
        now_s = self._fleet.now_s
        if known.canary is not None:
            known.canary.observe(candidate=True, outcome=outcome, now_s=now_s, log_speed=known.expected)
        if self._canaries and (known.connection.state is State.ACTIVE or self._all_are_new):
            log_speed = self._estimates.advantage(known)
            for canary in self._canaries:
                if canary is not known.canary:
                    canary.observe(candidate=False, outcome=outcome, now_s=now_s, log_speed=log_speed)

    def observe_pair(self, candidate: Replica, primary: Replica | None, pair: PairedSample) -> None:
        """A request and its copy, for the paired test."""
        if candidate.trial is not None:
            candidate.trial.observe(
                pair,
                self._fleet.now_s - max(pair.age_s, 0.0),
                primary_log_speed=self._estimates.advantage(primary),
                candidate_log_speed=candidate.expected,
            )

    def _observe_error(self, known: Replica, ok: bool) -> None:
        """CUSUM of errors against the other replicas' own rate (Page 1954): errors that all share never trip it."""
        if known.scored_s != self._fleet.now_s:  # rates change once a tick
            usual = max(
                _error_rate(self._fleet.all_rates, known.rates),
                _error_rate(self._fleet.all_recent, known.recent),
            )
            usual = min(max(2.0 * usual, 0.02), 0.8)
            raised = usual + 0.1
            known.scores = math.log(raised / usual), math.log((1.0 - raised) / (1.0 - usual))
            known.scored_s = self._fleet.now_s
        known.cusum = max(known.cusum + known.scores[ok], 0.0)

    # ------------------------------------------------------------------ judgements

    def judge(self) -> None:
        """Every connection, by its state."""
        now_s = self._fleet.now_s
        for known in list(self._fleet.replicas.values()):
            match known.connection.state:
                case State.SHADOWING:
                    self._judge_trial(known)
                case State.SHIFTING:
                    self._judge_step(known)
                case State.ACTIVE:
                    self._guard(known)
                case State.DRAINING:
                    waited_s = now_s - known.connection.since_s
                    if known.queue <= 0:
                        self.apply(known, Event.DRAINED, "empty")
                    elif waited_s > self._config.drain_s:
                        self.apply(known, Event.DRAINED, f"deadline: {known.queue:g} requests still open")
                case State.INACTIVE:
                    pass

    def _judge_trial(self, known: Replica) -> None:
        if known.trial is None:
            return
        ruling = known.trial.rule(
            self._fleet.now_s,
            candidate_memory_fraction=self._fleet.memory_fraction(known),
            primary_p99_rise=self._neighbours_rise(known),
        )
        known.ruling = ruling
        waited_s = self._fleet.now_s - known.connection.since_s
        no_pairs = not ruling.evidence.get("pairs", 0.0)
        if ruling.verdict is Verdict.CONTINUE and no_pairs and not self._fleet.copyable:
            if waited_s >= self._config.step_s:
                reason = "requests cannot be copied: goes on as a small live canary"
                self.apply(known, Event.TRIAL_INCONCLUSIVE, reason, ruling)
            return
        if ruling.verdict is Verdict.UNFAVOURABLE:
            known.note_speed(ruling)
        if waited_s < self._config.timeout_s and self._is_past(known, ruling):
            self._begin_trial(known)
            return
        if ruling.verdict in _TRIAL_EVENTS:
            self.apply(known, _TRIAL_EVENTS[ruling.verdict], ruling.reason, ruling)

    def _neighbours_rise(self, known: Replica) -> float:
        """By how much a trial has slowed the primaries beside it, at least; NaN where there are none.

        Against primaries on other nodes, because a burst slows all; two standard errors are taken off.
        """
        now, error = self._estimates.neighbours(known)
        if math.isnan(now) or math.isnan(known.neighbours_before):
            return math.nan
        return math.exp(max(known.neighbours_before - now - 2.0 * error, 0.0)) - 1.0

    def _is_past(self, known: Replica, ruling: Ruling) -> bool:
        """Whether to look afresh at a replica on a known machine: it was slow, or slow at first, while it was cold."""
        if ruling.evidence["errors_shadow_only"] > 0.0:
            return False
        if known.connection.proven:  # a short trial takes few pairs, all of them good
            undecided = ruling.verdict is Verdict.CONTINUE
            return ruling.merely_slow or (undecided and ruling.evidence["judged"] >= 2.0 * self._config.min_pairs)
        return ruling.merely_slow and self._fleet.lost_lately(known) is not None

    def _judge_step(self, known: Replica) -> None:
        """On the ramp: live requests decide by the unpaired test, mirrored pairs, where there are any, too."""
        if known.canary is None or known.trial is None:
            return
        now_s = self._fleet.now_s
        rulings = [
            known.canary.rule(now_s),
            known.trial.rule(now_s, candidate_memory_fraction=self._fleet.memory_fraction(known)),
        ]
        known.ruling = rulings[0]
        for ruling in rulings:
            if ruling.verdict is Verdict.UNFAVOURABLE:
                known.note_speed(ruling)
                if known.is_of_use and (self._urgency.why() or self._fleet.has_returned(known)):
                    self._begin_step(known)
                    break
                errors = ruling.evidence.get("errors_shadow_only", 0.0) + ruling.evidence.get("errors", 0.0)
                last_chance = known.connection.step == 0 or known.setbacks >= _MAX_SETBACKS or errors > 0
                event = Event.GUARD_TRIPPED if last_chance else Event.STEP_FAILED
                self.apply(known, event, ruling.reason, ruling)
                return
        waited_s = now_s - known.connection.since_s
        good = any(r.verdict is Verdict.FAVOURABLE for r in rulings) or self._seems_harmless(known, rulings[0])
        least_s = min(self._config.step_s, STEP_S) if self._urgency.why() else self._config.step_s
        if waited_s >= self._config.step_timeout_s or (waited_s >= least_s and good):
            share = known.connection.share(self._config.ramp)
            if share >= 1.0:
                self.apply(known, Event.RAMP_DONE, "last step of the ramp passed", rulings[0])
            else:
                self.apply(known, Event.STEP_PASSED, f"no harm at a share of {share:g}", rulings[0])

    def _seems_harmless(self, known: Replica, ruling: Ruling) -> bool:
        """Whether a step of the ramp may end before its proof: enough was seen, or there is no time to see more."""
        margin = math.log(self._config.margin)
        level = ruling.evidence.get("mean_log_ratio", math.nan)
        if self._urgency.why():  # its capacity says how slow it is, and keeps from it what it cannot do
            return ruling.evidence.get("errors_shadow_only", 0.0) == 0.0 and not level > -WORTH_LOG_SPEED
        if self._estimates.is_paced(known) and known.speed.weight >= self._config.warmup_pairs:
            return known.speed.recent >= -margin  # streams tell their pace long before they end
        return ruling.evidence.get("candidate_outcomes", 0.0) >= self._config.min_pairs and level <= margin

    def _guard(self, known: Replica) -> None:
        """An ACTIVE replica: errors that the others do not have drain it; long good service is a clean slate."""
        c = known.connection
        if c.rejections and self._fleet.now_s - c.since_s > self._config.backoff_max_s:
            known.connection = replace(c, rejections=0)
        if known.cusum < _CUSUM_LIMIT or known.rates.failed < 3.0:
            return
        replicas = self._fleet.replicas.values()
        others = sum(1 for r in replicas if r is not known and r.connection.state is State.ACTIVE)
        if (others / max(len(self._fleet.proven()), 1)) < self._fleet.config.balance.panic_fraction:
            return  # never drain below the panic threshold
        rate = known.rates.failed / max(known.rates.finished, 1e-9)
        self.apply(known, Event.GUARD_TRIPPED, f"{rate:.0%} of its requests fail, unlike the others'")


def _error_rate(together: Rates, own: Rates) -> float:
    """Fraction of failed requests on all but one replica, shrunk towards one in a hundred."""
    return (together.failed - own.failed + 0.1) / (together.finished - own.finished + 10.0)
