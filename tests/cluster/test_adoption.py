"""One line on a deployment of a user, on a real cluster of several nodes: mirror, shift, active, fall-backs."""

import asyncio
import textwrap
from collections import Counter

import pytest
import ray
from ray import serve

from tests.cluster.conftest import deploy, deployment_status, status, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

USER_APP = """
    import random, time
    import ray
    from models.answers import ANSWER            # the user's own `models` package, not ours
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=16,
        request_router_config=RequestRouterConfig(
            request_router_class="serve_app.router:PredictiveRouter",
            request_router_kwargs={"config": CONFIG},
        ),
    )
    class Model:
        def __init__(self):
            self.kind = ray.get(ray.get_actor("kinds", namespace="test").take.remote())
            self.rng = random.Random(1)

        async def predict(self, x):
            time.sleep(0.02 if self.kind != "slow" else 0.3)
            if self.kind == "failing" and self.rng.random() < 0.3:
                raise ValueError("broken")
            return self.kind, x * ANSWER

    app = Model.bind()
"""

SETTINGS = {"trial": {"copy_methods": ["predict"]}, "balance": {"bootstrap_s": 3.0}}
"""The defaults, but that nobody waits for the first start to be over."""


@ray.remote(num_cpus=0)
class Kinds:
    """What the next replicas to start shall be."""

    def __init__(self):
        self.next = []

    def plan(self, *kinds):
        self.next = list(kinds)

    def take(self):
        return self.next.pop(0) if self.next else "healthy"


@pytest.fixture(scope="module")
def kinds(cluster):
    return Kinds.options(name="kinds", namespace="test").remote()


def write_app(folder, config):
    (folder / "models").mkdir(exist_ok=True)
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "answers.py").write_text("ANSWER = 42\n")
    (folder / "user_app.py").write_text(textwrap.dedent(USER_APP).replace("CONFIG", repr(config)))


def load(handle, seconds, rate_per_s=20):
    """Open loop: who answered how often, and the errors."""

    async def run():
        answered = Counter()

        async def one(i):
            try:
                kind, value = await handle.predict.remote(i)
                assert value == i * 42
                answered[kind] += 1
            except Exception as error:
                answered[type(error).__name__] += 1

        tasks = []
        for i in range(int(seconds * rate_per_s)):
            tasks.append(asyncio.create_task(one(i)))
            await asyncio.sleep(1 / rate_per_s)
        await asyncio.gather(*tasks)
        return answered

    return asyncio.run(run())


def events(name):
    return [(t["replica_id"], t["event"]) for t in status()["transitions"] if t["deployment"] == name]


def test_newcomers_are_mirrored_then_shifted_or_turned_away_and_users_see_no_error(cluster, kinds, tmp_path):
    ray.get(kinds.plan.remote())
    write_app(tmp_path, SETTINGS)
    handle = deploy(tmp_path, "user_app:app", "shop", name="Model", num_replicas=2)
    assert set(load(handle, 4)) == {"healthy"}
    wait_for(
        lambda: sum(r["state"] == "active" for r in deployment_status("shop/Model")["replicas"]) == 2, 10, "2 active"
    )

    ray.get(kinds.plan.remote("failing", "slow", "healthy"))
    deploy(tmp_path, "user_app:app", "shop", name="Model", num_replicas=5)
    seen = Counter()
    active = 0
    for _ in range(35):
        seen += load(handle, 3)
        replicas = deployment_status("shop/Model")["replicas"]
        active = sum(r["state"] == "active" for r in replicas)
        if active == 3 and Counter(e for _, e in events("shop/Model"))["trial_failed"] >= 2:
            break
    assert active == 3, [(t["replica_id"], t["event"], t["reason"]) for t in status()["transitions"]]
    by_replica = {}
    for replica_id, event in events("shop/Model"):
        by_replica.setdefault(replica_id, []).append(event)
    newcomers = [found for found in by_replica.values() if found[0] == "admit"]
    assert len(newcomers) == 3
    assert sum("ramp_done" in found for found in newcomers) == 1
    (well,) = (r for r, found in by_replica.items() if found[0] == "admit" and "ramp_done" in found)
    ago_s = {t["event"]: t["ago_s"] for t in status()["transitions"] if t["replica_id"] == well}
    assert ago_s["admit"] - ago_s["ramp_done"] < 20.0, "from the first copy to a full share"
    turned_away = [found for found in newcomers if set(found) <= {"admit", "trial_failed"}]
    assert len(turned_away) == 2, "the slow and the failing one never get past their trials, however often they try"
    assert set(seen) == {"healthy"}, seen
    assert deployment_status("shop/Model")["mirrored"] >= 20


def test_every_node_has_a_forecaster_that_reports(cluster):
    nodes = wait_for(lambda: len(s := status()["nodes"]) == 3 and s, 60, "3 nodes report")
    assert {n["node_id"] for n in nodes} == set(cluster.node_ids)
    for node in nodes:
        assert 0.0 <= node["current"]["cpu_fraction"] <= 1.0
        assert 0.0 < node["current"]["memory_fraction"] < 1.0
    forecast = wait_for(lambda: status()["nodes"][0]["predicted"], 90, "a forecast")
    assert list(forecast["cpu"]) == ["1.0", "2.0", "3.0", "5.0", "8.0", "10.0"]
    for low, middle, high in forecast["cpu"].values():
        assert low <= middle <= high


def test_the_coordinator_is_on_the_head_where_no_replica_starves_it(cluster):
    coordinator = ray.get_actor("shadecast-coordinator", namespace="shadecast")
    place = ray._private.state.actors(coordinator._actor_id.hex())["Address"]["NodeID"]
    (head,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"] and n["Alive"]]
    assert place == head


def test_a_killed_coordinator_comes_back_and_goes_on_from_the_routers_table(cluster, kinds, tmp_path):
    handle = ray.get_actor("shadecast-coordinator", namespace="shadecast")
    app = serve.get_app_handle("shop")
    before = {r["replica_id"]: r["state"] for r in deployment_status("shop/Model")["replicas"]}
    ray.kill(handle, no_restart=False)
    assert set(load(app, 6)) == {"healthy"}
    known = wait_for(lambda: deployment_status("shop/Model").get("replicas"), 20, "the deployment is known again")
    after = {r["replica_id"]: r["state"] for r in known}
    for replica_id, state in before.items():
        if state == "active":
            assert after[replica_id] == "active"
        else:
            assert after[replica_id] in ("inactive", "shadowing")


def test_nodes_that_join_and_leave_get_and_lose_their_forecaster(cluster):
    node_id = cluster.add_worker()
    wait_for(lambda: node_id in {n["node_id"] for n in status()["nodes"]}, 60, "the new node reports")
    cluster.remove_worker(node_id)
    wait_for(lambda: node_id not in {n["node_id"] for n in status()["nodes"]}, 60, "the node is forgotten")


def test_without_any_coordinator_requests_go_on(cluster, kinds, tmp_path):
    ray.get(kinds.plan.remote())
    ray.kill(ray.get_actor("shadecast-coordinator", namespace="shadecast"), no_restart=True)
    write_app(tmp_path, {"trial": {"mirror_fraction": 9}})  # a wrong setting must not stop a router either
    handle = deploy(tmp_path, "user_app:app", "alone", name="Model", num_replicas=2)
    answered = load(handle, 3)
    assert set(answered) == {"healthy"}
