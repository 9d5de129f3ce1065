"""Runs inside the head host: deploys, sends the requests at their times, writes down what came back.

    python -m bench.live.driver ADDRESS

Reads one JSON command a line on standard input (`{"do": "deploy", ...}`), answers each with one line on standard output
that begins with `MARK`; everything else there is noise of Ray's. Ends when standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from bench.live import gateway_model
from bench.live.arms import ARMS
from bench.live.journal import Journal, plain
from bench.live.workload import Work, exchange_folder, right_answer
from serve_app.gateway.model_call import retry_budget
from serve_app.launch.control_plane import running_coordinator, start_control_plane
from shadecast.blocks import BLOCK_S

MARK = "@@"
HTTP_PORT = 8018
REQUEST_TIMEOUT_S = 60.0
_DRAIN_S = 75.0
_REST_S = 5.0
"""After a soak, until reports and tables show that nothing is under way."""
_RUNNING_S = 180.0


class HttpError(Exception):
    """An answer that is no success; the text is its kind."""


class Driver:
    """One cluster's driver; every public method is a command."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._options: dict[str, Any] = {}
        self._replicas = 0
        self._app = self._name = ""
        self._deployed = 0
        self._client: Any = None

    # ------------------------------------------------------------------ commands

    async def control_plane(self) -> dict[str, Any]:
        """Start the control plane and Serve."""
        await asyncio.to_thread(start_control_plane, page_port=0)
        http = {"host": "127.0.0.1", "port": HTTP_PORT}
        await asyncio.to_thread(serve.start, proxy_location="HeadOnly", http_options=http)
        return await self.nodes()

    async def nodes(self) -> dict[str, Any]:
        """Node id of each living node, by address."""
        alive = await asyncio.to_thread(ray.nodes)
        return {"nodes": {n["NodeManagerAddress"]: n["NodeID"] for n in alive if n["Alive"]}}

    async def deploy(self, arm: str, replicas: int, settings: dict[str, Any], unisolated: bool) -> dict[str, Any]:
        """Deploy an arm anew and wait until all its replicas run; which nodes they are on."""
        self._options = {
            "name": "Work",
            "max_ongoing_requests": 64,
            "max_queued_requests": 500,
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 10.0,
            "graceful_shutdown_timeout_s": 5.0,
            "graceful_shutdown_wait_loop_s": 0.5,
            "max_replicas_per_node": 1,
            "ray_actor_options": {"num_cpus": 0.1} | ({} if unisolated else {"resources": {"worker": 1}}),
            "logging_config": {"enable_access_log": False},
            **ARMS[arm].options(settings),
        }
        self._replicas = replicas
        self._deployed += 1
        self._name = "Work"
        self._app = f"live{self._deployed}"  # Serve keeps a handle, with its router, by the application's name
        await self._apply()
        return {"on": await self._replica_nodes()}

    async def deploy_http(self, arm: str, replicas: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Deploy the project's own gateway, twice, before the same work as a model."""
        self._replicas, self._deployed = replicas, self._deployed + 1
        self._app, self._name = f"live{self._deployed}", "burn"
        own = ARMS[arm].config
        config = {s: {**settings.get(s, {}), **own.get(s, {})} for s in {*settings, *own}} if own is not None else {}
        common = {"graceful_shutdown_timeout_s": 5.0}
        worker = {"ray_actor_options": {"num_cpus": 0.1, "resources": {"worker": 1}}, "max_replicas_per_node": 1}
        application = {
            "name": self._app,
            "route_prefix": "/",
            "import_path": "serve_app.app:build",
            "args": {
                "model": "bench.live.gateway_model:Burn",
                "replicas": replicas,
                "gateway_replicas": 2,
                "max_ongoing_requests": 64,
                "router": "default" if own is None else "predictive",
                "config": config,
            },
            "deployments": [
                {"name": "Gateway", "ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.01}}, **common},
                {"name": "burn", **worker, **common},
            ],
        }
        schema = ServeDeploySchema.model_validate(
            {"applications": [application], "http_options": {"host": "127.0.0.1", "port": HTTP_PORT}}
        )
        await asyncio.to_thread(lambda: _get_global_client().deploy_apps(schema))
        await self._running()
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=100)
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{HTTP_PORT}", timeout=REQUEST_TIMEOUT_S, limits=limits
        )
        for _ in range(100):  # the proxy learns of a new route a moment later
            answer = await self._client.get("/v2/health/ready")
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.1)
        return {"on": await self._replica_nodes()}

    async def scale(self, replicas: int) -> dict[str, Any]:
        """Change the number of replicas, which the ones that run do not notice."""
        self._replicas = replicas
        await self._apply()
        return {"on": await self._replica_nodes()}

    async def rolling(self) -> dict[str, Any]:
        """Replace all replicas by a new version."""
        resources = self._options["ray_actor_options"]
        self._options["ray_actor_options"] = resources | {"num_cpus": resources["num_cpus"] + 0.001}
        await self._apply()
        return {}

    async def undeploy(self) -> dict[str, Any]:
        """Remove the application."""
        await asyncio.to_thread(serve.delete, self._app)
        self._handle = None
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        return {}

    async def status(self) -> dict[str, Any]:
        """The coordinator's status, as far as it concerns the application."""
        return {"status": await self._status()}

    async def run(self, requests: str, result: str, scenario: dict[str, Any]) -> dict[str, Any]:
        """Send the requests of a file, write what came back to another; says when time 0 is, by the monotonic clock."""
        rows = json.loads(await asyncio.to_thread(Path(requests).read_text))
        zero_s = time.monotonic() + 1.0 - rows[0]["at_s"]
        say({"zero_s": zero_s})
        budget = retry_budget()
        used = [0.0, 0.0]
        under_way: set[asyncio.Task[None]] = set()
        done = 0

        async def one(row: dict[str, Any]) -> None:
            nonlocal done
            send = self._http if scenario["kind"] == "http" else self._stream if row["items"] else self._unary
            record: dict[str, Any] = {
                "at_s": row["at_s"],
                "session": row["session"],
                "error": "",
                "node": "",
                "tries": 1,
            }
            budget.request(time.monotonic())
            for attempt in (1, 2):
                record["error"], lost = await self._attempt(send, row, record, scenario, zero_s)
                if not lost or attempt == 2 or not budget.take(time.monotonic()):
                    break
                record["tries"] = 2
            record["latency_s"] = time.monotonic() - zero_s - row["at_s"]
            done += 1
            journal.add("record", record)

        with Journal(Path(result)) as journal:
            watcher = asyncio.create_task(self._watch(zero_s, journal))
            journal.add("before", await self._status())
            said_s, begun_s = 0.0, time.monotonic()
            for row in rows:
                now_s = time.monotonic() - zero_s
                if row["at_s"] > now_s:
                    await asyncio.sleep(row["at_s"] - now_s)
                if row["at_s"] >= 0.0 and used[0] == 0.0:
                    used[0] = time.process_time()
                task = asyncio.create_task(one(row))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                if time.monotonic() - said_s > 1.0:
                    said_s = time.monotonic()
                    say({"progress": done, "of": len(rows)})
            used[1] = time.process_time()
            if under_way:
                await asyncio.wait(set(under_way), timeout=_DRAIN_S)
            late = list(under_way)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            watcher.cancel()
            if scenario["soak"]:
                await asyncio.sleep(_REST_S)
            journal.add("after", await self._status())
            journal.add("observed", await self._observed(time.monotonic() - begun_s))
            journal.add("driver_cpu_s", used[1] - used[0])
            journal.add("unanswered", len(rows) - done)
        return {"sent": len(rows)}

    # ------------------------------------------------------------------ requests

    async def _attempt(
        self, send: Any, row: dict[str, Any], record: dict[str, Any], scenario: dict[str, Any], zero_s: float
    ) -> tuple[str, bool]:
        """One try: kind of error, "" if none, and whether the request was lost with its replica."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                right = await send(row, record, scenario, zero_s)
        except TimeoutError:
            return "timeout", False
        except BackPressureError:
            return "rejected", False
        except HttpError as error:
            return str(error), False
        except RayTaskError as error:
            return type(error.cause).__name__, False
        except RayActorError:
            return "lost", not record.get("items")
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return "cancelled", True
        except Exception as error:
            return type(error).__name__, False
        return ("" if right else "wrong"), False

    async def _unary(self, row: dict[str, Any], record: dict[str, Any], scenario: dict[str, Any], _: float) -> bool:
        handle = self._handle.options(session_id=row["session"]) if row["session"] else self._handle
        payload = bytes(scenario["payload_bytes"])
        method = handle.infer_batched if scenario["batched"] else handle.infer
        node, value, size = await method.remote(row["x"], row["cpu_s"], payload)
        record["node"] = node
        return bool(value == right_answer(row["x"]) and size == len(payload))

    async def _http(self, row: dict[str, Any], record: dict[str, Any], _: dict[str, Any], __: float) -> bool:
        answer = await self._client.post("/v2/models/burn/infer", content=gateway_model.body(row["x"], row["cpu_s"]))
        if answer.status_code != 200:
            raise HttpError(f"HTTP {answer.status_code}")
        record["node"], value = gateway_model.read(answer.json())
        return value == right_answer(row["x"])

    async def _stream(
        self, row: dict[str, Any], record: dict[str, Any], scenario: dict[str, Any], zero_s: float
    ) -> bool:
        stream = self._handle.options(stream=True).stream.remote(
            row["x"], row["items"], scenario["item_gap_s"], row["cpu_s"]
        )
        right, items, last = True, 0, ""
        record["moves"] = 0
        async for node, value in stream:
            if items == 0:
                record["first_item_s"] = time.monotonic() - zero_s - row["at_s"]
                record["node"] = last = node
            if node != last:
                record["moves"] += 1
                last = node
            right = right and value == right_answer(row["x"] + items)
            items += 1
            record["items"] = items
        return right and items == row["items"]

    # ------------------------------------------------------------------ the deployment

    async def _apply(self) -> None:
        # without a version, `serve.run` takes each call for new code and replaces all replicas
        fixed = {"version": "1", "_internal": True}
        app = serve.deployment(Work).options(**self._options, **fixed, num_replicas=self._replicas).bind()
        self._handle = await asyncio.to_thread(serve.run, app, name=self._app, route_prefix=None)
        await self._running()

    async def _running(self) -> None:
        deadline_s = time.monotonic() + _RUNNING_S
        while True:
            app = (await asyncio.to_thread(serve.status)).applications.get(self._app)
            found = app.deployments.get(self._name) if app is not None else None
            states = found.replica_states if found is not None else {}
            ready = app is not None and app.status == "RUNNING"
            if ready and states.get("RUNNING") == self._replicas and sum(states.values()) == self._replicas:
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self._replicas} replicas did not run within {_RUNNING_S:g} s: {states}")
            await asyncio.sleep(0.3)

    async def _replica_nodes(self) -> list[str]:
        """Node ids of the replicas that run, by asking Serve's controller."""
        details = await asyncio.to_thread(lambda: _get_global_client().get_serve_details())
        replicas = details["applications"][self._app]["deployments"][self._name]["replicas"]
        return [r["node_id"] for r in replicas if r["state"] == "RUNNING"]

    async def _status(self) -> dict[str, Any]:
        try:
            status = await asyncio.wait_for(running_coordinator().status.remote(), 3.0)
        except Exception as error:  # killed by the scenario, perhaps
            return {"error": repr(error)}
        mine = [d for d in status["deployments"] if d["deployment"] == f"{self._app}/{self._name}"]
        return {"deployment": mine[0] if mine else None, "nodes": status["nodes"], "transitions": status["transitions"]}

    async def _observed(self, longest_ago_s: float) -> list[dict[str, Any]]:
        """What the coordinator kept for `shadecast report` since this run began; nothing of routers that route."""
        try:
            told = await asyncio.wait_for(running_coordinator().observed.remote(), 10.0)
        except Exception as error:  # as above
            say({"unobserved": repr(error)})
            return []
        mine = [d["blocks"] for d in told if d["deployment"] == f"{self._app}/{self._name}"]
        return [block for blocks in mine for block in blocks if block["ago_s"] <= longest_ago_s + BLOCK_S]

    async def _watch(self, zero_s: float, journal: Journal) -> None:
        """States of the connections each second, for the pictures."""
        while True:
            status = await self._status()
            deployment = status.get("deployment") or {}
            keep = ("replica_id", "node_id", "state", "share", "capacity", "live_capacity", "queue", "mirror_fraction")
            rows = [{key: view.get(key) for key in keep} for view in deployment.get("replicas", [])]
            cpu = {n["node_id"]: n["current"]["cpu_background_fraction"] for n in status.get("nodes", [])}
            counts = {key: deployment.get(key) for key in ("finished", "rescued", "mirrored", "load", "panic")}
            journal.add("state", {"at_s": time.monotonic() - zero_s, "replicas": rows, "background": cpu, **counts})
            await asyncio.sleep(1.0)


def say(message: dict[str, Any]) -> None:
    """One line to the benchmark."""
    print(MARK + json.dumps(plain(message)), flush=True)


async def serve_commands() -> None:
    """Answer commands, several at a time, until standard input closes."""
    driver = Driver()
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()

    async def carry_out(command: dict[str, Any]) -> None:
        number, do = command.pop("id"), command.pop("do")
        try:
            answer = await getattr(driver, do)(**command)
        except Exception as error:
            answer = {"error": f"{do}: {type(error).__name__}: {error}"[:2000]}
        say({"answer": number, **answer})

    while line := await reader.readline():
        task = asyncio.create_task(carry_out(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
    """Connect and serve commands."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    exchange_folder().mkdir(parents=True, exist_ok=True)
    ray.init(address=sys.argv[1], namespace="shadecast", log_to_driver=False, logging_level="ERROR")
    say({"ready": True})
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve_commands())


if __name__ == "__main__":
    main()
