"""The loop closed: a cluster's own telemetry retrains its forecaster, and its nodes take up what is promoted.

The cluster's machines have a user's `models`, `train` and `actors` on their PYTHONPATH, which raise when they are
imported, and the command line is called beside a clone: ours find their own packages in every process of a training.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from models.registry import Registry
from serve_app.launch.control_plane import forecaster_states, order, start_control_plane
from serve_app.launch.local import LocalCluster
from shadecast.errors import OrderError
from tests.cluster.conftest import status, wait_for
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

FASTER = 0.1
"""Seconds between samples, so that minutes of telemetry are there in seconds; everything else is as in production."""
NODES = 2


@pytest.fixture(scope="module")
def beside_a_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone's parent folder, with a user's packages beside it, both on the PYTHONPATH of all machines."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "shadecast" / "serve_app").mkdir(parents=True)
    for name in ("models", "train", "actors"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('raise ImportError(f"a user\'s {__name__}, imported by ours")\n')
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, beside_a_clone: Path) -> Any:
    """(folder of the log, registry) of a cluster that forecasts with a registry of its own."""
    folder = tmp_path_factory.mktemp("loop")
    shipped, registry = Registry(), Registry(str(folder / "registry"))
    champion = shipped.champion()
    registry.save(shipped.load(champion), {"created_wall_s": 1.0})
    registry.promote(champion)
    settings = {
        "telemetry_log": str(folder / "log"),
        "registry": registry.uri,
        "period_s": FASTER,
        "log_flush_s": 1.0,
    }
    with started(LocalCluster(workers=NODES - 1)) as local:
        local.connect()
        start_control_plane(settings, page_port=0)
        wait_for(lambda: len(status()["nodes"]) == NODES, 90.0, "both nodes report")
        yield folder / "log", registry, functools.partial(command, address=local.address, folder=beside_a_clone)


def command(*arguments: str, address: str, folder: Path) -> str:
    """The output of a command line, run as an operator would."""
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [Path(sys.executable).with_name("shadecast"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_use(role: str = "champion") -> set[str]:
    """Versions that the nodes' forecasters run in a role, "" where one has none."""
    return {state["versions"].get(role, {}).get("version", "") for state in forecaster_states().values()}


def logged_rows(log: Path) -> int:
    return sum(pq.read_metadata(p).num_rows for p in log.rglob("*.parquet"))


def test_logged_telemetry_retrains_the_forecaster_and_the_nodes_run_the_promoted_version(running: Any) -> None:
    log, registry, shadecast = running
    first = registry.champion()
    before = {node: state["pid"] for node, state in forecaster_states().items()}
    assert in_use() == {first}
    wait_for(lambda: logged_rows(log) > 200 * NODES, 120.0, "enough rows in the log")

    small = ["--made-up", "0", "--epochs", "1", "--workers", "1", "--promote", "never"]
    folders = ["--telemetry", str(log), "--registry", registry.uri, "--storage", str(log.parent / "runs")]
    out = shadecast("train", *folders, *small, "--version", "retrained")
    assert "retrained: saved" in out
    card = registry.card("retrained")
    assert card["started_from"] == first
    assert card["rows"] > 200 * NODES
    assert in_use() == {first}, "nothing changes before the promotion"

    registry.challenge("retrained")
    wait_for(lambda: in_use("challenger") == {"retrained"}, 10.0, "every node scores the challenger in shadow")
    assert {n["model_version"] for n in status()["nodes"]} <= {first, ""}, "a challenger is not acted on"

    shadecast("forecaster", "promote", "retrained", "--registry", registry.uri)
    started_s = time.monotonic()
    wait_for(lambda: in_use() == {"retrained"}, 10.0, "every node runs the promoted version")
    assert time.monotonic() - started_s < 10.0
    assert {node: state["pid"] for node, state in forecaster_states().items()} == before, "without a restart"

    wait_for(
        lambda: all(n["model_version"] == "retrained" and n["skill"] for n in status()["nodes"]), 30.0, "live skill"
    )
    state = json.loads(shadecast("status", "--json"))
    for node in state["nodes"]:
        assert node["model_version"] == "retrained"
        assert set(node["skill"]) >= {"cpu", "memory"}
        assert all(isinstance(value, float) for value in node["skill"].values())


def test_the_log_has_what_serve_carries_and_a_forecaster_takes_announcements(running: Any) -> None:
    log, _, _ = running
    newest = max(log.rglob("*.parquet"), key=lambda p: p.stat().st_mtime)
    columns = pq.read_table(newest, columns=["in_flight", "arrivals_per_s"], partitioning=None).to_pydict()
    assert (columns["in_flight"][-1], columns["arrivals_per_s"][-1]) == (0.0, 0.0), "told by the coordinator, not NaN"
    node = status()["nodes"][0]["node_id"]
    assert order("announce", node, starts_in_s=5.0, lasts_s=10.0, strength=0.8)["told"]
    assert [each["node_id"] for each in status()["announced"]] == [node]
    assert order("cancel", node)["cancelled"] == 1
    with pytest.raises(OrderError, match="no node with the id 'nowhere'"):
        order("announce", "nowhere", lasts_s=10.0)
    with pytest.raises(OrderError, match="starts_in_s"):
        order("announce", node, starts_in_s=-1.0, lasts_s=10.0)


def test_a_damaged_or_missing_version_is_refused_while_the_champion_goes_on(running: Any) -> None:
    _, registry, _ = running
    champion, root = registry.champion(), Path(registry.uri)
    registry.save(replace(registry.load(champion), version="broken"), {})
    weights = root / "broken" / "weights.safetensors"
    whole = weights.read_bytes()
    for content, words in ((whole[:-1] + bytes([whole[-1] ^ 1]), "corrupt"), (None, "cannot be read")):
        weights.unlink() if content is None else weights.write_bytes(content)
        (root / "champion.json").write_text(json.dumps({"version": "broken", "history": [champion]}))
        wait_for(
            lambda words=words: all(words in state["problem"] for state in forecaster_states().values()),
            15.0,
            f"every node refuses it: {words}",
        )
        assert in_use() == {champion}
    registry.rollback()
    wait_for(lambda: not any(state["problem"] for state in forecaster_states().values()), 15.0, "the refusal is over")
    assert in_use() == {champion}
