"""`bench.llm`: the engine by arithmetic, the rules by what they must do, the traces as published."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from bench.llm.engine import BLOCK_TOKENS, Engine, Job, Machine
from bench.llm.joining import ARMS, ASSISTANTS, JOINS_S, join
from bench.llm.page import by_rule, checks
from bench.llm.routers import NOW
from bench.llm.rules import RULES
from bench.llm.run import simulate
from bench.llm.settings import settings
from bench.llm.traffic import TOOLS, Agents, agents, ceiling, numbered, tool_calls, trace

PLAIN = Machine(prefill_per_s=10_000.0, base_s=0.01, sequence_s=0.001, token_s=0.0, chunk_tokens=2048)


def job(number, tokens, answer, path="", at_s=0.0):
    hashes = [f"{path or number}/{i}".encode() for i in range(tokens // BLOCK_TOKENS)]
    return Job(number, at_s, hashes, tokens, answer)


def run(machine, jobs, speed=1.0):
    """Serve jobs on one engine, each at its time."""
    engine, left = Engine(machine, speed), sorted(jobs, key=lambda each: each.at_s)
    while left or engine.due_s < float("inf"):
        if left and left[0].at_s <= engine.due_s:
            engine.submit(left[0], left[0].at_s)
            left.pop(0)
        else:
            engine.advance()
    return jobs


def test_one_request_takes_its_prefill_and_a_step_for_each_token():
    (one,) = run(PLAIN, [job(0, 5000, 11)])
    assert one.first_s == pytest.approx(5000 / 10_000 + 3 * 0.01)  # in 3 chunks, a step each
    assert one.end_s - one.first_s == pytest.approx(10 * 0.011)


def test_a_slow_replica_takes_so_much_longer():
    (one,) = run(PLAIN, [job(0, 5000, 11)], speed=0.5)
    assert (one.first_s, one.end_s - one.first_s) == (pytest.approx(1.06), pytest.approx(2 * 10 * 0.011))


def test_a_replica_that_gets_slower_is_so_from_its_next_step_on():
    engine, one = Engine(PLAIN), job(0, 1000, 101)
    engine.submit(one, 0.0)
    engine.advance()
    engine.set_speed(0.5, one.first_s + 50 * 0.011 - 0.001)
    while engine.due_s < float("inf"):
        engine.advance()
    assert one.end_s - one.first_s == pytest.approx((50 + 2 * 50) * 0.011, abs=0.012)


def test_an_engine_tells_what_is_to_be_computed_and_held_and_in_the_end_nothing():
    engine = Engine(PLAIN)
    jobs = [job(0, 5000, 20, "x"), job(1, 5000, 20, "x"), job(2, 3000, 20, "y")]
    for each in jobs:
        engine.submit(each, 0.0)
    assert (engine.pending_tokens, engine.held_tokens) == (13_000, 13_060)
    while not engine.decoding:
        engine.advance()
    assert engine.cached_tokens(jobs[1].hashes) == 9 * BLOCK_TOKENS
    while engine.due_s < float("inf"):
        engine.advance()
    assert (engine.pending_tokens, engine.held_tokens, engine.requests, engine.blocks_in_use) == (0, 0, 0, 0)


def test_those_who_decode_wait_for_a_prompt_that_comes_meanwhile():
    first, second = run(PLAIN, [job(0, 1000, 101), job(1, 1000, 2, at_s=0.5)])
    alone_s = 0.11 + 100 * 0.011
    assert second.end_s > second.first_s > 0.5 + 0.11
    assert first.end_s == pytest.approx(alone_s + 0.1 + 0.001, abs=0.002), (
        "its prefill, and one step in which two decode"
    )


def test_what_was_computed_is_not_computed_again_and_only_whole_blocks_are():
    jobs = run(PLAIN, [job(0, 5000, 2, "x"), job(1, 5000, 2, "x", at_s=5.0), job(2, 5000, 2, "y", at_s=10.0)])
    assert [each.hits for each in jobs] == [0, 9 * BLOCK_TOKENS, 0]
    assert jobs[1].first_s - 5.0 == pytest.approx(0.01 + (5000 - 9 * BLOCK_TOKENS) / 10_000.0)


def test_the_least_recently_used_prompt_is_dropped_first_from_its_end():
    small = Machine(gpu_tokens=12_000, cache_tokens=12_000)
    paths = ("x", "y", "x", "z", "x", "y")
    jobs = run(small, [job(i, 5120, 2, path, at_s=10.0 * i) for i, path in enumerate(paths)])
    assert [each.hits for each in jobs] == [0, 0, 5119, 0, 5119, 3 * BLOCK_TOKENS], "23 blocks fit"


def test_requests_wait_in_order_while_their_context_does_not_fit():
    small = Machine(gpu_tokens=12_000, cache_tokens=12_000)
    jobs = run(small, [job(i, 5000, 500) for i in range(4)])
    assert jobs[2].first_s > min(jobs[0].end_s, jobs[1].end_s)
    assert [each.number for each in sorted(jobs, key=lambda each: each.first_s)] == [0, 1, 2, 3]


def test_nothing_is_left_in_use_when_all_have_ended():
    """Each of the same requests later finds the engine as it was: accounts that leak would stop it."""
    small = Machine(gpu_tokens=30_000, cache_tokens=30_000)
    for seed in range(3):
        jobs = agents(Agents(prompts=3), 0.4, 1000.0, seed)
        assert all(each.end_s > each.first_s > each.at_s or each.answer_tokens == 1 for each in run(small, jobs))


@pytest.mark.parametrize(
    ("shape", "prompt", "answer", "shared"), [(TOOLS, 8_596, 182, 0.59), (Agents(), 15_000, 180, 0.9)]
)
def test_drawn_traffic_has_its_shape(shape, prompt, answer, shared):
    jobs = agents(shape, 6.0, 600.0, 0)
    assert sum(each.prompt_tokens for each in jobs) / len(jobs) == pytest.approx(prompt, rel=0.2)
    assert sum(each.answer_tokens for each in jobs) / len(jobs) == pytest.approx(answer, rel=0.1)
    assert ceiling(jobs) == pytest.approx(shared, abs=0.06)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_serves_everybody_with_one_router_and_with_three(name):
    jobs = agents(Agents(prompts=4), 4.0, 40.0, 1)
    for routers in (1, 3):
        result = simulate(RULES[name], jobs, Machine(), (1.0, 1.0, 0.5), routers=routers)
        assert result.requests == len(jobs) == len({each.number for each in jobs})
        assert 0.0 <= result.hit_fraction <= ceiling(jobs) + 1e-9
        assert 1.0 <= result.busiest <= 3.0
    assert all(each.end_s != each.end_s for each in jobs), "the caller's requests are not touched"


def test_agents_are_served_better_where_their_prefixes_are_known():
    jobs = agents(Agents(), 6.0, 150.0, 3)
    found = {name: simulate(RULES[name], jobs, Machine(), (1.0,) * 4) for name in ("power of two (Serve)", NOW)}
    serve, ours = found.values()
    assert ours.hit_fraction > serve.hit_fraction + 0.2
    assert ours.mean_s < 0.8 * serve.mean_s


def test_prompts_leave_a_slow_replica_that_has_them():
    """Ray's rule stays with the longest match, however long that takes."""
    jobs = agents(Agents(), 6.0, 150.0, 3)
    ray, ours = (simulate(RULES[name], jobs, Machine(), (1.0, 1.0, 1.0, 0.2)) for name in ("Ray prefix router", NOW))
    assert ours.ttft_p99_s < 0.5 * ray.ttft_p99_s


