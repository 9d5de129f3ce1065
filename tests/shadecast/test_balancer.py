"""The balancer as a whole: what enters, what leaves, how capacity moves. Claims are the test names."""

import math
from itertools import pairwise

import pytest

from shadecast.balancer import Balancer, TickInput
from shadecast.config import Config
from shadecast.types import (
    Forecast,
    NodeReport,
    NodeSnapshot,
    Outcome,
    PairedSample,
    ReplicaReport,
    RouterReport,
    RoutingTable,
    State,
    TableRow,
    Unfinished,
)
from tests.shadecast.world import DEPLOYMENT, World, grown


def flat_forecast(cpu=0.0, memory=0.3, gate=1.0, veto=False):
    def rows(value):
        return tuple((value, value, value) for _ in range(6))

    quantiles = {"cpu": rows(cpu), "memory": rows(memory), "network": rows(0.0)}
    return Forecast(quantiles, gate={"cpu": gate, "memory": gate, "network": gate}, veto_allowed=veto)


# ---------------------------------------------------------------- entering


def test_at_the_first_start_all_replicas_enter_without_a_trial():
    world = World()
    world.add("a")
    world.add("b")
    world.tick()
    assert world.state("a") is State.ACTIVE
    world.add("late")
    world.run(2)
    assert world.state("late") is State.ACTIVE


def test_an_equal_newcomer_goes_through_shadowing_and_shifting_to_active():
    world = grown()
    world.add("new")
    world.tick()
    assert world.state("new") is State.SHADOWING
    assert world.row("new").share == 0.0
    assert 0.0 < world.row("new").mirror_fraction <= 0.5
    world.run(180)
    assert world.state("new") is State.ACTIVE
    events = world.events("new")
    assert events[0] == "admit"
    assert events[1] in ("trial_passed", "trial_inconclusive")
    assert events[-1] == "ramp_done"
    assert [t.reason for t in world.transitions if not t.reason] == []


@pytest.mark.parametrize("fault", [{"speed": 0.2}, {"failing": 0.2}])
def test_a_bad_newcomer_is_turned_away_before_any_live_request(fault):
    for seed in range(5):
        world = grown(seed=seed)
        world.add("new", **fault)
        world.run(100)
        assert "trial_failed" in world.events("new")
        assert world.live.get("new", 0) == 0
        assert world.failed_live == 0
        assert world.state("new") in (State.INACTIVE, State.SHADOWING)


def test_trials_of_a_replica_that_stays_bad_come_ever_more_seldom():
    world = grown()
    world.add("new", failing=0.5)
    world.run(400)
    starts = [t.at_s for t in world.transitions if t.event == "admit"]
    pauses = [b - a for a, b in pairwise(starts)]
    assert 3 <= len(starts) <= 8
    assert pauses[-1] > 2 * pauses[0]


def test_a_replica_that_gets_well_comes_back():
    world = grown()
    newcomer = world.add("new", failing=0.5)
    world.run(30)
    assert "trial_failed" in world.events("new")
    newcomer.failing = 0.0
    world.run(300)
    assert world.state("new") is State.ACTIVE


def test_a_newcomer_that_is_well_has_its_full_share_within_seconds():
    taken = []
    for seed in range(10):
        world = grown(seed=seed)
        world.add("new")
        began_s = world.now_s
        world.tick()
        while world.row("new").share < 1.0:
            world.tick()
        taken.append(world.now_s - began_s)
    assert sorted(taken)[8] <= 20.0, "p90 at 20 requests/s"


@pytest.mark.parametrize("speed", [0.9, 0.5])
def test_a_slower_machine_works_as_soon_and_takes_its_part(speed):
    world = grown()
    world.add("new", speed=speed)
    world.run(25)
    assert world.state("new") is State.ACTIVE
    world.run(20)
    world.live.clear()
    world.run(60)
    fair = sum(world.live.values()) / 5
    assert 0.8 * speed < world.live["new"] / fair < 1.2 * speed + 0.1


def test_a_slow_newcomer_gets_no_more_copies_than_it_would_get_requests():
    world = grown()
    world.add("new", speed=0.3)
    world.run(8)
    assert world.state("new") is State.SHADOWING
    assert 0.0 < world.row("new").mirror_fraction < 0.7 / (len(world.machines) - 1)


