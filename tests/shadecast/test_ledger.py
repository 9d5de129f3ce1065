"""The book of calls, the ledger that reports it, the inbox that reads the reports: whatever gets lost, each call once.

Invariants, whatever reports and answers are lost, late, repeated or out of order, as long as the same inbox lives:

1. The increments that it hands out add up to the calls that really started, finished and failed since the first report
   that it took (the router's very first report counts from the start).
2. Each outcome is handed out once at most, and once it is sure that all reports are taken, exactly once.
3. What it believes to be in flight is so.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shadecast.calls import Call, Calls, Do, Event, Phase
from shadecast.errors import TransitionError
from shadecast.histogram import BOUNDS_S, Durations, Histogram
from shadecast.inbox import Inbox
from shadecast.ledger import Ledger
from shadecast.types import PairedSample

ALIVE = [("r0", "n", 8), ("r1", "n", 8)]
PAIR = PairedSample("r1", "r0", 1.0, 2.0, 0.0, 0.0)


class Router:
    """A router's book and ledger, and its replicas."""

    def __init__(self, name="router", alive=("r0", "r1")):
        self.book = Calls()
        self.ledger = Ledger(name, "app/d", self.book)
        self.alive = list(alive)
        self.now_s = 0.0

    def tell(self, call, event, **facts):
        for do in self.book.handle(call, event, self.now_s, **facts):
            if do is Do.RECORD:
                self.ledger.record(call)
            elif do is Do.EVIDENCE:
                self.ledger.evidence(call)

    def start(self, replica_id="r0", others=0.0, now_s=None):
        """A call that a replica has accepted."""
        self.now_s = self.now_s if now_s is None else now_s
        call = Call()
        self.book.open(call, self.now_s)
        self.tell(call, Event.CHOOSE, replica_id=replica_id)
        self.tell(call, Event.SEND)
        self.tell(call, Event.ACCEPT, others=others)
        return call

    def end(self, call, now_s=None, *, ok=True):
        self.now_s = self.now_s if now_s is None else now_s
        self.tell(call, Event.END, ok=ok)

    def report(self, now_s=None):
        """Plain values, as they travel."""
        self.now_s = self.now_s if now_s is None else now_s
        made = self.ledger.report(self.now_s, [(replica_id, f"node of {replica_id}", 8) for replica_id in self.alive])
        return json.loads(json.dumps(made))

    def exchange(self, inbox, now_s=None, *, heard=True):
        """A report that the inbox takes, and its answer, which the router has `heard` or not."""
        read, acknowledged = inbox.take(self.report(now_s), self.now_s)
        if heard:
            self.ledger.acknowledged(acknowledged)
        return read


def counts(read, replica_id="r0"):
    """(started, finished, failed, in flight) that a report tells of a replica; None if it does not list it."""
    for view in read.replicas:
        if view.replica_id == replica_id:
            return view.started, view.finished, view.failed, view.in_flight
    return None


def durations(read, replica_id="r0"):
    return [outcome.duration_s for view in read.replicas if view.replica_id == replica_id for outcome in view.outcomes]


# ------------------------------------------------------------------ durations


def per_bucket(times):
    """{upper bound: how many} of those that have any."""
    bounds = [*BOUNDS_S, math.inf]
    return {bounds[i]: count for i, count in enumerate(times.counts) if count}


def test_durations_are_counted_by_buckets_whose_bounds_belong_to_them():
    histogram = Histogram()
    for duration_s in (0.0, 0.001, 0.0011, 0.1, 0.100001, 200.0, 200.1, 1e9, math.inf):
        histogram.add(duration_s)
    assert per_bucket(histogram.durations()) == {0.001: 2, 0.002: 1, 0.1: 1, 0.2: 1, 200.0: 1, math.inf: 3}
    counted = histogram.durations()
    histogram.add(math.nan)
    histogram.add(-0.1)
    assert histogram.durations() == counted
    assert sorted(set(BOUNDS_S)) == list(BOUNDS_S)
    for bound in (0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0):
        assert bound in BOUNDS_S, "objectives lie on bounds"


