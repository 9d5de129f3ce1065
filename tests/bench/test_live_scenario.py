"""Scenarios, metrics and the command of the live benchmark, without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from bench.live.arms import ARMS, find_arms
from bench.live.cgroups import LabError
from bench.live.chaos import chaos_scenario
from bench.live.faults import FAULTS, NEEDS_ISOLATION
from bench.live.journal import Journal, read_journal
from bench.live.metrics import Span, cpu_fractions, measure
from bench.live.report import write_markdown
from bench.live.run import Rows
from bench.live.scenario import SCENARIOS, find_scenarios, requests
from bench.live.soak import growth_per_s
from bench.live.targets import baseline, checks
from bench.results import Row, by_arm, code_version, comparable
from shadecast.config import Config

NODES = ("one", "two", "three", "four")


def record(at_s, latency_s=0.05, node="one", error="", **more):
    return {"at_s": at_s, "latency_s": latency_s, "node": node, "error": error, "tries": 1, "session": "", **more}


def result(records, unanswered=0, **more):
    return {"records": records, "unanswered": unanswered, "driver_cpu_s": 1.0, "before": {}, "after": {}} | more


def spread(until_s, rate_per_s=20, bad_from=None, bad_to=None, back_s=None):
    """Requests over four nodes; node "one" is left alone between `bad_from` and `back_s`."""
    made = []
    for i in range(int(until_s * rate_per_s)):
        at_s = i / rate_per_s
        nodes = NODES[1:] if bad_from is not None and bad_from <= at_s < back_s else NODES
        made.append(record(at_s, node=nodes[i % len(nodes)]))
    return made


def test_every_arm_gets_the_same_requests_and_every_seed_others():
    for scenario in SCENARIOS.values():
        if not scenario.trace:
            assert requests(scenario, 1) == requests(scenario, 1)
            assert requests(scenario, 1) != requests(scenario, 2)


@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if not s.trace and s.kind != "stream"])
def test_a_run_has_about_two_thousand_requests_after_the_warm_up(name):
    counted = [r for r in requests(SCENARIOS[name], 0) if r.at_s >= 0.0]
    few = SCENARIOS[name].rate_per_s < 10.0  # such a run would last seven minutes
    assert len(counted) >= (500 if few else 1800)
    assert max(r.at_s for r in counted) <= SCENARIOS[name].length_s


def test_streams_last_two_to_twenty_seconds():
    scenario = SCENARIOS["streams"]
    lengths_s = [r.items * scenario.item_gap_s for r in requests(scenario, 0)]
    assert 1.9 <= min(lengths_s) < 4.0
    assert 15.0 < max(lengths_s) <= 20.2


def test_every_fault_of_every_scenario_can_be_made_and_fits_into_the_run():
    for scenario in SCENARIOS.values():
        for fault in scenario.faults:
            assert fault.kind in FAULTS
            assert fault.start < fault.end
    assert set(FAULTS) >= NEEDS_ISOLATION


def test_chaos_kills_and_hogs_all_the_time_with_a_quiet_end_and_sends_as_many_streams_as_asked_for():
    scenario = chaos_scenario(10_000, 0)
    assert {fault.kind for fault in scenario.faults} == {"replica_kill", "hog"} <= set(FAULTS)
    assert {fault.value for fault in scenario.faults if fault.kind == "hog"} == {1, 2, 8}
    assert all(before.end <= after.start for before, after in pairwise(scenario.faults)), "one after the other"
    assert scenario.faults[-1].end * scenario.length_s < scenario.length_s - 15.0
    sent = requests(scenario, 0)
    assert len(sent) > 10_000
    assert min(request.items for request in sent) >= 2


def test_chaos_is_passed_only_where_streams_did_go_on_elsewhere_and_none_was_wrong():
    scenario = chaos_scenario(1000, 0)

    def stream(at_s, error="", moves=0):
        return record(at_s, error=error) | {"items": 10, "first_item_s": 0.1, "moves": moves}

    for wrong, moves, met in (("", 1, [True] * 3), ("wrong", 1, [False, True, True]), ("", 0, [True, True, False])):
        rows = [stream(float(i), moves=moves * (i % 9 == 0)) for i in range(80)] + [stream(81.0, wrong)]
        found = {metric: [value] for metric, value in measure(scenario, result(rows), []).items()}
        assert [check.met for check in checks(scenario.name, {"shadecast": found}, {})] == met


def test_our_arms_have_valid_settings():
    for arm in ARMS.values():
        if arm.config is not None:
            Config.from_mapping(arm.config)


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(LabError, match="known are default, round_robin"):
        find_arms("default,fastest")
    with pytest.raises(LabError, match="soak, calm, hog"):
        find_scenarios("hogg")
    with pytest.raises(LabError, match="is empty"):
        find_scenarios(" , ")


def test_quantiles_leave_out_the_warm_up_and_failures_count_as_misses():
    scenario = replace(SCENARIOS["calm"], requests=100, rate_per_s=10, slo_s=0.1)
    rows = (
        [record(-1.0, 9.0)] + [record(i / 10, 0.05) for i in range(98)] + [record(9.8, 0.5), record(9.9, error="lost")]
    )
    found = measure(scenario, result(rows, unanswered=1), [])
    assert found["requests"] == 101
    assert found["p999_s"] == 0.5
    assert found["slo_miss_fraction"] == pytest.approx(3 / 101)
    assert (found["errors"], found["errors_lost"], found["errors_unanswered"], found["lost"]) == (2, 1, 1, 2)
    assert found["goodput_per_s"] == pytest.approx(9.8)


def test_a_coordinator_that_was_killed_begins_to_count_anew_and_nothing_is_lost():
    def counts(finished, mirrored, rescued):
        return {"finished": finished, "mirrored": mirrored, "rescued": rescued}

    states = [counts(100, 10, 0), counts(200, 20, 2), {"mirrored": None}, counts(0, 0, 0), counts(150, 0, 1)]
    ends = {"before": {"deployment": counts(50, 5, 0)}, "after": {"deployment": counts(200, 0, 1)}}
    found = measure(SCENARIOS["calm"], result([record(0.0)], states=states, **ends), [])
    assert (found["mirrored"], found["rescued"]) == (15, 3)
    assert found["mirrored_fraction"] == pytest.approx(15 / 350)
    new = measure(SCENARIOS["calm"], result([record(0.0)], states=states, **ends | {"before": None}), [])
    assert (new["mirrored"], new["rescued"]) == (20, 3)


def test_processes_that_were_killed_say_nothing_of_a_runs_cpu():
    before = {"coordinator": {1: 10.0}, "forecasters": {2: 1.0, 3: 2.0}}
    after = {"coordinator": {9: 0.5}, "forecasters": {2: 2.0, 4: 0.1}}
    assert cpu_fractions(before, after, 100.0) == {"forecasters_cpu_fraction": pytest.approx(0.01)}


def test_a_run_is_written_down_as_it_goes_and_read_back_as_valid_json(tmp_path):
    path = tmp_path / "result.jsonl"
    with Journal(path) as journal:
        journal.add("before", {})
        journal.add("state", {"at_s": 0.5, "background": {"one": float("nan")}})
        for at_s in (0.0, 1.0):
            journal.add("record", record(at_s))
        journal.add("unanswered", 3)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found = read_journal(path)
    assert found["records"] == [record(0.0), record(1.0)]
    assert found["states"] == [{"at_s": 0.5, "background": {"one": None}}]
    assert (found["before"], found["unanswered"]) == ({}, 3)


def test_seconds_until_the_bad_node_is_avoided_and_used_again():
    scenario = replace(SCENARIOS["hog"], requests=1200, rate_per_s=20)
    span = Span("hog", 20.0, 40.0, "one", bad=True)
    rows = spread(60.0, bad_from=23.0, back_s=45.0)
    found = measure(scenario, result(rows), [span])
    assert found["avoided_s"] == pytest.approx(2.5, abs=0.6)  # a window of 2 s reaches a third of the share before
    assert found["used_again_s"] == pytest.approx(4.0, abs=0.7)
    assert found["share_bad_node"] == pytest.approx(3 / 20 * 0.25, abs=0.01)


def test_a_node_that_is_never_avoided_counts_with_the_whole_time():
    scenario = replace(SCENARIOS["hog"], requests=1200, rate_per_s=20)
    found = measure(scenario, result(spread(60.0)), [Span("hog", 20.0, 40.0, "one", bad=True)])
    assert found["avoided_s"] == 20.0
    assert found["share_bad_node"] == pytest.approx(0.25, abs=0.01)


def test_streams_are_judged_by_first_item_and_pace():
    scenario = replace(SCENARIOS["streams"], requests=2, rate_per_s=1)
    fast = record(0.0, 2.1, first_item_s=0.1, items=11)
    slow = record(1.0, 8.1, first_item_s=0.1, items=11)
    found = measure(scenario, result([fast, slow]), [])
    assert found["slo_miss_fraction"] == 0.5
    assert found["item_slowdown_p99"] == pytest.approx(4.0)
    assert found["first_item_p99_s"] == 0.1


def test_sessions_that_leave_a_bad_node_are_moved_but_not_strayed():
    scenario = replace(SCENARIOS["sessions-hot"], requests=4, rate_per_s=1)
    nodes = ["one", "one", "two", "three"]
    rows = [record(float(i), node=node, session="s") for i, node in enumerate(nodes)]
    found = measure(scenario, result(rows), [Span("hog", 1.5, 3.0, "one", bad=True)])
    assert found["sessions_moved"] == 2
    assert found["session_stay_fraction_well"] == pytest.approx(2 / 3)


def test_rows_are_saved_after_every_run_and_resumed(tmp_path):
    path = tmp_path / "live.json"
    rows = Rows(path, resume=False)
    rows.add([Row("hog", "default", 0, "p99_s", 1.5)])
    assert json.loads(path.read_text()) == [
        {"scenario": "hog", "arm": "default", "seed": 0, "metric": "p99_s", "value": 1.5, "code": code_version()}
    ]
    again = Rows(path, resume=True)
    assert again.done("hog", "default", 0)
    assert not again.done("hog", "default", 1)
    again.add([Row("hog", "default", 1, "p99_s", 2.5)])
    assert by_arm(Rows(path, resume=True).rows, "hog", ARMS)["default"]["p99_s"] == [1.5, 2.5]


def test_what_is_of_older_code_is_run_again_and_replaced_where_that_is_asked_for(tmp_path):
    path = tmp_path / "live.json"
    old = Row("hog", "shadecast", 0, "p99_s", 1.5, "before 0059")
    Rows(path, resume=False).add([old, Row("hog", "default", 0, "p99_s", 9.0, "c1")])
    assert Rows(path, resume=True).done("hog", "shadecast", 0)
    rows = Rows(path, resume=True, renew=True)
    assert not rows.done("hog", "shadecast", 0)
    assert rows.done("hog", "default", 0)
    rows.add([Row("hog", "shadecast", 0, "p99_s", 0.5, "c2")])
    assert [(row.arm, row.value, row.code) for row in rows.rows] == [("default", 9.0, "c1"), ("shadecast", 0.5, "c2")]
    assert rows.done("hog", "shadecast", 0)


def test_arms_stand_side_by_side_with_the_newest_code_and_the_seeds_that_ours_has():
    old = [Row("hog", arm, seed, "p99_s", 1.0, code) for seed in (0, 1) for arm, code in
           (("default", "c1"), ("shadecast", "before 0059"), ("live_capacity", "before 0054"))]  # fmt: skip
    assert comparable(old) == old
    new = [Row("hog", arm, seed, "p99_s", 2.0, "c2") for seed in (1, 7) for arm in ("default", "shadecast")]
    left = {(row.arm, row.seed, row.code) for row in comparable(old + new)}
    assert left == {("shadecast", 1, "c2"), ("shadecast", 7, "c2"), ("default", 1, "c1"), ("default", 1, "c2"),
                    ("default", 7, "c2"), ("live_capacity", 1, "before 0054")}  # fmt: skip
    apart = [Row("hog", "default", 3, "p99_s", 1.0, "c1"), Row("hog", "shadecast", 4, "p99_s", 1.0, "c1")]
    assert comparable(apart) == apart, "other seeds are better than none"


def fill(arm, **metrics):
    return [Row("hog", arm, seed, name, value) for name, values in metrics.items() for seed, value in enumerate(values)]


def test_targets_are_ratios_to_the_arms_measured_beside_it():
    rows = fill("default", p99_s=[1.0, 1.0], p999_s=[20.0, 20.0]) + fill("oracle", p99_s=[0.1, 0.2], p999_s=[0.2, 0.2])
    good = by_arm(rows + fill("shadecast", p99_s=[0.12, 0.2], p999_s=[0.24, 0.24]), "hog", ARMS)
    assert [check.met for check in checks("hog", good, {})] == [True, True, True]
    slow = by_arm(rows + fill("shadecast", p99_s=[0.2, 0.4], p999_s=[5.0, 5.0]), "hog", ARMS)
    assert [check.met for check in checks("hog", slow, {})] == [False, False, False]
    more = by_arm(rows + fill("shadecast", p99_s=[0.1, 0.2, 9.0], p999_s=[0.2, 0.2, 9.0]), "hog", ARMS)
    assert [check.measured for check in checks("hog", more, {})] == ["1.000 x", "1.000 x", "0.010 x"]


def test_each_of_equal_nodes_is_to_have_about_its_part_of_every_half_minute():
    scenario = SCENARIOS["calm"]
    nodes = ["a", "b", "c", "d"]
    even = [record(i / 24, node=nodes[i % 4]) for i in range(2000)]
    starved = [{**r, "node": "a"} if r["node"] == "b" and 20.0 < r["at_s"] < 45.0 else r for r in even]
    for rows, text, met in ((even, "25 to 25 %", True), (starved, "4 to 46 %", False)):
        found = measure(scenario, result(rows), [])
        judged = checks("calm", {"shadecast": {name: [value] for name, value in found.items()}}, {})
        (check,) = [each for each in judged if "half minute" in each.text]
        assert (check.measured, check.met) == (text, met)


def test_calm_is_judged_by_the_clock_and_by_the_pace_that_the_machine_had_in_each_run():
    good, pace = [24.0] * 3, [0.01, 0.015, 0.01]
    rows = fill("default", p50_s=[0.02, 0.03, 0.02], goodput_per_s=good, forecasters_cpu_fraction=pace)
    ours = fill("shadecast", goodput_per_s=good, p50_s=[0.03] * 3, forecasters_cpu_fraction=[0.015, 0.015, 0.015])
    by_clock, by_pace = checks("calm", by_arm(rows + ours, "hog", ARMS), {})[:2]
    assert (by_clock.met, by_pace.met) == (False, True)
    assert by_pace.measured == "1.000 x (1.00 to 1.00)"
    slower = fill("shadecast", goodput_per_s=good, p50_s=[0.03] * 3, forecasters_cpu_fraction=[0.013, 0.014, 0.013])
    assert not checks("calm", by_arm(rows + slower, "hog", ARMS), {})[1].met


def test_misses_are_pooled_over_seeds_and_the_forecasts_own_part_is_paired():
    rows = fill("default", slo_miss_fraction=[0.0, 0.04]) + fill("live_capacity", slo_miss_fraction=[0.01, 0.02])
    for ours, met in (([0.0, 0.004], [True, True]), ([0.0, 0.02], [False, True]), ([0.02, 0.03], [False, False])):
        found = by_arm(rows + fill("shadecast", slo_miss_fraction=ours), "hog", ARMS)
        assert [check.met for check in checks("streams-periodic", found, {})] == met
    none = by_arm(fill("default", slo_miss_fraction=[0.0]) + fill("shadecast", slo_miss_fraction=[0.01]), "hog", ARMS)
    assert [(check.met, check.measured) for check in checks("streams", none, {})] == [(False, "inf x")]
    more = by_arm(
        fill("default", slo_miss_fraction=[0.1]) + fill("shadecast", slo_miss_fraction=[0.02, 0.0]), "hog", ARMS
    )
    assert [check.measured for check in checks("streams", more, {})] == ["0.200 x"]


@pytest.mark.parametrize(
    ("name", "fair", "most"), [("newcomer-slow", "newcomer-none", 1.05), ("coordinator-kill", "calm", 1.1)]
)
def test_faults_that_should_cost_nothing_are_judged_beside_the_same_requests_without_them(name, fair, most):
    assert baseline(name) == fair
    assert requests(SCENARIOS[name], 3) == requests(SCENARIOS[fair], 3)
    without = {"shadecast": {"p99_s": [0.1]}}
    for factor, met in ((0.99, True), (1.01, False)):
        found = {"shadecast": {"p99_s": [0.1 * most * factor], "errors": [0.0], "error_fraction": [0.0]}}
        assert [check.met for check in checks(name, found, without)] == [True, met]


def test_growth_is_that_of_processes_that_were_there_throughout_the_second_half():
    times_s = [10.0 * i for i in range(41)]
    seen = [
        ("steady", [(t, 5e8) for t in times_s]),
        ("leaks", [(t, 1e8 + 1000.0 * t) for t in times_s]),
        ("leaks", [(t, 1e8) for t in times_s]),
        ("fills up", [(t, min(t, 100.0) * 1e6) for t in times_s]),
        ("started late", [(t, 1e6 * t) for t in times_s if t > 250.0]),
        ("ended", [(t, 1e6 * t) for t in times_s if t < 300.0]),
    ]
    assert growth_per_s(seen) == pytest.approx({"steady": 0.0, "leaks": 1000.0, "fills up": 0.0}, abs=1e-3)
    assert growth_per_s([]) == {}


def test_the_page_names_targets_errors_and_too_few_requests(tmp_path):
    rows = fill("default", p99_s=[1.0], requests=[300.0], errors=[2.0], errors_lost=[2.0])
    rows += fill("shadecast", p99_s=[0.1], requests=[300.0], errors=[0.0])
    write_markdown(tmp_path / "live.md", rows, None)
    page = (tmp_path / "live.md").read_text()
    assert "QUICK" in page
    assert "Errors: default 2 lost." in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "fastest"], "known are default"),
        (["--scenario", "nothing"], "known are all, soak, calm"),
        (["--json", __file__], "is there already"),
    ],
)
def test_wrong_arguments_end_with_one_line_before_anything_is_started(words, said):
    done = subprocess.run([sys.executable, "-m", "bench.live", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