def test_one_newcomer_among_many_is_not_overrun_by_copies():
    world = grown(50, rate_per_tick=250)  # 500 a second, 10 for each
    world.add("new")
    world.run(4)
    assert world.state("new") is State.SHADOWING
    assert world.row("new").mirror_fraction <= 1.2 / 50


@pytest.mark.parametrize(("stalled_s", "stays"), [(3.0, True), (60.0, False)])
def test_on_the_ramp_a_moment_of_slowness_is_borne_and_lasting_slowness_is_not(stalled_s, stays):
    world = grown(rate_per_tick=60, settings={"trial": {"step_s": 5.0}})
    newcomer = world.add("new")
    world.tick()
    while world.state("new") is not State.SHIFTING:
        world.tick()
    newcomer.speed = 0.1
    world.run(stalled_s)
    newcomer.speed = 1.0 if stays else 0.1
    world.run(20)
    assert ("guard_tripped" not in world.events("new")) is stays


@pytest.mark.parametrize("node_stays", [False, True])
@pytest.mark.parametrize(("speed", "allowed"), [(0.5, True), (0.15, False)])
def test_a_machine_that_is_slower_than_the_others_comes_back_with_what_it_could_do(speed, allowed, node_stays):
    world = grown(6)
    world.machines["old0"].speed = 0.5
    world.run(300)
    assert world.row("old0").capacity == pytest.approx(0.5, abs=0.1)
    world.machines["old0"].alive = False
    if node_stays:
        world.add("watch", node_id="node-old0")
    world.run(20)
    world.add("again", node_id="node-old0", speed=speed)
    world.tick()
    assert world.row("again").capacity == pytest.approx(0.5, abs=0.1)
    world.run(60)
    assert (world.state("again") is State.ACTIVE) is allowed
    assert ("trial_failed" in world.events("again")) is not allowed


def test_a_returned_machine_may_be_cold_for_a_while():
    world = grown(6)
    world.machines["old0"].alive = False
    world.run(20)
    again = world.add("again", node_id="node-old0", speed=0.3)
    world.run(30)
    assert world.state("again") is State.ACTIVE
    assert world.row("again").capacity < 0.5
    again.speed = 1.0
    world.run(60)
    assert world.row("again").capacity > 0.8
    assert "guard_tripped" not in world.events("again")


def test_a_machine_that_comes_back_broken_is_withdrawn():
    world = grown(6)
    world.machines["old0"].alive = False
    world.run(20)
    world.add("again", node_id="node-old0", failing=0.5)
    world.run(30)
    assert "guard_tripped" in world.events("again")
    assert world.failed_live <= 5
    assert world.state("again") in (State.INACTIVE, State.SHADOWING)


@pytest.mark.parametrize(("fault", "welcome"), [({"speed": 0.4}, True), ({"failing": 0.3}, False)])
def test_where_there_is_no_time_for_trials_a_newcomer_serves_within_seconds_unless_it_fails(fault, welcome):
    world = grown(4, settings={"balance": {"slots": 1.0}}, rate_per_tick=40)
    world.run(30)
    world.add("new", **fault)
    world.run(3)
    assert world.live["new"] > 0
    world.run(9)
    assert (world.state("new") is State.ACTIVE) is welcome
    assert world.failed_live <= 5
    assert ("guard_tripped" in world.events("new")) is not welcome


@pytest.mark.parametrize(("rate_per_tick", "slots"), [(13, 1.0), (3, 1.0), (13, 0.0)])
def test_a_rolling_update_that_does_not_wait_for_trials_leaves_enough_to_serve(rate_per_tick, slots):
    """Serve stops the next old replica as soon as a new one runs."""
    world = grown(4, settings={"balance": {"slots": slots}}, rate_per_tick=rate_per_tick)
    needed = 0.05 * rate_per_tick / 0.5
    for i in range(4):
        world.machines[f"old{i}"].alive = False
        world.add(f"new{i}", node_id=f"node-old{i}")
        world.run(1.5)
        for _ in range(13):
            world.tick()
            shares = [row.share for row in world.output.table.rows if row.share > 0.0]
            assert (sum(shares) if 1.0 in shares else len(shares)) > needed, "without an ACTIVE one they take all"
    world.run(300)
    assert {world.state(f"new{i}") for i in range(4)} == {State.ACTIVE}