@pytest.mark.parametrize("heard", [True, False])
def test_each_request_that_went_well_is_in_one_bucket_once_whatever_gets_lost(heard):
    router, inbox = Router(), Inbox()
    ended = [0.0004, 0.03, 0.03, 0.7]
    router.exchange(inbox)
    seen = Durations()
    for duration_s in ended:
        call = router.start()
        router.end(call, router.now_s + duration_s)
        failed = router.start()
        router.end(failed, router.now_s + 0.3, ok=False)
        router.report()  # lost
        seen = seen.plus(router.exchange(inbox, heard=heard).durations)
    assert per_bucket(seen) == {0.001: 1, 0.05: 2, 1.0: 1}
    assert seen.sum_s == pytest.approx(sum(ended))
    router.exchange(inbox)
    read = router.exchange(inbox)
    assert sum(read.durations.counts) == 0, "nothing new"


def test_a_coordinator_that_has_restarted_counts_durations_from_then_on():
    router = Router()
    router.exchange(Inbox())
    router.end(router.start(), 0.1)
    inbox = Inbox()
    assert router.exchange(inbox) is None, "it asks for everything"
    assert sum(router.exchange(inbox).durations.counts) == 0
    router.end(router.start(), 0.5)
    assert per_bucket(router.exchange(inbox).durations) == {0.5: 1}


def test_however_many_requests_end_without_a_report_nothing_piles_up_and_none_is_lost():
    """Without a control plane there are no reports."""
    router = Router()
    router.report()
    for _ in range(5_000):
        router.end(router.start(), router.now_s + 0.002)
    assert len(pickle.dumps(router.ledger)) < 20_000
    assert sum(router.report()["durations"]["counts"]) == 5_000


def test_a_report_tells_time_to_the_first_item_of_streams_alone():
    router, inbox = Router(), Inbox()
    for items, first_item_s in ((0, math.nan), (1, math.nan), (40, 0.3)):
        call = router.start()
        call.items, call.first_item_s = items, first_item_s
        router.end(call, router.now_s + 2.0)
    read = router.exchange(inbox)
    assert per_bucket(read.first_items) == {0.5: 1}
    assert per_bucket(read.durations) == {2.0: 3}


def test_a_report_has_no_durations_where_none_were_and_is_short_where_there_were_many():
    router = Router()
    assert router.report()["durations"] == {}
    for _ in range(100):
        router.end(router.start(), router.now_s + 0.1)
    assert len(json.dumps(router.report()["durations"])) < 160


def test_refusals_and_second_attempts_are_told_apart_and_counted_once():
    router, inbox = Router(), Inbox()
    router.exchange(inbox)
    router.ledger.refuse("cancelled")
    router.ledger.refuse("late")
    router.ledger.refuse("late")
    for how in ("retried", "moved", "moved", "resumed"):
        router.ledger.rescue(how)
    router.report()  # lost
    read = router.exchange(inbox)
    assert read.refused == {"cancelled": 1, "late": 2}
    assert (read.rescued, read.retried, read.moved, read.resumed) == (4, 1, 2, 1)
    read = router.exchange(inbox)
    assert read.refused == {"cancelled": 0, "late": 0}
    assert (read.rescued, read.retried, read.moved, read.resumed) == (0, 0, 0, 0)


# ------------------------------------------------------------------ one report


def test_a_request_ends_once():
    router, inbox = Router(), Inbox()
    call = router.start("r0", 2.0, now_s=1.0)
    with pytest.raises(TransitionError):
        router.tell(call, Event.ACCEPT, others=2.0)
    assert router.book.in_flight("r0") == 1
    router.end(call, 3.5)
    assert call.duration_s == 2.5
    for event in (Event.END, Event.DROP, Event.MOVE):
        with pytest.raises(TransitionError):
            router.tell(call, event)
    with pytest.raises(TransitionError):
        router.tell(Call(), Event.END)
    read = router.exchange(inbox, 4.0)
    assert counts(read) == (1, 1, 0, 0)
    (view,) = (view for view in read.replicas if view.replica_id == "r0")
    (outcome,) = view.outcomes
    assert (outcome.duration_s, outcome.in_flight_at_start, outcome.ok) == (2.5, 2.0, True)
    assert (view.node_id, view.max_ongoing) == ("node of r0", 8)


def test_a_failure_is_an_outcome_too():
    router, inbox = Router(), Inbox()
    router.end(router.start(), 1.0, ok=False)
    read = router.exchange(inbox)
    assert counts(read) == (1, 1, 1, 0)
    assert [outcome.ok for outcome in read.replicas[0].outcomes] == [False]


