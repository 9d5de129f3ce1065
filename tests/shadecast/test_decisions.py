"""Decisions that are kept to be explained: which, how many, what they say, and what they cost nobody."""

from __future__ import annotations

import json
import math
import random

import pytest

from shadecast.decisions import (
    MOST_BYTES,
    MOST_CANDIDATES,
    QUESTIONS,
    Decision,
    Limit,
    Question,
    Ring,
    answer,
    candidates,
    check,
    looked_at,
    questions,
    to_plain,
)
from shadecast.explain import explain_decision
from shadecast.pick import PickTable, cost_table
from shadecast.types import RoutingTable, State, TableRow


def picks_of(count: int, shares: tuple[float, ...] = (1.0,), **more: object) -> tuple[PickTable, RoutingTable]:
    rows = tuple(
        TableRow(
            f"r{i:03d}", f"n{i}", State.ACTIVE, shares[i % len(shares)], 0.4 + (i % 7) / 10, float(i % 3),
            live_capacity=0.5 + (i % 7) / 10,
        )
        for i in range(count)
    )  # fmt: skip
    table = RoutingTable("app/model", 1, 1, 3, rows, 2.0)
    mine = {row.replica_id: i % 2 for i, row in enumerate(rows)}
    return PickTable([row.replica_id for row in rows], table, mine, mine, cost_table(2.0, 0.0), **more), table


def decision(request_id: str = "q", at_s: float = 0.0, special: str = "", **more: object) -> Decision:
    return Decision(request_id, "predict", at_s, "table", "r001", special, **more)


# ---------------------------------------------------------------- which are kept


def test_however_many_special_decisions_there_are_few_a_second_are_kept():
    limit = Limit()
    kept = sum(limit.take(1000.0 + i / 10_000) for i in range(100_000))  # 10 s
    assert 100 <= kept <= 125


def test_special_ones_are_kept_at_once_after_a_quiet_time():
    limit = Limit()
    assert sum(limit.take(0.0) for _ in range(100)) == 20
    assert sum(limit.take(1.0) for _ in range(100)) == 10


def test_many_usual_ones_do_not_push_out_the_special_ones_and_the_ring_is_bounded():
    ring = Ring(16)
    ring.add(decision("rare", 0.0, "waited"))
    for i in range(1000):
        ring.add(decision(f"q{i}", 1.0 + i))
        ring.add(decision(f"came-{i}", 0.5, "came back"))
    assert len(ring) == 16 + 32 + 1
    assert [d.request_id for d in ring.last()][:2] == ["q999", "q998"]
    assert [d.special for d in ring.of("rare")] == ["waited"]
    assert ring.of("q0") == []


def test_a_request_that_was_decided_twice_has_both_the_newest_first():
    ring = Ring()
    ring.add(decision("q", 1.0))
    ring.add(decision("q", 2.0, "retried"))
    assert [d.special for d in ring.of("q")] == ["retried", ""]


def test_an_id_of_any_length_is_kept_shortened_and_found():
    ring = Ring()
    ring.add(decision("x" * 100_000))
    (kept,) = ring.of("x" * 100_000)
    assert len(kept.request_id) == 128


def test_a_copy_is_noted_with_the_decision_that_it_belongs_to():
    ring = Ring()
    ring.add(decision("q"))
    ring.copied("another", "r009")
    ring.copied("q", "r007")
    assert [d.copied_to for d in ring.last()] == ["r007"]
    assert "A copy of it went to r007, which is on trial." in explain_decision(to_plain(ring.of("q")[0], 0.0))


# ---------------------------------------------------------------- what they say


