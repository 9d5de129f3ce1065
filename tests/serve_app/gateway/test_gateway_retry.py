"""The retry budget: arithmetic on times that the tests choose.

Invariants: retries never exceed initial + fraction * requests + floor * time; the bucket never holds more than `burst`.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.retry import RetryBudget


def test_a_fifth_of_requests_may_be_retried_in_the_long_run() -> None:
    budget = RetryBudget(fraction=0.2, initial=0.0, floor_per_s=0.0)
    retried = 0
    for _ in range(1000):
        budget.request(now_s=0.0)
        retried += budget.take(now_s=0.0)
    assert 199 <= retried <= 200


def test_a_quiet_service_may_retry_now_and_then() -> None:
    budget = RetryBudget(initial=0.0, floor_per_s=0.5)
    assert not budget.take(now_s=0.0)
    assert not budget.take(now_s=1.0)
    assert budget.take(now_s=2.0)
    assert not budget.take(now_s=2.0)


def test_a_dying_replicas_requests_can_all_be_retried_at_once() -> None:
    budget = RetryBudget()
    for step in range(500):
        budget.request(now_s=step / 50)
    assert sum(budget.take(now_s=10.0) for _ in range(200)) == 100


def test_a_clock_that_steps_back_earns_nothing() -> None:
    budget = RetryBudget(initial=0.0, floor_per_s=1.0)
    budget.request(now_s=10.0)
    before = budget.tokens
    budget.take(now_s=5.0)
    assert budget.tokens == before


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=200),
    st.floats(0, 1),
    st.floats(1, 50),
    st.floats(0, 20),
    st.floats(0, 5),
)
def test_retries_stay_within_the_budget_whatever_comes(
    steps: list[tuple[bool, float]], fraction: float, burst: float, initial: float, floor_per_s: float
) -> None:
    budget = RetryBudget(fraction, burst, initial, floor_per_s)
    now_s, requests, retries = 0.0, 0, 0
    budget.request(now_s)
    for is_request, passed_s in steps:
        now_s += passed_s
        if is_request:
            budget.request(now_s)
            requests += 1
        else:
            retries += budget.take(now_s)
        assert 0.0 <= budget.tokens <= burst
    assert retries <= initial + fraction * (requests + 1) + floor_per_s * now_s + 1e-6
