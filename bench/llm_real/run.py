"""One run: an arm, a scenario and a seed on a cluster of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from rich.console import Console

from bench.llm_real.arms import Arm, Scenario
from bench.llm_real.client import Client, columns
from bench.llm_real.engines import Engine, Hogs, find_engines, served, total
from bench.llm_real.server import FIRST, FOLDER, GO
from bench.llm_real.workload import conversations
from examples.llm.serving import application, environment
from serve_app.launch.control_plane import start_control_plane

_START_S = 150.0
_PORT = 18_230


def run(scenario: Scenario, arm: Arm, seed: int, model: Path, *, folder: Path, console: Console) -> dict[str, Any]:
    """Start everything, play the traffic, and stop everything. `folder` is empty and this run's own."""
    env = {**environment(), FOLDER: str(folder), FIRST: str(scenario.replicas)}
    os.environ.update(env)
    began_s = time.monotonic()
    with _ray(env, scenario):
        if arm.control_plane:
            start_control_plane(page_port=0)
        serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
        app = application(
            model,
            scenario.replicas + scenario.joining,
            arm.router,
            arm.settings,
            server="bench.llm_real.server:MeasuredServer",
            env=env,
        )
        # Deploy and go on: with a replica that waits to join, the application is not ready yet.
        serve.run_many([serve.RunTarget(app, route_prefix="/")], wait_for_applications_running=False)
        engines = _wait(scenario, folder)
        console.print(f"up after {time.monotonic() - began_s:.0f} s", style="dim")
        return {
            "scenario": scenario.name,
            "arm": arm.name,
            "seed": seed,
            **asyncio.run(_play(scenario, seed, engines, folder)),
        }


@contextlib.contextmanager
def _ray(env: Mapping[str, str], scenario: Scenario) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2 * (scenario.replicas + scenario.joining) + 4,  # Ray LLM asks for two a replica
        include_dashboard=False,
        namespace="shadecast",
        object_store_memory=200_000_000,
        runtime_env={"env_vars": dict(env)},
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def _wait(scenario: Scenario, folder: Path) -> list[Engine]:
    """Until all engines are started and those that serve from the beginning do."""
    deadline_s = time.monotonic() + _START_S
    every = scenario.replicas + scenario.joining
    while time.monotonic() < deadline_s:
        engines = find_engines(folder)
        if len(engines) == every and _running() >= scenario.replicas and _answers():
            return engines
        time.sleep(0.2)
    raise RuntimeError(
        f"not up within {_START_S:g} s: {len(find_engines(folder))} of {every} engines, {serve.status()}"
    )


def _deployment() -> Any:
    apps = serve.status().applications.values()
    found = [status for app in apps for name, status in app.deployments.items() if name.startswith("MeasuredServer")]
    return found[0] if found else None


def _running() -> int:
    deployment = _deployment()
    return int(deployment.replica_states.get("RUNNING", 0)) if deployment is not None else 0


def _answers() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{_PORT}/v1/models", timeout=5.0).is_success
    except httpx.HTTPError:
        return False


async def _play(scenario: Scenario, seed: int, engines: list[Engine], folder: Path) -> dict[str, Any]:
    then_s = scenario.warm_s + scenario.steady_s
    end_s = then_s + scenario.then_s
    client = Client(f"http://127.0.0.1:{_PORT}", scenario.traffic)
    marks: list[dict[str, Any]] = []
    with Hogs() as hogs:

        def mark(phase: str) -> None:
            counted = [engine.counters() for engine in engines]
            marks.append({"phase": phase, "at_s": client.now_s, "counters": counted})
            client.phase = phase

        def disturb() -> None:
            mark("hog" if scenario.hogs else "newcomer")
            hogs.start(cores[0], scenario.hogs)
            if scenario.joining:
                (folder / GO).touch()

        def over() -> None:
            client.close()
            mark("over")
            hogs.stop()

        cores = sorted(os.sched_getaffinity(0))
        for number, engine in enumerate(engines if scenario.hogs else ()):
            engine.pin(cores[number % len(cores)])
        client.phase = "warm"
        await client.warm_up(3)
        jobs = conversations(scenario.traffic, seed, end_s)
        await client.play(jobs, [(scenario.warm_s, lambda: mark("steady")), (then_s, disturb), (end_s, over)])
    copies = [0] * len(engines)
    for engine in engines:
        for number, is_copy in served(folder, engine.place):
            if is_copy:
                copies[engine.place] += 1
            else:
                client.answers[number].place = engine.place
    return {
        "phases": {here["phase"]: _between(here, after) for here, after in pairwise(marks)},
        "copies": copies,
        "requests": columns(client.answers),
    }


def _between(here: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What the engines have counted in a phase, all together and each."""
    gone = [{k: b[k] - a[k] for k in a} for a, b in zip(here["counters"], after["counters"], strict=True)]
    return {"seconds": round(after["at_s"] - here["at_s"], 3), **total(gone), "by_engine": gone}
