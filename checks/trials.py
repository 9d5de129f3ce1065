"""What each extra is for, tried from a folder that has nothing of the project: `python trials.py EXTRA WITHOUT,...`.

Runs in an environment in which the wheel is installed with that extra; `checks/install.py` copies it there.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import RequestRouterConfig

_COMMAND = Path(sys.executable).with_name("shadecast")


def base() -> None:
    """A user's replica behind our router; the rest says which extra brings it."""
    with cluster():
        answers_through_our_router()
    says(["up"], 2, "shadecast up needs the control plane's packages: pip install 'shadecast[control]'")
    says(["train"], 2, "pip install 'shadecast[train]'")
    refused = subprocess.run([sys.executable, "-m", "train"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused
    assert "pip install 'shadecast[train]'" in refused.stderr, refused.stderr


def control() -> None:
    """A control plane on a cluster, and what it knows."""
    with cluster() as address:
        print(says(["up", "--address", address, "--page-port", "0"], 0, "Control plane runs"))
        answers_through_our_router()
        deadline_s = time.monotonic() + 120.0
        while True:
            state = json.loads(says(["status", "--address", address, "--json"], 0, "{"))
            forecasting = [node for node in state["nodes"] if node["model_version"]]
            if forecasting and state["deployments"]:
                break
            assert time.monotonic() < deadline_s, state
            time.sleep(0.5)
        says(["down", "--address", address], 0, "Stopped")
    says(["train"], 2, "shadecast train needs the packages of training: pip install 'shadecast[train]'")


def gateway() -> None:
    """A class of a user's behind the gateway's HTTP."""
    from serve_app.app import AppArgs, ArgumentError, build  # noqa: PLC0415 - others of the extras do not bring it

    Path("mine.py").write_text("class Twice:\n    def infer(self, inputs):\n        return {'y': 2 * inputs['x']}\n")
    sys.path.insert(0, os.getcwd())
    said = ""
    try:
        build(AppArgs.model_validate({}))
    except ArgumentError as error:
        said = error.format_message()
    assert "pip install 'shadecast[control]'" in said, f"of the example model, without torch: {said!r}"
    with cluster():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            build(AppArgs.model_validate({"model": "mine:Twice", "replicas": 2, "num_cpus": 0.1})), route_prefix="/"
        )
        asked = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [21]}]}
        url = f"http://127.0.0.1:{port}/v2/models/twice/infer"
        request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
            told = json.loads(answer.read())
        assert told["outputs"][0]["data"] == [42], told


def train() -> None:
    """A short training on Ray, into a registry of its own."""
    short = ["--hidden", "8", "--epochs", "1", "--steps", "4", "--made-up", "8", "--start", "nothing"]
    where = ["--registry", str(Path("registry").absolute()), "--storage", str(Path("storage").absolute())]
    print(says(["train", *short, *where, "--version", "v1", "--promote", "never"], 0, ""))
    assert Path("registry/v1/weights.safetensors").exists(), list(Path().rglob("*"))


def gpu() -> None:
    """NVIDIA's library is found; without a device its values are unknown."""
    from actors.gpu import open_gpu  # noqa: PLC0415 - as above

    reader = open_gpu()
    assert reader is not None, "pynvml was not found"
    print(reader.read())


def everything() -> None:
    """Nothing is missing."""
    from serve_app import extras  # noqa: PLC0415 - as above

    for extra in extras.MODULES:
        extras.require(extra, "this check")
    says(["--help"], 0, "announce")


# ---------------------------------------------------------------- what they share


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of one node, its address."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        ray.init(address=made.address, namespace="trial", log_to_driver=False)
        yield str(made.address)
    finally:
        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def answers_through_our_router() -> None:
    """Two replicas of a user's class, called through a handle."""

    @serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(request_router_class="serve_app.router:PredictiveRouter"),
    )
    class Model:
        def twice(self, x: int) -> int:
            return 2 * x

    deployment: Any = Model
    handle: Any = serve.run(deployment.bind(), name="trial", route_prefix=None)
    assert [handle.twice.remote(i).result(timeout_s=60) for i in range(40)] == [2 * i for i in range(40)]
    assert "serve_app.routing.request_router" in sys.modules, "Serve routed by itself"


def says(arguments: list[str], code: int, words: str) -> str:
    """What the command line prints: it must end with that code and say that."""
    ran = subprocess.run([str(_COMMAND), *arguments], capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert ran.returncode == code, (arguments, ran.returncode, ran.stdout, ran.stderr)
    assert words in ran.stdout + ran.stderr, (arguments, ran.stdout, ran.stderr)
    return ran.stdout


def main() -> None:
    """Try one extra."""
    extra, without = sys.argv[1], [name for name in sys.argv[2].split(",") if name]
    for name in ("shadecast", "serve_app"):
        origin = getattr(find_spec(name), "origin", None)
        assert str(origin).startswith(sys.prefix), f"{name} is not the wheel's: {origin}"
    brought = [name for name in without if find_spec(name) is not None]
    assert not brought, f"the extra {extra!r} brings {brought}"
    tried = {"base": base, "control": control, "gateway": gateway, "train": train, "gpu": gpu, "all": everything}
    tried[extra]()


if __name__ == "__main__":
    main()
