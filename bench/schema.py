"""`python -m bench.schema --requests 100000`: requests made from the gateway's OpenAPI document.

schemathesis makes right ones and wrong ones for every path and method that the document describes, and checks each
answer against it. The gateway runs in a process of its own behind uvicorn; the replica's code is called there without
Ray in between. Prints how many requests, what statuses, and the process's memory before and after. Ends with 1 at the
first answer that is a 5xx; a 504 is none where the request asked for an answer within less than a second.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import requests
import typer
import uvicorn
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Unsatisfiable
from rich.console import Console
from schemathesis import GenerationMode, openapi
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import negative_data_rejection

from serve_app.gateway.http_app import make_app
from serve_app.gateway.ingress import GatewaySettings, InferenceApi
from serve_app.gateway.model_call import ModelCaller
from serve_app.gateway.model_server import ModelInfo, ModelServer
from serve_app.gateway.tensors import TensorSpec

_Statuses = collections.Counter[tuple[str, str, int]]
_BODY_WEIGHT = 4
"""Requests with a body come so often for each without."""
_MANY = 1000
_MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


class Everything:
    """A model with tensors of several kinds, that gives back what it gets; and generates."""

    name = "everything"
    inputs = (
        TensorSpec("words", "BYTES", (-1,)),
        TensorSpec("scores", "FP32", (-1, 3)),
        TensorSpec("n", "INT8", (-1,)),
    )
    outputs = inputs

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What came."""
        return inputs

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        """The words of the text."""
        for word in str(request.get("text_input", "")).split()[:20]:
            yield {"text_output": word + " "}


class _Direct:
    """Stands where Serve's handle does: calls the replica's code at once."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server

    def options(self, **_: Any) -> _Direct:
        return self

    def remote(self, *args: Any) -> Any:
        if len(args) == 1:
            return _Stream(self._server.generate(args[0]))
        return asyncio.ensure_future(self._server.infer(*args))


class _Stream:
    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items

    def __aiter__(self) -> _Stream:
        return self

    def __anext__(self) -> Any:
        return anext(self._items)

    def cancel(self) -> None:
        """The generator ends with its last reference."""


async def _ready() -> bool:
    return True


def _serve(port: int) -> None:
    """The gateway's process."""
    chosen = GatewaySettings()
    handle = _Direct(ModelServer(f"{__name__.replace('__main__', 'bench.schema')}:Everything"))
    caller = ModelCaller(handle, time.monotonic, chosen.queue_timeout_s)
    api = InferenceApi(caller, ModelInfo.of(Everything), chosen, _ready)
    uvicorn.run(make_app(api), host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def _gateway() -> Iterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "bench.schema", "--port", str(port)])  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(f"{url}/v2/health/live", timeout=1.0)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30.0)


def send(url: str, count: int, *, same: bool = True) -> _Statuses:
    """Sends about `count` requests, always the same ones or others each time; how many by method, path and status.

    Raises AssertionError for a 5xx, and schemathesis' failure for an answer that is not as the document says.
    """
    document = requests.get(f"{url}/openapi.json", timeout=10.0).json()
    operations = [_operation(found) for found in openapi.from_dict(document).get_all_operations()]
    statuses: _Statuses = collections.Counter()
    weights = [1 if not list(each.body) or each.path.endswith("load") else _BODY_WEIGHT for each in operations]
    with requests.Session() as session:
        for operation, weight in zip(operations, weights, strict=True):
            for mode in _MODES:
                examples = max(1, round(count * weight / sum(weights) / len(_MODES)))
                settings_ = settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    derandomize=same,
                    suppress_health_check=list(HealthCheck),
                    verbosity=Verbosity.quiet,
                )
                strategy = operation.as_strategy(generation_mode=mode)
                try:
                    statuses += _send(url, session, operation, settings_, strategy)
                except Unsatisfiable:
                    if mode is GenerationMode.POSITIVE:
                        raise  # nothing can be wrong about a request without parameters and body; but one can be made
    return statuses


def _operation(found: Any) -> Any:
    return found.ok()


def _send(url: str, session: requests.Session, operation: Any, how: settings, strategy: Any) -> _Statuses:
    statuses: _Statuses = collections.Counter()
    # of many thousand requests that are to be wrong some are right by chance: what schemathesis drew beyond a bound
    # may lie within it
    excluded = [negative_data_rejection] if how.max_examples > _MANY else []

    @how
    @given(case=strategy)
    def each(case: Any) -> None:
        response = case.call(base_url=url, session=session, timeout=30.0)
        statuses[case.method, operation.path, response.status_code] += 1
        if response.status_code == 504 and _is_hasty(case.body):
            return
        assert response.status_code < 500, (case.as_curl_command(), response.text[:500])
        case.validate_response(response, excluded_checks=excluded)

    each()
    return statuses


def _is_hasty(body: Any) -> bool:
    parameters = body.get("parameters") if isinstance(body, dict) else None
    timeout_us = parameters.get("timeout") if isinstance(parameters, dict) else None
    return isinstance(timeout_us, (int, float)) and timeout_us < 1_000_000


def main(
    *,
    count: Annotated[int, typer.Option("--requests", help="about how many")] = 100_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the counts here")] = None,
    port: Annotated[int, typer.Option(hidden=True, help="serve there: the gateway's own process")] = 0,
) -> None:
    """Send requests made from the gateway's OpenAPI document."""
    if port:
        _serve(port)
        return
    console = Console(width=140)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    statuses: _Statuses = collections.Counter()
    memory: list[tuple[int, float]] = []
    with _gateway() as (url, process):
        begun_s = time.monotonic()
        parts = max(1, count // 10_000)
        for _ in range(parts):
            memory.append((statuses.total(), _mib(process)))
            try:
                statuses += send(url, count // parts, same=False)
            except (AssertionError, FailureGroup) as error:
                console.print(f"[red]{error}[/]")
                raise typer.Exit(1) from None
            console.print(f"{statuses.total()} requests, {_mib(process):.0f} MiB", style="dim")
        memory.append((statuses.total(), _mib(process)))
        took_s = time.monotonic() - begun_s
    by_status: collections.Counter[int] = collections.Counter()
    for (_, _, status), times in statuses.items():
        by_status[status] += times
    console.print(f"{statuses.total()} requests in {took_s:.0f} s: {dict(sorted(by_status.items()))}")
    console.print(f"memory before, and after each part: {', '.join(f'{mib:.0f}' for _, mib in memory)} MiB")
    if json_file is not None:
        rows = [{"method": m, "path": p, "status": s, "count": n} for (m, p, s), n in sorted(statuses.items())]
        found = {"requests": statuses.total(), "memory_mib": memory, "answers": rows}
        json_file.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


def _mib(process: psutil.Process) -> float:
    """Of the gateway's process and those that it started."""
    return float(sum(each.memory_info().rss for each in [process, *process.children()]) / 2**20)


if __name__ == "__main__":
    typer.run(main)
