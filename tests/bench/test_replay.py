"""Recorded jobs as load: read right, the same for every arm, and played on a node as they were recorded."""

from __future__ import annotations

import itertools
import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.live import player
from bench.live.replay import schedule
from bench.live.scenario import QUOTA
from bench.recordings import IDLE, HeldApart, Recording, held_apart, own_held_apart, playable, shared_data
from bench.simulate import nodes
from bench.simulate.arms import ARMS
from bench.simulate.nodes import NodeTrace, periodic, replays
from bench.simulate.run import simulate
from bench.simulate.scenario import find, make_world
from bench.simulate.shipped import ShippedForecaster
from models.grid import CHANNELS
from models.registry import SHIPPED, Registry

CPU, MEMORY, NETWORK = (CHANNELS.index(name) for name in ("cpu", "memory", "network"))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> HeldApart:
    """Our own held-out recordings, whatever else this machine has."""
    monkeypatch.setattr(nodes, "held_apart", own_held_apart)
    return own_held_apart()


def test_our_own_recordings_to_play_are_of_no_machine_that_the_shipped_model_was_trained_on(own: HeldApart) -> None:
    registry = Registry(str(SHIPPED))
    trained = {name.split("/")[1] for name in registry.card(registry.champion())["trained_on"]}
    played = {recording.name.split("/")[0] for recording in own.recordings}
    assert len(played) == 10
    assert not played & trained


@pytest.mark.skipif(not (shared_data() / "telemetry").is_dir(), reason="no public telemetry: set SHADECAST_DATA")
def test_public_recordings_of_cloud_machines_are_played_where_they_are_there() -> None:
    found = held_apart()
    assert (found.source, len(found.recordings)) == ("lumos", 564)
    assert sum(len(recording.rows) for recording in found.recordings) == pytest.approx(92_473, abs=100)
    cpu = np.array([row[CPU] for recording in found.recordings for row in recording.rows])
    assert cpu.mean() == pytest.approx(0.705, abs=0.002)


def test_holes_hold_the_last_value_and_memory_changes_from_where_it_was_between_recordings() -> None:
    nan = float("nan")
    values = np.array(
        [[0.2, 0.70, 1.25e8, 10.0, 1.0, 0.0], [nan, 0.75, nan, nan, nan, nan], [0.4, 1.9, 2.5e9, 9, 2, 1]]
    )
    rows = playable(values)
    assert rows[:, CPU].tolist() == [0.2, 0.2, 0.4]
    assert rows[:, MEMORY] == pytest.approx([IDLE[MEMORY], IDLE[MEMORY] + 0.05, 0.9])
    assert rows[:, NETWORK] == pytest.approx([0.1, 0.1, 1.0])
    assert np.isfinite(rows).all()


def test_a_played_recording_slows_the_node_and_shows_its_channels_and_ends() -> None:
    rows = tuple((cpu, 0.5, 0.1, 1.0, 1.0, 0.0) for cpu in (0.0, 0.5, 1.0, 0.25))
    trace = NodeTrace()
    trace.play(10.0, Recording("machine/job", rows))
    assert [trace.speed_at(t) for t in (9.5, 10.5, 11.5, 12.5, 13.5, 14.5)] == [1.0, 1.0, 0.5, 0.05, 0.75, 1.0]
    assert trace.shown(9.9) is None
    assert trace.shown(12.2) == rows[2]
    assert trace.shown(14.0) is None
    assert (trace.memory_at(11.0), trace.memory_at(20.0)) == (0.5, IDLE[MEMORY])


def test_recordings_follow_each_other_and_are_there_from_the_beginning(own: HeldApart) -> None:
    playing = 0
    for node in range(200):
        trace = NodeTrace()
        replays(150.0)(trace, random.Random(node), 600.0, node)
        assert trace.times_s == sorted(trace.times_s)
        for (start_s, recording), (next_s, _) in itertools.pairwise(trace.plays):
            assert next_s >= start_s + recording.length_s
        playing += trace.shown(0.0) is not None
    length_s = sum(r.length_s for r in own.recordings) / len(own.recordings)
    assert playing / 200 == pytest.approx(length_s / (length_s + 150.0), abs=0.12)


def test_a_seed_of_a_replay_is_the_same_for_every_arm_and_repeats(own: HeldApart) -> None:
    scenario = replace(find("replay", exact=True)[0], horizon_s=45.0, replicas=4, routers=2, warmup_s=5.0)
    assert make_world(scenario, 1).nodes[2].speeds == make_world(scenario, 1).nodes[2].speeds
    assert make_world(scenario, 1).nodes[2].speeds != make_world(scenario, 2).nodes[2].speeds
    for arm in ("live_capacity", "shadecast_shipped"):
        first, second = (
            {k: v for k, v in simulate(scenario, ARMS[arm], 1).items() if k != "decision_us"} for _ in "ab"
        )
        assert first == second
        assert first["unfinished"] == 0.0