def test_memory_that_was_full_before_a_node_died_ends_no_trial_when_it_is_back():
    world = grown(4)
    world.machines["old0"].memory = 0.99
    world.run(1)
    world.machines["old0"].alive = False
    world.run(10)
    world.add("again", node_id="node-old0", silent=True)
    world.run(30)
    assert "trial_failed" not in world.events("again")
    assert world.state("again") in (State.SHIFTING, State.ACTIVE)


def test_a_node_whose_memory_is_always_nearly_full_serves_all_the_same():
    """A pinned model: nothing rises. After a rolling update the next replica there works as any other."""
    world = grown(4)
    world.machines["old0"].memory = 0.94
    world.run(5)
    world.machines["old0"].alive = False
    world.add("next", node_id="node-old0", memory=0.94)
    world.run(30)
    assert world.state("next") is State.ACTIVE
    assert not {"guard_tripped", "trial_failed"} & set(world.events("next"))


def test_a_newcomer_whose_memory_rises_to_the_limit_is_turned_away():
    world = grown(4)
    new = world.add("new")
    world.run(2)
    new.memory = 0.95
    world.run(2)
    (failed,) = [t for t in world.transitions if t.event == "trial_failed"]
    assert "memory rose from 30% to 95%" in failed.reason


def test_a_replica_that_fails_each_of_its_rare_requests_is_withdrawn():
    """Judged by request, not by second: .15 requests a second on each of four."""
    world = grown(4)
    world.machines["old0"].failing = 1.0
    failed_before = world.failed_live
    for i in range(2000):
        world.rate_per_tick = 1 if i % 3 == 0 else 0
        world.tick()
        if world.state("old0") is not State.ACTIVE:
            break
    assert world.events("old0")[0] == "guard_tripped"
    assert world.failed_live - failed_before <= 8


def test_machines_that_all_slow_down_are_no_reason_to_let_a_newcomer_in_untried():
    world = grown(4)
    for machine in world.machines.values():
        machine.speed = 0.3
    world.run(5)
    world.add("new", failing=0.3)
    world.run(20)
    assert "admit_urgent" not in world.events("new")
    assert world.live.get("new", 0) == 0


def test_requests_that_wait_in_routers_leave_no_time_for_trials():
    """Saturated with eight places each, while the curve that was learned says that there are 64."""
    world = grown(4)
    world.waiting = 12
    world.run(3)
    world.add("new")
    world.run(3)
    assert "admit_urgent" in world.events("new")
    assert "wait for a replica" in next(t.reason for t in world.transitions if t.event == "admit_urgent")
    assert world.live["new"] > 0


def test_requests_that_cannot_be_copied_lead_to_a_small_live_canary():
    world = grown(copyable=False)
    world.add("new")
    world.run(4)
    assert world.state("new") is State.SHIFTING
    assert world.row("new").share == 0.1
    world.run(180)
    assert world.state("new") is State.ACTIVE


def test_a_failing_replica_on_the_ramp_is_withdrawn():
    world = grown(copyable=False)
    world.add("new", failing=0.5)
    world.run(100)
    assert "guard_tripped" in world.events("new")
    assert world.live["new"] < 40


@pytest.mark.parametrize("copyable", [True, False])
def test_silence_proves_nothing_so_a_broken_newcomer_is_found_before_users_meet_it(copyable):
    world = grown(copyable=copyable)
    world.rate_per_tick = 0
    world.add("new", failing=0.5)
    world.run(400)
    assert world.state("new") in (State.SHADOWING, State.SHIFTING)
    assert world.row("new").share <= 0.1
    world.rate_per_tick = 10
    world.run(30)
    assert world.state("new") is not State.ACTIVE
    assert world.failed_live <= (0 if copyable else 10)


def test_a_newcomer_that_came_in_silence_has_its_share_seconds_after_the_first_requests():
    world = grown()
    world.rate_per_tick = 0
    world.add("new")
    world.run(400)
    world.rate_per_tick = 10
    world.run(20)
    assert world.row("new").share == 1.0


def test_with_a_request_now_and_then_a_newcomer_does_not_starve():
    world = grown()
    world.add("new")
    for tick in range(1200):
        world.rate_per_tick = tick % 10 == 0
        world.tick()
    assert world.state("new") is State.ACTIVE


