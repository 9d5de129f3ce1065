"""The life of a call, over all phases and events and over random histories.

Invariants, checked after every event of every history:

1. An event that the table does not list raises `TransitionError` and changes nothing.
2. A call is counted on the replica that it was last chosen for while it is CHOSEN, SENT, ACCEPTED or MOVED, and nowhere
   else: in flight = on the way + running.
3. WAITING calls are counted as waiting, all that are not over as open.
4. Totals never fall: what was accepted has ended, has moved or was dropped, or is still there.
5. Each accepted call is recorded at most once, and exactly once if it ended.
6. Once all calls are over, every count is zero.
"""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shadecast.calls import TRANSITIONS, Call, Calls, Do, Event, Phase
from shadecast.errors import TransitionError

PRODUCT = [(phase, event) for phase in Phase for event in Event]
FINAL = {Phase.ENDED, Phase.DROPPED}
ON_A_REPLICA = {Phase.CHOSEN, Phase.SENT, Phase.ACCEPTED, Phase.MOVED}
PATHS = {
    Phase.WAITING: (),
    Phase.CHOSEN: (Event.CHOOSE,),
    Phase.SENT: (Event.CHOOSE, Event.SEND),
    Phase.ACCEPTED: (Event.CHOOSE, Event.SEND, Event.ACCEPT),
    Phase.PRODUCED: (Event.CHOOSE, Event.SEND, Event.ACCEPT, Event.PRODUCE),
    Phase.MOVED: (Event.CHOOSE, Event.SEND, Event.ACCEPT, Event.MOVE),
    Phase.ENDED: (Event.CHOOSE, Event.SEND, Event.ACCEPT, Event.END),
    Phase.DROPPED: (Event.DROP,),
}


def call_in(phase, replica_id="a", now_s=1.0):
    """A book with one call that has come as far."""
    calls, call = Calls(), Call()
    calls.open(call, now_s)
    for event in PATHS[phase]:
        calls.handle(call, event, now_s, replica_id=replica_id)
    assert call.phase is phase
    return calls, call


def counts(calls):
    return calls.waiting, calls.in_flight("a"), calls.on_the_way("a"), calls.open_calls, calls.totals("a")


@pytest.mark.parametrize(("phase", "event"), PRODUCT, ids=[f"{p}-{e}" for p, e in PRODUCT])
def test_every_event_in_every_phase_does_what_the_table_says_or_raises_and_changes_nothing(phase, event):
    calls, call = call_in(phase)
    before = counts(calls), dict(vars(call))
    if (phase, event) not in TRANSITIONS:
        with pytest.raises(TransitionError, match=f"{event} is not allowed in phase {phase}"):
            calls.handle(call, event, 2.0, replica_id="b")
        assert (counts(calls), dict(vars(call))) == before
    else:
        after, follows = TRANSITIONS[phase, event]
        assert calls.handle(call, event, 2.0, replica_id="a") == follows
        assert call.phase is after
        on_a_replica = [p in ON_A_REPLICA for p in (phase, after)]
        assert (Do.COUNT in follows) == (on_a_replica[0] != on_a_replica[1]), "told if the number has changed"
        assert calls.in_flight("a") == on_a_replica[1]
        assert (Do.CLOSE in follows) == (after in FINAL)


def test_the_message_of_a_refused_event_names_what_is_allowed():
    calls, call = call_in(Phase.CHOSEN)
    with pytest.raises(TransitionError, match="allowed: pass, send, drop"):
        calls.handle(call, Event.END, 2.0)


def test_every_phase_is_reached_and_leads_to_an_end():
    def reachable(start):
        seen, frontier = {start}, [start]
        while frontier:
            here = frontier.pop()
            for (phase, _), (after, _) in TRANSITIONS.items():
                if phase is here and after not in seen:
                    seen.add(after)
                    frontier.append(after)
        return seen

    assert reachable(Phase.WAITING) == set(Phase)
    for phase in Phase:
        assert reachable(phase) & FINAL
    assert not any(phase in FINAL for phase, _ in TRANSITIONS)


def test_only_a_call_that_a_replica_has_accepted_is_recorded_and_only_as_it_ends():
    recorded = {(phase, event) for (phase, event), (_, follows) in TRANSITIONS.items() if Do.RECORD in follows}
    assert recorded == {(Phase.ACCEPTED, Event.END), (Phase.PRODUCED, Event.END)}