class Read(list):  # type: ignore[type-arg]
    """Scores that note which of them are read."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(scores)
        self.seen: set[int] = set()

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        self.seen.add(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 64, 500])
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.2), (0.1,)])
@pytest.mark.parametrize("part", [False, True])
def test_what_was_looked_at_is_what_the_pick_compared(count, shares, part):
    picks, _ = picks_of(count, shares)
    pool = picks.pool[: max(count // 2, 1)] if part else None
    rng = random.Random(count)
    for _ in range(20):
        draws: list[float] = []

        def drawn(draws: list[float] = draws) -> float:
            draws.append(rng.random())
            return draws[-1]

        picks.scores = read = Read(list(picks.scores))
        i = picks.pick(drawn, 4, -1, pool)
        compared = set(read.seen)
        seen = set(looked_at(picks, draws, 4, -1, pool))
        if shares == (1.0,):
            assert seen == compared
            assert i in seen
        elif part:  # what its share leaves out was looked at, too; where all were left out, the whole pool is
            assert seen <= set(picks.pool)
        else:
            assert compared <= seen
        picks.commit(i)


@pytest.mark.parametrize("count", [2, 8, 200])
def test_the_parts_make_the_score_that_the_pick_went_by(count):
    picks, table = picks_of(count)
    before = list(picks.scores)
    seen = list(range(0, count, 2))
    picks.count(0, picks.in_flight[0] + 1)  # r000 is chosen, and counted
    for candidate in candidates(picks, table, seen, "r000"):
        i = picks.index[candidate.replica_id]
        assert candidate.score == pytest.approx(before[i]), "as it was before the request was counted there"
        assert candidate.score == pytest.approx(candidate.cost / candidate.capacity)
        assert candidate.forecast_factor == pytest.approx(candidate.capacity / candidate.live_capacity)
        assert candidate.looked_at == (i in seen)


def test_the_chosen_one_is_always_shown_and_never_more_than_a_few():
    picks, table = picks_of(300)
    shown = candidates(picks, table, range(0, 300, 3), "r299")
    assert shown[0].replica_id == "r299"
    assert len(shown) == MOST_CANDIDATES
    assert candidates(PickTable((), None, {}, {}, cost_table(1.0, 0.0)), None, (), "gone") == ()


def test_why_a_replica_could_not_be_taken_is_said():
    picks, table = picks_of(4, (1.0, 1.0, 1.0, 0.0), limits=[8.0, 0.0, 8.0, 8.0])
    picks.eject(2, True)
    out = {c.replica_id: c.out for c in candidates(picks, table, range(4), ejected={"r002"})}
    assert out == {"r000": "", "r001": "full", "r002": "ejected", "r003": "not eligible"}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (decision(special="refused", detail="its caller gave up"), "It got no replica: its caller gave up."),
        (decision(special="retried", detail="r1 had not accepted it"), "It was retried: r1 had not accepted it."),
        (decision(special="waited", waited_s=0.5, detail="all were full"), "It waited for 0.50 s: all were full."),
        (decision(session=True), "It went to r001, which has its session, or stands in for the one that has it."),
        (decision(of_copy=True), "It is for nobody: code called it while it handled a copy."),
        (decision(model="m"), "It asked for the multiplexed model 'm': replicas that have it are preferred."),
    ],
)
def test_each_kind_is_said_in_a_sentence(made, said):
    (read,) = check({"decisions": [to_plain(made, 1.0)]})
    assert said in explain_decision(read)


@pytest.mark.parametrize(
    ("shares", "capacities", "said"),
    [
        ((1.0, 1.0), (0.5, 1.0), "its score, 1.05, was the least of the 2 that were drawn (2 were eligible, 2 alive)"),
        ((1.0, 1.0), (1.0, 0.95), "its score, 1.11, was within a tenth of the least of the 2"),
        ((0.1, 1.0), (1.0, 0.5), "its score, 2.10, was the least whose share of the picks was drawn, of the 2"),
    ],
)
def test_it_is_said_truly_why_the_chosen_one_was_the_best(shares, capacities, said):
    rows = tuple(TableRow(f"r{i}", "n", State.ACTIVE, shares[i], capacities[i]) for i in range(2))
    table = RoutingTable("app/model", 1, 1, 1, rows)
    picks = PickTable(["r0", "r1"], table, {}, {}, cost_table(1.0, 0.0))
    seen = candidates(picks, table, (0, 1), "r1", counted=False)
    made = Decision("q", "predict", 0.0, "table", "r1", eligible=2, alive=2, candidates=seen)
    assert said in " ".join(explain_decision(to_plain(made, 0.0)))


# ---------------------------------------------------------------- questions


def test_an_answer_is_bounded_and_can_be_read_again():
    picks, table = picks_of(50)
    ring = Ring()
    for i in range(200):
        ring.add(decision(f"q{i}", float(i), candidates=candidates(picks, table, range(8), "r001")))
    told = answer(ring, Question(7, most=1000), 200.0)
    assert len(json.dumps(told)) <= MOST_BYTES + 500
    read = check(json.loads(json.dumps(told)))
    assert len(read) == len(told["decisions"]) > 5
    assert read[0]["request_id"] == "q127" if ring.of("q199") == [] else "q199"
    assert read[0]["candidates"][0]["score"] == told["decisions"][0]["candidates"][0]["score"]
    assert answer(ring, Question(8, "q199"), 200.0)["decisions"][0]["ago_s"] == 1.0
    assert answer(ring, Question(9, "nobody"), 200.0)["decisions"] == []


def test_what_is_not_known_travels_as_none():
    plain = to_plain(decision(waited_s=math.nan, candidates=candidates(*picks_of(2), (0,))), 0.0)
    assert plain["waited_s"] is None
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    "nonsense",
    [None, 7, "text", [], {}, {"decisions": 7}, {"decisions": [7, {}, {"candidates": "x"}]}, {"decisions": {"a": 1}}],
)
def test_an_answer_that_is_none_is_left_out(nonsense):
    assert check(nonsense) == []


def test_of_an_answer_only_what_is_known_is_kept_and_as_the_type_that_it_is():
    (read,) = check(
        {"decisions": [{"request_id": 7, "eligible": "many", "ago_s": "x", "evil": "<b>", "candidates": [{}, 3]}]}
    )
    assert "evil" not in read
    assert (read["request_id"], read["eligible"], read["ago_s"]) == ("", 0, None)
    assert [c["score"] for c in read["candidates"]] == [None]
    assert explain_decision(read), "and it can be shown"


def test_a_router_that_answers_without_bound_is_cut():
    huge = {"decisions": [{**to_plain(decision(), 0.0), "detail": "x" * 1_000_000}] * 10_000}
    assert len(json.dumps(check(huge))) < 5 * MOST_BYTES


@pytest.mark.parametrize("nonsense", [None, 7, {"number": 1}, ["x", {"number": "1"}, {"number": 1, "most": None}]])
def test_questions_that_are_none_are_left_out(nonsense):
    assert questions(nonsense) == ()


def test_no_more_questions_are_taken_than_there_may_be():
    assert len(questions([{"number": i} for i in range(100)])) == QUESTIONS
