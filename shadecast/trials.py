"""How replicas on trial, on the ramp and in use are judged, and what follows for their connections.

The tests are in `gate`, the states in `connection`. Here the evidence is brought to the tests, and guards choose the
event.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

from shadecast.config import TrialConfig
from shadecast.connection import TRANSITIONS, Event, step
from shadecast.estimates import Estimates
from shadecast.fleet import Fleet
from shadecast.gate import NEWCOMER_LIMIT, Ruling, Trial, Verdict, memory_harm
from shadecast.replica import Replica
from shadecast.sequential import ErrorGuard
from shadecast.types import Outcome, PairedSample, State, Transition
from shadecast.urgency import STEP_S, Urgency

ACTIVE_LIMIT = 9.0
"""Score of the error guard at which a replica in use is drained; about one false alarm in e^9 requests."""
_STEP_OUTCOMES = 20
"""A step of the ramp ends early after so many requests."""
_STILL_ASKED_S = 3.0
"""So long after its last request a replica that drains is taken to be left by its sessions."""
_KNOWN_SPEED = 10.0
"""Recent observations from which on the ramp goes by a replica's speed."""
_FAILING_S = 600.0
"""So long a session, or a model, whose requests failed is taken to be their reason."""
_MOST_FAILING = 10_000
_TRIAL_EVENTS = {
    Verdict.FAVOURABLE: Event.TRIAL_PASSED,
    Verdict.UNFAVOURABLE: Event.TRIAL_FAILED,
    Verdict.INCONCLUSIVE: Event.TRIAL_INCONCLUSIVE,
}


