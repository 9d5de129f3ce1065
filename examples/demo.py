"""The demo: a real trace that three newcomers join, one well, one slow, one failing; Serve's default router and ours.

`make demo` starts a local cluster, replays the same arrivals against both routers in turn, and prints what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

from bench.simulate.workload import TraceRow
from examples import demo_model
from examples.trace import arrivals
from serve_app.launch.control_plane import running_coordinator, start_control_plane
from serve_app.launch.local import LocalCluster

console = Console(width=max(Console().width, 110))
HEALTHY = 4
SPANS = 6
APP = "demo"
NEWCOMERS = ("well", "slow", "failing")
WINDOW_S = 5.0
"""In which a newcomer has its share once it gives half of a fair part of the answers."""


@dataclass
class Result:
    """What the client saw of one replay."""

    requests: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    late_latencies_s: list[float] = field(default_factory=list)
    """Of requests sent after the newcomers had joined."""
    answered: list[Counter[str]] = field(default_factory=lambda: [Counter() for _ in range(SPANS)])
    answers: list[tuple[float, str]] = field(default_factory=list)
    """When the requests were sent that were answered, in seconds since the newcomers joined, and by which replica."""
    transitions: list[dict[str, Any]] = field(default_factory=list)
    deployment: dict[str, Any] = field(default_factory=dict)

    def given_by(self, kind: str) -> list[float]:
        """When the requests were sent that replicas of a kind answered."""
        return sorted(at_s for at_s, label in self.answers if label.endswith(kind))

    def share_after_s(self, kind: str) -> float | None:
        """Seconds from the newcomers' joining until one had its share; None if it never had."""
        answers_s, theirs_s = np.array(sorted(at_s for at_s, _ in self.answers)), np.array(self.given_by(kind))
        for begin_s in theirs_s:
            window = begin_s, begin_s + WINDOW_S
            every, its = (np.diff(np.searchsorted(times, window))[0] for times in (answers_s, theirs_s))
            if its / every >= 0.5 / (HEALTHY + 1):
                return float(begin_s)
        return None


def deploy(router: str, replicas: int, port: int) -> None:
    """Deploy, or only change the number of replicas: what was there before goes on undisturbed."""
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "serve_app.app:build",
                "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}},
                "args": {
                    "model": "examples.demo_model:FaultyDigits",
                    "replicas": HEALTHY,
                    "num_cpus": 0.2,
                    "max_ongoing_requests": 32,
                    "router": router,
                },
                "deployments": [{"name": "digits", "num_replicas": replicas}],
            }
        ],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