def test_a_cancelled_request_frees_its_place_and_says_nothing_of_the_replica():
    router, inbox = Router(), Inbox()
    call = router.start(now_s=1.0)
    assert router.book.in_flight("r0") == 1
    router.now_s = 2.0
    router.tell(call, Event.DROP)
    read = router.exchange(inbox, 3.0)
    assert counts(read) == (1, 0, 0, 0)
    assert durations(read) == []


def test_requests_under_way_are_reported_with_their_age_oldest_first():
    router, inbox = Router(), Inbox()
    for i in range(40):
        router.start(now_s=float(i))
    read = router.exchange(inbox, 100.0, heard=False)
    (view,) = (view for view in read.replicas if view.replica_id == "r0")
    assert view.in_flight == 40
    assert [entry.age_s for entry in view.unfinished] == [100.0 - i for i in range(16)]
    assert router.exchange(inbox, 101.0, heard=False).replicas[0].unfinished[0].age_s == 101.0


def test_requests_that_no_replica_has_accepted_count_as_in_flight_but_not_as_started():
    router, inbox = Router(), Inbox()
    call = Call()
    router.book.open(call, 0.0)
    assert router.exchange(inbox, 0.5).waiting == 1
    router.tell(call, Event.CHOOSE, replica_id="r0")
    router.tell(call, Event.SEND)
    read = router.exchange(inbox, 4.0)
    assert counts(read) == (0, 0, 0, 1)
    assert [entry.age_s for entry in read.replicas[0].unfinished] == [3.5]
    assert read.waiting == 0


def test_reports_start_anew_and_are_numbered():
    router, inbox = Router(), Inbox()
    router.ledger.pair(PAIR)
    router.ledger.count("mirrored", 3)
    router.ledger.count("observed_time_ours", 0.5)
    first, second = router.exchange(inbox, 1.0), router.exchange(inbox, 2.5)
    assert (len(first.pairs), first.mirrored, first.seq, first.interval_s) == (1, 3, 1, 0.0)
    assert (len(second.pairs), second.mirrored, second.seq, second.interval_s) == (0, 0, 2, 1.5)
    assert (first.observed.time_ours, second.observed.time_ours) == (0.5, 0.0)
    assert first.pairs == (PAIR,)


def test_the_newest_evidence_is_kept_and_all_calls_are_counted():
    router, inbox = Router(), Inbox()
    for i in range(200):
        router.end(router.start(now_s=float(i)), i + 0.001 * i)
    for i in range(300):
        router.ledger.pair(PairedSample("r1", "r0", float(i), 2.0, 0.0, 0.0))
    read = router.exchange(inbox)
    assert counts(read) == (200, 200, 0, 0)
    assert durations(read) == pytest.approx([0.001 * i for i in range(136, 200)])
    assert [pair.primary_s for pair in read.pairs] == [float(i) for i in range(44, 300)]


# ------------------------------------------------------------------ what has changed


def test_a_report_lists_what_has_changed_since_the_last_one_that_was_acknowledged():
    router, inbox = Router(), Inbox()
    first = router.exchange(inbox)
    assert [view.replica_id for view in first.replicas] == ["r0", "r1"]
    assert not first.partial
    call = router.start("r1")
    second = router.exchange(inbox)
    assert [view.replica_id for view in second.replicas] == ["r1"]
    assert second.partial
    assert router.exchange(inbox).replicas == ()
    router.end(call)
    assert [view.replica_id for view in router.exchange(inbox).replicas] == ["r1"]


@pytest.mark.parametrize("lost", ["report", "answer"])
def test_what_was_lost_comes_with_the_next_report_and_nothing_comes_twice(lost):
    router, inbox = Router(), Inbox()
    router.exchange(inbox, 0.0)
    router.end(router.start(now_s=0.0), 0.25)
    router.ledger.pair(PAIR)
    router.ledger.count("rescued")
    seen = []
    if lost == "report":
        router.report(1.0)
    else:
        seen.append(router.exchange(inbox, 1.0, heard=False))
    router.end(router.start(now_s=1.0), 1.5)
    seen += [router.exchange(inbox, 2.0), router.exchange(inbox, 3.0)]
    assert [sum(found) for found in zip(*filter(None, map(counts, seen)), strict=True)] == [2, 2, 0, 0]
    assert [d for read in seen for d in durations(read)] == [0.25, 0.5]
    assert sum(len(read.pairs) for read in seen) == 1
    assert sum(read.rescued for read in seen) == 1


