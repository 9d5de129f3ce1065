"""`bench.llm_real` and `examples.llm` as far as they go without vLLM: requests, numbers, page, what is missing."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from bench.llm_real import report
from bench.llm_real.arms import ARMS, FIRST, SCENARIOS
from bench.llm_real.client import Answer, columns, from_columns
from bench.llm_real.workload import conversations
from examples.llm import serving

TALKS = SCENARIOS["conversations"].traffic


def run(arm, answers, *, scenario="conversations", seed=0, hits=50.0, phase="steady", copies=(0, 0)):
    """A run as it is written to a file."""
    counted = {"seconds": 10.0, "hits": hits, "queries": 100.0}
    phases = dict.fromkeys({phase, "steady", "hog" if scenario == "conversations" else "newcomer"}, counted)
    made = {"scenario": scenario, "arm": arm, "seed": seed, "phases": phases, "copies": list(copies)}
    return json.loads(json.dumps({**made, "requests": columns(answers)}))


def answers(first_s, *, phase="steady", count=20, place=0):
    return [
        Answer(float(i), i % 4, phase, place=place, first_s=first_s, end_s=2 * first_s, tokens=24) for i in range(count)
    ]


def test_every_arm_sends_the_same_bytes():
    one, other = (conversations(TALKS, 3, 60.0) for _ in range(2))
    assert [talk.messages(3) for talk in one] == [talk.messages(3) for talk in other]
    assert [talk.at_s for talk in one] == [talk.at_s for talk in other]
    assert conversations(TALKS, 4, 60.0)[0].messages(0) != one[0].messages(0)


def test_a_turn_begins_with_all_of_the_one_before():
    for talk in conversations(TALKS, 0, 20.0):
        for turn in range(1, TALKS.turns):
            assert talk.messages(turn)[: 2 * turn] == talk.messages(turn - 1)
            assert talk.messages(turn)[2 * turn]["role"] == "assistant"


def test_conversations_share_twenty_beginnings_some_more_than_others():
    talks = conversations(TALKS, 0, 2000.0)
    assert len(talks) == pytest.approx(2000 * TALKS.per_s, rel=0.1)
    shared = Counter(talk.instruction for talk in talks)
    assert len(shared) == TALKS.prefixes == 20
    assert shared.most_common()[0][1] > 3 * shared.most_common()[-1][1]


def test_a_request_without_an_answer_took_for_ever_and_is_an_error():
    found = report.Found(10.0, 1.0, 4.0, [*answers(0.1, count=99), Answer(0.0, 0, "steady", error="cut off")])
    assert found.errors == 1
    assert found.first_s(0.99) == 0.1
    assert found.first_s(1.0) == math.inf
    assert found.hit_share == 0.25
    assert found.tokens_per_s == pytest.approx(99 * 24 / 10)


def test_answers_survive_a_file():
    given = [*answers(0.25, count=3), Answer(1.0, 2, "hog", error="ReadError: ")]
    back = from_columns(json.loads(json.dumps(columns(given))))
    assert back[:3] == given[:3]
    assert math.isnan(back[3].first_s)
    assert back[3].error == "ReadError: "


def test_targets_are_judged_by_the_numbers():
    def verdicts(ours_s, hog_s, hits):
        runs = [
            run(report.RAY, [*answers(0.2), *answers(1.0, phase="hog")]),
            run(report.OURS, [*answers(ours_s), *answers(hog_s, phase="hog")], hits=hits),
        ]
        return [check.met for check in report.checks(runs)]

    assert verdicts(0.19, 0.5, 50.0) == [True, True, True]
    assert verdicts(0.21, 0.51, 49.0) == [False, False, False]


def test_no_target_is_judged_by_seeds_that_only_one_arm_has():
    assert report.checks([run(report.RAY, answers(0.2), seed=0), run(report.OURS, answers(0.2), seed=1)]) == []


def test_a_newcomer_is_judged_by_its_first_live_requests():
    late = [replace(each, sent_s=each.sent_s + 1000.0) for each in answers(9.0, phase="newcomer", count=50, place=2)]
    early = answers(0.1, phase="newcomer", count=FIRST, place=2)
    others = answers(5.0, phase="newcomer", count=50, place=1)
    ours = run(report.OURS, [*late, *others, *early], scenario="newcomer", copies=(0, 0, 7))
    numbers = {row.metric: row.value for row in report.rows_of(ours)}
    assert numbers["newcomer_requests"] == FIRST
    assert numbers["newcomer_first_p50_s"] == numbers["newcomer_first_p99_s"] == 0.1
    assert numbers["newcomer_copies"] == 7


def test_the_page_says_what_was_missed_and_has_the_notes_beside_it(tmp_path):
    (tmp_path / "llm-notes.md").write_text("Not run: half of it.")
    runs = [run(report.RAY, answers(0.2)), run(report.OURS, answers(0.3), hits=60.0)]
    report.write_page(tmp_path / "llm.md", {"python": "3"}, runs)
    page = (tmp_path / "llm.md").read_text()
    assert "Not run: half of it." in page
    assert "| 0.600 and 0.500 | met |" in page
    assert "1.50 (0.300 and 0.200 s) | **missed** |" in page
    assert f"| {report.RAY} | 1 | 20 | 0 | 0.500 |" in page


def test_every_scenario_names_arms_that_are_there():
    for scenario in SCENARIOS.values():
        assert set(scenario.arms) <= set(ARMS)


@pytest.mark.parametrize("module", ["examples.llm", "bench.llm_real"])
def test_without_vllm_it_says_how_to_install_it(module):
    code = (
        "import runpy, sys; sys.modules['vllm'] = None; sys.argv = [sys.argv[1]];"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stdout + done.stderr
    assert "examples.llm needs vllm" in said
    assert "examples/llm/install.sh .venv-llm" in said
    assert "Traceback" not in said


def test_nothing_is_missing_only_where_all_is_installed(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None if name == "mmh3" else object())
    assert serving.missing().startswith("examples.llm needs mmh3, not installed here")
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _: object())
    assert serving.missing() == ""