async def wait_running(replicas: int, timeout_s: float = 120.0) -> None:
    """Until the application runs with that many replicas."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        app = (await asyncio.to_thread(serve.status)).applications.get(APP)
        if app is not None and app.status == "RUNNING" and "digits" in app.deployments:
            if app.deployments["digits"].replica_states.get("RUNNING", 0) == replicas:
                return
            if app.status == "DEPLOY_FAILED":
                break
        await asyncio.sleep(0.3)
    raise SystemExit(f"demo: the application did not come up: {app}")


async def replay(
    rows: list[TraceRow],
    url: str,
    seconds: float,
    *,
    join_s: float,
    join: Callable[[], None],
    on_done: Callable[[], None],
) -> Result:
    """Send every request at its time, whatever the others do (open loop); newcomers join at `join_s`."""
    pixels, labels = load_digits(return_X_y=True)
    result = Result()
    rng = np.random.default_rng(0)
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=100)
    started_s = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:

        async def send(row: TraceRow) -> None:
            chosen = rng.integers(0, len(pixels), int(np.clip(row.prompt_tokens / 100, 2, 48)))
            body = {
                "inputs": [
                    {
                        "name": "pixels",
                        "shape": [len(chosen), 64],
                        "datatype": "FP32",
                        "data": pixels[chosen].ravel().tolist(),
                    }
                ]
            }
            await asyncio.sleep(max(started_s + row.at_s - time.monotonic(), 0.0))
            sent_s = time.monotonic()
            result.requests += 1
            try:
                answer = await client.post("/v2/models/digits/infer", content=json.dumps(body))
                answer.raise_for_status()
                outputs = {o["name"]: o["data"] for o in answer.json()["outputs"]}
                result.wrong += float(np.mean(np.array(outputs["digit"]) == labels[chosen])) < 0.7
                span = min(int(row.at_s / seconds * SPANS), SPANS - 1)
                label = outputs["answered_by"][0]
                result.answered[span][label] += 1
                result.answers.append((row.at_s - join_s, label))
            except httpx.HTTPStatusError as error:
                result.errors[f"HTTP {error.response.status_code}"] += 1
            except httpx.HTTPError as error:
                result.errors[type(error).__name__] += 1
            took_s = time.monotonic() - sent_s
            result.latencies_s.append(took_s)
            if row.at_s > join_s:
                result.late_latencies_s.append(took_s)
            on_done()

        async def let_join() -> None:
            await asyncio.sleep(join_s)
            await asyncio.to_thread(join)

        await asyncio.gather(let_join(), *(send(row) for row in rows))
    return result


async def run_arm(
    router: str, rows: list[TraceRow], seconds: float, *, port: int, roles: Any, progress: Progress
) -> Result:
    """One router's turn, on a fresh deployment."""
    task = progress.add_task(f"{router:>10}: starting", total=len(rows))
    await roles.plan.remote()
    await asyncio.to_thread(deploy, router, HEALTHY, port)
    await wait_running(HEALTHY)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
        for _ in range(40):  # every replica loads and warms up before the clock starts
            body = {"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
            await client.post("/v2/models/digits/infer", json=body)
    if router == "predictive":
        await asyncio.sleep(16.0)  # the first start, in which replicas enter untried, is over

    def join() -> None:
        progress.update(task, description=f"{router:>10}: three newcomers join")
        ray.get(roles.plan.remote(*NEWCOMERS))
        deploy(router, HEALTHY + len(NEWCOMERS), port)

    progress.update(task, description=f"{router:>10}: replaying")
    result = await replay(rows, url, seconds, join_s=seconds / 4, join=join, on_done=lambda: progress.advance(task))
    if router == "predictive":
        state = await running_coordinator().status.remote()
        result.deployment = next(d for d in state["deployments"] if d["deployment"].endswith("/digits"))
        result.transitions = [t for t in state["transitions"] if t["ago_s"] < seconds + 5]
    progress.update(task, description=f"{router:>10}: done")
    await asyncio.to_thread(serve.delete, APP)
    return result


def quantile_ms(values_s: list[float], q: float) -> str:
    """A latency quantile in milliseconds."""
    return f"{1000 * float(np.quantile(values_s, q)):.0f} ms" if values_s else "-"


def _part_of(result: Result, kind: str) -> str:
    """How many answers a newcomer gave, and when it began to and had its share, since the command to start it."""
    answers_s, share_s = result.given_by(kind), result.share_after_s(kind)
    if not answers_s:
        return "none"
    shared = f"its share after {share_s:.0f} s" if share_s is not None else "never its share"
    return f"{len(answers_s)}: the first after {answers_s[0]:.0f} s, {shared}"


def print_results(results: dict[str, Result], seconds: float) -> None:
    """Both columns, shares over time, transitions."""
    table = Table(title="What the clients saw", title_justify="left")
    for heading in ("", *("Serve's default" if arm == "default" else "Shadecast" for arm in results)):
        table.add_column(heading)
    late = [r.late_latencies_s for r in results.values()]
    lines: list[tuple[str, list[str]]] = [
        ("requests", [str(r.requests) for r in results.values()]),
        ("errors", [f"{sum(r.errors.values())} {dict(r.errors) or ''}" for r in results.values()]),
        ("answers mostly wrong", [str(r.wrong) for r in results.values()]),
        ("p50", [quantile_ms(r.latencies_s, 0.5) for r in results.values()]),
        ("p99", [quantile_ms(r.latencies_s, 0.99) for r in results.values()]),
        ("p50 after the newcomers joined", [quantile_ms(values, 0.5) for values in late]),
        ("p99 after the newcomers joined", [quantile_ms(values, 0.99) for values in late]),
    ]
    for kind in NEWCOMERS:
        lines.append((f"live answers of the newcomer that is {kind}", [_part_of(r, kind) for r in results.values()]))
    lines.append(("mirrored requests", [str(r.deployment.get("mirrored", 0)) for r in results.values()]))
    for name, values in lines:
        table.add_row(name, *values)
    console.print(table)
    for arm, result in results.items():
        shares = Table(title=f"Share of the answers per node and replica over time: {arm}", title_justify="left")
        shares.add_column("node, kind")
        for span in range(SPANS):
            shares.add_column(f"{span * seconds / SPANS:.0f}-{(span + 1) * seconds / SPANS:.0f} s", justify="right")
        labels = sorted({label for counter in result.answered for label in counter})
        for label in labels:
            cells = [100 * c[label] / max(sum(c.values()), 1) for c in result.answered]
            shares.add_row(label, *(f"{cell:.0f} %" if cell else "." for cell in cells))
        console.print(shares)
    console.print("\nState transitions (Shadecast):")
    for entry in results["predictive"].transitions:
        evidence = {k: round(v, 3) for k, v in entry["evidence"].items() if k == "pairs" and math.isfinite(v)}
        console.print(
            f"  {-entry['ago_s']:6.1f} s  {entry['replica_id']} on {entry['node_id'][:6]}: "
            f"{entry['before']} -> {entry['after']}: {entry['reason']} {evidence or ''}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def main() -> None:
    """Parse the arguments, run both arms, print, and leave nothing running."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="length of each replay")
    parser.add_argument("--speed", type=float, default=2.5, help="pace of the trace")
    parser.add_argument("--seed", type=int, default=10, help="which part of the trace")
    parser.add_argument("--workers", type=int, default=3, help="worker nodes")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--json", default="", help="write the numbers to this file")
    args = parser.parse_args()
    rows, origin = arrivals(args.seconds, args.speed, args.seed)
    console.print(f"Arrivals: {origin}.", highlight=False)
    with console.status("Starting") as status:
        cluster = LocalCluster(args.workers, on_progress=lambda text: status.update(f"Ray cluster: {text}"))
        with cluster:
            cluster.connect()
            status.update("Control plane")
            start_control_plane(page_port=0)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": args.port})
            roles = (
                ray.remote(demo_model.Roles)
                .options(name=demo_model.ROLES, namespace=demo_model.NAMESPACE, num_cpus=0)
                .remote()
            )
            status.stop()
            results = {}
            bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*bars, console=console) as progress:
                for arm in ("default", "predictive"):
                    results[arm] = asyncio.run(
                        run_arm(arm, rows, args.seconds, port=args.port, roles=roles, progress=progress)
                    )
            print_results(results, args.seconds)
    if args.json:
        Path(args.json).write_text(json.dumps({arm: vars(r) for arm, r in results.items()}, default=str, indent=1))


if __name__ == "__main__":
    main()
