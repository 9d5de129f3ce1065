"""Equal replicas share evenly, at any load: differences within their own uncertainty are none."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from bench.simulate.arms import ARMS
from bench.simulate.run import _Runner
from bench.simulate.scenario import SHORT, Scenario, make_world

WINDOW_S = 30.0


@pytest.mark.parametrize("load", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", [21, 22])
def test_each_of_four_equal_replicas_gets_about_a_quarter_of_every_half_minute(load, seed):
    scenario = Scenario("homogeneous", SHORT, load=load, replicas=4, routers=1, horizon_s=180.0)
    runner = _Runner(scenario, make_world(scenario, seed), ARMS["shadecast"](), seed)
    answered: defaultdict[int, Counter[int]] = defaultdict(Counter)
    inner = runner.sim.on_end

    def ended(request, ok):
        answered[int(request.arrived_s // WINDOW_S)][request.replica] += 1
        inner(request, ok)

    runner.sim.on_end = ended
    runner.sim.run(scenario.horizon_s)
    counted = [window for at, window in answered.items() if at and sum(window.values()) >= 50]
    assert len(counted) >= 4
    for window in counted:
        total = sum(window.values())
        assert len(window) == 4
        assert all(0.15 <= count / total <= 0.35 for count in window.values()), window