def test_periodic_neighbours_keep_their_interval_and_their_errors_do_not_add_up() -> None:
    intervals = []
    for node in range(50):
        trace = NodeTrace()
        periodic(0.35, 20.0, 60.0, 120.0, 0.5)(trace, random.Random(node), 3000.0, node)
        starts = np.array([event.start_s for event in trace.events])
        every_s = float(np.polyfit(np.arange(len(starts)), starts, 1)[0])
        assert np.abs(starts - starts[0] - every_s * np.arange(len(starts))).max() < 4.0
        assert all(event.end_s - event.start_s == pytest.approx(20.0) for event in trace.events)
        intervals.append(every_s)
    assert 59.5 < min(intervals) < 70.0
    assert 110.0 < max(intervals) < 120.5


def test_the_shipped_arm_expects_a_neighbour_that_came_twice_before_it_comes_again() -> None:
    trace = NodeTrace()
    for start_s in (30.0, 110.0, 190.0):
        trace.set_from(start_s, 0.35)
        trace.set_from(start_s + 20.0, 1.0)
    shipped = ShippedForecaster(trace, announced=False)
    expected = {}
    for second in range(1, 190):
        load = 1.0 - trace.mean_speed(second - 1.0, float(second))
        made = shipped.make(float(second), load, 0.45)
        if made is not None:
            expected[second] = max(row[1] for row in made.quantiles["cpu"])
    assert expected[105] < 0.3, "one start tells nothing of the next"
    assert expected[183] == pytest.approx(0.65 / 2, abs=0.01), "what it took, by half: it was not yet right or wrong"


# ---------------------------------------------------------------- played on a node


def test_what_a_node_plays_live_is_what_the_simulator_plays(own: HeldApart) -> None:
    rows = schedule(3, 1, 600.0, QUOTA, 1 << 20)
    trace = NodeTrace()
    replays(150.0)(trace, random.Random("3/replay/1"), 600.0, 1)
    assert rows == schedule(3, 1, 600.0, QUOTA, 1 << 20)
    assert rows != schedule(3, 2, 600.0, QUOTA, 1 << 20)
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})
    for second in range(600):
        cpu = (trace.shown(float(second)) or IDLE)[CPU]
        assert player.row_at(rows, second)[1] == pytest.approx(QUOTA * cpu, abs=1e-3)
    assert all(0 <= row[2] <= 1 << 20 and 0 <= row[3] <= 12.5e6 for row in rows)
    assert max(row[1] for row in rows) > 0.5 * QUOTA


def test_the_player_takes_its_share_of_each_second_and_ends_in_time() -> None:
    now_s, burnt_s = [0.0], [0.0]
    asked = []

    def clock() -> float:
        return now_s[0]

    def used() -> float:  # looking takes a millisecond of CPU
        now_s[0] += 0.001
        burnt_s[0] += 0.001
        return burnt_s[0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    rows = [(0, 0.8, 100, 4000), (2, 0.0, 50, 0)]
    meters = player.Meters(clock, used, sleep)
    player.play(rows, 4.0, 0.5, lambda memory, network: asked.append((memory, network)), meters)
    assert now_s[0] == pytest.approx(4.0, abs=0.05)
    assert burnt_s[0] == pytest.approx(0.5 * 0.8 * 2.0, abs=0.3)
    assert asked[0] == (100, 4000 * player.SLICE_S)
    assert asked[-1] == (50, 0)


def test_the_player_runs_alone_and_sends_what_the_rows_say() -> None:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.settimeout(20.0)
    rows = [(0, 0.05, 1 << 20, 200_000)]
    command = [sys.executable, "-I", "-S", str(Path(player.__file__)), "1.0", "2", "127.0.0.1"]
    began_s = time.monotonic()
    process = subprocess.Popen([*command, str(receiver.getsockname()[1])], stdin=subprocess.PIPE, text=True)
    try:
        process.communicate(json.dumps(rows), timeout=30.0)
        assert len(receiver.recv(65536)) == player.DATAGRAM_BYTES
    finally:
        process.kill()
        receiver.close()
    assert process.returncode == 0
    assert time.monotonic() - began_s >= 1.0


def test_memory_that_is_held_grows_and_shrinks() -> None:
    held = bytearray()
    player.hold(held, 10 * player.PAGE_BYTES)
    assert len(held) == 10 * player.PAGE_BYTES
    player.hold(held, 3)
    assert len(held) == 3
