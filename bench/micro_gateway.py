"""`python -m bench.micro_gateway --json FILE [--quick]`: HTTP through the gateway and through a plain FastAPI ingress.

Each ingress is a deployment behind the same Serve proxy and calls the same replicas of the same model. Arms:

- `gateway`: this project's, with its router;
- `fastapi`: `@serve.ingress(FastAPI())` with a pydantic body, and Serve's default router;
- `fastapi_ours`: the same, with this project's router: what the router alone makes.

The arms take turns on a machine that others use, too. Where a process lands and how it warmed up makes differences of a
few percent between two of the same, so all ingresses are deployed anew for each pair, and the interval is over pairs.
`stall` sends 12 MiB of JSON and asks the gateway whether it is alive all the while.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import ray
import typer
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig
from rich.console import Console

from bench.micro import Row
from bench.results import interval
from bench.simulate.report import machine
from serve_app.gateway.digits import Digits
from serve_app.gateway.ingress import Gateway, GatewaySettings
from serve_app.gateway.model_server import ModelInfo, ModelServer
from serve_app.launch.control_plane import start_control_plane
from serve_app.launch.local import LocalCluster
from serve_app.router import PredictiveRouter

ARMS = ("gateway", "fastapi", "fastapi_ours")
CONNECTIONS = (1, 8)
Turns = dict[tuple[str, int], list[tuple[float, float, float]]]
"""By arm and connections, of each turn: requests per s, their median time in s, CPU s of the ingress for each."""
_REPLICAS = 4
_PORT = 8765
_PIXELS = [float(value) for value in range(64)]
_REQUEST = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": _PIXELS}]}
_ROWS = 22_000
"""Of 64 numbers: 12 MiB of JSON."""


class Tensor(BaseModel):
    """A tensor as a FastAPI application would declare it."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class Inference(BaseModel):
    """A request with its tensors."""

    inputs: list[Tensor]


def _plain_app() -> FastAPI:
    app = FastAPI()

    @app.post("/v2/models/digits/infer")
    async def infer(body: Inference) -> dict[str, Any]:
        inputs = {each.name: np.array(each.data, np.float32).reshape(each.shape) for each in body.inputs}
        outputs = await serve.get_replica_context().servable_object.model.infer.remote(inputs)
        return {
            "model_name": "digits",
            "outputs": [
                {"name": name, "datatype": str(array.dtype), "shape": array.shape, "data": array.ravel().tolist()}
                for name, array in outputs.items()
            ],
        }

    return app


@serve.ingress(_plain_app)
class Plain:
    """An ingress as users write it."""

    def __init__(self, model: Any, router: str) -> None:
        if router == "default":
            RequestRouterConfig.get_request_router_class = lambda _: PowerOfTwoChoicesRequestRouter
        self.model = model


def _deploy(arm: str, model: Any) -> None:
    quiet = {"enable_access_log": False}  # as `serve_app.app:build` has it; a log line takes the same in both
    options = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 512, "logging_config": quiet}
    if arm == "gateway":
        info = ModelInfo.of(Digits)
        app = serve.deployment(Gateway).options(name=arm, **options).bind(model, info, GatewaySettings())
    else:
        router = "default" if arm == "fastapi" else "ours"
        app = serve.deployment(Plain).options(name=arm, **options).bind(model, router)
    serve.run(app, name=arm, route_prefix=f"/{arm}")


def main(
    *,
    json_file: Annotated[Path | None, typer.Option("--json", help="write rows here")] = None,
    quick: Annotated[bool, typer.Option(help="two pairs of few rounds")] = False,
    pairs: Annotated[int, typer.Option(help="deployments of all ingresses")] = 8,
    rounds: Annotated[int, typer.Option(help="turns in each")] = 12,
    seconds: Annotated[float, typer.Option(help="of each turn")] = 1.0,
) -> None:
    """Measure the ways through HTTP side by side, and how long large requests stop the gateway."""
    console = Console(width=140)
    console.print("  ".join(f"{key}: {value}" for key, value in machine().items()), style="dim")
    if quick:
        pairs, rounds = 2, 4
    turns: list[Turns] = []
    with LocalCluster(workers=1) as cluster:
        cluster.connect()
        start_control_plane(page_port=0)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": _PORT})
        router = RequestRouterConfig(request_router_class=f"{PredictiveRouter.__module__}:PredictiveRouter")
        server = serve.deployment(ModelServer).options(
            num_replicas=_REPLICAS,
            ray_actor_options={"num_cpus": 0.1},
            request_router_config=router,
            logging_config={"enable_access_log": False},
        )
        model = serve.run(server.bind("digits", {}, 8, None), name="model", route_prefix=None)
        for pair in range(pairs):
            for arm in ARMS:
                _deploy(arm, model)
            turns.append(asyncio.run(_take_turns(rounds, seconds)))
            console.print(f"pair {pair + 1} of {pairs}", style="dim")
            if pair < pairs - 1:
                for arm in ARMS:
                    serve.delete(arm)
        stalls = asyncio.run(_stalls(3 if quick else 8))
        serve.shutdown()
        ray.shutdown()
    rows = [*_compared(turns), *stalls]
    for row in rows:
        console.print(f"{row.name:22} {row.arm:14} {row.replicas or '':2} {row.metric:22} {row.value:.4g}")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=0) + "\n", encoding="utf-8")


