"""`python -m bench.protocols [--json FILE]`: gRPC beside HTTP through the same gateway, proxy process and model.

Unmodified asynchronous clients of Triton's send one row of the digits model as raw bytes, each connection one request
after the other. The protocols take turns in rounds on one cluster; the client shares the machine with it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import tritonclient.grpc.aio as triton_grpc
import tritonclient.http.aio as triton_http
import typer
from ray import serve
from rich.console import Console
from rich.table import Table

from bench.simulate.report import machine
from serve_app.app import AppArgs, build
from serve_app.grpc_proxy import grpc_options

_CONNECTIONS = (1, 8)
Infer = Callable[[], Awaitable[Any]]


def main(
    *,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
    http_port: Annotated[int, typer.Option(help="of Serve's HTTP proxy")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="of Serve's gRPC proxy")] = 9000,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each protocol")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="of each turn")] = 2.0,
) -> None:
    """Measure both protocols."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": http_port},
            grpc_options=grpc_options(grpc_port),
        )
        serve.run(build(AppArgs.model_validate({"replicas": 2, "num_cpus": 0.5})), name="digits", route_prefix="/")
        rows = asyncio.run(_measure(http_port, grpc_port, rounds, seconds))
    finally:
        serve.shutdown()
        ray.shutdown()
    table = Table("connections", "protocol", "p50 ms", "p99 ms", "requests/s")
    for row in rows:
        table.add_row(
            str(row["connections"]), row["protocol"], *(f"{row[k]:.2f}" for k in ("p50_ms", "p99_ms", "per_s"))
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


async def _measure(http_port: int, grpc_port: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for connections in _CONNECTIONS:
        async with AsyncExitStack() as stack:
            senders: dict[str, list[Infer]] = {"http": [], "grpc": []}
            for _ in range(connections):
                senders["http"].append(await _http(stack, http_port))
                senders["grpc"].append(await _grpc(stack, grpc_port))
            took_s: dict[str, list[float]] = {protocol: [] for protocol in senders}
            for number in range(-1, rounds):  # the first turn warms up
                for protocol, infers in senders.items():
                    found = await asyncio.gather(*(_drive(infer, seconds) for infer in infers))
                    if number >= 0:
                        took_s[protocol] += [each for one in found for each in one]
        for protocol, times_s in took_s.items():
            cuts_s = statistics.quantiles(times_s, n=100)
            rows.append(
                {
                    "connections": connections,
                    "protocol": protocol,
                    "p50_ms": 1e3 * cuts_s[49],
                    "p99_ms": 1e3 * cuts_s[98],
                    "per_s": len(times_s) / (rounds * seconds),
                }
            )
    return rows


async def _drive(infer: Infer, seconds: float) -> list[float]:
    """Seconds that each request took, one after the other."""
    took_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < end_s:
        await infer()
        took_s.append(time.perf_counter() - began_s)
    return took_s


async def _http(stack: AsyncExitStack, port: int) -> Infer:
    client = await stack.enter_async_context(triton_http.InferenceServerClient(f"127.0.0.1:{port}"))
    tensor = triton_http.InferInput("pixels", [1, 64], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 64), np.float32))
    return lambda: client.infer("digits", [tensor])


async def _grpc(stack: AsyncExitStack, port: int) -> Infer:
    # without the option all clients of a process share one connection
    own = [("grpc.use_local_subchannel_pool", 1)]
    client = await stack.enter_async_context(triton_grpc.InferenceServerClient(f"127.0.0.1:{port}", channel_args=own))
    tensor = triton_grpc.InferInput("pixels", [1, 64], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 64), np.float32))
    return lambda: client.infer("digits", [tensor])


if __name__ == "__main__":
    typer.run(main)
