"""The model's server of the benchmark: it shows its engine's metrics, and may wait to be let in as a newcomer."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import prometheus_client
from ray import serve

from examples.llm.server import TellingServer
from serve_app.mirror import is_shadow

FOLDER, FIRST = "BENCH_LLM_FOLDER", "BENCH_LLM_FIRST"
"""Environment: where replicas say who they are, and how many of them are there from the start."""
GO = "go"
"""The file in that folder whose coming lets the others in."""


class MeasuredServer(TellingServer):
    """Tells its process and where its engine's metrics are.

    Replicas beyond the first wait with a started engine and an empty cache: so that a newcomer joins at a moment of the
    benchmark's choice, and its start takes no CPU from those that are measured.
    """

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc] # as Ray's: Serve awaits it
        await super().__init__(*args, **kwargs)
        folder, first = Path(os.environ[FOLDER]), int(os.environ[FIRST])
        server, _ = prometheus_client.start_http_server(0, addr="127.0.0.1")
        place = _place(folder)
        told = {
            "place": place,
            "pid": os.getpid(),
            "port": server.server_port,
            "replica": serve.get_replica_context().replica_id.unique_id,
        }
        self._served = open(folder / f"{place}.served", "a", encoding="utf-8")  # noqa: ASYNC230, SIM115 - as long as it
        half = folder / f"{place}.half"
        half.write_text(json.dumps(told), encoding="utf-8")
        half.rename(folder / f"{place}.json")
        while place >= first and not (folder / GO).exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.1)

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        """As Ray's, and noted: which request of the client's, and whether it is a copy."""
        self._served.write(f"{request.user} {int(is_shadow())}\n")
        self._served.flush()
        return await super().chat(request, raw_request_info)


def _place(folder: Path) -> int:
    """The first number that no other replica has taken."""
    place = 0
    while True:
        try:
            (folder / f"{place}.taken").touch(exist_ok=False)
        except FileExistsError:
            place += 1
        else:
            return place