def test_a_report_that_comes_twice_counts_once():
    router, inbox = Router(), Inbox()
    router.end(router.start(), 1.0)
    message = router.report()
    first, acknowledged = inbox.take(message, 1.0)
    assert counts(first) == (1, 1, 0, 0)
    assert inbox.take(message, 1.1) == (None, acknowledged)


def test_a_report_that_is_overtaken_by_the_next_one_is_not_used():
    router, inbox = Router(), Inbox()
    router.exchange(inbox)
    router.end(router.start(), 1.0)
    early = router.report()
    router.end(router.start(), 3.0)
    late = router.report()
    read, acknowledged = inbox.take(late, 3.0)
    assert counts(read) == (2, 2, 0, 0)
    assert durations(read) == [1.0, 2.0]
    assert inbox.take(early, 3.1) == (None, acknowledged)


def test_a_coordinator_that_has_restarted_asks_for_everything_and_counts_from_then_on():
    router, first, second = Router(), Inbox(), Inbox()
    router.exchange(first)
    call = router.start()
    router.end(router.start(), 1.0)
    router.ledger.count("rescued")
    router.exchange(first)
    assert router.exchange(second) is None, "it does not know what has changed since what"
    read = router.exchange(second)
    assert not read.partial
    assert [view.replica_id for view in read.replicas] == ["r0", "r1"]
    assert counts(read) == (0, 0, 0, 1), "what was before is the former one's; what is under way is so"
    assert read.rescued == 0
    assert durations(read) == [], "the former one has had it"
    router.end(call, 5.0)
    read = router.exchange(second)
    assert (counts(read), durations(read)) == ((0, 1, 0, 0), [5.0])
    assert read.partial


def test_the_very_first_report_of_a_router_counts_from_its_start():
    router, inbox = Router(), Inbox()
    router.end(router.start(), 1.0)
    router.ledger.count("rescued", 2)
    read = router.exchange(inbox)
    assert counts(read) == (1, 1, 0, 0)
    assert read.rescued == 2


@pytest.mark.parametrize(("quiet_s", "started"), [(6.0, 1), (90.0, 0)])
def test_a_router_that_was_long_quiet_is_asked_for_everything(quiet_s, started):
    router, inbox = Router(), Inbox()
    router.end(router.start(), 0.0)
    router.exchange(inbox, 0.0, heard=False)
    router.exchange(inbox, 1.0)
    router.start(now_s=3.0)
    assert router.exchange(inbox, 1.0 + quiet_s) is None
    read = router.exchange(inbox, 2.0 + quiet_s)
    assert not read.partial
    assert counts(read) == (started, 0, 0, 1)
    assert durations(read) == [], "was taken before"


def test_routers_are_told_apart():
    one, two, inbox = Router("one"), Router("two"), Inbox()
    for router, calls in ((one, 1), (two, 3)):
        for _ in range(calls):
            router.start()
    assert counts(one.exchange(inbox)) == (1, 0, 0, 1)
    assert counts(two.exchange(inbox)) == (3, 0, 0, 3)
    one.start()
    two.start()
    assert counts(two.exchange(inbox)) == (1, 0, 0, 4)
    assert counts(one.exchange(inbox)) == (1, 0, 0, 2)


def test_streams_report_each_item_once():
    router, inbox = Router(), Inbox()
    call = router.start()
    router.ledger.pace("r0", 5, 0.5)
    first = router.exchange(inbox)
    router.ledger.pace("r0", 0, 0.25)
    second = router.exchange(inbox, heard=False)
    router.ledger.pace("r0", 2, 0.25)
    third = router.exchange(inbox)
    seen = [(view.items, view.stream_s) for read in (first, second, third) for view in read.replicas if view.items >= 0]
    assert [found for found in seen if any(found)] == [(5, 0.5), (0, 0.25), (2, 0.25)]
    router.end(call)


# ------------------------------------------------------------------ evidence of calls that were taken off a replica


