"""What an observing router's requests tell: held against worlds in which it is known what ours would have done.

In these worlds each replica has a true relative time, a request of size z takes z times that, and predictions are the
true times with an error. Choosing the least prediction is what ours would have done, so its true times are known.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest

from shadecast.blocks import BLOCK_S
from shadecast.observing import MOST_BLOCKS, Estimate, Observations, estimate, usual_s
from shadecast.types import Outcome


@dataclass(frozen=True)
class Truth:
    saved: float
    serve_late: float
    ours_late: float


def world(
    error: float,
    *,
    slow: float = 5.0,
    minutes: int = 30,
    per_s: float = 10.0,
    slo_s: float = 0.5,
    informed: bool = True,
) -> tuple[Estimate, Truth]:
    """Four replicas of which one, another one each minute, takes `slow` times as long; Serve takes any of them."""
    rng, seen = random.Random(11), Observations()
    took, would, late, ours_late = 0.0, 0.0, 0, 0
    count = int(minutes * 60 * per_s)
    for k in range(count):
        now_s = 1000.0 + k / per_s
        true = [1.0, 1.0, 1.0, 1.0]
        true[int(now_s // 60) % 4] = slow
        predicted = [
            each * math.exp(rng.gauss(0, error)) if informed else math.exp(rng.gauss(0, error)) for each in true
        ]
        chosen, ours = rng.randrange(4), min(range(4), key=predicted.__getitem__)
        size_s = 0.1 * math.exp(rng.gauss(0, 0.5))
        seen.add(
            now_s, Outcome(size_s * true[chosen], 1.0, predicted=predicted[chosen], predicted_ours=predicted[ours]), 1
        )
        took, would = took + size_s * true[chosen], would + size_s * true[ours]
        late, ours_late = late + (size_s * true[chosen] > slo_s), ours_late + (size_s * true[ours] > slo_s)
    found = estimate(seen.plain(1000.0 + count / per_s), slo_s, np.random.default_rng(0))
    return found, Truth(1 - would / took, late / count, ours_late / count)


def test_right_predictions_are_trusted_and_the_gain_is_what_it_would_have_been():
    found, truth = world(0.0)
    assert found.trust == pytest.approx(1.0, abs=0.03)
    assert found.saved_fraction == pytest.approx(truth.saved, abs=0.02)
    low, high = found.saved_bounds
    assert low - 0.01 < truth.saved < high + 0.01
    assert 0.005 < high - low < 0.05
    assert found.serve.miss_fraction == pytest.approx(truth.serve_late, abs=0.003)
    assert found.ours.miss_fraction == pytest.approx(truth.ours_late, abs=0.005)
    assert found.avoided_fraction == pytest.approx(truth.serve_late - truth.ours_late, abs=0.006)
    assert found.serve.p50_s == pytest.approx(0.118, rel=0.15)
    assert found.ours.p50_s == pytest.approx(0.1, rel=0.12)
    assert found.too_little == ""
    above = {f: s for s, f in found.serve.tail}
    assert found.serve.tail[0][0] < above[0.1] < above[0.01] == found.serve.p99_s


@pytest.mark.parametrize("error", [0.15, 0.3, 0.6])
def test_predictions_that_err_do_not_promise_too_much(error):
    """Who takes the least of four that err sees a gain in the errors, too."""
    found, truth = world(error)
    assert 0.3 < found.trust < 0.95
    assert found.saved_fraction < truth.saved + 0.02
    assert found.saved_fraction == pytest.approx(truth.saved, abs=0.02 if error < 0.5 else 0.06)


def test_predictions_that_say_nothing_claim_nothing():
    found, truth = world(0.5, informed=False)
    assert found.trust == pytest.approx(0.0, abs=0.05)
    assert truth.saved == pytest.approx(0.0, abs=0.05)
    assert found.saved_fraction == pytest.approx(0.0, abs=0.05)


def test_where_all_replicas_are_alike_there_is_nothing_to_gain():
    found, _ = world(0.0, slow=1.0)
    assert found.saved_fraction == pytest.approx(0.0, abs=1e-9)
    assert found.avoided_fraction == pytest.approx(0.0, abs=1e-9)
    low, high = found.saved_bounds
    assert low <= 0.0 <= high


@pytest.mark.parametrize(
    ("minutes", "per_s", "why"),
    [(5, 10.0, "requests in 1[01] half-minutes, 20 are needed"), (30, 0.1, "1[78]\\d requests, 200 are needed")],
)
def test_with_too_little_data_serves_side_is_told_and_ours_is_not(minutes, per_s, why):
    found, truth = world(0.0, minutes=minutes, per_s=per_s)
    assert re.search(why, found.too_little)
    assert found.ours is None
    assert found.saved_bounds is found.avoided_bounds is found.trust_bounds is found.serve.miss_bounds is None
    assert math.isnan(found.saved_fraction)
    assert found.serve.miss_fraction == pytest.approx(truth.serve_late, abs=0.02)


def test_replicas_that_ours_would_have_left_alone_were_rightly_so_by_their_failures_and_lateness():
    seen = Observations()
    for k in range(6000):
        refused = k % 10 == 0
        ok = not refused or k % 20 == 0
        took_s = 2.0 if refused and k % 40 == 0 else 0.1
        seen.add(k * 0.2, Outcome(took_s, 0.0, ok, predicted=1.0, predicted_ours=1.0, refused=refused), 1.0)
    found = estimate(seen.plain(1200.0), 0.5, np.random.default_rng(0))
    assert found.refused == 600
    assert found.refused_right == 300 + 150
    low, high = found.refused_right_bounds
    assert low <= 0.75 <= high
    assert found.others_missed_fraction == 0.0
    assert found.serve.failed_fraction == pytest.approx(0.05)
    assert found.ours.failed_fraction == pytest.approx(0.0), "elsewhere none failed"


def test_a_report_that_was_cut_counts_each_outcome_for_those_that_are_missing():
    seen = Observations()
    for k in range(300):
        seen.add(k * 3.0, Outcome(0.1, 0.0, predicted=1.0, predicted_ours=1.0), 2.5)
    assert estimate(seen.plain(900.0), 1.0, np.random.default_rng(0)).requests == 750


@pytest.mark.parametrize(
    "odd",
    [
        Outcome(0.1, 0.0),
        Outcome(0.1, 0.0, predicted=1.0),
        Outcome(math.nan, 0.0, predicted=1.0, predicted_ours=1.0),
        Outcome(-1.0, 0.0, predicted=1.0, predicted_ours=1.0),
        Outcome(0.1, 0.0, predicted=math.nan, predicted_ours=1.0),
        Outcome(0.1, 0.0, predicted=math.inf, predicted_ours=1.0),
    ],
)
def test_what_cannot_be_compared_is_left_out(odd):
    seen = Observations()
    seen.add(0.0, odd, 1.0)
    assert seen.plain(1.0) == []


def test_extremes_are_bounded():
    seen = Observations()
    for k in range(300):
        took_s = (0.0, 1e-9, 1e6)[k % 3]
        seen.add(k * BLOCK_S, Outcome(took_s, 0.0, predicted=1e9, predicted_ours=0.1), 1.0)
    plain = seen.plain(300 * BLOCK_S)
    found = estimate(plain, 1.0, np.random.default_rng(0))
    assert all(map(math.isfinite, (found.saved_fraction, found.trust, found.serve.p99_s, found.ours.mean_s)))
    assert math.isfinite(usual_s(plain))


def test_however_long_it_is_observed_blocks_are_few_and_no_request_is_forgotten():
    seen = Observations()
    for k in range(5 * MOST_BLOCKS):
        seen.add(1000.0 + k * BLOCK_S, Outcome(0.1, 0.0, k % 2 == 0, predicted=1.0, predicted_ours=1.0), 1.0)
    now_s = 1000.0 + 5 * MOST_BLOCKS * BLOCK_S
    plain = seen.plain(now_s)
    assert MOST_BLOCKS / 2 <= len(plain) <= MOST_BLOCKS
    assert {block["length_s"] for block in plain} == {8 * BLOCK_S}
    assert plain[0]["ago_s"] == pytest.approx(now_s - 1000.0, abs=8 * BLOCK_S)
    assert sum(block["requests"] for block in plain) == 5 * MOST_BLOCKS
    assert sum(block["failed"] for block in plain) == 2.5 * MOST_BLOCKS
    assert sum(cell[-1] for block in plain for cell in block["cells"]) == 2.5 * MOST_BLOCKS


def test_requests_that_all_failed_have_no_times_and_no_estimate():
    seen = Observations()
    for k in range(6000):
        seen.add(k * 0.2, Outcome(0.1, 0.0, False, predicted=1.0, predicted_ours=1.0), 1.0)
    found = estimate(seen.plain(1200.0), 0.5, np.random.default_rng(0))
    assert found.serve is found.ours is None
    assert math.isnan(usual_s(seen.plain(1200.0)))