def test_a_trial_by_copies_fills_a_newcomers_cache_before_its_first_live_request():
    jobs = agents(ASSISTANTS, 6.0, JOINS_S + 100.0, 1)
    untried, *_, trial = (join(arm, jobs, Machine(), seed=1) for arm in ARMS)
    assert (untried.copies, untried.waited_s) == (0, pytest.approx(0.0, abs=2.0))
    assert trial.copies >= 25
    assert 3.0 <= trial.waited_s <= 31.0
    assert trial.hits > untried.hits + 0.05
    assert trial.first_mean_s < untried.first_mean_s
    assert all(each.end_s != each.end_s for each in jobs), "the caller's requests are not touched"


def test_routers_that_exchange_decisions_find_more_than_those_that_do_not():
    jobs = agents(Agents(prompts=60, zipf=0.3), 6.0, 150.0, 2)
    hits = {
        name: simulate(RULES[name], jobs, Machine(), (1.0,) * 4, routers=4).hit_fraction
        for name in (NOW, "decisions not exchanged")
    }
    assert hits[NOW] > hits["decisions not exchanged"] + 0.05


def test_published_traces_are_read_as_they_are(tmp_path):
    mooncake, azure = tmp_path / "t.jsonl.gz", tmp_path / "t.csv"
    rows = [
        {"timestamp": 500 * i, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1 + i % 2, 9]}
        for i in range(20)
    ]
    mooncake.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2023-11-16 18:17:{i:02}.9799600,1100,10\n" for i in range(20)
    ))  # fmt: skip
    jobs = trace(mooncake, 0, 2.0, 10.0)
    assert len(jobs) == 20
    assert jobs[0].hashes == jobs[2].hashes != jobs[1].hashes
    assert [len(each.hashes) for each in jobs[:3]] == [2, 2, 2], "the block that is not whole is nobody's"
    assert ceiling(trace(azure, 0, 2.0, 10.0)) == 0.0
    assert [each.number for each in numbered(jobs)] == list(range(20))
    assert [each.session for each in jobs[:4]] == [0, 1, 0, 1], "who begins with a whole prompt of before goes on"
    mooncake.write_bytes(gzip.compress(b'{"timestamp": 1}\n'))
    with pytest.raises(ValueError, match="line 1: KeyError"):
        trace(mooncake, 0, 1.0, 1.0)


