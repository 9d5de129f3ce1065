"""The state machine of a connection: one literal table, and a step that carries out what the table says.

Guards, elsewhere, choose the event; the table alone says where it leads. An event that the table does not
list for the state raises `TransitionError` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from shadecast.config import TrialConfig
from shadecast.errors import TransitionError
from shadecast.types import State


class Event(StrEnum):
    """What may happen to a connection."""

    ADMIT = "admit"
    """Healthy, forecast fit, budget free: a trial may begin."""
    ADMIT_URGENT = "admit_urgent"
    """The active set is about to be overloaded, or the machine is known: live traffic under guards, without a trial."""
    ADMIT_UNTRIED = "admit_untried"
    """Nothing better is alive (first start, panic), or known to be good and needed: full traffic without a trial."""
    TRIAL_PASSED = "trial_passed"
    TRIAL_INCONCLUSIVE = "trial_inconclusive"
    """Out of pairs or time without a sign of harm: goes on as the smallest live step."""
    TRIAL_FAILED = "trial_failed"
    STEP_PASSED = "step_passed"
    RAMP_DONE = "ramp_done"
    GUARD_TRIPPED = "guard_tripped"
    """Errors, slowness or a resource limit seen on live traffic."""
    DRAIN = "drain"
    """An operator, or a node about to go."""
    DRAINED = "drained"
    """Empty, or past the deadline."""
    LOST = "lost"
    """The replica is gone, or nobody has heard of it for too long."""


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.INACTIVE, Event.ADMIT): State.SHADOWING,
    (State.INACTIVE, Event.ADMIT_URGENT): State.SHIFTING,
    (State.INACTIVE, Event.ADMIT_UNTRIED): State.ACTIVE,
    (State.INACTIVE, Event.LOST): State.INACTIVE,
    (State.SHADOWING, Event.TRIAL_PASSED): State.SHIFTING,
    (State.SHADOWING, Event.TRIAL_INCONCLUSIVE): State.SHIFTING,
    (State.SHADOWING, Event.TRIAL_FAILED): State.INACTIVE,
    (State.SHADOWING, Event.ADMIT_URGENT): State.SHIFTING,
    (State.SHADOWING, Event.ADMIT_UNTRIED): State.ACTIVE,
    (State.SHADOWING, Event.DRAIN): State.INACTIVE,
    (State.SHADOWING, Event.LOST): State.INACTIVE,
    (State.SHIFTING, Event.STEP_PASSED): State.SHIFTING,
    (State.SHIFTING, Event.RAMP_DONE): State.ACTIVE,
    (State.SHIFTING, Event.GUARD_TRIPPED): State.INACTIVE,
    (State.SHIFTING, Event.ADMIT_UNTRIED): State.ACTIVE,
    (State.SHIFTING, Event.DRAIN): State.DRAINING,
    (State.SHIFTING, Event.LOST): State.INACTIVE,
    (State.ACTIVE, Event.GUARD_TRIPPED): State.DRAINING,
    (State.ACTIVE, Event.DRAIN): State.DRAINING,
    (State.ACTIVE, Event.LOST): State.INACTIVE,
    (State.DRAINING, Event.DRAINED): State.INACTIVE,
    (State.DRAINING, Event.LOST): State.INACTIVE,
}


@dataclass(frozen=True, slots=True)
class Connection:
    """One replica as the routers may use it."""

    replica_id: str
    node_id: str
    state: State = State.INACTIVE
    since_s: float = 0.0
    """When the present state was entered; on a step of the ramp, when the step was."""
    step: int = 0
    """Index into the ramp while SHIFTING."""
    rejections: int = 0
    """Failed trials and tripped guards in a row."""
    not_before_s: float = 0.0
    """No trial begins earlier: the back-off."""
    proven: bool = False
    """Has been ACTIVE."""

    def share(self, ramp: tuple[float, ...]) -> float:
        """Fraction of picks, in [0, 1], for which the replica is eligible."""
        match self.state:
            case State.ACTIVE:
                return 1.0
            case State.SHIFTING:
                return ramp[min(self.step, len(ramp) - 1)]
            case State.INACTIVE | State.SHADOWING | State.DRAINING:
                return 0.0
            case _:
                assert_never(self.state)


def backoff_s(rejections: int, config: TrialConfig) -> float:
    """Pause before the next trial: doubles with each rejection in a row, up to the configured longest."""
    if rejections <= 0:
        return 0.0
    return min(config.backoff_s * 2.0 ** min(rejections - 1, 30), config.backoff_max_s)


def step(connection: Connection, event: Event, now_s: float, config: TrialConfig) -> Connection:
    """The connection after `event` at `now_s`. Raises TransitionError if the table does not list the event."""
    before = connection.state
    after = TRANSITIONS.get((before, event))
    if after is None:
        raise TransitionError(
            f"connection {connection.replica_id}: event {event.value} is not allowed in state {before.value}; "
            f"allowed are {', '.join(e.value for s, e in TRANSITIONS if s is before)}"
        )
    changed = replace(connection, state=after, since_s=now_s)
    match event:
        case Event.ADMIT | Event.DRAIN | Event.DRAINED:
            return changed
        case Event.ADMIT_UNTRIED:
            return replace(changed, proven=True, rejections=0, step=0)
        case (
            Event.RAMP_DONE
        ):  # rejections stay until it has served well for long: else it would flap at the first pause
            return replace(changed, proven=True, step=0)
        case Event.ADMIT_URGENT:
            urgent = next((i for i, share in enumerate(config.ramp) if share >= config.urgent_share), 0)
            return replace(changed, step=urgent)
        case Event.TRIAL_PASSED | Event.TRIAL_INCONCLUSIVE:
            return replace(changed, step=0)
        case Event.STEP_PASSED:
            return replace(changed, step=min(connection.step + 1, len(config.ramp) - 1))
        case Event.TRIAL_FAILED | Event.GUARD_TRIPPED:
            rejections = connection.rejections + 1
            return replace(changed, rejections=rejections, not_before_s=now_s + backoff_s(rejections, config), step=0)
        case Event.LOST:
            return replace(changed, rejections=0, not_before_s=0.0, proven=False, step=0)
        case _:
            assert_never(event)