def test_few_are_on_trial_at_once():
    world = grown(8)
    for i in range(20):
        world.add(f"new{i}")
    for _ in range(60):
        world.tick()
        on_trial = sum(row.state is State.SHADOWING for row in world.output.table.rows)
        assert on_trial <= math.ceil(0.25 * 28)


def test_mirrored_requests_stay_within_their_bounds():
    world = grown(8, rate_per_tick=100)
    for i in range(7):
        world.add(f"new{i}")
    before = world.requests
    world.run(20)
    assert world.mirrored <= 0.13 * (world.requests - before)


# ---------------------------------------------------------------- leaving


def test_an_active_replica_that_begins_to_fail_drains_and_stays_out():
    world = grown()
    world.machines["old0"].failing = 0.6
    world.run(15)
    assert world.events("old0")[:2] == ["guard_tripped", "drained"]
    assert world.failed_live < 40


def test_a_session_whose_requests_fail_wherever_they_go_takes_no_replica_along():
    world = grown(4, rate_per_tick=40)
    for i in range(8):  # in the end it moves by itself
        world.bad_session = f"old{i % 4}"
        world.run(60)
    assert world.transitions == []


def test_a_replica_that_fails_the_requests_of_many_sessions_is_withdrawn():
    world = grown(4)
    world.machines["old0"].failing = 1.0
    world.of_sessions = 5
    world.run(30)
    assert "guard_tripped" in world.events("old0")


def test_errors_that_all_replicas_share_drain_nobody():
    world = grown()
    for machine in world.machines.values():
        machine.failing = 0.5
    world.run(60)
    assert all(world.state(name) is State.ACTIVE for name in world.machines)


def test_a_replica_that_no_router_lists_is_lost():
    world = grown()
    world.machines["old1"].alive = False
    world.tick()
    assert [t.event for t in world.transitions] == ["lost"]
    assert "old1" not in {row.replica_id for row in world.output.table.rows}


def test_when_all_routers_are_silent_nothing_is_thrown_away():
    world = grown()
    world.routers = False
    world.run(60)
    assert len(world.output.table.rows) == 4
    assert world.transitions == []


def test_an_operator_drains_a_node_and_lets_it_back_in_through_a_trial():
    world = grown()
    world.holds.add("node-old2")
    world.run(5)
    assert world.state("old2") is State.INACTIVE
    world.machines["old2"].alive = False
    world.add("next", node_id="node-old2")
    world.add("old2", node_id="node-old2")
    world.run(60)
    assert world.state("old2") is world.state("next") is State.INACTIVE, "whatever runs there"
    world.live.clear()
    world.run(5)
    assert not {"old2", "next"} & set(world.live)
    world.holds.clear()
    world.tick()
    assert world.state("old2") is State.SHADOWING


def test_a_drained_replica_serves_its_sessions_until_they_have_left_or_the_deadline():
    world = grown()
    world.kept_session = "old0"
    world.holds = {"old0"}
    world.run(15)
    assert world.state("old0") is State.DRAINING, "between two short requests it looks empty, and is not"
    world.kept_session = ""
    world.run(5)
    assert world.state("old0") is State.INACTIVE

    world.kept_session = "old1"
    world.holds = {"old0", "old1"}
    world.run(40)
    assert world.state("old1") is State.INACTIVE


def test_what_a_guard_drains_comes_back_although_the_coordinator_restarts_meanwhile():
    world = grown()
    world.machines["old0"].failing = 1.0
    while world.state("old0") is not State.DRAINING:
        world.tick()
    world.machines["old0"].failing = 0.0
    kept = world.output.table
    world.balancer = Balancer(DEPLOYMENT, Config(), epoch=2)
    world.balancer.restore(kept, world.now_s)
    world.run(60)
    assert world.state("old0") is State.ACTIVE


def test_when_the_last_replicas_go_those_on_trial_take_over_under_guard():
    world = grown(2)
    world.add("new")
    world.tick()
    assert world.state("new") is State.SHADOWING
    world.machines["old0"].alive = world.machines["old1"].alive = False
    world.run(1)
    assert world.state("new") is State.SHIFTING


