"""Which copies warm a newcomer's cache most."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest

from shadecast.popular import Popular
from shadecast.prompts import ENDS, Prompt

_IDS = itertools.count()


def prompt(path, blocks, own=0):
    """A prompt that begins with `blocks` of a path, and has so many blocks of its own."""
    hashes = [f"{path}/{i}".encode() for i in range(blocks)] + [f"own {next(_IDS)}".encode() for _ in range(own)]
    return Prompt(hashes, ENDS, ENDS[len(hashes) - 1] if hashes else 1)


def seen(*prompts):
    made = Popular()
    for each in prompts:
        made.add(each)
    return made


def test_a_prompt_that_begins_as_many_do_is_worth_most_and_one_of_its_own_nothing():
    often, seldom, alone = prompt("often", 32), prompt("seldom", 32), prompt("alone", 32)
    popular = seen(*[often] * 6, *[seldom] * 3, alone)
    assert popular.gain(alone, 0) == 0.0
    assert popular.gain(often, 0) == pytest.approx(5 / 10 * ENDS[31])
    assert popular.gain(seldom, 0) == pytest.approx(2 / 10 * ENDS[31])


def test_what_the_newcomer_has_is_worth_nothing_more():
    often = prompt("often", 32)
    popular = seen(*[often] * 10)
    assert popular.gain(often, ENDS[31]) == 0.0
    assert popular.gain(often, ENDS[15]) == pytest.approx(9 / 10 * (ENDS[31] - ENDS[15]))


def test_of_two_prompts_with_the_same_beginning_both_are_worth_that_beginning():
    a, b = prompt("system", 16, own=16), prompt("system", 16, own=100)
    popular = seen(a, b)
    assert popular.gain(a, 0) == popular.gain(b, 0) == pytest.approx(ENDS[15] / 2)


def test_what_was_popular_once_is_forgotten_and_so_are_prompts_that_came_once():
    old = prompt("old", 16)
    popular = seen(*[old] * 500)
    before = popular.gain(old, 0)
    for i in range(8000):
        popular.add(prompt(i, 16))
    assert popular.gain(old, 0) < before / 100


SHARES = [1.0 / (rank + 1.0) for rank in range(40)]


def copied(seed, *, by_worth, copies=15, fraction=0.1):
    """Of traffic with 40 beginnings: the part whose beginning was copied, and after how many requests."""
    rng, popular = random.Random(seed), Popular()
    cached: set[int] = set()
    requests = done = 0
    while done < copies:
        path = rng.choices(range(40), SHARES)[0]
        each = prompt(path, 32, own=4)
        popular.add(each)
        chance = popular.chance(popular.gain(each, ENDS[31] if path in cached else 0), fraction)
        requests += 1
        if requests > 300 and rng.random() < (chance if by_worth else fraction):
            done += 1
            cached.add(path)
    return sum(SHARES[path] for path in cached) / sum(SHARES), requests - 300


def test_as_many_copies_warm_more_than_by_chance():
    by_chance, by_worth = ([copied(seed, by_worth=worth) for seed in range(8)] for worth in (False, True))
    assert fmean(part for part, _ in by_worth) > fmean(part for part, _ in by_chance) + 0.08
    assert fmean(count for _, count in by_worth) == pytest.approx(150, rel=0.2)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_where_all_or_none_are_to_be_copied_worth_makes_no_difference(fraction):
    popular = Popular()
    assert {popular.chance(gain, fraction) for gain in (0.0, 5000.0, 3.0, 0.0)} == {fraction}


@pytest.mark.parametrize("each", [prompt("x", 0), Prompt([], ENDS, 5)])
def test_a_prompt_shorter_than_a_block_is_worth_nothing(each):
    assert seen(each, each).gain(each, 0) == 0.0
