"""The engine agrees with queueing theory; tolerances follow from the number of independent busy cycles."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bench.simulate.arms.simple import RandomChoice
from bench.simulate.engine import Request, Simulation, batching_share, slots_share
from bench.simulate.nodes import NodeTrace
from bench.simulate.scenario import TOKENS, Scenario, World
from bench.simulate.workload import lognormal, poisson


def _single_server(share: list[float], rate: float, work, until_s: float, seed: str) -> list[tuple[float, float]]:
    """(latency, work) of every request through one replica, after a warm-up of a tenth."""
    sim = Simulation(1, share, seed)
    arm = RandomChoice()
    sim.bind(arm)
    arm.start(sim, World(Scenario("test", TOKENS), [NodeTrace()], lambda: iter(()), 0), random.Random(seed))
    sim.join(0, 1.0)
    done: list[tuple[float, float]] = []
    sim.on_end = lambda request, ok: (
        done.append((sim.now_s - request.arrived_s, request.work_s)) if request.arrived_s > until_s / 10 else None
    )
    rng = random.Random(seed)
    for number, at_s in enumerate(poisson(rng, rate, 0.0, 1.0, until_s)):
        sim.at(at_s, sim.dispatch, Request(number, at_s, work(rng), 0))
    sim.run(until_s * 2)
    return done


def _erlang_c(servers: int, load: float) -> float:
    """Probability of waiting in M/M/c at `load` erlangs (Erlang 1917)."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    tail = load**servers / math.factorial(servers) * servers / (servers - load)
    return tail / (sum(terms) + tail)


@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.7), (4, 0.5), (4, 0.8), (16, 0.9)])
def test_fifo_slots_wait_as_erlang_c_says(servers: int, utilisation: float) -> None:
    mean_s = 0.1
    rate = servers * utilisation / mean_s
    until_s = 40_000 / rate
    waits, waited = [], []
    for seed in range(4):
        done = _single_server(slots_share(servers), rate, lambda rng: rng.expovariate(1 / mean_s), until_s, f"c{seed}")
        wait = np.array([latency - work for latency, work in done])
        waits.append(wait.mean())
        waited.append((wait > 1e-9).mean())
    expected = _erlang_c(servers, servers * utilisation)
    assert np.mean(waited) == pytest.approx(expected, rel=0.06)
    mean_wait_s = expected * mean_s / (servers * (1 - utilisation))
    assert np.mean(waits) == pytest.approx(mean_wait_s, rel=0.12)


@pytest.mark.parametrize("sigma", [0.5, 1.2])
@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_processor_sharing_slows_all_sizes_alike_whatever_their_distribution(sigma: float, utilisation: float) -> None:
    """M/G/1-PS: E[T | x] = x / (1 - rho) for every x, insensitive to the distribution (Kleinrock 1967)."""
    share = [1.0] + [1.0 / n for n in range(1, 4001)]
    small, large = [], []
    for seed in range(4):
        done = _single_server(share, utilisation, lambda rng: lognormal(rng, 1.0, sigma), 15_000.0, f"ps{seed}")
        work = np.array([w for _, w in done])
        slowdown = np.array([t for t, _ in done]) / work
        middle = np.median(work)
        small.append(slowdown[work < middle].mean())
        large.append(slowdown[work >= middle].mean())
    expected = 1 / (1 - utilisation)
    assert np.mean(small) == pytest.approx(expected, rel=0.08)
    assert np.mean(large) == pytest.approx(expected, rel=0.08)


def test_a_lone_request_in_a_batching_replica_takes_its_work_times_one_plus_one_over_b0() -> None:
    done = _single_server(batching_share(16.0, 32), 0.001, lambda rng: 4.0, 20_000.0, "lone")
    latencies = sorted(latency for latency, _ in done)
    assert latencies[0] == pytest.approx(4.0 * (1 + 1 / 16))
    assert latencies[len(latencies) // 2] == pytest.approx(4.0 * (1 + 1 / 16))


def test_batching_shares_follow_every_arrival_and_departure_exactly() -> None:
    """Two requests overlap: checked against hand calculation."""
    sim = Simulation(1, batching_share(16.0, 32), "two")
    arm = RandomChoice()
    sim.bind(arm)
    arm.start(sim, World(Scenario("test", TOKENS), [NodeTrace()], lambda: iter(()), 0), random.Random(0))
    sim.join(0, 1.0)
    ends: dict[int, float] = {}
    sim.on_end = lambda request, ok: ends.__setitem__(request.id, sim.now_s)
    sim.at(0.0, sim.dispatch, Request(1, 0.0, 2.0, 0))
    sim.at(1.0, sim.dispatch, Request(2, 1.0, 0.5, 0))
    sim.run(100.0)
    alone, together = 1 / (1 + 1 / 16), 1 / (1 + 2 / 16)
    second = 1.0 + 0.5 / together
    assert ends[2] == pytest.approx(second)
    assert ends[1] == pytest.approx(second + (2.0 - alone - 0.5) / alone)


def test_a_change_of_speed_stretches_what_is_left() -> None:
    sim = Simulation(1, slots_share(1), "speed")
    arm = RandomChoice()
    sim.bind(arm)
    arm.start(sim, World(Scenario("test", TOKENS), [NodeTrace()], lambda: iter(()), 0), random.Random(0))
    replica = sim.join(0, 1.0)
    ends: list[float] = []
    sim.on_end = lambda request, ok: ends.append(sim.now_s)
    sim.at(0.0, sim.dispatch, Request(1, 0.0, 2.0, 0))
    sim.at(1.0, replica.set_speed, 0.25)
    sim.at(2.0, replica.set_speed, 0.0)
    sim.at(5.0, replica.set_speed, 1.0)
    sim.run(100.0)
    assert ends == [pytest.approx(5.75)]


def test_cancelling_a_request_gives_its_place_to_the_next_one() -> None:
    sim = Simulation(1, slots_share(1), "cancel")
    arm = RandomChoice()
    sim.bind(arm)
    arm.start(sim, World(Scenario("test", TOKENS), [NodeTrace()], lambda: iter(()), 0), random.Random(0))
    replica = sim.join(0, 1.0)
    ends: list[tuple[int, float]] = []
    sim.on_end = lambda request, ok: ends.append((request.id, sim.now_s))
    first, second = Request(1, 0.0, 10.0, 0), Request(2, 0.0, 1.0, 0)
    sim.at(0.0, sim.dispatch, first)
    sim.at(0.0, sim.dispatch, second)
    sim.at(3.0, replica.cancel, first)
    sim.run(100.0)
    assert ends == [(2, pytest.approx(4.0))]
    assert replica.load() == 0