def test_a_call_can_always_be_given_up():
    for phase in set(Phase) - FINAL:
        after, _ = TRANSITIONS[phase, Event.DROP]
        assert after is Phase.DROPPED


def test_a_duration_is_from_acceptance_to_the_end_and_of_a_stream_to_its_last_item():
    calls, call = call_in(Phase.ACCEPTED, now_s=10.0)
    calls.handle(call, Event.END, 12.5, ok=False)
    assert (call.duration_s, call.ok) == (2.5, False)
    calls, stream = call_in(Phase.PRODUCED, now_s=10.0)
    calls.handle(stream, Event.END, 99.0)
    assert stream.duration_s == 0.0, "however late its reader is"


def test_a_call_that_was_retried_or_moved_says_how_long_it_has_taken_at_least():
    for phase, event in ((Phase.SENT, Event.RETRY), (Phase.ACCEPTED, Event.MOVE)):
        calls, call = call_in(phase, now_s=10.0)
        assert Do.EVIDENCE in calls.handle(call, event, 13.0)
        assert call.duration_s == 3.0


def test_a_call_that_has_come_back_is_counted_where_it_goes_next():
    calls, call = call_in(Phase.SENT)
    calls.handle(call, Event.REJECT, 2.0)
    assert (calls.waiting, calls.in_flight("a")) == (1, 0)
    assert call.replica_id == "a", "where it was: not to be tried again at once"
    calls.handle(call, Event.CHOOSE, 3.0, replica_id="b")
    assert (calls.waiting, calls.in_flight("a"), calls.in_flight("b"), call.since_s) == (0, 0, 1, 3.0)


def test_a_choice_finds_the_routers_own_calls_on_the_replica_and_acceptance_what_the_replica_says():
    calls, _ = call_in(Phase.ACCEPTED)
    second = Call()
    calls.handle(second, Event.CHOOSE, 2.0, replica_id="a")
    assert second.others == 1
    calls.handle(second, Event.SEND, 2.0)
    calls.handle(second, Event.ACCEPT, 2.1, others=7.0)
    assert second.others == 7.0


def test_the_oldest_unfinished_calls_come_first_and_no_more_than_asked_for():
    calls = Calls()
    made = []
    for now_s, events in ((3.0, 3), (1.0, 1), (2.0, 3), (4.0, 2)):
        call = Call()
        for event in (Event.CHOOSE, Event.SEND, Event.ACCEPT)[:events]:
            calls.handle(call, event, now_s, replica_id="a")
        made.append(call)
    assert [call.since_s for call in calls.unfinished("a", 16)] == [1.0, 2.0, 3.0, 4.0]
    assert [call.since_s for call in calls.unfinished("a", 2)] == [1.0, 2.0]
    assert calls.unfinished("nowhere", 16) == []
    assert set(calls.unaccepted()) == {made[1], made[3]}


def test_a_moved_call_keeps_its_place_but_is_not_moved_again():
    calls, call = call_in(Phase.MOVED)
    assert list(calls.running("a")) == []
    assert list(calls.all_running()) == [call]
    assert calls.in_flight("a") == 1


def test_replicas_that_are_gone_are_forgotten_once_no_call_is_left_there():
    calls, call = call_in(Phase.ACCEPTED)
    assert not calls.forget("a")
    assert calls.in_flight("a") == 1
    calls.handle(call, Event.END, 2.0)
    assert calls.totals("a") == (1, 1, 0)
    assert calls.forget("a")
    assert calls.totals("a") == (0, 0, 0)
    assert calls.forget("a")


@pytest.mark.parametrize(("phase", "event"), TRANSITIONS, ids=[f"{p}-{e}" for p, e in TRANSITIONS])
def test_a_replica_whose_counts_change_is_noted(phase, event):
    calls, call = call_in(phase)
    calls.changed.clear()
    before = counts(calls)[1:3] + counts(calls)[4:]
    calls.handle(call, event, 2.0, replica_id="a")
    assert calls.changed == {"a"} or counts(calls)[1:3] + counts(calls)[4:] == before