def test_stamps_of_three_seconds_are_spread(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 3001 * (i // 10), "input_length": 600, "output_length": 5, "hash_ids": [i]} for i in range(100)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    one, other = (trace(path, seed, 10.0 / 3.0, float("inf")) for seed in (0, 1))
    assert len({each.at_s for each in one}) == 100
    assert [each.at_s for each in one] != [each.at_s for each in other], "seeds differ in when requests come"
    assert all(later.at_s - each.at_s < 3.0 for each, later in pairwise(one))


def test_tool_calls_have_the_shape_that_was_counted():
    jobs = tool_calls(20.0, 300.0, 0)
    short = sum(each.answer_tokens < 60 for each in jobs) / len(jobs)
    assert short == pytest.approx(0.58, abs=0.05)
    assert sum(each.prompt_tokens for each in jobs) / len(jobs) == pytest.approx(8_500, rel=0.2)
    assert ceiling(jobs) == pytest.approx(0.6, abs=0.06)


def test_traces_of_the_public_folder_give_their_published_shape():
    for setting in settings():
        if setting.needs is None or not setting.needs.is_file():
            continue
        jobs = setting.make(0, 0.2)
        assert len(jobs) > 100
    if not any(setting.needs is not None and setting.needs.is_file() for setting in settings()):
        pytest.skip("no public traces: set SHADECAST_DATA")


def test_the_command_compares_rules_and_leaves_out_what_is_not_there(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.llm", "--seeds", "1", "--load", "0.05", "--traces", str(tmp_path)]
    command += ["--setting", "agents", "--setting", "conversation", "--rule", "least requests", "--json", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "conversation: left out" in ran.stdout
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["setting"], row["rule"], row["seed"]) == ("agents", "least requests", 0)
    assert {"slo_fraction", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "hit_fraction", "mean_s"} <= row.keys()
    row["mean_s"] = 7.5  # as if it had been another run
    path.write_text(json.dumps({"rows": [row]}))
    page = tmp_path / "page.md"
    more = ["--resume", "--markdown", str(page), "--rule", NOW, "--rule", "Ray prefix router"]
    ran = subprocess.run(command + more, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads(path.read_text())["rows"]
    assert [each["rule"] for each in rows] == ["least requests", NOW, "Ray prefix router"]
    assert rows[0] == row, "what is there is not run again"
    assert "| least requests |" in page.read_text()
    assert "| agents | in SLO >= the best rival's - 0.01 |" in page.read_text()


@pytest.mark.parametrize(
    ("mine", "verdicts"),
    [
        ((0.88, 20.0, 5.0), [True, True, True, True]),
        ((0.86, 20.0, 5.0), [False, False, True, True]),
        ((0.88, 22.0, 5.6), [True, True, False, False]),
    ],
)
def test_the_page_says_which_targets_are_met(mine, verdicts):
    def row(rule, slo, pace, p99, hits=0.5):
        return {
            "setting": "x", "rule": rule, "seed": 0, "slo_fraction": slo, "ttft_p50_s": 1.0, "ttft_p99_s": p99,
            "tpot_p50_ms": pace, "mean_s": 3.0, "hit_fraction": hits,
        }  # fmt: skip

    rows = [row("Ray prefix router", 0.79, 21.0, 9.0), row("LMetric", 0.88, 23.0, 5.0), row(NOW, *mine)]
    setting = replace(settings()[0], name="x", speeds=(0.4, 1.0, 1.0))
    assert [check.met for check in checks(setting, by_rule(rows, "x"))] == verdicts
