"""Machines, workloads, traces and forecasts of the simulator."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.simulate.forecasts import NodeForecaster
from bench.simulate.nodes import NodeTrace, antagonists, availability, crashes, pauses, ramps
from bench.simulate.scenario import FAMILIES, TOKENS, ForecastQuality, find, make_world
from bench.simulate.workload import load_trace, lognormal, poisson
from shadecast.types import HORIZONS_S

DATA = Path(os.environ.get("SHADECAST_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data") / "traces"


def _trace(disturb, seed: int = 0, horizon_s: float = 20_000.0) -> NodeTrace:
    trace = NodeTrace()
    disturb(trace, random.Random(seed), horizon_s, 0)
    return trace


def test_antagonists_take_the_share_of_time_that_their_length_and_pause_say() -> None:
    trace = _trace(antagonists(0.35, 10.0, 30.0, 60.0), horizon_s=200_000.0)
    assert trace.mean_speed(0.0, 200_000.0) == pytest.approx(1 - 0.65 * 20 / 80, rel=0.03)
    assert availability(antagonists(0.35, 10.0, 30.0, 60.0)) == pytest.approx(1 - 0.65 * 20 / 80, rel=0.02)


def test_served_and_when_served_are_inverse_even_across_standstills() -> None:
    trace = _trace(crashes(60.0, 20.0, 3.0, 0.3), horizon_s=1000.0)
    rng = random.Random(1)
    for _ in range(500):
        at_s = rng.uniform(0.0, 1500.0)
        if trace.speed_at(at_s) > 0:
            assert trace.when_served(trace.served(at_s)) == pytest.approx(at_s, abs=1e-6)


def test_served_is_the_integral_of_speed() -> None:
    trace = _trace(ramps(0.25, 10.0, 15.0, 60.0), horizon_s=400.0)
    steps = np.arange(0.0, 400.0, 0.01)
    total = sum(trace.speed_at(float(t)) for t in steps) * 0.01
    assert trace.served(400.0) == pytest.approx(total, rel=1e-3)


def test_memory_climbs_for_ten_seconds_before_a_warned_crash_and_not_before_an_unwarned_one() -> None:
    warned = _trace(crashes(120.0, 20.0, 3.0, 0.3))
    down_s, up_s = warned.downs_s[0]
    climb = [warned.memory_at(down_s - back) for back in (12.0, 8.0, 4.0, 0.1)]
    assert climb == sorted(climb)
    assert climb[0] < 0.5 < 0.95 < climb[-1]
    assert warned.memory_at(up_s + 0.1) < 0.5
    silent = _trace(crashes(120.0, 20.0, 3.0, 0.3, warned=False))
    assert silent.memory_at(silent.downs_s[0][0] - 1.0) < 0.5


def test_pauses_come_at_a_fixed_interval() -> None:
    events = _trace(pauses(0.02, 1.0, 30.0), horizon_s=300.0).events
    gaps = {round(b.start_s - a.start_s, 6) for a, b in itertools.pairwise(events)}
    assert gaps == {30.0}


def test_a_speed_change_that_goes_back_in_time_is_refused() -> None:
    trace = NodeTrace()
    trace.set_from(5.0, 0.5)
    with pytest.raises(ValueError, match="must not be before"):
        trace.set_from(4.0, 1.0)


def test_lognormal_has_the_mean_that_was_asked_for() -> None:
    rng = random.Random(0)
    values = [lognormal(rng, 3.84, 0.9) for _ in range(200_000)]
    assert np.mean(values) == pytest.approx(3.84, rel=0.02)
    assert np.std(np.log(values)) == pytest.approx(0.9, rel=0.01)


def test_arrivals_have_their_mean_rate_and_swing() -> None:
    counts = np.zeros(12)
    for seed in range(40):
        rng = random.Random(seed)
        times = np.array(list(poisson(rng, 20.0, 0.3, 60.0, 600.0)))
        phase = random.Random(seed).uniform(0.0, 2 * math.pi)
        counts += np.histogram((2 * math.pi * times / 60.0 + phase) % (2 * math.pi), 12, (0, 2 * math.pi))[0]
    rates = counts / counts.mean()
    expected = 1 + 0.3 * np.array([math.sin((k + 0.5) * math.pi / 6) for k in range(12)])
    assert counts.sum() / 40 / 600 == pytest.approx(20.0, rel=0.02)
    assert np.abs(rates - expected).max() < 0.04


def test_a_seed_makes_the_same_world_for_every_arm_and_another_seed_another() -> None:
    scenario = replace(find("tokens-antagonist")[0], horizon_s=60.0)

    def facts(seed: int) -> list[tuple[float, float, int]]:
        return [(r.arrived_s, r.work_s, r.router) for r in make_world(scenario, seed).requests()]

    assert facts(1) == facts(1)
    assert facts(1) != facts(2)
    assert make_world(scenario, 1).nodes[3].times_s == make_world(scenario, 1).nodes[3].times_s


def test_offered_work_is_the_load_times_what_the_disturbed_replicas_can_do() -> None:
    scenario = find("tokens-antagonist")[0]
    work = [
        sum(request.work_s for request in make_world(scenario, seed).requests()) / scenario.horizon_s
        for seed in range(6)
    ]
    capacity = 16 * 32 / (1 + 32 / 16) * (1 - 0.65 * 0.25)
    assert np.mean(work) / capacity == pytest.approx(0.7, rel=0.05)


def test_all_scenario_names_are_there_and_unknown_ones_are_refused_with_the_list() -> None:
    names = (
        "tokens-antagonist tokens-ramp tokens-crash short-antagonist short-pauses sessions homogeneous "
        "heterogeneous-cold newcomer-slow newcomer-failing stale-table trace scale replay periodic hand-over"
    )
    assert set(FAMILIES) == set(names.split())
    assert {s.load for s in find("tokens-antagonist")} == {0.6, 0.7, 0.8, 0.9}
    assert {s.tick_s for s in find("stale-table")} == {0.25, 0.5, 1.0, 5.0}
    with pytest.raises(ValueError, match="unknown; known are all, tokens-antagonist"):
        find("tokens")


# ---------------------------------------------------------------- traces


def _write(path: Path, text: str) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def test_the_azure_formats_of_2023_and_2024_are_read_as_published(tmp_path: Path) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    old = _write(tmp_path / "a.csv.gz", header + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.03,3,8\n")
    new = _write(
        tmp_path / "b.csv", header + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,9,6\n"
    )
    rows = load_trace(old, random.Random(0))
    assert [round(r.at_s, 4) for r in rows] == [0.0, 0.05]
    assert (rows[0].prompt_tokens, rows[0].generated_tokens) == (4808, 10)
    assert [round(r.at_s, 4) for r in load_trace(new, random.Random(0))] == [0.0, 0.9901]


def test_mooncake_stamps_are_spread_inside_their_grid_cell(tmp_path: Path) -> None:
    lines = [json.dumps({"timestamp": 3000 * (k // 50), "input_length": 6758, "output_length": 500, "hash_ids": [0]})
             for k in range(500)]  # fmt: skip
    path = _write(tmp_path / "c.jsonl.gz", "\n".join(lines))
    times = np.array([row.at_s for row in load_trace(path, random.Random(0))])
    assert len(np.unique(times)) == 500
    counts = np.histogram(times, bins=np.arange(0.0, 30.0, 1.0))[0]
    assert counts.var() / counts.mean() < 2.5, "one second counts are not a grid any more"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "TIME,A\n1,2\n", "columns"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,many,10\n", "line 2"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "at least 2"),
        ("x.jsonl", '{"timestamp": 0}\n', "line 1"),
        ("x.jsonl", "not json\n", "line 1"),
        ("x.txt", "", "must end with"),
    ],
)
def test_a_broken_trace_is_refused_with_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = _write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_trace(path, random.Random(0))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "count"), [("AzureLLMInferenceTrace_code.csv.gz", 8819), ("conversation_trace.jsonl.gz", 12031)]
)
def test_the_published_traces_load_whole(name: str, count: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; set SHADECAST_DATA")
    rows = load_trace(DATA / name, random.Random(0))
    assert len(rows) == count
    assert 3000 < rows[-1].at_s < 4000
    scenario = replace(find("trace")[0], trace=DATA / name, horizon_s=100.0)
    work = sum(request.work_s for request in make_world(scenario, 0).requests())
    assert 0.2 < work / 100.0 / scenario.capacity() < 2.0, "bursty, but of the order of the load"


# ---------------------------------------------------------------- forecasts


def _forecaster(kind, trace: NodeTrace, seed: int = 0, **quality: float) -> NodeForecaster:
    return NodeForecaster(kind, trace, ForecastQuality(**quality), False, random.Random(seed))


def test_a_perfect_forecast_shows_the_future_speed() -> None:
    trace = _trace(antagonists(0.35, 10.0, 30.0, 60.0))
    forecaster = _forecaster("perfect", trace)
    for at_s in range(5, 500, 7):
        forecast = forecaster.make(float(at_s), 1.0 - trace.speed_at(at_s), 0.4)
        for horizon_s, row in zip(HORIZONS_S, forecast.quantiles["cpu"], strict=True):
            assert row[1] == pytest.approx(1.0 - trace.speed_at(at_s + horizon_s), abs=1e-9)


def test_realistic_forecasts_have_the_recall_and_the_false_alarms_asked_for() -> None:
    foreseen = total = 0
    for seed in range(30):
        trace = _trace(antagonists(0.35, 10.0, 30.0, 60.0), seed, 3000.0)
        forecaster = _forecaster("realistic", trace, seed, false_alarms_per_s=0.0)
        for event in trace.events:
            forecast = forecaster.make(event.start_s - 2.0, 1.0 - trace.speed_at(event.start_s - 2.0), 0.4)
            total += 1
            foreseen += forecast.quantiles["cpu"][3][1] > 0.4  # 5 s ahead: 3 s into it
    assert foreseen / total == pytest.approx(0.7, abs=3 * math.sqrt(0.21 / total))
    calm = NodeTrace()
    calm.set_from(0.0, 1.0)
    alarms = 0
    for seed in range(40):
        forecaster = _forecaster("realistic", calm, seed, false_alarms_per_s=1 / 100.0)
        seen = [forecaster.make(float(t), 0.0, 0.4).quantiles["cpu"][5][1] > 0.4 for t in range(500)]
        alarms += sum(1 for before, now in zip([False, *seen], seen, strict=False) if now and not before)
    assert alarms / 40 == pytest.approx(5.0, rel=0.25)


def test_the_quantiles_of_every_kind_rise_and_stay_in_the_unit_interval() -> None:
    trace = _trace(crashes(60.0, 20.0, 3.0, 0.3))
    for kind in ("perfect", "realistic", "wrong"):
        forecaster = _forecaster(kind, trace)
        for t in range(300):
            forecast = forecaster.make(float(t), 1.0 - trace.speed_at(t), trace.memory_at(t))
            for rows in forecast.quantiles.values():
                assert all(0.0 <= low <= middle <= high <= 1.0 for low, middle, high in rows)


def test_a_wrong_forecast_loses_its_gate_and_its_veto_and_a_good_one_keeps_them() -> None:
    own, other = (_trace(antagonists(0.35, 10.0, 30.0, 60.0), seed, 2000.0) for seed in (1, 2))
    wrong, right = _forecaster("wrong", other), _forecaster("realistic", own)
    for t in range(1, 1000):
        load = 1.0 - own.mean_speed(t - 1.0, float(t))
        last_wrong, last_right = wrong.make(float(t), load, 0.45), right.make(float(t), load, 0.45)
    assert last_wrong.gate["cpu"] < 0.1
    assert not last_wrong.veto_allowed
    assert last_right.gate["cpu"] > 0.7


def test_a_crash_is_foreseen_only_once_memory_climbs() -> None:
    trace = _trace(crashes(120.0, 20.0, 3.0, 0.3))
    down_s = trace.downs_s[0][0]
    forecaster = _forecaster("realistic", trace, recall=1.0)
    before = forecaster.make(down_s - 9.5, 0.0, trace.memory_at(down_s - 9.5))
    climbing = forecaster.make(down_s - 7.0, 0.0, trace.memory_at(down_s - 7.0))
    assert before.quantiles["memory"][5][1] < 0.6
    assert climbing.quantiles["memory"][5][1] == pytest.approx(1.0)


def test_slo_and_throughput_of_token_streams_are_as_published() -> None:
    assert TOKENS.throughput() == pytest.approx(32 / 3)
    assert TOKENS.slo_s(2.0) == pytest.approx(8.0)
