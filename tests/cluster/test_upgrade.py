"""An upgrade rolls through a cluster under load: its former version and this one work side by side, no request fails.

The former version comes from the repository's history: the test is skipped where that is not there. It is installed
for the whole cluster, then replaced in place, as pip does: what runs goes on with what it has imported, what starts
imports the new one. One application is deployed again before the control plane is started again, the other one after.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from serve_app.launch.local import LocalCluster
from tests.cluster.conftest import deployment_status, status, wait_for
from tests.ports import free_port
from tests.ray_start import started

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]

ROOT = Path(__file__).resolve().parents[2]
FORMER = "eb44b95"
"""The last commit whose messages have schema 1."""
PACKAGES = ("shadecast", "actors", "models", "serve_app", "train")
APP = """
    import os
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    options = dict(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter"),
    )

    @serve.deployment(**options)
    class Model:
        async def predict(self):
            return os.getpid()

    @serve.deployment(**options)
    class Front:
        def __init__(self, model):
            self.model = model

        async def __call__(self, request):
            return await self.model.predict.remote()

    app = Front.bind(Model.bind())
"""


def install(folder, commit=None):
    """The packages of a commit, or of this working tree, in place of those that are there."""
    new = folder.with_name("new")
    new.mkdir()
    if commit is None:
        for name in PACKAGES:
            shutil.copytree(ROOT / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        archive = subprocess.run(["git", "archive", commit, *PACKAGES], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            pytest.skip(f"the history has no {commit}: {archive.stderr.decode().strip()[:80]}")
        subprocess.run(["tar", "-x", "-C", str(new)], input=archive.stdout, check=True)
    (new / "upgraded.py").write_text(textwrap.dedent(APP))
    for name in [*PACKAGES, "upgraded.py"]:
        there = folder / name
        if there.is_dir():
            shutil.rmtree(there)
        (new / name).rename(there)
    new.rmdir() if not any(new.iterdir()) else shutil.rmtree(new)


class Load:
    """Requests through Serve's proxy, all the time, and how they ended."""

    def __init__(self, port):
        self.port, self.seen, self.stopped = port, Counter(), threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(name,)) for name in ("first", "last") * 2]
        for thread in self.threads:
            thread.start()

    def run(self, name):
        while not self.stopped.wait(0.1):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{name}", timeout=30) as answer:
                    json.load(answer)
                self.seen[name, "ok"] += 1
            except Exception as error:
                self.seen[name, repr(error)] += 1

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        return self.seen


@pytest.fixture
def site(tmp_path):
    """A cluster with the former version on its path; `run(*command)` in a process that has what is installed now."""
    folder, port = tmp_path / "site", free_port()
    folder.mkdir()
    install(folder, FORMER)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder))
        # one node: Serve's proxies prefer their own
        with started(LocalCluster(workers=0)) as local:
            environment.setenv("RAY_ADDRESS", local.address)
            config = tmp_path / "config.yaml"

            def run(*command):
                ran = subprocess.run(
                    command, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=240, check=False
                )
                assert ran.returncode == 0, ran.stdout + ran.stderr
                return ran.stdout

            def shadecast(*arguments):
                cli = "serve_app.cli" if (folder / "serve_app" / "cli.py").exists() else "serve_app.launch.cli"
                return run(sys.executable, "-P", "-c", f"from {cli} import main; main()", *arguments)

            applications = {}

            def deploy(name):
                again = {"runtime_env": {"env_vars": {"AGAIN": "1"}}} if name in applications else {}
                applications[name] = {
                    "name": name,
                    "import_path": "upgraded:app",
                    "route_prefix": f"/{name}",
                    **again,
                }
                http = {"host": "127.0.0.1", "port": port}
                described = {"proxy_location": "HeadOnly", "http_options": http}
                config.write_text(json.dumps({**described, "applications": list(applications.values())}))
                code = (
                    "import sys, json, ray; from ray import serve; from ray.serve.schema import ServeDeploySchema\n"
                    "from ray.serve.context import _get_global_client\n"
                    "ray.init(address='auto', log_to_driver=False); config = json.load(open(sys.argv[1]))\n"
                    "serve.start(http_options={**config['http_options'], 'location': 'HeadOnly'})\n"
                    "_get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)\n"
                )
                run(sys.executable, "-P", "-c", code, str(config))

            local.connect()
            yield folder, shadecast, deploy, port


def routers(deployment):
    return [router for router in deployment_status(deployment).get("routers", ()) if router["heard_s"] < 5]


def levels(name):
    return {router["level"] for part in ("Front", "Model") for router in routers(f"{name}/{part}")}


def test_an_upgrade_rolls_through_a_cluster_and_no_request_fails(site):
    folder, shadecast, deploy, port = site
    page = str(free_port())
    shadecast("up", "--page-port", page)
    deploy("first")
    deploy("last")
    load = Load(port)
    try:
        for name in (
            "first",
            "last",
        ):  # 0.1 sends its routers with their code: who has none yet could not take one later
            wait_for(lambda name=name: len(routers(f"{name}/Model")) == 2, 60, "both Fronts have a router")
        wait_for(lambda: levels("first") == levels("last") == {"table"}, 60, "the former version goes by tables")
        install(folder)
        deploy("first")
        time.sleep(3.0)
        shadecast("down")
        shadecast("up", "--page-port", page)
        wait_for(lambda: levels("last") == {"table"}, 60, "routers of the former version, a new control plane")
        wait_for(lambda: "table" in levels("first"), 60, "new routers, a new control plane")
        wait_for(lambda: len([n for n in status()["nodes"] if n["age_s"] < 5]) == 1, 60, "a new forecaster reports")
        deploy("last")
        wait_for(lambda: "table" in levels("last"), 60, "new routers of the other application, too")
        time.sleep(3.0)
    finally:
        seen = load.stop()
    assert set(seen) == {("first", "ok"), ("last", "ok")}, seen
    assert min(seen.values()) > 100
