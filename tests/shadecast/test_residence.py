"""How long requests usually stay, by arithmetic."""

import random

import pytest

from shadecast.residence import LONGEST_S, SHORTEST_S, Residence


def test_before_anything_is_seen_a_first_guess_holds():
    usual = Residence()
    assert usual.mean_s == 1.0
    usual.first_s = 7.5
    assert usual.mean_s == 7.5


@pytest.mark.parametrize("true_s", [0.2, 3.0, 40.0])
def test_queues_that_are_told_each_second_give_the_mean_time(true_s):
    """Poisson arrivals, 4 a second, exponential times."""
    rng, usual, ends, now_s = random.Random(3), Residence(), [], 0.0
    next_s = rng.expovariate(4.0)
    for second in range(1, 1200):
        arrived = 0
        while next_s <= second:
            ends.append(next_s + rng.expovariate(1.0 / true_s))
            next_s += rng.expovariate(4.0)
            arrived += 1
        now_s = float(second)
        ends = [end for end in ends if end > now_s]
        usual.told(len(ends), 1.0, arrived, now_s)
    assert usual.mean_s == pytest.approx(true_s, rel=0.3)


def test_one_request_a_second_that_stays_two_seconds_is_two_at_a_time():
    usual = Residence()
    for i in range(50):
        usual.told(2.0, 1.0, 1.0, float(i))
    assert usual.mean_s == pytest.approx(2.0)


def test_it_follows_a_change_within_minutes():
    usual = Residence()
    for second in range(300):
        usual.told(20.0 if second < 150 else 2.0, 1.0, 2.0, float(second))
    assert usual.mean_s == pytest.approx(1.0, rel=0.4)


@pytest.mark.parametrize(
    ("told", "expected"),
    [((0.0, 1.0, 1000.0), SHORTEST_S), ((1e9, 1.0, 1.0), LONGEST_S), ((5.0, 60.0, 0.0), 101.0)],
)
def test_it_is_bounded(told, expected):
    usual = Residence()
    usual.told(*told, 1.0)
    assert usual.mean_s == pytest.approx(expected)


@pytest.mark.parametrize("told", [(-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (1.0, float("inf"), 1.0)])
def test_what_cannot_be_is_not_taken(told):
    usual = Residence()
    usual.told(*told, 1.0)
    assert usual.mean_s == 1.0
