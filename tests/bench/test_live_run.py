"""A short live scenario from end to end on isolated hosts: deploys, drives, hogs, measures, leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.live import state
from bench.live.arms import find_arms
from bench.live.hosts import missing
from bench.live.report import write_markdown
from bench.live.run import Bench, Progress, Rows
from bench.live.scenario import SCENARIOS

LACKING = missing()


@pytest.mark.root
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING))
def test_a_short_hog_is_driven_and_nothing_is_left(tmp_path):
    scenario = replace(SCENARIOS["hog"], requests=240, rate_per_s=20, warm_up_s=5.0)
    said: list[str] = []
    rows = Rows(tmp_path / "live.json", resume=False)
    bench = Bench(rows, tmp_path / "series", Progress(said.append, lambda done, of: None))
    try:
        assert bench.scenario(scenario, find_arms("oracle"), [0]) == [], said
        slot = bench._world.lab.state.made.slot
    finally:
        left = bench.close()
    assert left == []
    for arm in ("oracle",):
        found = {row.metric: row.value for row in rows.rows if row.arm == arm}
        assert found["requests"] > 160
        assert found["errors"] == 0.0
        assert 0.005 < found["p50_s"] <= found["p99_s"] <= found["p999_s"]
        assert found["coordinator_rss_bytes"] > 1e7
        kept = json.loads((tmp_path / "series" / f"hog-{arm}-0.json").read_text())
        (span,) = kept["spans"]
        assert 0.25 < span["start_s"] / scenario.length_s < 0.5
        assert span["end_s"] > span["start_s"]
        busy = [s["background"].get(span["node_id"]) for s in kept["states"] if s["at_s"] > span["start_s"]]
        known = [b for b in busy if b is not None]  # a sample in which the quota was noticed says nothing
        assert max(known) > 0.5, "the node's telemetry saw the hog"
    shares = {row.arm: row.value for row in rows.rows if row.metric == "share_bad_node"}
    assert shares["oracle"] < 0.05, "the oracle leaves the node at once"
    write_markdown(tmp_path / "live.md", rows.rows, tmp_path / "series")
    assert (tmp_path / "live" / "hog-latency.png").stat().st_size > 1000
    assert (tmp_path / "live" / "hog-shares.png").stat().st_size > 1000
    assert not (state.FOLDER / f"{slot}.json").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{state.PREFIX}{slot}"))