@pytest.mark.parametrize("event", [Event.RETRY, Event.MOVE])
@pytest.mark.parametrize("reported_before", [True, False])
def test_a_call_that_is_taken_off_its_replica_is_evidence_once_although_nothing_has_ended(event, reported_before):
    """A slow replica notices late that the call was cancelled: until then nothing else there changes."""
    router, inbox = Router(), Inbox()
    call = Call()
    router.book.open(call, 0.0)
    router.tell(call, Event.CHOOSE, replica_id="r0")
    router.tell(call, Event.SEND)
    if event is Event.MOVE:
        router.tell(call, Event.ACCEPT, others=3.0)
    seen = [router.exchange(inbox, 1.0)] if reported_before else []
    router.now_s = 2.5
    router.tell(call, event)
    seen += [router.exchange(inbox, 3.0), router.exchange(inbox, 4.0)]
    if event is Event.MOVE:
        router.tell(call, Event.END, ok=True)  # it has noticed
    seen.append(router.exchange(inbox, 5.0))
    assert [d for read in seen for d in durations(read)] == [2.5]
    assert [o.ok for read in seen for view in read.replicas for o in view.outcomes] == [True]
    found = [counts(read) for read in seen if counts(read) is not None]
    assert (sum(finished for _, finished, _, _ in found), sum(failed for _, _, failed, _ in found)) == (0, 0)
    assert found[-1][3] == 0


# ------------------------------------------------------------------ replicas that come and go


def test_a_replica_that_is_gone_is_forgotten_only_when_its_requests_have_ended():
    router, inbox = Router(alive=["r0", "r1", "gone"]), Inbox()
    call = router.start("gone")
    router.exchange(inbox, 0.5)
    router.alive.remove("gone")
    read = router.exchange(inbox, 1.0)
    assert read.gone == ("gone",)
    assert counts(read, "gone") is None
    assert router.book.in_flight("gone") == 1
    router.end(call, 2.0, ok=False)
    assert call.duration_s == 2.0
    router.exchange(inbox, 3.0)
    assert router.book.all_in_flight() == {}
    assert router.book.totals("gone") == (0, 0, 0), "forgotten"


@pytest.mark.parametrize("heard", [True, False])
def test_that_a_replica_is_gone_is_said_until_it_is_acknowledged(heard):
    router, inbox = Router(), Inbox()
    router.exchange(inbox)
    router.alive.remove("r1")
    assert router.exchange(inbox, heard=heard).gone == ("r1",)
    assert router.exchange(inbox).gone == (() if heard else ("r1",))
    assert router.exchange(inbox).gone == ()


def test_a_full_report_lists_no_replica_that_is_gone():
    router, first, second = Router(), Inbox(), Inbox()
    router.exchange(first)
    router.alive.remove("r1")
    router.exchange(first, heard=False)
    router.exchange(second)
    read = router.exchange(second)
    assert (read.partial, read.gone) == (False, ())
    assert [view.replica_id for view in read.replicas] == ["r0"]


@pytest.mark.parametrize("under_way", [0, 1])
@pytest.mark.parametrize("heard", ["all", "not that it is gone", "not that it was gone, nor that it is back"])
def test_a_replica_that_is_gone_for_a_moment_counts_on(under_way, heard):
    """Serve takes one for dead that only could not be reached, and lists it again; or the coordinator missed it all."""
    router, inbox = Router(), Inbox()
    for _ in range(5):
        router.end(router.start())
    for _ in range(under_way):
        router.start()
    seen = [router.exchange(inbox), router.exchange(inbox)]
    router.alive.remove("r0")
    if heard == "all":
        seen.append(router.exchange(inbox))
    else:
        router.report()  # lost
    router.alive.append("r0")
    if heard == "not that it was gone, nor that it is back":
        router.report()
    for _ in range(3):
        router.end(router.start())
    seen += [router.exchange(inbox), router.exchange(inbox)]
    found = [found for read in seen if (found := counts(read)) is not None]
    assert sum(started for started, *_ in found) == 8 + under_way
    assert sum(finished for _, finished, *_ in found) == 8
    assert sum(len(durations(read)) for read in seen) == 8
    assert found[-1][3] == under_way


# ------------------------------------------------------------------ any story