@pytest.mark.parametrize("seed", range(5))
def test_where_all_replicas_are_new_at_once_the_one_that_fails_is_found_by_the_others(seed):
    world = grown(3, copyable=False, seed=seed)
    for i in range(3):
        world.machines[f"old{i}"].alive = False
        world.add(f"new{i}", failing=float(i == seed % 3))
        world.run(1)
    assert not any(row.state is State.ACTIVE for row in world.output.table.rows)
    world.run(10)
    world.live.clear()
    world.failed_live = 0
    world.run(20)
    assert world.failed_live < 0.1 * 20 * 20


# ---------------------------------------------------------------- capacity


def test_a_slowed_replica_loses_capacity_within_seconds_and_gets_it_back():
    world = grown()
    world.machines["old0"].speed = 0.2
    world.run(5)
    assert world.row("old0").capacity < 0.6
    assert world.row("old1").capacity > 0.7
    world.machines["old0"].speed = 1.0
    world.run(15)
    assert world.row("old0").capacity > 0.7


def test_telemetry_alone_shows_a_hog_before_any_request_does():
    world = grown()
    world.rate_per_tick = 0
    world.machines["old0"].background = 0.9
    world.run(2)
    assert world.row("old0").capacity < 0.4


def test_an_unfinished_request_counts_before_it_ends():
    world = grown()
    world.rate_per_tick = 0
    world.tick()
    stuck = ReplicaReport("old0", "node-old0", 8, 4, unfinished=(Unfinished(3.0, 0.0),) * 4)
    others = tuple(ReplicaReport(f"old{i}", f"node-old{i}", 8, 0) for i in (1, 2, 3))
    for _ in range(6):
        world.seq += 1
        world.now_s += 0.5
        report = RouterReport("router", DEPLOYMENT, world.seq, 0.5, (stuck, *others))
        world.output = world.balancer.on_tick(TickInput(world.now_s, (report,)))
    assert world.row("old0").capacity < 0.3
    assert world.row("old1").capacity > 0.7


@pytest.mark.parametrize("streams", [False, True])
def test_tables_trust_a_curve_no_further_than_the_loads_that_were_seen(streams):
    balancer = World().balancer
    for k in range(1, 61):
        outcomes = tuple(Outcome(1.0 - 0.01 * n, float(n)) for n in range(12))
        pace = {"items": 40, "stream_s": 8.0} if streams else {}
        replicas = tuple(ReplicaReport(n, n, 64, 8, 12, 12, 0, outcomes, **pace) for n in ("a", "b"))
        out = balancer.on_tick(TickInput(0.5 * k, (RouterReport("router", DEPLOYMENT, k, 0.5, replicas),)))
    assert (out.slots, out.batch_half) == (64.0, 0.0), "by what was seen, more cost nothing"
    assert (out.table.slots, out.table.batch_half) == ((4096.0, 7.0) if streams else (12.0, 0.0))


def test_one_tick_moves_capacity_by_no_more_than_the_rate_limit():
    world = grown()
    last = {row.replica_id: row.capacity for row in world.output.table.rows}
    world.machines["old0"].speed = 0.05
    world.machines["old0"].background = 0.95
    for i in range(60):
        if i == 30:
            world.machines["old0"].speed = 1.0
            world.machines["old0"].background = 0.0
        world.tick()
        for row in world.output.table.rows:
            change = row.capacity - last[row.replica_id]
            assert -0.3 - 1e-9 <= change <= 0.15 + 1e-9
            last[row.replica_id] = row.capacity


def test_failed_and_impossibly_fast_requests_never_make_a_replica_attractive():
    world = grown(rate_per_tick=0)
    for _ in range(40):
        world.seq += 1
        world.now_s += 0.5
        fast = ReplicaReport(
            "old0", "node-old0", 8, 0, 10, 10, 5, (Outcome(1e-6, 0, ok=False),) * 5 + (Outcome(1e-6, 0),) * 5
        )
        usual = tuple(
            ReplicaReport(f"old{i}", f"node-old{i}", 8, 0, 10, 10, 0, (Outcome(0.05, 0),) * 10) for i in (1, 2, 3)
        )
        report = RouterReport("router", DEPLOYMENT, world.seq, 0.5, (fast, *usual))
        world.output = world.balancer.on_tick(TickInput(world.now_s, (report,), world.nodes()))
        world.transitions += world.output.transitions
    assert "guard_tripped" in world.events("old0")
    assert world.row("old0").capacity < 4.1


