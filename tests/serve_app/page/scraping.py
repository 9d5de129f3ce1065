"""Metrics of a made-up cluster, and a real Prometheus that scrapes them, where one is installed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families as read_text

from serve_app.page.metrics import prometheus_text
from serve_app.page.server import Page
from serve_app.page.watch import to_json
from tests.actors.test_retrainer import Rig
from tests.ports import free_port
from tests.serve_app.page.page_scene import make_scene

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
NO_PROMTOOL = "promtool is not installed (Debian: package prometheus)"
NO_PROMETHEUS = "prometheus is not installed (Debian: package prometheus)"


def played_status() -> dict[str, Any]:
    """Of a real coordinator, after 165 s of the scene: a trial has passed and one has failed, a replica is ejected.

    Self-retraining is on, and waits.
    """
    scene = make_scene()

    async def play() -> dict[str, Any]:
        for _ in range(165):
            await scene.play()
        for known in scene.coordinator._deployments.values():
            known.was_late(0.004)
        await scene.coordinator.retraining(Rig().looks())
        found: dict[str, Any] = to_json(await scene.coordinator.status())
        return found

    return asyncio.run(play())


def samples(status: dict[str, Any] | None) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """{name of the sample: {labels: value}}."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in read_text(prometheus_text(status)[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def own_address() -> str:
    """An address of this machine that is not loopback, where it has one."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not address.address.startswith(("127.", "169.254.")):
                return str(address.address)
    return "127.0.0.1"


@contextlib.asynccontextmanager
async def scraped(
    status: dict[str, Any] | Callable[[], dict[str, Any]] | None, folder: Path, rules: Path | None = None
) -> AsyncIterator[str]:
    """The address of a Prometheus that scrapes a page with this status, by an address of the machine, each second.

    A status that is called is another one each time; without one there is no page. Rules are evaluated each second.
    """

    async def answer() -> dict[str, Any] | None:
        return status() if callable(status) else status

    page = Page("0.0.0.0", free_port(), "token", find=lambda: SimpleNamespace(status=SimpleNamespace(remote=answer)))
    page_port = free_port() if status is None else (await page.start()).rpartition(":")[2]
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [
            {"job_name": "shadecast", "static_configs": [{"targets": [f"{own_address()}:{page_port}"]}]}
        ],
        "rule_files": [str(rules)] if rules is not None else [],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [
        str(PROMETHEUS),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)
        await page.stop()


def active_alerts(prometheus: str) -> dict[str, dict[str, str]]:
    """{alert: annotations} of those whose condition holds, for however short a time; every rule can be evaluated."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules?type=alert", timeout=5) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} <= {("ok", ""), ("unknown", "")}
    return {rule["name"]: rule["alerts"][0]["annotations"] for rule in rules if rule["alerts"]}


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """Its answer; empty while it starts."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
            return []  # it listens before its storage is ready
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    except OSError:
        return []


async def answered(prometheus: str, expression: str, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """The first answer that is not empty; an empty one after that time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = await asyncio.to_thread(query, prometheus, expression)
        if found or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.2)