async def _take_turns(rounds: int, seconds: float) -> Turns:
    found: Turns = {}
    processes = {arm: _process(arm) for arm in ARMS}
    for arm in ARMS:
        await _drive(arm, 8, 2.0)
    for turn in range(rounds):
        for connections in CONNECTIONS:
            for at in range(len(ARMS)):
                arm = ARMS[(at + turn) % len(ARMS)]
                before_s = sum(processes[arm].cpu_times()[:2])
                rate, p50_s, count = await _drive(arm, connections, seconds)
                cpu_s = sum(processes[arm].cpu_times()[:2]) - before_s
                found.setdefault((arm, connections), []).append((rate, p50_s, cpu_s / count))
    return found


def _compared(turns: list[Turns]) -> list[Row]:
    """Medians over all turns, and the ratio to the plain ingress: of the medians of a pair, the interval over pairs."""
    rows = []
    for connections in CONNECTIONS:
        name = f"http_{connections}_connections"
        for arm in ARMS:
            every = [turn for pair in turns for turn in pair[arm, connections]]
            for at, (metric, scale) in enumerate((("median_per_s", 1.0), ("p50_ms", 1e3), ("ingress_cpu_ms", 1e3))):
                rows.append(Row(name, arm, _REPLICAS, metric, scale * statistics.median(turn[at] for turn in every)))
        for arm in (arm for arm in ARMS if arm != "fastapi"):
            for at, metric in enumerate(("rate", "p50", "ingress_cpu")):
                logs = [
                    statistics.median(
                        math.log(ours[at] / plain[at])
                        for ours, plain in zip(pair[arm, connections], pair["fastapi", connections], strict=True)
                    )
                    for pair in turns
                ]
                mean, half = interval(logs)
                for end, value in (("", mean), ("_low", mean - half), ("_high", mean + half)):
                    rows.append(Row(name, arm, _REPLICAS, f"{metric}_ratio{end}", math.exp(value)))
    return rows


def _process(arm: str) -> psutil.Process:
    """The process of an arm's ingress."""
    (found,) = [each for each in psutil.process_iter() if f"ServeReplica:{arm}:" in " ".join(_command(each))]
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def _drive(arm: str, connections: int, seconds: float) -> tuple[float, float, int]:
    """Requests per second of a closed loop, the median time of one, and how many there were."""
    raw = _raw(f"/{arm}/v2/models/digits/infer", json.dumps(_REQUEST).encode())
    until_s = time.monotonic() + seconds
    times: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
        while (sent_s := time.monotonic()) < until_s:
            writer.write(raw)
            await _answer(reader)
            times.append(time.monotonic() - sent_s)
        writer.close()

    begun_s = time.monotonic()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return len(times) / (time.monotonic() - begun_s), statistics.median(times), len(times)


def _raw(path: str, body: bytes) -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return lines.encode() + body


async def _answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"the server answered {head[:60]!r}")
    if b"content-length: " in head:
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return
    while size := int((await reader.readline()).strip() or b"0", 16):
        await reader.readexactly(size + 2)
    await reader.readline()


async def _stalls(times: int) -> list[Row]:
    """How long small requests wait beside one of 12 MiB, and what they wait without one."""
    data = np.random.default_rng(0).random(_ROWS * 64).round(6).tolist()
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [_ROWS, 64], "data": data}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "digit"}]}).encode()
    large = _raw("/gateway/v2/models/digits/infer", body)
    rows = [Row("large_request", "gateway", 0, "body_mib", len(body) / 2**20)]
    quiet, beside, answers = [], [], []
    for turn in range(times + 1):
        quiet.append(await _longest_wait(asyncio.sleep(1.0)))
        begun_s = time.monotonic()
        beside.append(await _longest_wait(_send(large)))
        answers.append(time.monotonic() - begun_s)
        if turn == 0:  # the processes that read large requests start with the first one
            rows.append(Row("large_request", "gateway", 0, "first_answer_ms", 1e3 * answers[0]))
            quiet, beside, answers = [], [], []
    for metric, values in (("wait_alone", quiet), ("wait_beside", beside), ("answer", answers)):
        rows.append(Row("large_request", "gateway", 0, f"{metric}_ms", 1e3 * statistics.median(values)))
        rows.append(Row("large_request", "gateway", 0, f"{metric}_max_ms", 1e3 * max(values)))
    return rows


async def _send(raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT, limit=2**26)
    writer.write(raw)
    await _answer(reader)
    writer.close()


async def _longest_wait(work: Any) -> float:
    """The longest that one "are you alive?" after the other took while `work` was done."""
    ask = b"GET /gateway/v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
    task, longest = asyncio.ensure_future(work), 0.0
    while not task.done():
        begun_s = time.monotonic()
        writer.write(ask)
        await _answer(reader)
        longest = max(longest, time.monotonic() - begun_s)
        await asyncio.sleep(0.002)
    await task
    writer.close()
    return longest


if __name__ == "__main__":
    typer.run(importlib.import_module("bench.micro_gateway").main)  # replicas import its classes by that name
