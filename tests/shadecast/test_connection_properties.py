"""The state machine of a connection, over all states and events and over random histories.

Invariants, checked after every event of every history:

1. The share is in [0, 1]; it is 0 unless SHIFTING or ACTIVE, 1 when ACTIVE.
2. An event that the table does not list raises `TransitionError` and changes nothing.
3. LOST leads to INACTIVE from every state, and clears what was held against the replica.
4. A step changes the share by at most one step of the ramp.
5. After n rejections in a row the next trial is allowed no earlier than backoff_s(n) after the last of them.
6. Between two admissions after a rejection lies at least the back-off, whatever happens in between: no flapping.
7. From every reachable connection a finite path leads to ACTIVE: nothing starves.
8. `since_s` is the time of the last event; who and where never change.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shadecast.config import TrialConfig
from shadecast.connection import TRANSITIONS, Connection, Event, backoff_s, step
from shadecast.errors import TransitionError
from shadecast.types import State

CONFIG = TrialConfig()
PRODUCT = [(state, event) for state in State for event in Event]
CONNECTIONS = st.builds(
    Connection,
    st.just("replica"),
    st.just("node"),
    st.sampled_from(State),
    st.floats(0, 1e6),
    st.integers(0, len(CONFIG.ramp) - 1),
    st.integers(0, 40),
    st.floats(0, 1e6),
    st.booleans(),
)


@pytest.mark.parametrize(("state", "event"), PRODUCT, ids=[f"{s.value}-{e.value}" for s, e in PRODUCT])
@given(connection=CONNECTIONS, now_s=st.floats(0, 1e6))
@settings(max_examples=8, deadline=None)
def test_every_event_in_every_state_does_what_the_table_says_or_raises_and_changes_nothing(
    state, event, connection, now_s
):
    connection = replace(connection, state=state)
    before = replace(connection)
    if (state, event) not in TRANSITIONS:
        with pytest.raises(TransitionError, match=f"{event.value} is not allowed in state {state.value}"):
            step(connection, event, now_s, CONFIG)
    else:
        after = step(connection, event, now_s, CONFIG)
        assert after.state is TRANSITIONS[state, event]
        assert (after.replica_id, after.node_id, after.since_s) == ("replica", "node", now_s)
        assert 0.0 <= after.share(CONFIG.ramp) <= 1.0
    assert connection == before


def test_the_message_of_a_refused_event_names_what_is_allowed():
    with pytest.raises(TransitionError, match="allowed are drained, lost"):
        step(Connection("r", "n", State.DRAINING), Event.ADMIT, 0.0, CONFIG)


def test_lost_leads_to_inactive_from_every_state():
    assert all(TRANSITIONS[state, Event.LOST] is State.INACTIVE for state in State)


def test_live_traffic_before_a_trial_comes_only_by_the_two_admissions_without_one():
    untried = {(s, e) for (s, e), after in TRANSITIONS.items() if s is State.INACTIVE and after is not State.SHADOWING}
    assert untried == {
        (State.INACTIVE, Event.ADMIT_URGENT),
        (State.INACTIVE, Event.ADMIT_UNTRIED),
        (State.INACTIVE, Event.LOST),
    }


def test_every_state_is_reached_and_none_is_a_dead_end():
    def reachable(start: State) -> set[State]:
        seen, frontier = {start}, [start]
        while frontier:
            here = frontier.pop()
            for (state, _), after in TRANSITIONS.items():
                if state is here and after not in seen:
                    seen.add(after)
                    frontier.append(after)
        return seen

    for state in State:
        assert reachable(state) == set(State)


@given(CONNECTIONS, st.floats(0, 1e6))
@settings(deadline=None)
def test_an_urgent_newcomer_begins_at_the_urgent_share(connection, now_s):
    after = step(replace(connection, state=State.INACTIVE), Event.ADMIT_URGENT, now_s, CONFIG)
    assert after.share(CONFIG.ramp) >= CONFIG.urgent_share


@given(st.integers(-3, 10_000))
def test_the_back_off_doubles_and_is_bounded(rejections):
    pause_s = backoff_s(rejections, CONFIG)
    assert 0.0 <= pause_s <= CONFIG.backoff_max_s
    assert backoff_s(rejections + 1, CONFIG) >= pause_s
    if rejections <= 0:
        assert pause_s == 0.0
    elif pause_s < CONFIG.backoff_max_s:
        assert pause_s == CONFIG.backoff_s * 2.0 ** (rejections - 1)


_TO_ACTIVE = {
    State.INACTIVE: Event.ADMIT,
    State.SHADOWING: Event.TRIAL_PASSED,
    State.DRAINING: Event.DRAINED,
}


def _path_to_active(connection: Connection, now_s: float) -> Connection:
    """Go on as a well replica would: trial passed, each step passed, once the back-off is over."""
    for _ in range(10 + len(CONFIG.ramp)):
        if connection.state is State.ACTIVE:
            return connection
        if connection.state is State.SHIFTING:
            last = connection.share(CONFIG.ramp) >= 1.0
            event = Event.RAMP_DONE if last else Event.STEP_PASSED
        else:
            event = _TO_ACTIVE[connection.state]
        now_s = max(now_s, connection.not_before_s)
        connection = step(connection, event, now_s, CONFIG)
    return connection


class History(RuleBasedStateMachine):
    """Random events in random order; ADMIT as its guard allows it: not before the back-off is over."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.connection = Connection("replica", "node", since_s=self.now_s)
        self.previous = self.connection
        self.rejected_s: float | None = None
        self.in_a_row = 0
        self.last_event: Event | None = None

    def _step(self, event: Event) -> None:
        self.previous, self.last_event = self.connection, event
        self.connection = step(self.connection, event, self.now_s, CONFIG)
        if event in (Event.TRIAL_FAILED, Event.GUARD_TRIPPED):
            self.rejected_s, self.in_a_row = self.now_s, self.in_a_row + 1
        elif event in (Event.LOST, Event.ADMIT_UNTRIED):
            self.rejected_s, self.in_a_row = None, 0

    @rule(dt=st.floats(0.0, 700.0))
    def wait(self, dt):
        self.now_s += dt

    @rule(event=st.sampled_from([e for e in Event if e not in (Event.ADMIT, Event.ADMIT_URGENT)]))
    def happen(self, event):
        if (self.connection.state, event) in TRANSITIONS:
            self._step(event)
        else:
            before = self.connection
            with pytest.raises(TransitionError):
                step(self.connection, event, self.now_s, CONFIG)
            assert self.connection is before

    @precondition(lambda self: self.connection.state is State.INACTIVE)
    @rule()
    def admit_as_soon_as_allowed(self):
        if self.now_s < self.connection.not_before_s:
            return
        if self.rejected_s is not None:
            assert self.now_s - self.rejected_s >= backoff_s(self.in_a_row, CONFIG) * (1 - 1e-12)
        self._step(Event.ADMIT)

    @invariant()
    def share_fits_the_state(self):
        share = self.connection.share(CONFIG.ramp)
        match self.connection.state:
            case State.ACTIVE:
                assert share == 1.0
            case State.SHIFTING:
                assert share in CONFIG.ramp
            case State.INACTIVE | State.SHADOWING | State.DRAINING:
                assert share == 0.0

    @invariant()
    def shares_move_one_step_at_a_time(self):
        both = (self.previous.state, self.connection.state)
        if both == (State.SHIFTING, State.SHIFTING):
            assert abs(self.connection.step - self.previous.step) <= 1

    @invariant()
    def rejections_are_counted_and_waited_for(self):
        assert self.connection.rejections == self.in_a_row
        if self.rejected_s is not None:
            assert self.connection.not_before_s == self.rejected_s + backoff_s(self.in_a_row, CONFIG)

    @invariant()
    def a_lost_replica_starts_afresh(self):
        if self.last_event is Event.LOST:
            c = self.connection
            assert (c.state, c.rejections, c.not_before_s, c.proven) == (State.INACTIVE, 0, 0.0, False)

    @invariant()
    def a_finite_path_leads_to_active(self):
        assert _path_to_active(self.connection, self.now_s).state is State.ACTIVE

    @invariant()
    def only_the_event_sets_the_time(self):
        assert self.connection.since_s <= self.now_s


History.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistory = History.TestCase