@pytest.mark.parametrize(("gate", "expected"), [(1.0, True), (0.0, False)])
def test_a_forecast_counts_as_far_as_its_gate_lets_it(gate, expected):
    world = grown()
    for name, machine in world.machines.items():
        machine.forecast = flat_forecast(cpu=0.9 if name == "old0" else 0.0, gate=gate)
    world.run(4)
    assert (world.row("old0").capacity < 0.5) is expected


def test_a_fall_that_every_node_expects_never_leaves_the_traffic_to_one():
    world = grown(8)
    for name, machine in world.machines.items():
        machine.forecast = flat_forecast(cpu=0.9 if name != "old0" else 0.0)
    world.run(5)
    capacities = sorted(row.capacity for row in world.output.table.rows)
    assert sum(capacity < 0.3 for capacity in capacities) == 2
    assert capacities[2] > 0.45


def test_a_forecast_that_is_stale_or_broken_means_live_capacity():
    world = grown()
    world.machines["old0"].forecast = flat_forecast(cpu=0.95)
    world.run(3)
    assert world.row("old0").capacity < 0.6
    world.machines["old0"].silent = True
    world.run(12)
    assert world.row("old0").capacity > 0.7
    world.machines["old0"].silent = False
    nan = math.nan
    world.machines["old0"].forecast = Forecast({"cpu": ((nan, nan, nan),) * 6, "memory": ()}, gate={"cpu": 1.0})
    world.run(5)
    assert world.row("old0").capacity > 0.7


def test_a_veto_nearly_empties_a_node_but_never_many_at_once():
    world = grown(8)
    for machine in world.machines.values():
        machine.forecast = flat_forecast(memory=0.99, veto=True)
    world.run(5)
    vetoed = [view for view in world.balancer.views() if view.vetoed]
    assert len(vetoed) == 2
    assert all(view.capacity < 0.1 for view in vetoed)


# ---------------------------------------------------------------- bad input


def test_impossible_reports_are_dropped_and_counted():
    world = grown()
    view = ReplicaReport(
        "old0", "node-old0", 8, 0, 3, 3, 0, (Outcome(math.nan, 0), Outcome(-1, 0), Outcome(1, math.inf))
    )
    twice = ReplicaReport("old0", "node-old0", 8, 0)
    before = world.output.dropped
    reports = (
        RouterReport("x1", DEPLOYMENT, 1, 1.0, (view,)),
        RouterReport("x2", DEPLOYMENT, 1, 1.0, (twice, twice)),
        RouterReport("x3", "other/one", 1, 1.0, ()),
        RouterReport("router", DEPLOYMENT, 1, 1.0, ()),
    )
    nan = math.nan
    node = NodeReport("node-old0", 1, NodeSnapshot(nan, nan, nan, nan, nan, nan, nan), None, age_s=nan)
    output = world.balancer.on_tick(TickInput(world.now_s + 0.5, reports, (node,)))
    assert output.dropped == before + 3 + 1 + 1 + 1 + 1
    for row in output.table.rows:
        assert math.isfinite(row.capacity)
        assert 0.0 <= row.share <= 1.0


@pytest.mark.parametrize("jump_s", [-1000.0, 0.0, 1e6])
def test_a_clock_that_jumps_raises_nothing_and_keeps_bounds(jump_s):
    world = grown()
    world.now_s += jump_s
    for _ in range(5):
        world.tick()
    for row in world.output.table.rows:
        assert 0.01 <= row.capacity <= 5.0
    world.run(30)
    assert any(row.share > 0.0 for row in world.output.table.rows)


def test_versions_rise_with_every_table():
    world = grown()
    versions = []
    for _ in range(5):
        versions.append(world.tick().table.version)
    assert versions == sorted(set(versions))


def test_a_restarted_coordinator_goes_on_from_a_routers_table():
    rows = (
        TableRow("old0", "node-old0", State.ACTIVE, 1.0, 0.8, 3.0, proven=True),
        TableRow("bad", "node-bad", State.INACTIVE, 0.0, 0.2, 0.0, rejections=3),
        TableRow("out", "node-out", State.DRAINING, 0.0, 1.0, 0.0, proven=True),
    )
    world = World()
    world.balancer.restore(RoutingTable(DEPLOYMENT, 1, 9, 1, rows), 0.0)
    for name in ("old0", "bad", "out", "new"):
        world.add(name)
    world.tick()
    assert world.state("old0") is State.ACTIVE
    assert world.state("out") in (State.DRAINING, State.INACTIVE)
    assert world.row("bad").share == world.row("new").share == 0.0
    assert world.row("bad").rejections == 3


