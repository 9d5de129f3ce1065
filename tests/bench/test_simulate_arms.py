"""Each arm does what its source says, runs repeat, and the whole is fast enough."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bench.simulate.__main__ import main
from bench.simulate.arms import ARMS
from bench.simulate.arms.base import Arm, two_of
from bench.simulate.arms.clairvoyant import Clairvoyant
from bench.simulate.arms.consistent_hash import ConsistentHash
from bench.simulate.arms.p2c import TruePowerOfTwo
from bench.simulate.arms.peak_ewma import DECAY_S, PeakEwma
from bench.simulate.arms.prequal import Prequal, _Probe
from bench.simulate.arms.product import Product
from bench.simulate.arms.ray_p2c import HANDSHAKE_S, RayPowerOfTwo
from bench.simulate.arms.simple import RoundRobin
from bench.simulate.engine import Request, Session, Simulation, slots_share
from bench.simulate.nodes import NodeTrace, calm
from bench.simulate.report import Row, interval
from bench.simulate.run import simulate
from bench.simulate.scenario import SHORT, Scenario, World, find
from bench.simulate.targets import checks

NAMES = [
    *("random", "round_robin", "consistent_hash", "least_requests", "p2c_local", "p2c_ray", "p2c_true", "peak_ewma"),
    *("prequal", "prequal_tuned", "live_capacity", "shadecast", "shadecast_perfect", "shadecast_wrong", "clairvoyant"),
    *("shadecast_shipped", "live_capacity_handover", "shadecast_handover", "shadecast_shipped_handover"),
]
METRICS = [
    *("p50_s", "p99_s", "p999_s", "slo_miss_fraction", "p50_slowdown", "p99_slowdown"),
    *("lost_requests", "moved_sessions", "decision_us"),
]


def _bench(arm: Arm, replicas: int = 4, routers: int = 2, slots: int = 2) -> Simulation:
    """A simulation with idle replicas, ready for single decisions."""
    sim = Simulation(routers, slots_share(slots), "bench")
    sim.bind(arm)
    nodes = [NodeTrace() for _ in range(replicas)]
    arm.start(sim, World(Scenario("test", SHORT), nodes, lambda: iter(()), 0), random.Random(7))
    for node in range(replicas):
        sim.join(node, 1.0)
    return sim


def _fill(sim: Simulation, replica: int, count: int, work_s: float = 100.0) -> None:
    for _ in range(count):
        request = Request(10**6 + random.Random(replica).randrange(10**6), sim.now_s, work_s, 0)
        sim.replicas[replica].submit(request)


def _small(name: str, **changes: object) -> Scenario:
    return replace(find(name)[0], **{"horizon_s": 60.0, "warmup_s": 5.0, **changes})


def test_the_arms_are_those_that_were_named() -> None:
    assert sorted(ARMS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_finishes_every_request_and_repeats_exactly(name: str) -> None:
    scenario = _small("short-antagonist", horizon_s=25.0)
    first, second = simulate(scenario, ARMS[name], 3), simulate(scenario, ARMS[name], 3)
    assert first["unfinished"] == 0
    assert first["requests"] > 5000
    assert set(METRICS) <= set(first)
    assert {k: v for k, v in first.items() if k != "decision_us"} == {
        k: v for k, v in second.items() if k != "decision_us"
    }


def test_two_of_draws_every_ordered_pair_equally_often() -> None:
    rng = random.Random(0)
    counts: dict[tuple[int, int], int] = {}
    for _ in range(12_000):
        pair = two_of(rng, [3, 5, 9, 11])
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 12
    assert all(abs(n - 1000) < 150 for n in counts.values())


def test_true_power_of_two_is_never_the_longer_of_two_queues() -> None:
    arm = TruePowerOfTwo()
    sim = _bench(arm, replicas=2)
    _fill(sim, 0, 3)
    assert {arm.pick(Request(k, 0.0, 1.0, 0)) for k in range(50)} == {1}


def test_round_robin_visits_all_in_turn_for_each_router() -> None:
    arm = RoundRobin()
    _bench(arm)
    for router in (0, 1):
        picks = [arm.pick(Request(k, 0.0, 1.0, router)) for k in range(8)]
        assert sorted(picks[:4]) == [0, 1, 2, 3]
        assert picks[:4] == picks[4:]


# ---------------------------------------------------------------- Ray's cached queue lengths


def test_ray_cache_counts_a_request_up_when_sent_then_takes_the_replicas_own_number_then_counts_it_down() -> None:
    arm = RayPowerOfTwo()
    sim = _bench(arm, replicas=2)
    sim.run(1.0)
    _fill(sim, 0, 5)
    request = Request(1, sim.now_s, 50.0, 0)
    sim.mine[0][0] += 1
    sim.replicas[0].submit(request)
    arm.on_sent(request)
    assert arm._cached(0, 0) == 1, "what the cache knew, plus one"
    sim.run(sim.now_s + HANDSHAKE_S + 0.001)
    assert arm._cached(0, 0) == 6, "the replica's own number, this request included"
    assert arm._cached(1, 0) == 0, "the other router learns nothing"
    arm.on_done(request, True)
    assert arm._cached(0, 0) == 5


def test_ray_cache_entries_are_void_after_ten_seconds_and_then_probed() -> None:
    arm = RayPowerOfTwo()
    sim = _bench(arm, replicas=2)
    sim.run(5.0)
    _fill(sim, 0, 3)
    assert arm._cached(0, 0) == 0, "stale but valid: the other router's requests are unseen"
    sim.run(10.5)
    assert arm._cached(0, 0) is None
    assert arm.pick(Request(1, sim.now_s, 1.0, 0)) == 1, "both unknown: probed before the choice"
    assert arm._cached(0, 0) == 3


def test_ray_routes_on_the_valid_entry_and_probes_the_other_in_the_background() -> None:
    arm = RayPowerOfTwo()
    sim = _bench(arm, replicas=2)
    sim.run(20.0)
    arm._cache[0] = {0: (7, sim.now_s)}
    assert arm.pick(Request(1, sim.now_s, 1.0, 0)) == 0, "the only valid entry decides, however long"
    sim.run(sim.now_s + HANDSHAKE_S + 0.001)
    assert arm._cached(0, 1) == 0


def test_ray_retries_elsewhere_after_a_rejection_and_nothing_is_lost() -> None:
    arm = RayPowerOfTwo()
    sim = _bench(arm, replicas=2, slots=1)
    sim.max_ongoing = 2
    ended: list[int] = []
    sim.on_end = lambda request, ok: ended.append(request.id)
    for number in range(10):
        sim.at(1.0, sim.dispatch, Request(number, 1.0, 1.0, number % 2))
    sim.run(1.5)
    assert max(replica.load() for replica in sim.replicas) <= 2
    sim.run(60.0)
    assert sorted(ended) == list(range(10))


# ---------------------------------------------------------------- peak-EWMA, Prequal


def test_peak_ewma_jumps_to_a_peak_at_once_and_decays_with_its_time_constant() -> None:
    arm = PeakEwma()
    sim = _bench(arm)
    request = Request(1, 0.0, 1.0, 0)
    request.replica, request.sent_s = 0, 0.0
    sim.now_s = 2.0
    arm.on_done(request, True)
    assert arm.score(request, 0) == pytest.approx(2.0)
    sim.now_s = 2.0 + DECAY_S
    assert arm.score(request, 0) == pytest.approx(2.0 * np.exp(-1.0))
    sim.mine[0][1] = 2
    assert arm.score(request, 1) > 1e5, "no history but requests pending: penalised"


def test_prequal_takes_the_fastest_cold_probe_and_the_shortest_queue_if_all_are_hot() -> None:
    arm = Prequal()
    _bench(arm)
    probes = [_Probe(0, 9, 0.1, 0.0, 2), _Probe(1, 2, 0.5, 0.0, 2), _Probe(2, 3, 0.3, 0.0, 2)]
    assert arm._choose(probes, 5).replica == 2
    assert arm._choose(probes, 1).replica == 1


def test_prequal_pools_stay_within_size_and_age_and_a_used_probe_counts_its_own_request() -> None:
    arm = Prequal()
    sim = _bench(arm, replicas=16)
    for number in range(200):
        sim.now_s = number * 0.01
        arm.pick(Request(number, sim.now_s, 1.0, 0))
        assert len(arm._pools[0]) <= Prequal.pool_size
    before = {id(p): p.rif for p in arm._pools[0]}
    arm.pick(Request(999, sim.now_s, 1.0, 0))
    assert sum(p.rif - before[id(p)] for p in arm._pools[0] if id(p) in before) <= 1
    sim.now_s += 1.01
    assert arm._fresh(0) == []


def test_prequal_latency_is_the_median_at_the_nearest_load() -> None:
    arm = Prequal()
    _bench(arm)
    record = arm._latency[0]
    for value in (0.1, 0.2, 0.9):
        record.record(3, value, 1.0)
    record.record(9, 5.0, 1.0)
    assert record.estimate(4, 2.0) == 0.2
    assert record.estimate(8, 2.0) == 5.0
    assert record.estimate(3, 100.0) == 0.0, "too old"


# ---------------------------------------------------------------- clairvoyant


def test_the_clairvoyant_end_of_a_request_is_the_true_end_when_nothing_more_comes() -> None:
    arm = Clairvoyant()
    sim = _bench(arm, replicas=1, slots=2)
    trace = arm.world.nodes[0]
    for time_s, speed in ((2.0, 0.3), (9.0, 1.0)):
        trace.set_from(time_s, speed)
        sim.at(time_s, sim.replicas[0].set_speed, speed)
    rng = random.Random(3)
    predicted: dict[int, float] = {}
    ended: dict[int, float] = {}
    sim.on_end = lambda request, ok: ended.__setitem__(request.id, sim.now_s)

    def send(request: Request) -> None:
        predicted[request.id] = arm.ends_s(request, 0)
        sim.dispatch(request)

    for number in range(9):
        at_s = number * 0.3
        sim.at(at_s, send, Request(number, at_s, rng.uniform(0.5, 2.0), 0))
    sim.run(100.0)
    assert ended == {number: pytest.approx(end_s) for number, end_s in predicted.items()}


# ---------------------------------------------------------------- sessions, crashes, newcomers


def test_consistent_hashing_moves_only_the_sessions_of_a_replica_that_leaves() -> None:
    arm = ConsistentHash()
    sim = _bench(arm, replicas=8)
    requests = []
    for number in range(2000):
        request = Request(number, 0.0, 1.0, 0)
        request.session = Session(number, [1.0], [1.0])
        requests.append(request)
    before = [arm.pick(request) for request in requests]
    sim.leave(sim.replicas[3])
    after = [arm.pick(request) for request in requests]
    assert all(a == b for a, b in zip(before, after, strict=True) if b != a and b != 3) or all(
        b == 3 for a, b in zip(after, before, strict=True) if a != b
    )
    assert max(np.bincount(before, minlength=8)) < 2 * 2000 / 8


@pytest.mark.parametrize("name", ["p2c_true", "prequal_tuned", "live_capacity", "shadecast"])
def test_sessions_stay_on_their_replica_while_nothing_is_wrong(name: str) -> None:
    metrics = simulate(_small("sessions", horizon_s=120.0, disturb=calm), ARMS[name], 0)
    assert metrics["moved_fraction"] < (0.01 if name in ("live_capacity", "shadecast") else 0.1)
    assert metrics["unfinished"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["live_capacity", "shadecast"])
def test_sessions_leave_slowed_replicas_and_miss_hardly_any_deadline(name: str) -> None:
    """A quarter of the nodes is slowed at any time; routers that do not know a session place it past those."""
    metrics = simulate(_small("sessions", horizon_s=120.0), ARMS[name], 0)
    assert metrics["moved_fraction"] < 0.3
    assert metrics["slo_miss_fraction"] < 0.005


def test_random_routing_without_stickiness_would_move_nearly_every_turn() -> None:
    arm = ARMS["random"]()
    type(arm).sticky = False
    try:
        metrics = simulate(_small("sessions"), lambda: arm, 0)
    finally:
        del type(arm).sticky
    assert metrics["moved_fraction"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p2c_ray", "prequal", "shadecast"])
def test_requests_lost_in_a_crash_are_counted_and_still_answered(name: str) -> None:
    metrics = simulate(_small("tokens-crash", horizon_s=200.0), ARMS[name], 1)
    assert metrics["lost_requests"] > 10
    assert metrics["unfinished"] <= 3, "only giants that a crash has sent back to their start"
    assert metrics["error_fraction"] == 0.0


def test_a_failing_newcomer_hurts_users_of_blind_arms_and_hardly_those_of_the_product() -> None:
    scenario = _small("newcomer-failing", horizon_s=120.0)
    blind, ours = simulate(scenario, ARMS["p2c_true"], 0), simulate(scenario, ARMS["live_capacity"], 0)
    assert blind["error_fraction"] > 0.01
    assert ours["error_fraction"] < 0.1 * blind["error_fraction"]
    assert ours["trials"] >= 1
    assert ours["mirrored_requests"] > 0


def test_copies_take_real_capacity_and_are_not_counted_as_requests() -> None:
    arm = Product(None)
    with_newcomer = _small("newcomer-slow", horizon_s=100.0)
    without = replace(with_newcomer, newcomers=())
    assert (
        simulate(with_newcomer, lambda: arm, 0)["requests"] == simulate(without, lambda: Product(None), 0)["requests"]
    )
    assert arm.extra_metrics()["mirrored_requests"] > 20


# ---------------------------------------------------------------- speed, report, command line


def test_a_hundred_thousand_requests_on_sixteen_replicas_take_at_most_twenty_seconds_of_one_core() -> None:
    scenario = replace(find("short-antagonist")[0], horizon_s=265.0)
    began = time.process_time()
    metrics = simulate(scenario, ARMS["p2c_ray"], 0)
    assert metrics["requests"] > 95_000
    assert time.process_time() - began < 20.0


def test_the_interval_over_seeds_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert interval([5.0]) == (5.0, 0.0)


def test_a_target_that_is_missed_is_said_to_be_missed() -> None:
    found = {"shadecast": {"lost_requests": [50.0]}, "p2c_true": {"lost_requests": [100.0]}}
    check = checks("tokens-crash", found)[0]
    assert not check.met
    assert "MISSED" in check.line()
    found["shadecast"]["lost_requests"] = [40.0]
    assert checks("tokens-crash", found)[0].met


def test_a_gain_that_may_be_luck_is_missed_where_the_target_asks_to_be_sure() -> None:
    live = [0.040, 0.050, 0.060, 0.070]
    sure = {"shadecast_shipped": [0.8 * v for v in live], "live_capacity": live}
    lucky = {"shadecast_shipped": [0.040, 0.050, 0.060, 0.020], "live_capacity": live}
    for arms, met in ((sure, True), (lucky, False)):
        (check,) = checks("replay", {arm: {"slo_miss_fraction": values} for arm, values in arms.items()})
        assert check.met == met, check.line()
        assert "t = " in check.measured


def _invoke(*arguments: str):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_a_table_and_writes_rows_and_a_page(tmp_path: Path) -> None:
    rows_file, page = tmp_path / "rows.json", tmp_path / "docs" / "simulation.md"
    result = _invoke(
        "--scenario", "homogeneous@tokens", "--seeds", "2", "--quick", "--arms", "p2c_ray,live_capacity",
        "--json", str(rows_file), "--markdown", str(page),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "QUICK" in result.output
    rows = json.loads(rows_file.read_text())
    assert set(rows[0]) == {"scenario", "arm", "seed", "metric", "value", "code"}
    assert {row["arm"] for row in rows} == {"p2c_ray", "live_capacity"}
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["metric"] for row in rows} >= set(METRICS)
    assert Row(**rows[0]).scenario == "homogeneous@tokens"
    text = page.read_text()
    assert "| live_capacity |" in text
    assert (page.parent / "simulation" / "homogeneous-tokens.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "nope"), "scenario 'nope': unknown"),
        (("--arms", "p2c,random"), "--arms 'p2c': unknown"),
        (("--scenario", "trace", "--trace", "/nowhere.csv"), "no such file"),
    ],
)
def test_a_wrong_argument_ends_with_one_line_that_says_what_is_known(arguments: tuple[str, ...], message: str) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
