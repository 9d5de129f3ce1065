"""Starts Ray on the hosts of a lab: a head without replicas, workers one after the other, then their CPU quota."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.live.hosts import Host, Lab

PORT = 6379
_OBJECT_STORE_BYTES = 150_000_000
_ROOT = Path(__file__).resolve().parents[2]


def ray_environment() -> dict[str, str]:
    """What all processes of one lab's cluster must agree on: one authentication mode and a token of their own."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_task_events_max_num_task_in_gcs": "1000",  # 100,000 fill for hours, which would look like a leak
    }


def start_head(host: Host, environment: Mapping[str, str]) -> str:
    """Start the head; its address. It takes no replicas: it offers the resource "head", workers offer "worker"."""
    _start(host, environment, ["--head", f"--port={PORT}", "--include-dashboard=false", '--resources={"head": 100}'])
    return f"{host.ip}:{PORT}"


def start_worker(host: Host, environment: Mapping[str, str], address: str) -> None:
    """Start one worker; not two at once, parallel starts lose nodes."""
    _start(host, environment, [f"--address={address}", '--resources={"worker": 100}'])


def _start(host: Host, environment: Mapping[str, str], words: list[str]) -> None:
    ray = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host.ip}", "--num-cpus=4"]
    common = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    host.check([*ray, *words, *common], environment, timeout_s=120.0)


def start_cluster(lab: Lab, environment: Mapping[str, str], on_progress: Callable[[str], None] = lambda _: None) -> str:
    """Ray on all hosts of a lab, then the workers' quota; the head's address."""
    on_progress("Ray on head")
    address = start_head(lab.head, environment)
    for host in lab.workers:
        on_progress(f"Ray on {host.name}")
        start_worker(host, environment, address)
    lab.limit_workers()
    return address


def python(module: str, *words: str) -> list[str]:
    """The command that runs one of our modules inside a host."""
    return [sys.executable, "-P", "-m", module, *words]


def inherited() -> dict[str, str]:
    """This process's environment without what would tie a host's Ray to another cluster."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
