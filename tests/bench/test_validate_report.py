"""Whether a report's prediction held: judged on runs in which it is known what came."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.simulate.arms.observing import Observing
from bench.simulate.run import play
from bench.simulate.scenario import find, make_world
from bench.validate_report import Change, judge, read_runs
from shadecast.observing import Observations
from shadecast.types import Outcome


def runs(
    *, twice_as_slow: bool, seeds: int = 8, length_s: float = 120.0
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every third request is on a replica that takes five times as long, unless ours routes; or ours does worse."""
    found = []
    for seed in range(seeds):
        rng, seen = random.Random(seed), Observations()
        before: list[list[Any]] = []
        after: list[list[Any]] = []
        for k in range(int(length_s * 20)):
            at_s, size_s, slow = k / 20.0, 0.1 * rng.lognormvariate(0, 0.3), 5.0 if k % 3 == 0 else 1.0
            seen.add(at_s, Outcome(size_s * slow, 0.0, predicted=slow, predicted_ours=1.0), 1.0)
            before.append([at_s, size_s * slow, "n", ""])
            after.append([at_s, size_s * (10.0 if twice_as_slow else 1.0), "n", ""])
        more = {"length_s": length_s, "slo_s": 0.3}
        observing = {**more, "records": before, "observed": seen.plain(length_s)}
        found.append((observing, {**more, "records": after, "observed": []}))
    return found


def test_a_prediction_that_came_true_holds() -> None:
    verdict = judge("x", runs(twice_as_slow=False))
    assert verdict.too_little == ""
    assert verdict.holds
    assert verdict.realised_saved.value == pytest.approx(1 - 3 / 7, abs=0.02)
    assert verdict.predicted_saved.value == pytest.approx(verdict.realised_saved.value, abs=0.02)
    assert verdict.predicted_avoided.value == pytest.approx(verdict.realised_avoided.value, abs=0.01)


def test_a_prediction_that_did_not_come_true_does_not_hold() -> None:
    verdict = judge("x", runs(twice_as_slow=True))
    assert not verdict.holds
    assert verdict.realised_saved.value < -1.0
    assert verdict.realised_avoided.value < -0.5


def test_too_few_half_minutes_prove_nothing() -> None:
    verdict = judge("x", runs(twice_as_slow=False, seeds=2))
    assert verdict.too_little.startswith("not enough data")
    assert not verdict.holds


def test_intervals_that_touch_agree_and_without_one_nothing_does() -> None:
    assert Change(0.2, (0.1, 0.3)).overlaps(Change(0.4, (0.3, 0.5)))
    assert not Change(0.2, (0.1, 0.3)).overlaps(Change(0.4, (0.31, 0.5)))
    assert not Change(0.2, None).overlaps(Change(0.2, (0.0, 1.0)))


def test_only_seeds_with_both_arms_count(tmp_path: Path) -> None:
    observing, ours = runs(twice_as_slow=False, seeds=1)[0]
    for name, what in (
        ("hog-periodic-shadecast_observe-0", observing),
        ("hog-periodic-shadecast-0", ours),
        ("hog-periodic-shadecast_observe-1", observing),
        ("calm-shadecast-0", ours),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    found = read_runs(tmp_path)
    assert {name: len(seeds) for name, seeds in found.items()} == {"hog-periodic": 1}
    assert np.isfinite(judge("hog-periodic", found["hog-periodic"]).realised_saved.value)
    with pytest.raises(ValueError, match="no scenario with both arms"):
        read_runs(tmp_path / "nothing")


def test_a_product_that_looks_on_sends_requests_as_serve_does_and_predicts_for_each() -> None:
    scenario = replace(find("short-antagonist")[0], replicas=4, routers=2, horizon_s=90.0)
    arm = Observing(None)
    played = play(make_world(scenario, 0), arm)
    blocks = arm.observations.plain(arm.sim.now_s)
    assert played.metrics["mirrored_requests"] == played.metrics["rescued_requests"] == 0.0
    assert sum(block["requests"] for block in blocks) == pytest.approx(len(played.latency_s), rel=0.35)
    predicted = {cell[1] - cell[2] for block in blocks for cell in block["cells"]}
    assert max(predicted) > 3, "a slow replica was taken where ours would have taken another one"
