"""The ledger: exactly one start and one end each."""

import math

from hypothesis import given
from hypothesis import strategies as st

from shadecast.ledger import Ledger
from shadecast.types import PairedSample

ALIVE = [("r0", "n0", 8), ("r1", "n1", 8)]


def test_a_request_ends_once():
    ledger = Ledger("router", "app/d")
    ledger.start("a", "r0", 1.0, 2.0)
    ledger.start("a", "r0", 5.0, 2.0)
    assert ledger.in_flight("r0") == 1
    assert ledger.finish("a", "r0", 3.5, ok=True) == 2.5
    assert ledger.finish("a", "r0", 4.0, ok=True) is None
    assert ledger.finish("b", "r0", 4.0, ok=True) is None
    assert ledger.finish("a", "r9", 4.0, ok=True) is None
    view = ledger.report(4.0, ALIVE).replicas[0]
    assert (view.started, view.finished, view.failed, view.in_flight) == (1, 1, 0, 0)
    assert view.outcomes[0].duration_s == 2.5
    assert view.outcomes[0].in_flight_at_start == 2.0


def test_a_cancelled_request_frees_its_place_and_says_nothing_of_the_replica():
    ledger = Ledger("router", "app/d")
    ledger.start("a", "r0", 1.0, 0.0)
    ledger.finish("a", "r0", 2.0, ok=False, counted=False)
    view = ledger.report(3.0, ALIVE).replicas[0]
    assert (view.in_flight, view.finished, view.failed, view.outcomes) == (0, 0, 0, ())


def test_requests_under_way_are_reported_with_their_age_oldest_first():
    ledger = Ledger("router", "app/d")
    for i in range(40):
        ledger.start(f"q{i}", "r0", float(i), 0.0)
    view = ledger.report(100.0, ALIVE).replicas[0]
    assert view.in_flight == 40
    assert len(view.unfinished) == 16
    assert view.unfinished[0].age_s == 100.0
    assert ledger.report(101.0, ALIVE).replicas[0].unfinished[0].age_s == 101.0


def test_a_replica_that_is_gone_is_forgotten_only_when_its_requests_have_ended():
    ledger = Ledger("router", "app/d")
    ledger.start("a", "gone", 0.0, 0.0)
    assert [r.replica_id for r in ledger.report(1.0, ALIVE).replicas] == ["r0", "r1"]
    assert ledger.in_flight("gone") == 1
    assert ledger.finish("a", "gone", 2.0, ok=False) == 2.0
    ledger.report(3.0, ALIVE)
    assert ledger.all_in_flight() == {}


def test_reports_start_anew_and_are_numbered():
    ledger = Ledger("router", "app/d")
    ledger.pair(PairedSample("r1", "r0", 1.0, 2.0, 0, 0))
    ledger.mirrored = 3
    first, second = ledger.report(1.0, ALIVE), ledger.report(2.5, ALIVE)
    assert (len(first.pairs), first.mirrored, first.seq, first.interval_s) == (1, 3, 1, 0.0)
    assert (len(second.pairs), second.mirrored, second.seq, second.interval_s) == (0, 0, 2, 1.5)


@given(
    st.lists(st.tuples(st.sampled_from("sfcr"), st.integers(0, 9), st.sampled_from(["r0", "r1", "gone"])), max_size=80)
)
def test_counts_always_return_to_zero(steps):
    """Whatever the order of starts, ends, cancellations and reports: started = finished + cancelled + open."""
    ledger = Ledger("router", "app/d")
    started = ended = 0
    now_s = 0.0
    open_ids = set()
    for kind, number, replica in steps:
        now_s += 0.1
        key = (f"q{number}", replica)
        if kind == "s":
            started += key not in open_ids
            open_ids.add(key)
            ledger.start(*key, now_s, 0.0)
        elif kind == "r":
            ledger.report(now_s, ALIVE)
        else:
            done = ledger.finish(*key, now_s, ok=kind == "f", counted=kind == "f")
            assert (done is not None) == (key in open_ids)
            ended += done is not None
            open_ids.discard(key)
        assert sum(ledger.all_in_flight().values()) == len(open_ids) == started - ended
    for key in list(open_ids):
        assert not math.isnan(ledger.finish(*key, now_s, ok=True))
    assert ledger.all_in_flight() == {}
