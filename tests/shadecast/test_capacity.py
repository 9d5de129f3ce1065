"""Capacity: censored observations, learned sensitivities, forecasts read by clock time, rate limits, vetoes."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast import capacity as cap
from shadecast.service_curve import CurveLearner
from shadecast.types import HORIZONS_S, Forecast, NodeSnapshot


def room(cpu=0.0, memory=0.0, network=0.0):
    return cap.headroom_now(NodeSnapshot(cpu, cpu, memory, network, network, 0.0, 0.0))


def forecast(cpu, spread=0.0, gate=1.0, veto=False, memory=0.0):
    """`cpu` gives the median at each horizon."""

    def rows(values):
        return tuple((max(v - spread, 0.0), v, min(v + spread, 1.0)) for v in values)

    flat = rows([0.0] * len(HORIZONS_S))
    quantiles = {"cpu": rows(cpu), "memory": rows([memory] * len(HORIZONS_S)), "network": flat}
    return Forecast(quantiles, gate={"cpu": gate, "memory": gate}, veto_allowed=veto)


@pytest.mark.parametrize("z", [-5.0, -1.0, 0.0, 1.0, 3.0, 5.9, 6.1, 20.0])
def test_a_request_that_lasts_is_expected_to_last_longer(z):
    """The inverse Mills ratio, against numbers: E[Y | Y > z] > max(z, E[Y])."""
    excess = cap.censored_excess(z)
    assert excess > max(z, 0.0)
    assert excess < max(z, 0.0) + 0.8


def test_the_inverse_mills_ratio_matches_sampling():
    rng = random.Random(1)
    draws = [rng.gauss(0, 1) for _ in range(200_000)]
    for z in (-1.0, 0.0, 1.0):
        over = [d for d in draws if d > z]
        error = 4 / math.sqrt(len(over))
        assert cap.censored_excess(z) == pytest.approx(sum(over) / len(over), abs=error)


def test_noisy_requests_say_less_than_clear_ones_and_all_fade():
    estimate = cap.SpeedEstimate(2.0, 0.0)
    for _ in range(4):
        estimate.observe(-1.0)
    assert estimate.residual(0.1) < estimate.residual(1.0) < 0.0
    before = estimate.residual(0.5)
    estimate.advance(20.0)
    assert before < estimate.residual(0.5) < 0.0
    estimate.advance(10.0)
    estimate.observe(math.nan)
    assert math.isfinite(estimate.residual(0.5))


def in_doubt(seen, every_s, *, renewed):
    """Median log speed over seeds: a replica stood still for a moment and gave `seen` usual times since then."""
    found = []
    for seed in range(21):
        rng = random.Random(seed)
        estimate = cap.SpeedEstimate(2.0, 0.0)
        for _ in range(6):
            estimate.observe(-4.6)
            estimate.observe(rng.gauss(0.0, 0.7))  # what waited arrives among the first good ones
        for k in range(seen):
            estimate.advance((k + 1) * every_s)
            estimate.observe(rng.gauss(0.0, 0.7))
            estimate.settle(0.7)
            if renewed:
                estimate.renew()
        found.append(estimate.residual(0.7))
    return statistics.median(found)


def test_of_a_replica_in_doubt_the_last_seconds_count_if_they_hold_enough():
    assert in_doubt(40, 0.2, renewed=False) < math.log(0.75)
    assert in_doubt(40, 0.2, renewed=True) > math.log(0.85)
    assert in_doubt(10, 2.0, renewed=True) == in_doubt(10, 2.0, renewed=False), "too few to stand for themselves"


@pytest.mark.parametrize(("true_gamma", "low", "high"), [(0.0, 0.0, 0.15), (0.5, 0.4, 0.6), (1.0, 0.9, 1.1)])
def test_a_deployments_sensitivity_to_cpu_is_learned(true_gamma, low, high):
    rng = random.Random(2)
    sensitivity = cap.Sensitivity()
    for _ in range(4000):
        h = rng.gauss(0, 0.4)
        sensitivity.observe((h, rng.gauss(0, 0.05), 0.0), true_gamma * h + rng.gauss(0, 0.3))
    gamma = sensitivity.solve()
    assert low <= gamma[0] <= high
    assert gamma[1] >= 0.0


def test_a_resource_that_moves_together_with_another_is_not_counted_twice():
    rng = random.Random(3)
    sensitivity = cap.Sensitivity()
    for _ in range(4000):
        h = rng.gauss(0, 0.4)
        sensitivity.observe((h, h + rng.gauss(0, 0.1), 0.0), h + rng.gauss(0, 0.2))
    gamma = sensitivity.solve()
    assert gamma[0] + gamma[1] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("age_s", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("span_s", [0.5, 3.0, 6.0])
def test_a_forecast_is_read_by_clock_time(age_s, span_s):
    weights = cap.horizon_weights(age_s, span_s)
    assert sum(weights) == pytest.approx(1.0)
    middle_s = sum(w * h for w, h in zip(weights, HORIZONS_S, strict=True))  # of a load that rises by 1 a second
    assert middle_s == pytest.approx(age_s + span_s / 2.0, abs=1e-9)


def test_a_forecast_holds_its_first_and_last_value_outside_its_horizons():
    assert cap.horizon_weights(0.0, 0.5) == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert cap.horizon_weights(60.0, 5.0) == (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_a_drop_counts_by_how_much_of_a_requests_life_it_takes():
    late = forecast([0.0, 0.0, 0.0, 0.0, 0.8, 0.8])
    changes = [cap.outlook(late, room(), (1.0, 0.0, 0.0), 0.0, h).log_change for h in (0.5, 2.5, 4.0)]
    assert changes[0] == 0.0
    assert changes[0] > changes[1] > changes[2] > math.log(0.2)


def test_a_veto_looks_until_the_next_table_is_in_use_and_at_memory_as_far_as_it_can():
    pause = forecast([0.0, 0.97, 0.0, 0.0, 0.0, 0.0])
    worst = [cap.outlook(pause, room(), (1.0, 0.0, 0.0), age_s, 0.5).worst_log_speed for age_s in (0.0, 1.0, 2.5)]
    assert worst[0] == worst[1] < math.log(0.15) < worst[2]
    climbing = forecast([0.0] * 6, memory=0.99)
    assert cap.outlook(climbing, room(), (1.0, 0.0, 0.0), 0.0, 0.5).memory_high == pytest.approx(0.99)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        Forecast({}),
        Forecast({"cpu": ()}, gate={"cpu": 1.0}),
        Forecast({"cpu": ((math.nan,) * 3,) * 6}, gate={"cpu": 1.0}),
        Forecast({"cpu": ((0.5, 0.5, 0.5),) * 3}, gate={"cpu": 1.0}),
    ],
)
def test_a_broken_forecast_changes_nothing(broken):
    assert cap.outlook(broken, room(), (1.0, 1.0, 1.0), 0.0, 5.0).log_change == 0.0


def test_a_forecast_of_what_is_already_there_changes_nothing():
    view = cap.outlook(forecast([0.6] * 6), room(cpu=0.6), (1.0, 0.0, 0.0), 0.0, 5.0)
    assert view.log_change == pytest.approx(0.0)


def test_an_onset_that_may_come_is_worth_its_probability():
    rows = [((0.0, median, 0.8),) * 6 for median in (0.0, 0.4, 0.8)]
    changes = []
    for row in rows:
        unsure = Forecast({"cpu": row}, gate={"cpu": 1.0})
        changes.append(cap.outlook(unsure, room(), (1.0, 0.0, 0.0), 0.0, 5.0).log_change)
    assert changes[0] == pytest.approx(0.3 * math.log(0.2))
    assert changes[1] == pytest.approx(0.4 * math.log(0.6) + 0.3 * math.log(0.2))
    assert changes[2] == pytest.approx(0.7 * math.log(0.2))


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_what_is_expected_lies_between_the_quantiles(loads, now, gate):
    low, median, high = sorted(loads)
    made = Forecast({"cpu": ((low, median, high),) * 6}, gate={"cpu": gate})
    change = cap.outlook(made, room(cpu=now), (1.0, 0.0, 0.0), 0.0, 5.0).log_change
    best, worst = (cap.log_headroom(load) - cap.log_headroom(now) for load in (low, high))
    assert gate * worst - 1e-9 <= change <= gate * best + 1e-9


@given(st.floats(0.01, 4), st.one_of(st.floats(-10, 10), st.just(math.nan)), st.floats(-5, 5))
def test_capacity_moves_no_faster_than_its_rates(before, wanted, elapsed_s):
    after = cap.limit_rate(before, wanted, elapsed_s)
    allowed_s = max(elapsed_s, 0.0)
    assert -cap.FALL_PER_S * allowed_s - 1e-9 <= after - before <= cap.RISE_PER_S * allowed_s + 1e-9


def test_vetoes_need_leave_and_hit_the_worst_few():
    gamma = (1.0, 0.0, 0.0)
    views = {
        f"n{i}": cap.outlook(forecast([0.95] * 6, veto=i != 0, memory=0.99 if i == 3 else 0.0), room(), gamma, 0.0, 5.0)
        for i in range(8)
    }
    vetoed = cap.vetoes(views, memory_limit=0.92)
    assert len(vetoed) == 2
    assert "n3" in vetoed
    assert "n0" not in vetoed


def test_a_veto_outlasts_its_forecast_by_half_a_sample_and_never_takes_more_than_its_share():
    gamma = (1.0, 0.0, 0.0)
    dire = {f"n{i}": cap.outlook(forecast([0.95] * 6, veto=True), room(), gamma, 0.0, 5.0) for i in range(8)}
    well = {**dict.fromkeys(dire, cap.NO_OUTLOOK), "n7": dire["n7"]}
    veto = cap.Veto()
    first = veto.step(dire, 0.92, 100.0)
    assert len(first) == 2
    assert veto.step(well, 0.92, 100.4) == {"n7", min(first)}
    assert veto.step(well, 0.92, 100.6) == {"n7"}
    assert veto.step({}, 0.92, 100.7) == frozenset()


def durations(slots, batch_half, seed=1, count=2000, top=24):
    rng = random.Random(seed)
    for _ in range(count):
        n = rng.randrange(top)
        if batch_half:
            yield n, 0.2 * (1 + (n + 1) / batch_half) * rng.lognormvariate(0, 0.3)
        else:
            yield n, 0.2 * (1 + max(n + 1 - slots, 0) / slots) * rng.lognormvariate(0, 0.3)


@pytest.mark.parametrize(("slots", "batch_half"), [(1, 0), (4, 0), (16, 0), (0, 4), (0, 16)])
def test_the_service_curve_is_learned_from_loads_and_durations(slots, batch_half):
    learner = CurveLearner(0.0, 0.0)
    assert learner.curve.correction(10) == 1.0
    for n, duration_s in durations(slots, batch_half):
        learner.observe(n, math.log(duration_s))
    curve = learner.fit()
    assert curve.learned
    if batch_half:
        assert batch_half / 2 <= curve.batch_half <= batch_half * 2
    else:
        assert curve.batch_half == 0.0
        assert slots / 1.5 <= curve.slots <= slots * 1.5


def test_a_curve_that_was_given_is_not_relearned():
    learner = CurveLearner(2.0, 0.0)
    for n, duration_s in durations(16, 0):
        learner.observe(n, math.log(duration_s))
    assert (learner.fit().slots, learner.fit().batch_half) == (2.0, 0.0)


@pytest.mark.parametrize("streams", [False, True])
def test_replicas_are_chosen_by_a_curve_that_is_flat_no_further_than_loads_were_seen(streams):
    learner = CurveLearner(0.0, 0.0)
    for n, duration_s in durations(64, 0, top=12):
        learner.observe(n, math.log(duration_s))
    assert learner.fit().factor(20) < 1.1, "by what was seen, more cost nothing"
    curve = learner.cautious(streams=streams)
    assert curve.factor(20) > 1.5
    busy, idle = curve.factor(curve.slots if not streams else 6.0) / 0.9, curve.factor(0.0) / 0.65
    assert (idle < busy) is streams, "an idle replica at two thirds of the speed, beside usual loads"


@pytest.mark.parametrize(("slots", "batch_half"), [(1, 0), (4, 0), (16, 0), (0, 4), (0, 16)])
def test_a_curve_that_was_seen_to_rise_is_what_replicas_are_chosen_by(slots, batch_half):
    learner = CurveLearner(0.0, 0.0)
    for n, duration_s in durations(slots, batch_half):
        learner.observe(n, math.log(duration_s))
    fitted = learner.fit()
    assert learner.cautious(streams=False) == fitted
    assert batch_half == 0 or learner.cautious(streams=True) == fitted


def test_a_curve_that_is_given_or_not_known_yet_is_what_replicas_are_chosen_by():
    for learner in (CurveLearner(64.0, 0.0), CurveLearner(0.0, 64.0), CurveLearner(0.0, 0.0)):
        for streams in (False, True):
            assert learner.cautious(streams=streams) == learner.curve


@pytest.mark.parametrize(("nodes", "allowed"), [(1, 1), (3, 1), (4, 1), (8, 2), (16, 4)])
def test_no_more_than_a_quarter_of_the_nodes_the_surest_ones_are_expected_to_be_down(nodes, allowed):
    """In a lab whose runs were as long as each other, three nodes of four expected the next one; the fourth drowned."""
    views = {f"n{k}": cap.Outlook(log_change=math.log(0.4) - 0.1 * k, worst_log_speed=-0.1 * k) for k in range(nodes)}
    limited = cap.limit_down(views)
    down = {node_id for node_id, view in limited.items() if view.log_change < math.log(0.5)}
    assert down == {f"n{k}" for k in range(nodes - allowed, nodes)}
    assert all(limited[n] == views[n] for n in down)
    assert all(limited[n].log_change == pytest.approx(math.log(0.5)) for n in views.keys() - down)
    assert all(limited[n].worst_log_speed == views[n].worst_log_speed for n in views)


def test_what_is_expected_to_lose_less_than_half_or_to_recover_is_not_limited():
    views = {f"n{k}": cap.Outlook(log_change=change) for k, change in enumerate((-0.6, -0.6, -0.6, 0.0, 1.5, -0.1))}
    assert cap.limit_down(views) == views
    assert cap.limit_down({}) == {}


@pytest.mark.parametrize("now", [0.1, 0.7])
def test_a_node_is_left_for_what_is_likely_and_not_for_what_only_may_come(now):
    calm = tuple((0.0, 0.0, 0.0) for _ in range(6))
    for median, is_dire in ((0.5, False), (0.95, True)):
        rows = tuple((0.2, median, 0.97) for _ in range(6))
        made = Forecast({"cpu": rows, "memory": calm, "network": calm}, gate={"cpu": 1.0}, veto_allowed=True)
        view = cap.outlook(made, room(cpu=now), (1.0, 0.0, 0.0), 0.0, 0.5)
        assert bool(cap.vetoes(dict.fromkeys("abcd", view), 0.97)) == is_dire


def test_noise_of_telemetry_makes_no_node_unlike_another_and_a_hog_counts_at_once():
    rng, held, last = random.Random(5), room(cpu=0.1), []
    for _ in range(200):
        held = cap.smoothed(held, room(cpu=0.1 + rng.gauss(0.0, 0.035), memory=0.3))
        last.append(held[0])
    assert statistics.pstdev(last[20:]) < 0.02
    assert statistics.fmean(last[20:]) == pytest.approx(math.log(0.9), abs=0.01)
    assert held[1] == pytest.approx(math.log(0.7), abs=1e-6)
    assert cap.smoothed(held, room(cpu=0.5))[0] == pytest.approx(math.log(0.5)), "a hog"


def test_a_load_that_rises_little_by_little_is_followed_within_two_seconds():
    held = room()
    for sample in range(60):  # two samples a second
        held = cap.smoothed(held, room(cpu=0.01 * sample))
        behind = held[0] - room(cpu=0.01 * max(sample - 4, 0))[0]
        assert behind <= 1e-9