REPLICA_IDS = st.sampled_from(["r0", "r1"])
START = st.tuples(st.just("start"), st.integers(0, 5), REPLICA_IDS)
OVER = st.tuples(st.sampled_from(["end", "fail", "cancel"]), st.integers(0, 5))
MOVE = st.tuples(st.just("move"), st.integers(0, 5))
EXCHANGE = st.just(("exchange", 0))
NET = st.tuples(st.sampled_from(["report", "take", "take again", "lose", "hear", "lose answer"]), st.integers(0, 5))
RESTART = st.tuples(st.just("restart"))
COME_AND_GO = st.tuples(st.sampled_from(["gone", "back"]), st.just(0), REPLICA_IDS)
COUNTED = ("started", "finished", "failed")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(START, OVER, MOVE, EXCHANGE), max_size=80), st.sampled_from(["r0", "r1", "gone"]))
def test_counts_always_return_to_zero(steps, other):
    """Whatever the order of starts, ends, cancellations and reports: started = finished + cancelled + open."""
    router, inbox = Router(), Inbox()
    open_calls, started, over = [], 0, 0
    for kind, number, *replica in steps:
        router.now_s += 0.1
        if kind == "start":
            open_calls.append(router.start(other if number == 0 else replica[0]))
            started += 1
        elif kind in ("end", "fail", "cancel", "move") and open_calls:
            call = open_calls.pop(number % len(open_calls))
            if kind == "move":
                router.tell(call, Event.MOVE)
            router.tell(call, Event.DROP if kind == "cancel" else Event.END, ok=kind == "end")
            over += 1
        else:
            router.exchange(inbox)
        assert router.book.open_calls == len(open_calls) == started - over
        assert sum(router.book.all_in_flight().values()) == len(open_calls)
    for call in open_calls:
        router.end(call)
        assert not math.isnan(call.duration_s)
    assert router.book.all_in_flight() == {}


class Story:
    """One router, one coordinator after the other, and a network that loses, keeps and repeats what it carries."""

    def __init__(self, *, exact=True):
        self.router, self.exact = Router(), exact
        self.up: list[tuple[dict, dict]] = []
        """Reports on their way, each with what was true when it was made."""
        self.down: list[int] = []
        self.open: list[Call] = []
        self.ids = 0
        self.truth = {replica_id: Counter() for replica_id in ("r0", "r1")}
        self.evidence: set[tuple[str, float]] = set()
        self.all_handed_out: Counter = Counter()
        self.inboxes = 0
        self.new_inbox()

    def new_inbox(self):
        self.inbox = Inbox()
        self.inboxes += 1
        self.handed_out: Counter = Counter()
        self.sums = {replica_id: Counter() for replica_id in self.truth}
        self.in_flight: dict[str, int] = {}
        self.baseline = None

    def step(self, kind, number=0, replica_id="r0"):
        router = self.router
        router.now_s += 0.01
        match kind:
            case "start":
                self.ids += 1
                self.open.append(router.start(replica_id, float(self.ids)))
                self.truth[replica_id]["started"] += 1
            case "end" | "fail" | "cancel" if self.open:
                self.end(self.open.pop(number % len(self.open)), kind)
            case "move" if self.open:
                call = self.open[number % len(self.open)]
                if call.phase is Phase.ACCEPTED:
                    router.tell(call, Event.MOVE)
                    self.evidence.add((call.replica_id, call.others))
            case "exchange":
                for each in ("report", "take", "hear"):
                    self.step(each, -1)
            case "report":
                now = {
                    replica_id: (Counter(n), router.book.in_flight(replica_id)) for replica_id, n in self.truth.items()
                }
                self.up.append((router.report(), now))
            case "take" if self.up:
                self.take(*self.up.pop(number % len(self.up)))
            case "take again" if self.up:
                self.take(*self.up[number % len(self.up)])
            case "lose" if self.up:
                self.up.pop(number % len(self.up))
            case "hear" if self.down:
                router.ledger.acknowledged(self.down.pop(number % len(self.down)))
            case "lose answer" if self.down:
                self.down.pop(number % len(self.down))
            case "restart":
                self.new_inbox()
            case "gone" if replica_id in router.alive:
                router.alive.remove(replica_id)
            case "back" if replica_id not in router.alive:
                router.alive.append(replica_id)

    def end(self, call, kind):
        counted = kind != "cancel" and call.phase is Phase.ACCEPTED
        self.router.tell(call, Event.DROP if kind == "cancel" else Event.END, ok=kind == "end")
        if counted:
            self.truth[call.replica_id]["finished"] += 1
            self.truth[call.replica_id]["failed"] += kind == "fail"
            self.evidence.add((call.replica_id, call.others))

    def take(self, message, truth):
        read, acknowledged = self.inbox.take(message, 0.0)
        self.down.append(acknowledged)
        if read is None:
            return
        if self.baseline is None:
            self.baseline = {r: Counter() if read.seq == 1 else Counter(counted) for r, (counted, _) in truth.items()}
        if not read.partial:
            self.in_flight.clear()
        for replica_id in read.gone:
            self.in_flight.pop(replica_id, None)
        for view in read.replicas:
            for name in COUNTED:
                assert getattr(view, name) >= 0
                self.sums[view.replica_id][name] += getattr(view, name)
            self.in_flight[view.replica_id] = view.in_flight
            evidence = [(view.replica_id, outcome.in_flight_at_start) for outcome in view.outcomes]
            self.handed_out.update(evidence)
            self.all_handed_out.update(evidence)
        for replica_id, (counted, in_flight) in truth.items():
            for name in COUNTED:
                found, really = self.sums[replica_id][name], counted[name] - self.baseline[replica_id][name]
                assert found == really if self.exact else found <= really, (replica_id, name, found, really)
            assert self.in_flight.get(replica_id, in_flight) == in_flight
        assert max(self.handed_out.values(), default=1) == 1, "evidence that came twice"
        assert set(self.handed_out) <= self.evidence

    def to_its_end(self):
        """Everything is taken and heard from now on."""
        self.up.clear()
        self.down.clear()
        for _ in range(3):
            self.step("exchange")
        if self.exact:
            assert set(self.all_handed_out) == self.evidence, "evidence that got lost"
        if self.inboxes == 1:
            assert max(self.all_handed_out.values(), default=1) == 1


