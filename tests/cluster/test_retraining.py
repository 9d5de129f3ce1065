"""`shadecast up --retrain`, end to end: a log that this cluster's own forecasters record, a training on it, a promotion
that they take up, a comparison on live samples, and the way back.

The bounds of the decision are lowered by its own parameters (`RetrainPlan`): a log of half a minute is enough, and any
candidate is promoted and later rolled back, so that the test does not depend on how good it is.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from models.registry import Registry
from serve_app.launch.control_plane import RETRAINER, forecaster_states, start_control_plane
from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import status, wait_for
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

FASTER = 0.05
"""Seconds between samples: half a minute of telemetry holds as much as ten otherwise."""
NODES = 2
PLAN = {
    "every_s": 120.0,
    "least_machine_hours": 0.0125,  # 45 s: 22 of each node
    "least_onsets": 0,  # beside other tests all CPUs may be busy: then there is no quiet for a load to rise from
    "block_s": 1.0,
    "least_blocks": 2,
    "least_gain": -1e3,
    "least_harm": -1e3,
    "least_live_s": 0.0,
    "look_s": 0.5,
}
EFFORT = {"made_up": 0, "steps": 4, "epochs": 1}


@ray.remote(num_cpus=0)
def job_now_and_then(seconds: float) -> None:
    """Others' load on a node of one CPU: it is taken for half a second, then it is quiet."""
    rng, end_s = random.Random(1), time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(rng.uniform(0.4, 0.9))
        until_s = time.monotonic() + 0.5
        while time.monotonic() < until_s:
            pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("retraining")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def settings(folder: Path) -> Iterator[dict[str, Any]]:
    """Of a cluster that retrains, with a registry that is empty; the driver that started it has gone."""
    settings = {
        "telemetry_log": str(folder / "log"),
        "registry": str(folder / "registry"),
        "period_s": FASTER,
        "log_flush_s": 1.0,
    }
    with started(LocalCluster(workers=NODES - 1, cpus_per_node=1)) as local:
        local.connect()
        start_control_plane(
            settings,
            page_port=0,
            audit_log=str(folder / "audit.jsonl"),
            retrain="daily",
            retrain_plan=PLAN,
            retrain_effort=EFFORT,
        )
        local.connect()
        yield settings


def retraining() -> dict[str, Any]:
    return status()["retraining"] or {"state": "", "last": None, "reason": ""}


def in_use(role: str = "champion") -> set[str]:
    return {state["versions"].get(role, {}).get("version", "") for state in forecaster_states().values()}


def niceness_of_trainings() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline", "nice"]):
        if any("ray::shadecast-retrain" in part for part in process.info["cmdline"] or ()):
            found.add(process.info["nice"])
    return found


def test_a_cluster_retrains_on_its_own_log_takes_the_new_version_up_and_goes_back_where_it_is_worse_live(
    folder: Path, settings: dict[str, Any]
) -> None:
    shipped = Registry().champion()
    for node in ray.nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        job_now_and_then.options(scheduling_strategy=here).remote(90.0)
    wait_for(lambda: in_use() == {shipped}, 60.0, "every node runs the shipped version, which the registry begins with")
    pids = {node: state["pid"] for node, state in forecaster_states().items()}
    nice: set[int] = set()

    def promoted() -> bool:
        nice.update(niceness_of_trainings())
        return (retraining()["last"] or {}).get("outcome") == "promoted"

    wait_for(promoted, 120.0, "a training on the log is promoted")
    registry = Registry(settings["registry"])
    version = retraining()["last"]["version"]
    assert 19 in nice, "at the lowest priority"
    card = registry.card(version)
    assert card["started_from"] == shipped
    assert card["retrain"]["log"]["machine_hours"] >= PLAN["least_machine_hours"]
    assert card["retrain"]["held_out"]["blocks"] >= PLAN["least_blocks"]
    assert isinstance(card["retrain"]["held_out"]["headroom_gain"], float)
    assert shipped in registry.versions()

    wait_for(lambda: in_use() == {version}, 20.0, "every node runs the promoted version")
    assert in_use("challenger") == {shipped}, "and the former one beside it"
    assert retraining()["state"] == "probation"

    wait_for(lambda: (retraining()["last"] or {})["outcome"] == "rolled back", 60.0, "it is worse live: rolled back")
    assert registry.champion() == shipped
    wait_for(
        lambda: in_use() == {shipped} and in_use("challenger") == {""}, 20.0, "every node runs the former one again"
    )
    assert {node: state["pid"] for node, state in forecaster_states().items()} == pids, "without a restart"
    assert version in registry.versions(), "nothing is deleted"
    view = retraining()
    assert (view["state"], view["rollbacks"]) == ("waiting", 1)
    assert view["next_in_s"] > PLAN["every_s"], "it is not promoted again at once"
    written = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    outcomes = [w["outcome"].split(":")[0] for w in written if w["order"] == "retrain"]
    assert outcomes == ["promoted", "rolled back"]

    start_control_plane(settings, page_port=0, retrain="off")
    assert status()["retraining"] is None
    with pytest.raises(ValueError, match=RETRAINER):
        ray.get_actor(RETRAINER, namespace="shadecast")
    assert in_use() == {shipped}