class Trials:
    """Judges a fleet's connections; `transitions` are those of the tick under way."""

    def __init__(self, fleet: Fleet, estimates: Estimates, urgency: Urgency) -> None:
        self._fleet, self._estimates, self._urgency = fleet, estimates, urgency
        self._failing: dict[str, float] = {}
        """When requests of a session or model failed last, the oldest first."""
        self.transitions: list[Transition] = []

    @property
    def _config(self) -> TrialConfig:
        return self._fleet.config.trial

    def begin(self) -> None:
        """A tick begins: no transition yet."""
        self.transitions = []

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
        known.trial = known.ruling = None
        known.step_outcomes, known.quiet_s = 0, 0.0
        if known.connection.state is not State.SHIFTING:
            known.slow_since_s = None
        if event in (Event.ADMIT, Event.ADMIT_URGENT, Event.ADMIT_UNTRIED):
            known.errors = ErrorGuard()
            known.memory_before = self._fleet.memory_fraction(known)
        if known.connection.state is State.SHADOWING:
            curve = self._estimates.curve
            known.trial = Trial(
                self._config,
                self._fleet.now_s,
                errors=known.errors,
                batch_half=curve.batch_half,
                slots=curve.slots if curve.learned else math.inf,
            )

    # ------------------------------------------------------------------ evidence

    def observe_outcome(self, known: Replica, outcome: Outcome) -> None:
        """A live request that has ended."""
        known.step_outcomes += 1
        if outcome.ok or not self._is_the_senders(outcome.origin):
            known.errors.add(not outcome.ok, self._usual_errors(known))

    def _is_the_senders(self, origin: str) -> bool:
        """Whether requests of the same session or model have failed before: that may be their sender's doing.

        One that is bound to a replica fails there alone, and then on the next one to which it moves. A replica that is
        broken fails requests of many.
        """
        now_s = self._fleet.now_s
        if not origin:
            return False
        before_s = self._failing.pop(origin, -math.inf)
        self._failing[origin] = now_s
        for oldest, at_s in list(islice(self._failing.items(), 2)):  # more than come in
            if len(self._failing) > _MOST_FAILING or now_s - at_s > _FAILING_S:
                del self._failing[oldest]
        return now_s - before_s <= _FAILING_S

    def observe_pair(self, candidate: Replica, pair: PairedSample) -> None:
        """A request and its copy."""
        if candidate.trial is not None:
            began_s = self._fleet.now_s - max(pair.age_s, 0.0)
            candidate.trial.observe(pair, began_s, usual_errors=self._usual_errors(candidate))

    def _usual_errors(self, known: Replica) -> float:
        """The greatest error rate that is taken for usual, by the other replicas' own."""
        if known.usual_s != self._fleet.now_s:  # rates change once a tick
            known.usual_errors, known.usual_s = self._fleet.usual_errors(known), self._fleet.now_s
        return known.usual_errors

    # ------------------------------------------------------------------ judgements

    def judge(self, elapsed_s: float) -> None:
        """Every connection, by its state, `elapsed_s` after the last time."""
        now_s, quiet_s = self._fleet.now_s, elapsed_s * self._fleet.silence
        for known in list(self._fleet.replicas.values()):
            known.quiet_s += quiet_s
            match known.connection.state:
                case State.SHADOWING:
                    self._judge_trial(known)
                case State.SHIFTING:
                    self._judge_step(known)
                case State.ACTIVE:
                    self._guard(known)
                case State.DRAINING:
                    waited_s = now_s - known.connection.since_s
                    if known.queue <= 0 and not self._is_still_asked(known):
                        self.apply(known, Event.DRAINED, "empty")
                    elif waited_s > self._config.drain_s:
                        self.apply(known, Event.DRAINED, f"deadline: {known.queue:g} requests still open")
                case State.INACTIVE:
                    pass

    def _is_still_asked(self, known: Replica) -> bool:
        """Whether sessions that have not left yet still ask one that is well, but is to be kept out of traffic.

        One that a guard drains is not well: its sessions leave at once.
        """
        return self._fleet.is_held(known) and self._fleet.now_s - known.asked_s < _STILL_ASKED_S

    def _judge_trial(self, known: Replica) -> None:
        if known.trial is None:
            return
        memory_now = self._memory_now(known)
        ruling = known.trial.rule(
            self._fleet.now_s, memory_before=known.memory_before, memory_now=memory_now, quiet_s=known.quiet_s
        )
        known.ruling = ruling
        waited_s = self._fleet.now_s - known.connection.since_s - known.quiet_s
        if ruling.verdict is Verdict.CONTINUE and not known.trial.pairs and not self._fleet.copyable:
            if waited_s >= self._config.step_s:
                reason = "requests cannot be copied: goes on as a small live canary"
                self.apply(known, Event.TRIAL_INCONCLUSIVE, reason, ruling)
            return
        if ruling.verdict in _TRIAL_EVENTS:
            self.apply(known, _TRIAL_EVENTS[ruling.verdict], ruling.reason, ruling)

    def _memory_now(self, known: Replica) -> float:
        """Of its node; the first that is known is what it was before."""
        now = self._fleet.memory_fraction(known)
        if math.isnan(known.memory_before):
            known.memory_before = now
        return now

    def _judge_step(self, known: Replica) -> None:
        """On the ramp guards alone judge; a step ends soon, but not while anything speaks against the replica."""
        urgent = self._urgency.why()
        harm = self._harm(known, urgent=bool(urgent))
        if harm:
            self.apply(known, Event.GUARD_TRIPPED, harm)
            return
        waited_s = self._fleet.now_s - known.connection.since_s - known.quiet_s
        long_enough = waited_s >= self._config.step_s or (
            waited_s >= STEP_S and (bool(urgent) or known.step_outcomes >= _STEP_OUTCOMES)
        )
        suspected = known.errors.score > 0.0 or known.slow_since_s is not None
        suspected = suspected or known.kv_told > self._config.memory_limit  # more requests would wait for memory
        unsuspected = not suspected or waited_s >= self._config.step_timeout_s
        if not long_enough or not unsuspected:
            return
        share = known.connection.share(self._config.ramp)
        if share >= 1.0:
            self.apply(known, Event.RAMP_DONE, "last step of the ramp passed")
        else:
            self.apply(known, Event.STEP_PASSED, f"no harm at a share of {share:g}")

    def _harm(self, known: Replica, *, urgent: bool) -> str:
        """What takes a replica off the ramp, in words."""
        if known.errors.score >= NEWCOMER_LIMIT:
            return known.errors.excess()
        memory = memory_harm(known.memory_before, self._memory_now(known), self._config.memory_limit)
        if memory:
            return memory
        slower = math.exp(-self._estimates.advantage(known))
        if urgent or slower <= self._config.margin:
            known.slow_since_s = None
        elif known.slow_since_s is None:
            known.slow_since_s = self._fleet.now_s if known.speed.weight >= _KNOWN_SPEED else None
        elif self._fleet.now_s - known.slow_since_s >= self._config.step_s:  # a moment is for its capacity to answer
            return f"it has been {slower:.1f} times slower than the others for {self._config.step_s:g} s"
        return ""

    def _guard(self, known: Replica) -> None:
        """An ACTIVE replica: errors that the others do not have drain it; long good service is a clean slate."""
        c = known.connection
        if c.rejections and self._fleet.now_s - c.since_s > self._config.backoff_max_s:
            known.connection = replace(c, rejections=0)
        if known.errors.score < ACTIVE_LIMIT:
            return
        replicas = self._fleet.replicas.values()
        others = sum(1 for r in replicas if r is not known and r.connection.state is State.ACTIVE)
        if (others / max(len(self._fleet.proven()), 1)) < self._fleet.config.balance.panic_fraction:
            return  # never drain below the panic threshold
        self.apply(known, Event.GUARD_TRIPPED, known.errors.excess())
