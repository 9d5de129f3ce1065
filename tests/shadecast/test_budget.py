"""The budget of second attempts: arithmetic on times that the tests choose.

Invariants: what is done twice never exceeds initial + fraction * requests + per_s * time; at most `burst` are kept.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.model_call import retry_budget
from shadecast.budget import Budget


def test_a_fifth_of_requests_may_be_retried_in_the_long_run() -> None:
    budget = Budget(0.2, burst=100.0, initial=0.0)
    retried = 0
    for _ in range(1000):
        budget.request()
        retried += budget.take()
    assert 199 <= retried <= 200


def test_a_quiet_service_may_retry_now_and_then() -> None:
    budget = Budget(0.2, burst=100.0, initial=0.0, per_s=0.5)
    assert not budget.take(now_s=0.0)
    assert not budget.take(now_s=1.0)
    assert budget.take(now_s=2.0)
    assert not budget.take(now_s=2.0)


def test_a_dying_replicas_requests_can_all_be_retried_at_once() -> None:
    budget = retry_budget()
    for step in range(500):
        budget.request(now_s=step / 50)
    assert sum(budget.take(now_s=10.0) for _ in range(200)) == 100


def test_a_clock_that_steps_back_earns_nothing() -> None:
    budget = Budget(0.2, burst=100.0, initial=0.0, per_s=1.0)
    budget.request(now_s=10.0)
    before = budget.tokens
    budget.take(now_s=5.0)
    assert budget.tokens == before


def test_what_was_not_done_is_given_back_and_part_of_one_is_enough_for_part_of_the_work() -> None:
    budget = Budget(0.01, burst=8.0, initial=1.0)
    assert budget.take()
    budget.give_back()
    assert budget.take(cost=0.1)
    assert not budget.take()
    budget.give_back(0.1)
    budget.give_back(100.0)
    assert budget.tokens == 8.0


@given(
    st.lists(st.tuples(st.sampled_from(["request", "take", "not done"]), st.floats(0, 10)), max_size=200),
    st.floats(0, 1),
    st.floats(1, 50),
    st.floats(0, 20),
    st.floats(0, 5),
)
def test_what_is_done_twice_stays_within_the_budget_whatever_comes(
    steps: list[tuple[str, float]], fraction: float, burst: float, initial: float, per_s: float
) -> None:
    budget = Budget(fraction, burst, initial, per_s)
    now_s, requests, done = 0.0, 0, 0
    budget.request(now_s)
    for step, passed_s in steps:
        now_s += passed_s
        if step == "request":
            budget.request(now_s)
            requests += 1
        elif budget.take(now_s):
            if step == "not done":
                budget.give_back()
            else:
                done += 1
        assert 0.0 <= budget.tokens <= burst
    assert done <= initial + fraction * (requests + 1) + per_s * now_s + 1e-6
