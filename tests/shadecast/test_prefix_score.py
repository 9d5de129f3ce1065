"""Where a prompt goes, by table."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.prefix_score import Contexts, Costs, Load, choose, prefill_score, waits_s
from shadecast.rendezvous import Rendezvous

RNG = random.Random(1).random


@pytest.mark.parametrize(
    ("pending", "uncached", "requests", "speed", "weight", "expected"),
    [
        (0.0, 12_000.0, 0.0, 1.0, 1.0, 12_000.0),  # an idle replica without the prompt
        (0.0, 12_000.0, 0.0, 1.0, 2.0, 24_000.0),
        (8_000.0, 128.0, 3.0, 1.0, 1.0, 32_512.0),  # one that has nearly all of it, behind a prompt that waits
        (8_000.0, 128.0, 3.0, 1.0, 2.0, 33_024.0),
        (0.0, 1_000.0, 4.0, 0.4, 1.0, 12_500.0),  # .4 of the speed
        (0.0, 0.0, 9.0, 1.0, 1.0, 10.0),  # one token is always computed: the batch still counts
        (0.0, 10.0, 0.0, 0.0, 1.0, 10_000.0),
    ],
)
def test_the_score_is_the_product_over_the_speed(pending, uncached, requests, speed, weight, expected):
    assert prefill_score(pending, uncached, requests, speed, weight) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loads", "cached", "expected"),
    [
        ([Load("a"), Load("b")], {"b": 900}, 1),  # the prefix, where loads are equal
        ([Load("a"), Load("b", 20_000, 8)], {"b": 900}, 0),  # not behind a long queue
        ([Load("a", 0, 1), Load("b", 0, 4)], {"b": 900}, 1),  # 2 x 100 x 5 is less than 2 x 1,000 x 2
        ([Load("a", 0, 1), Load("b", 700, 1)], {"b": 600}, 1),  # 700 + 2 x 400 is less than 2 x 1,000
        ([Load("a", 0, 1), Load("b", 0, 4)], {"b": 500}, 0),  # 2 x 500 x 5 is more
        ([Load("a", 0, 0, 0.4), Load("b", 0, 1, 1.0)], {}, 1),  # 2,000 / .4 against 2,000 x 2
        ([Load("a", 100_000, 1), Load("b", 0, 20)], {}, 1),  # one request may be more than twenty
    ],
)
def test_a_prompt_goes_where_least_is_left_to_compute(loads, cached, expected):
    assert choose(loads, 1_000, cached, RNG) == expected


COSTS = Costs(prefill_s=1e-4, step_s=0.01, sequence_s=0.001, context_s=1e-7, answer_tokens=100.0, later_per_s=3.0)


def test_seconds_are_those_that_everybody_waits():
    load = Load("a", 2_000.0, 3.0, 0.5, 30_000.0)
    first, decode, others, later = waits_s(load, 5_000, 1_000.0, COSTS)
    assert first == pytest.approx(2 * (0.2 + 0.1))
    assert decode == pytest.approx(2 * 100 * (0.01 + 0.001 * 4 + 1e-7 * 35_000))
    assert others == pytest.approx(2 * 3 * (0.1 + 50 * (0.001 + 1e-7 * 5_000)))
    assert later == pytest.approx(2 * 3 * 2 * 0.1 * (0.2 + 0.05))


@pytest.mark.parametrize(
    ("loads", "cached", "expected"),
    [
        ([Load("a"), Load("b")], {"b": 9_000}, 1),  # the prefix, where loads are equal
        ([Load("a", 0, 2), Load("b", 0, 20)], {"b": 9_900}, 1),  # 20 that decode do not mind a short prefill
        ([Load("a", 0, 2), Load("b", 0, 20)], {"b": 4_000}, 0),  # but a long one
        ([Load("a"), Load("b", 30_000, 1)], {"b": 9_900}, 0),  # 3 s behind others
        ([Load("a", 0, 4, 1.0, 200_000), Load("b", 0, 4, 1.0, 20_000)], {}, 1),  # the shorter contexts
        ([Load("a", 0, 0, 0.4), Load("b", 0, 1)], {}, 1),  # not the slow one, though it is idle
    ],
)
def test_a_prompt_goes_where_users_wait_least_once_costs_are_known(loads, cached, expected):
    assert choose(loads, 10_000, cached, RNG, costs=COSTS) == expected


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9_999)), max_size=30), st.randoms())
def test_contexts_are_those_of_the_requests_that_are_there(requests, rng):
    contexts, left = Contexts(), []
    for replica_id, tokens in requests:
        contexts.add(replica_id, tokens)
        left.append((replica_id, tokens))
        if rng.random() < 0.4:
            contexts.remove(*left.pop(rng.randrange(len(left))))
    for name in "abc":
        own = [tokens for replica_id, tokens in left if replica_id == name]
        mean = sum(tokens for _, tokens in left) / len(left) if left else 0.0
        assert contexts.on(name, len(own)) == sum(own)
        assert contexts.on(name, len(own) + 2.0) == pytest.approx(sum(own) + 2.0 * mean), "others' are as long as ours"


def test_no_replicas_no_choice():
    assert choose([], 10, {}, RNG) == -1


def test_routers_that_do_not_know_of_each_other_send_a_cold_prefix_to_the_same_replica():
    names = [f"r{i}" for i in range(8)]
    ring = Rendezvous(dict.fromkeys(names, 1.0), b"key")
    ours = [Load(name) for name in names]
    theirs = [Load(name, 5.0) for name in reversed(names)]  # within a tenth
    for key in range(50):
        one = ours[choose(ours, 1000, {}, RNG, cold=(ring, key))].replica_id
        assert one == theirs[choose(theirs, 1000, {}, RNG, cold=(ring, key))].replica_id == ring.place(key)


def test_a_cold_prefix_does_not_go_to_a_replica_that_is_a_tenth_worse():
    names = [f"r{i}" for i in range(8)]
    ring = Rendezvous(dict.fromkeys(names, 1.0), b"key")
    loads = [Load(name, 201.0 if i else 0.0) for i, name in enumerate(names)]
    assert {choose(loads, 1000, {}, RNG, cold=(ring, key)) for key in range(50)} == {0}
    assert {choose(loads, 1000, {"r3": 900}, RNG, cold=(ring, key)) for key in range(50)} == {3}, (
        "a warm one does not ask it"
    )


def test_equals_are_drawn_evenly():
    loads = [Load(f"r{i}") for i in range(4)]
    rng = random.Random(3).random
    drawn = [choose(loads, 1000, {}, rng) for _ in range(400)]
    assert all(60 < drawn.count(i) < 140 for i in range(4))


def test_among_many_replicas_the_holder_and_a_few_others_are_compared():
    loads = [Load(f"r{i}") for i in range(500)]
    rng = random.Random(5).random
    assert {choose(loads, 1000, {"r77": 600}, rng) for _ in range(50)} == {77}
    assert len({choose(loads, 1000, {}, rng) for _ in range(200)}) > 120
