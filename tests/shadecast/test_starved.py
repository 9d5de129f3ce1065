"""Replicas that nobody asks, nodes that fall silent, requests that were taken away: silence is no good news."""

import pytest

from shadecast.calls import Call, Calls, Do, Event
from shadecast.inbox import Inbox
from shadecast.ledger import Ledger
from shadecast.types import State
from tests.shadecast.world import grown


def slowed(seconds=4, **kwargs):
    """A grown world in which old0 was slow for some seconds, so that the least score now leaves it out."""
    world = grown(left_below=0.5, **kwargs)
    world.machines["old0"].speed = 0.05
    world.run(seconds)
    assert world.row("old0").capacity < 0.3
    world.live.clear()
    return world


def test_a_replica_that_was_slow_for_a_moment_is_found_to_be_well_again():
    found, blind = slowed(), slowed(copyable=False)
    for world in (found, blind):
        world.machines["old0"].speed = 1.0
        world.run(20)
        assert world.state("old0") is State.ACTIVE
    assert blind.live.get("old0", 0) == 0, "otherwise requests themselves show it, not copies"
    assert found.row("old0").capacity > 0.6
    assert found.live.get("old0", 0) > 0


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("speed", [0.3, 0.5, 0.65])
def test_a_replica_that_was_a_little_slower_for_five_seconds_has_its_share_again_soon(speed, seed):
    world = grown(left_below=0.9, rate_per_tick=5, seed=seed)
    world.machines["old0"].speed = speed
    world.run(5)
    world.machines["old0"].speed = 1.0
    world.run(15)
    world.live.clear()
    world.run(10)
    fair = 10 * 2 * world.rate_per_tick / 4
    assert world.live.get("old0", 0) > fair / 2


def test_what_is_known_of_a_slower_machine_stays_known_while_it_is_in_doubt():
    world = grown(left_below=0.9, overflow=0.3)
    world.machines["old0"].speed = 0.6
    world.run(60)
    for _ in range(60):
        world.run(1)
        assert world.row("old0").capacity == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("overflow", [0.0, 0.03])
def test_copies_go_on_until_a_replica_is_as_fast_as_the_others_where_a_little_slower_is_left_out(seed, overflow):
    world = slowed(6, seed=seed)
    world.left_below, world.overflow = 0.9, overflow
    world.machines["old0"].speed = 1.0
    world.run(35)
    world.live.clear()
    world.run(5)
    fair = 5 * 2 * world.rate_per_tick / 4
    assert world.live.get("old0", 0) > fair / 2


@pytest.mark.parametrize("overflow", [0.0, 0.03, 0.1, 0.2, 0.4])
def test_copies_come_beside_requests_that_are_too_few_to_tell(overflow):
    world = slowed(6)  # and stays so
    world.left_below, world.overflow, world.mirrored = 0.9, overflow, 0
    world.run(15)
    requests = world.live.get("old0", 0)
    assert 2.5 < (world.mirrored + requests) / 15 < 5.5
    assert overflow < 0.4 or world.mirrored <= requests


@pytest.mark.parametrize("speed", [0.3, 0.6])
def test_copies_do_not_bring_requests_to_a_replica_that_stays_slower(speed):
    world = slowed(6)
    world.left_below = 0.9
    world.machines["old0"].speed = speed
    world.run(10)
    world.live.clear()
    world.run(100)
    assert world.live.get("old0", 0) < 0.005 * sum(world.live.values())


def test_copies_end_when_a_replica_is_well_again():
    world = slowed()
    world.machines["old0"].speed = 1.0
    world.run(20)
    assert world.live.get("old0", 0) > 0
    world.mirrored = 0
    world.run(20)
    assert world.mirrored == 0


def test_a_replica_that_stays_slow_gets_copies_and_no_live_request():
    world = slowed()
    world.mirrored = 0
    world.run(30)
    assert world.live.get("old0", 0) == 0
    assert 0 < world.mirrored <= 0.25 * 30 * 2 * world.rate_per_tick
    assert world.row("old0").capacity < 0.3


def test_copies_to_a_replica_that_stays_slow_get_rarer_and_still_find_it_well_again():
    world = slowed()
    counts = []
    for _ in range(5):
        world.mirrored = 0
        world.run(30)
        counts.append(world.mirrored)
    assert counts[0] > counts[2] > counts[4] > 0
    assert counts[4] < counts[0] / 2
    world.machines["old0"].speed = 1.0
    world.run(40)
    assert world.live.get("old0", 0) > 0


def test_replicas_that_are_asked_get_no_copies():
    world = grown(left_below=0.5)
    world.mirrored = 0
    world.run(20)
    assert world.mirrored == 0


def test_a_node_that_falls_silent_while_it_is_busy_is_not_taken_for_idle():
    world = grown()
    hogged = world.machines["old0"]
    hogged.background, hogged.speed = 0.9, 0.1
    world.run(3)
    busy = world.row("old0").capacity
    assert busy < 0.5
    world.machines["old0"].silent = True
    world.rate_per_tick = 0  # no request shows anything either
    world.run(15)
    assert world.row("old0").capacity < 1.2 * busy
    world.run(40)
    assert world.row("old0").capacity > busy, "not for ever: then telemetry is simply broken"


@pytest.mark.parametrize(("event", "others"), [(Event.RETRY, 0.0), (Event.MOVE, 3.0)])
def test_a_request_taken_off_a_replica_remains_as_evidence_of_at_least_that_duration(event, others):
    calls, inbox, alive = Calls(), Inbox(), [("a", "node", 8)]
    ledger = Ledger("router", "app/model", calls)
    calls.open(call := Call(), 0.0)
    calls.handle(call, Event.CHOOSE, 0.0, replica_id="a")
    calls.handle(call, Event.SEND, 0.0)
    if event is Event.MOVE:
        calls.handle(call, Event.ACCEPT, 0.0, others=others)
    assert Do.EVIDENCE in calls.handle(call, event, 2.5)
    ledger.evidence(call)
    read, acknowledged = inbox.take(ledger.report(3.0, alive), 3.0)
    (view,) = read.replicas
    assert [(o.duration_s, o.in_flight_at_start, o.ok) for o in view.outcomes] == [(2.5, others, True)]
    moved = event is Event.MOVE
    assert (view.started, view.finished, view.failed, view.in_flight) == (moved, 0, 0, moved), "until it has noticed"
    ledger.acknowledged(acknowledged)
    calls.handle(call, Event.DROP, 3.5)
    read, _ = inbox.take(ledger.report(4.0, alive), 4.0)
    assert [(view.outcomes, view.finished, view.in_flight) for view in read.replicas] == ([((), 0, 0)] if moved else [])
