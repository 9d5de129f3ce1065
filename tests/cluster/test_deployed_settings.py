"""An ingress behind Serve's own proxy: its HTTP errors count, and a deploy changes the settings of all routers.

Serve replaces every replica where a router's settings change, and keeps the routers that it has.
"""

import json
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from serve_app.launch.control_plane import start_control_plane
from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import deployment_status, wait_for
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

APP = """
    import os, pathlib
    from ray import serve
    from starlette.responses import JSONResponse

    HERE = pathlib.Path(__file__).parent

    def cost(args, kwargs):
        (HERE / f"cost-{os.getpid()}").touch()
        return 1.0

    @serve.deployment(ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_wait_loop_s=0.1)
    class Model:
        async def predict(self):
            return os.getpid()

    @serve.deployment(ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_wait_loop_s=0.1)
    class Front:
        def __init__(self, model):
            self.model = model

        async def __call__(self, request):
            if serve.get_replica_context().rank.rank == 0:
                return JSONResponse({}, 503)
            return {"front": os.getpid(), "model": await self.model.predict.remote()}

    app = Front.bind(Model.bind())
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """`deploy(router, **config)` of an application behind a proxy, and `ask(n)` for (status, answer) of n requests."""
    folder, port = tmp_path_factory.mktemp("shop"), free_port()
    (folder / "shop.py").write_text(textwrap.dedent(APP))
    # one node: Serve's proxies prefer their own
    with started(LocalCluster(workers=0)) as local:
        local.connect()
        start_control_plane(page_port=0)
        code = (
            "import sys, ray; from ray import serve; ray.init(address=sys.argv[1]); "
            "serve.start(http_options={'port': int(sys.argv[2]), 'location': 'HeadOnly'})"
        )
        command = [sys.executable, "-P", "-c", code, local.address, str(port)]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tempfile.gettempdir())

        def deploy(router, **config):
            router_config = {
                "request_router_class": f"serve_app.router:{router}",
                "request_router_kwargs": {"config": config},
            }
            names = {"Front": 3, "Model": 1}
            deployments = [
                {"name": name, "num_replicas": count, "request_router_config": router_config}
                for name, count in names.items()
            ]
            app = {
                "name": "shop",
                "route_prefix": "/",
                "import_path": "shop:app",
                "runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}},
                "deployments": deployments,
            }
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}))

            def running():
                found = serve.status().applications["shop"]
                assert found.status != "DEPLOY_FAILED", found.message
                return found.status == "RUNNING" and all(
                    found.deployments[name].replica_states.get("RUNNING") == count for name, count in names.items()
                )

            wait_for(running, 90, "the application runs")

        def ask_once(_):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, {}

        def ask(count, rate_per_s=40.0):
            with ThreadPoolExecutor(8) as pool:
                asked = []
                for i in range(count):
                    asked.append(pool.submit(ask_once, i))
                    time.sleep(1.0 / rate_per_s)
                return [each.result() for each in asked]

        try:
            yield deploy, ask, folder
        finally:
            serve.shutdown()


def replicas(name):
    return deployment_status(f"shop/{name}")["replicas"]


def levels(ask, name):
    ask(10)
    return {router["level"] for router in deployment_status(f"shop/{name}").get("routers", ()) if router["heard_s"] < 5}


def failing(answers):
    return sum(status == 503 for status, _ in answers) / len(answers)


def test_observing_leaves_a_third_of_the_answers_to_a_replica_that_fails_at_once(shop):
    deploy, ask, _ = shop
    deploy("ObservingRouter")
    wait_for(lambda: levels(ask, "Front") == {"observing"}, 30, "Front's routers observe")
    wait_for(lambda: levels(ask, "Model") == {"observing"}, 30, "Model's routers observe")
    assert failing(ask(60)) > 0.1


def test_deployed_as_predictive_its_routers_drain_the_replica_whose_http_answers_are_errors(shop):
    deploy, ask, _ = shop
    before = deployment_status("shop/Front")
    deploy("PredictiveRouter")
    wait_for(lambda: levels(ask, "Front") == {"table"}, 20, "the proxy goes by tables")
    wait_for(lambda: levels(ask, "Model") == {"table"}, 20, "and so do the routers within Front's replicas")
    wait_for(lambda: failing(ask(40, 20.0)) == 0.0, 90, "the one that fails is out")
    assert failing(ask(200, 20.0)) < 0.12, "each trial from which it might come back costs a few"
    after = deployment_status("shop/Front")
    assert after["table_version"] > before["table_version"], "nothing began anew"
    assert after["finished"] > before["finished"]
    assert {r["router_id"] for r in before["routers"]} <= {r["router_id"] for r in after["routers"]}, "the proxy's"


def test_settings_that_change_reach_routers_that_serve_has_kept(shop):
    deploy, ask, folder = shop
    deploy("PredictiveRouter", balance={"cost": "shop:cost"})

    def routing():
        answers = ask(20)
        fronts = {answer["front"] for _, answer in answers if answer}
        return fronts, {int(path.name.partition("-")[2]) for path in folder.glob("cost-*")}

    def all_of_them():
        fronts, counting = routing()
        return fronts and fronts <= counting

    wait_for(all_of_them, 20, "the routers within Front's replicas count by the new function")
    assert deployment_status("shop/Model")["finished"] > 50


def test_back_to_observing_serve_decides_again(shop):
    deploy, ask, _ = shop
    deploy("ObservingRouter")
    wait_for(lambda: levels(ask, "Front") == {"observing"}, 20, "Front's routers observe")
    assert failing(ask(60)) > 0.1