def tell(steps, **kind):
    story = Story(**kind)
    for step in steps:
        story.step(*step)
    story.to_its_end()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(START, OVER, EXCHANGE, NET), max_size=50))
def test_whatever_is_lost_late_or_repeated_every_call_is_counted_once(steps):
    tell(steps)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(START, OVER, EXCHANGE, NET, RESTART), max_size=50))
@example([("report", 0), ("start", 0, "r0"), ("exchange", 0), ("restart",), ("take", 0), ("hear", 0)])
@example([("report", 0), ("start", 0, "r0"), ("exchange", 0), ("restart",), ("exchange", 0), ("take", 0), ("hear", 0)])
def test_so_it_is_for_each_coordinator_that_has_restarted(steps):
    tell(steps)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(START, OVER, EXCHANGE, NET, MOVE), max_size=50))
def test_so_it_is_where_calls_are_taken_off_their_replicas(steps):
    tell(steps)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(START, OVER, EXCHANGE, NET, COME_AND_GO), max_size=50))
@example([("start", 0, "r0"), ("report", 0), ("gone", 0, "r0"), ("exchange", 0), ("back", 0, "r0")])
@example([("start", 0, "r0"), ("gone", 0, "r0"), ("report", 0), ("exchange", 0), ("back", 0, "r0")])
def test_replicas_that_come_and_go_never_make_more_of_their_calls_than_there_were(steps):
    tell(steps, exact=False)


def test_the_memory_of_language_models_is_told_when_it_changes_and_when_nobody_counts_any_more():
    router, inbox = Router(), Inbox()

    def told(now_s, memory):
        report, acknowledged = inbox.take(router.ledger.report(now_s, ALIVE, memory), now_s)
        router.ledger.acknowledged(acknowledged)
        return {view.replica_id: (view.kv_own, view.kv_told) for view in report.replicas}

    assert told(1.0, {}) == {"r0": (-1.0, -1.0), "r1": (-1.0, -1.0)}
    assert told(2.0, {"r0": (0.5, -1.0), "r1": (0.0, 0.25)}) == {"r0": (0.5, -1.0), "r1": (0.0, 0.25)}
    assert told(3.0, {"r0": (0.5, -1.0), "r1": (0.1, 0.25)}) == {"r1": (0.1, 0.25)}
    assert told(4.0, {"r0": (0.5, -1.0), "r1": (0.1, 0.25)}) == {}
    assert told(5.0, {}) == {"r0": (-1.0, -1.0), "r1": (-1.0, -1.0)}
