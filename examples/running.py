"""Runs an example: `python -m examples.NAME` starts a local cluster, deploys it, shows its promise, stops everything.

By hand: `ray start --head`, `shadecast up`, `serve run examples.NAME:app`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from serve_app.launch.control_plane import ask_coordinator, start_control_plane
from serve_app.launch.local import LocalCluster

PORT = 8000
_ROOT = Path(__file__).resolve().parents[1]
_START_S = 120.0


class Examples:
    """The examples that run on the connected cluster; `url` is the address of Serve's proxy."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._replicas: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}

    def deploy(self, wanted: Mapping[str, Mapping[str, int]]) -> None:
        """Start examples, or change how many replicas a deployment has, as `serve deploy` does; until all run.

        `{"embedding": {"MiniLM": 2}}`: this example, with two replicas of that deployment. Others go on undisturbed.
        """
        with self._lock:  # an application that a configuration does not name is deleted: one at a time
            for name, replicas in wanted.items():
                self._replicas[name] = {**self._replicas.get(name, {}), **replicas}
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(self._config()))
        deadline_s = time.monotonic() + _START_S
        while not all(map(self._runs, wanted)):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not all of {', '.join(wanted)} run after {_START_S:g} s: {serve.status()}")
            time.sleep(0.1)

    def _config(self) -> dict[str, Any]:
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {
            "applications": [
                {
                    "name": name,
                    "route_prefix": f"/{name}",
                    "import_path": f"examples.{name}:app",
                    "runtime_env": {"env_vars": {"PYTHONPATH": path}},
                    "deployments": [{"name": each, "num_replicas": count} for each, count in replicas.items()],
                }
                for name, replicas in self._replicas.items()
            ]
        }

    def _runs(self, name: str) -> bool:
        app = serve.status().applications.get(name)
        if app is not None and app.status == "DEPLOY_FAILED":
            raise RuntimeError(f"{name} did not start: {app.message}")
        return (
            app is not None
            and app.status == "RUNNING"
            and all(
                app.deployments[each].replica_states.get("RUNNING") == count
                for each, count in self._replicas[name].items()
            )
        )

    def of_each_replica(self, name: str, deployment: str, method: str) -> list[Any]:
        """What a method answers on each replica; [] in the instant before the handle knows any."""
        if (handle := self._handles.get((name, deployment))) is None:
            handle = self._handles[name, deployment] = serve.get_deployment_handle(deployment, name)
        try:
            answers: list[Any] = handle.broadcast(method).results(timeout_s=30)
        except DeploymentUnavailableError:
            return []
        return answers

    def events(self, name: str, deployment: str) -> dict[str, list[str]]:
        """What happened to each replica, in order: admit (a trial begins), trial_passed, step_passed, ramp_done, ..."""
        found: dict[str, list[str]] = {}
        for change in ask_coordinator("status")["transitions"]:
            if change["deployment"] == f"{name}/{deployment}":
                found.setdefault(change["replica_id"], []).append(str(change["event"]))
        return found


@dataclass
class Load:
    """What became of the requests of `load`."""

    sent: int = 0
    answers: list[Any] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


@contextlib.asynccontextmanager
async def load(ask: Callable[[int], Awaitable[Any]], clients: int, pause_s: float = 0.0) -> AsyncIterator[Load]:
    """Meanwhile so many clients call `ask(client)` again and again; at the end their last requests are awaited."""
    seen, stop = Load(), asyncio.Event()

    async def client(number: int) -> None:
        while not stop.is_set():
            seen.sent += 1
            try:
                seen.answers.append(await ask(number))
            except Exception as error:
                seen.errors.append(error)
            await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
        try:
            yield seen
        finally:
            stop.set()


async def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition()`, which may block. Raises TimeoutError, naming what was awaited."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := await asyncio.to_thread(condition)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.1)
    return value


@contextlib.contextmanager
def serving(local: LocalCluster, port: int) -> Iterator[Examples]:
    """The control plane and Serve on a local cluster."""
    local.connect()
    start_control_plane(page_port=0)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        yield Examples(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()


def run(name: str) -> None:
    """Start a cluster and an example, print what it shows, and leave nothing running."""
    example = importlib.import_module(f"examples.{name}")  # replicas import this one, not `__main__`
    print("Starting a local cluster ...", flush=True)
    with LocalCluster(workers=1) as local, serving(local, PORT) as examples:
        examples.deploy({name: {}})
        print(asyncio.run(example.show(examples)))
