"""What times say of speed: the reference, the noise, and streams by the pace of their items."""

import math
import random

import pytest

from shadecast.balancer import Balancer, TickInput
from shadecast.baseline import Baseline, SlowMean
from shadecast.calls import Calls
from shadecast.capacity import NO_HEADROOM, Sensitivity
from shadecast.config import Config
from shadecast.inbox import Inbox
from shadecast.ledger import Ledger
from shadecast.types import NodeReport, NodeSnapshot, Outcome, ReplicaReport, RouterReport

ITEM_S = 0.02


def test_the_reference_is_the_median_over_replicas_and_one_slow_one_does_not_move_it():
    baseline, sensitivity = Baseline(), Sensitivity()
    means = [SlowMean() for _ in range(5)]
    for _ in range(50):
        for k, mean in enumerate(means):
            baseline.observe(mean, math.log(8.0 if k == 0 else 2.0), NO_HEADROOM, sensitivity, 0.0, settled=True)
    baseline.refer(means)
    assert baseline.reference == pytest.approx(math.log(2.0))
    assert baseline.observe(means[0], math.log(8.0), NO_HEADROOM, sensitivity, 0.0, settled=True) == pytest.approx(
        -math.log(4.0)
    )


def test_nothing_is_said_of_speed_before_a_reference_is_known():
    assert math.isnan(Baseline().observe(SlowMean(), 0.0, NO_HEADROOM, Sensitivity(), 0.0, settled=True))


def test_a_time_too_short_to_be_true_counts_only_as_far_as_it_is_plausible():
    baseline = Baseline()
    baseline.reference, baseline.noise = 0.0, 0.1
    assert baseline.observe(SlowMean(), -10.0, NO_HEADROOM, Sensitivity(), 0.0, settled=True) < 1.0


def test_the_noise_learned_is_that_of_the_times():
    baseline, rng = Baseline(), random.Random(0)
    baseline.reference = 0.0
    for _ in range(3000):
        baseline.observe(SlowMean(), rng.gauss(0.0, 0.3), NO_HEADROOM, Sensitivity(), 0.0, settled=True)
    assert baseline.noise == pytest.approx(0.3, rel=0.15)


def test_a_ledger_reports_the_items_and_their_time_once():
    inbox, alive = Inbox(), [("a", "n", 8)]
    ledger = Ledger("router", "app/model", Calls())
    ledger.pace("a", 5, 0.1)
    ledger.pace("a", 7, 0.2)
    ledger.pace("unknown", 7, 0.2)
    first, acknowledged = inbox.take(ledger.report(1.0, alive), 1.0)
    second, _ = inbox.take(ledger.report(2.0, alive), 2.0)  # the answer to the first one is on its way
    ledger.acknowledged(acknowledged)
    third, _ = inbox.take(ledger.report(3.0, alive), 3.0)
    found = [(view.replica_id, view.items, view.stream_s) for read in (first, second) for view in read.replicas]
    assert found == [("a", 12, pytest.approx(0.3)), ("a", 0, 0.0)]
    assert third.replicas == (), "nothing has changed"


class Streams:
    """Four replicas with four streams each; every tick one ends, after a time that says nothing of the replica."""

    def __init__(self) -> None:
        settings = {"balance": {"slots": 32, "batch_half": 16}}
        self.balancer = Balancer("app/model", Config.from_mapping(settings), 1)
        self.rng = random.Random(5)
        self.speed = dict.fromkeys("abcd", 1.0)
        self.now_s, self.seq = 0.0, 0
        self.lowest = 1.0

    def tick(self) -> dict[str, float]:
        self.now_s += 0.5
        self.seq += 1
        pace = {name: speed / (1 + 4 / 16) / ITEM_S for name, speed in self.speed.items()}
        replicas = tuple(
            ReplicaReport(
                name, f"node-{name}", 64, 4, 1, 1, 0,
                (Outcome(self.rng.lognormvariate(1.0, 0.9) / self.speed[name], 3.0, items=200),),
                items=int(4 * 0.5 * rate), stream_s=4 * 0.5,
            )
            for name, rate in pace.items()
        )  # fmt: skip
        calm = NodeSnapshot(0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0)
        nodes = tuple(NodeReport(f"node-{name}", self.seq, calm, None) for name in self.speed)
        report = RouterReport("router", "app/model", self.seq, 0.5, replicas)
        table = self.balancer.on_tick(TickInput(self.now_s, (report,), nodes)).table
        return {row.replica_id: row.capacity for row in table.rows}


def test_streams_of_very_different_length_leave_equal_replicas_equal():
    world = Streams()
    for _ in range(40):
        world.tick()
    for _ in range(200):
        assert all(0.9 < capacity < 1.1 for capacity in world.tick().values())


def test_a_slow_replica_shows_in_the_pace_of_its_streams_within_three_seconds_without_telemetry():
    world = Streams()
    for _ in range(60):
        world.tick()
    world.speed["b"] = 0.35
    for _ in range(6):
        capacity = world.tick()
    assert capacity["b"] < 0.5
    assert min(capacity[name] for name in "acd") > 0.85
    world.speed["b"] = 1.0
    for _ in range(16):
        capacity = world.tick()
    assert capacity["b"] > 0.8


@pytest.mark.parametrize(("items", "stream_s"), [(-3, 1.0), (5, math.nan), (5, -1.0), (5, math.inf), (0, 0.0)])
def test_an_impossible_pace_is_ignored(items, stream_s):
    world = Streams()
    for _ in range(20):
        before = world.tick()
    replica = ReplicaReport("a", "node-a", 64, 4, items=items, stream_s=stream_s)
    report = RouterReport("other", "app/model", 1, 0.5, (replica,))
    table = world.balancer.on_tick(TickInput(world.now_s + 0.5, (report,))).table
    after = {row.replica_id: row.capacity for row in table.rows}
    assert after["a"] == pytest.approx(before["a"], abs=0.1)