def test_a_call_costs_a_few_microseconds():
    """`python -m bench.micro` has the number; here only that nothing grows with the calls that are there."""

    def seconds(others):
        calls = Calls()
        for _ in range(others):
            call = Call()
            for event in (Event.CHOOSE, Event.SEND, Event.ACCEPT):
                calls.handle(call, event, 1.0, replica_id="a")
        best = math.inf
        for _ in range(5):
            started_s = time.perf_counter()
            for _ in range(500):
                call = Call()
                for event in (Event.CHOOSE, Event.SEND, Event.ACCEPT, Event.END):
                    calls.handle(call, event, 1.0, replica_id="a")
            best = min(best, time.perf_counter() - started_s)
        return best

    assert seconds(20_000) < 5.0 * seconds(1)


class History(RuleBasedStateMachine):
    """Calls in any order of events, against a plain list of where each one should be."""

    calls_made = Bundle("calls")

    def __init__(self):
        super().__init__()
        self.book = Calls()
        self.now_s = 0.0
        self.live: dict[Call, Phase] = {}
        self.recorded: Counter[Call] = Counter()
        self.accepted: set[Call] = set()
        self.ended: set[Call] = set()

    @rule(target=calls_made, waits=st.booleans())
    def ask(self, waits):
        call = Call()
        if waits:
            self.book.open(call, self.now_s)
            self.live[call] = Phase.WAITING
        else:
            self._tell(call, Event.CHOOSE, "a")
        return call

    @rule(call=calls_made, event=st.sampled_from(Event), replica=st.sampled_from("abc"), ok=st.booleans())
    def tell(self, call, event, replica, ok):
        self._tell(call, event, replica, ok)

    @rule(call=consumes(calls_made), way=st.sampled_from([Event.END, Event.DROP, Event.MOVE]))
    def go_on(self, call, way):
        """Often enough, calls come to their end."""
        for event in (Event.CHOOSE, Event.SEND, Event.ACCEPT, way, Event.DROP):
            self._tell(call, event, "b")

    @rule(seconds=st.floats(0.0, 5.0))
    def wait(self, seconds):
        self.now_s += seconds

    def _tell(self, call, event, replica, ok=True):
        before = self.live.get(call, call.phase)
        if (before, event) not in TRANSITIONS:
            with pytest.raises(TransitionError):
                self.book.handle(call, event, self.now_s, replica_id=replica)
            assert call.phase is before
            return
        after, _ = TRANSITIONS[before, event]
        was = call.replica_id
        follows = self.book.handle(call, event, self.now_s, replica_id=replica, others=1.0, ok=ok)
        assert call.replica_id == (replica if event is Event.CHOOSE else was)
        self.recorded[call] += Do.RECORD in follows
        if after is Phase.ACCEPTED:
            self.accepted.add(call)
        if after is Phase.ENDED:
            self.ended.add(call)
        if after in FINAL:
            self.live.pop(call, None)
        else:
            self.live[call] = after

    @invariant()
    def counts_are_what_the_calls_say(self):
        phases = Counter((phase, call.replica_id) for call, phase in self.live.items())
        for name in "abc":
            on_the_way = phases[Phase.CHOSEN, name] + phases[Phase.SENT, name]
            running = phases[Phase.ACCEPTED, name] + phases[Phase.MOVED, name]
            assert self.book.on_the_way(name) == on_the_way
            assert self.book.in_flight(name) == on_the_way + running == self.book.all_in_flight().get(name, 0)
            assert len(self.book.unfinished(name, 10_000)) == on_the_way + running
        assert self.book.waiting == sum(count for (phase, _), count in phases.items() if phase is Phase.WAITING)
        assert self.book.open_calls == len(self.live)
        assert all(call.age_s(self.now_s) >= 0.0 for call in self.live)

    @invariant()
    def each_accepted_call_is_recorded_once_as_it_ends(self):
        assert {call for call, times in self.recorded.items() if times} == self.ended
        assert all(times <= 1 for times in self.recorded.values())
        started, finished, _ = (sum(each) for each in zip(*(self.book.totals(n) for n in "abc"), strict=True))
        assert (started, finished) == (len(self.accepted), len(self.ended))

    def teardown(self):
        for call in list(self.live):
            self._tell(call, Event.DROP, "a")
        self.counts_are_what_the_calls_say()
        assert (self.book.open_calls, self.book.all_in_flight(), self.book.waiting) == (0, {}, 0)


History.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistory = History.TestCase