# ---------------------------------------------------------------- trials that meet strange input


@pytest.mark.parametrize(
    "pair",
    [
        PairedSample("new", "old0", -1.0, 0.05, 0, 0, True, True),
        PairedSample("new", "old0", 0.05, -math.inf, 0, 0, True, True),
        PairedSample("new", "old0", 0.05, 0.05, -3, 0, True, True),
        PairedSample("new", "new", 0.05, 0.05, 0, 0, True, True),
        PairedSample("new", "not listed yet", 0.05, 0.05, 0, 0, True, True),
        PairedSample("not listed yet", "old0", 0.05, 0.05, 0, 0, True, True),
        PairedSample("old1", "old0", 0.05, 9.0, 0, 0, True, False),
    ],
)
def test_pairs_that_cannot_be_true_or_have_no_trial_change_nothing(pair):
    """Also those that come before their replica is listed, after its trial, or of a replica with itself."""
    world = grown()
    world.add("new")
    world.run(1)
    before = {row.replica_id: (row.state, row.capacity) for row in world.output.table.rows}
    world.seq += 1
    views = tuple(ReplicaReport(name, machine.node_id, 8, 0) for name, machine in world.machines.items())
    report = RouterReport("router", DEPLOYMENT, world.seq, 1.0, views, (pair,) * 50)
    world.output = world.balancer.on_tick(TickInput(world.now_s, (report,)))
    for row in world.output.table.rows:
        state, capacity = before[row.replica_id]
        assert row.state is state
        assert row.capacity == pytest.approx(capacity, abs=0.05)
    world.run(20)
    assert world.state("new") is State.ACTIVE


def test_a_candidate_that_vanishes_in_its_trial_begins_anew_when_it_comes_back():
    world = grown()
    world.add("new")
    world.tick()
    while world.state("new") is not State.SHADOWING:
        world.tick()
    world.run(2)
    world.machines["new"].alive = False
    world.run(1)
    assert [row.replica_id for row in world.output.table.rows] == ["old0", "old1", "old2", "old3"]
    world.machines["new"].alive = True
    world.machines["new"].failing = 1.0
    world.run(20)
    assert world.row("new").share == 0.0
    assert "trial_failed" in world.events("new")


@pytest.mark.parametrize("until", [State.SHADOWING, State.SHIFTING])
@pytest.mark.parametrize("failing", [0.0, 1.0])
def test_a_coordinator_that_restarts_in_a_trial_holds_it_once_more(until, failing):
    world = grown()
    world.add("new")
    world.tick()
    while world.state("new") is not until:
        world.tick()
    kept = world.output.table
    world.machines["new"].failing = failing
    world.balancer = Balancer(DEPLOYMENT, Config(), epoch=2)
    world.balancer.restore(kept, world.now_s)
    world.tick()  # its requests still go by the last table
    world.live.clear()
    assert world.state("new") is State.SHADOWING
    world.run(20)
    assert (world.state("new") is State.ACTIVE) == (failing == 0.0)
    assert failing == 0.0 or "new" not in world.live


def test_one_replica_in_all_serves_at_once_and_so_does_the_one_that_replaces_it():
    world = World()
    world.add("only")
    world.tick()
    assert world.row("only").share == 1.0
    world.run(60)
    world.add("next")
    world.run(1)
    world.machines["only"].alive = False
    world.tick()
    world.tick()
    assert world.row("next").share > 0.0
    world.run(15)
    assert world.state("next") is State.ACTIVE


def test_nodes_that_come_and_go_leave_nothing_behind():
    world = grown()
    for i in range(300):
        world.add(f"short{i}", node_id=f"node-short{i}")
        if i >= 5:
            del world.machines[f"short{i - 5}"]
        world.run(5)
    fleet = world.balancer._fleet
    assert len(fleet.nodes) < 100
    assert len(fleet.replicas) < 20
    assert len(fleet._left) < 100
    assert {f"node-old{i}" for i in range(4)} <= fleet.nodes.keys()
