"""A Ray cluster of several nodes on this machine: one head and some workers, as separate raylets.

Stops exactly the processes that it started. For trying things out, the demo and the tests; the nodes share the
machine's cores, so it shows behaviour, not speed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import ray
from ray.cluster_utils import Cluster

from serve_app.launch.own_files import cache_folder
from shadecast.errors import ShadecastError

_OBJECT_STORE_BYTES = 150_000_000


class LocalClusterError(ShadecastError):
    """The local cluster did not start, or none is running."""


def address_file() -> Path:
    """Where the address of this user's local cluster is kept while it runs."""
    return cache_folder() / "local.json"


class LocalCluster:
    """Use as a context manager: everything that it started is shut down at the end, also after an error."""

    def __init__(
        self,
        workers: int = 3,
        cpus_per_node: int = 2,
        *,
        dashboard: bool = False,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not 0 <= workers <= 64:
            raise LocalClusterError(f"workers = {workers}: must be from 0 to 64, because all share this machine")
        if cpus_per_node < 1:
            raise LocalClusterError(f"cpus_per_node = {cpus_per_node}: must be at least 1")
        self._workers = workers
        self._cpus = cpus_per_node
        self._dashboard = dashboard
        self._on_progress = on_progress
        self._cluster: Any = None
        self.node_ids: list[str] = []

    @property
    def address(self) -> str:
        """Address for `ray.init` and RAY_ADDRESS."""
        return str(self._cluster.address)

    def add_worker(self) -> str:
        """Start one more worker node; its id."""
        node = self._cluster.add_node(num_cpus=self._cpus, object_store_memory=_OBJECT_STORE_BYTES)
        self.node_ids.append(node.node_id)
        return str(node.node_id)

    def remove_worker(self, node_id: str) -> None:
        """Stop one worker node at once, as if it had died."""
        for node in list(self._cluster.worker_nodes):
            if node.node_id == node_id:
                self._cluster.remove_node(node, allow_graceful=False)
                self.node_ids.remove(node_id)

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve_app.http_guard:proxy_middlewares")
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            self._on_progress("head node")
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": self._cpus,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                    "include_dashboard": self._dashboard,
                },
            )
            self.node_ids.append(self._cluster.head_node.node_id)
            for i in range(self._workers):
                self._on_progress(f"worker node {i + 1} of {self._workers}")
                self.add_worker()
            with contextlib.suppress(OSError):  # without a home that can be written, RAY_ADDRESS tells where it is
                address_file().parent.mkdir(parents=True, exist_ok=True)
                address_file().write_text(json.dumps({"address": self.address, "pid": os.getpid()}))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def connect(self) -> None:
        """Connect this process, as a job of its own (a second call starts a second job)."""
        ray.shutdown()
        ray.init(address=self.address, namespace="shadecast", log_to_driver=False, logging_level="ERROR")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            address_file().unlink()
        ray.shutdown()
        if self._cluster is not None:
            nodes = [n for n in [*self._cluster.worker_nodes, self._cluster.head_node] if n is not None]
            descendants = [child for node in nodes for child in _descendants(node)]
            for node in nodes:
                node.kill_all_processes(check_alive=False, allow_graceful=False)
            for child in descendants:  # agents and workers would notice only after half a minute
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(descendants, timeout=10)


def _descendants(node: Any) -> list[psutil.Process]:
    """Processes that a node's own processes have started."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(info.process.pid).children(recursive=True)
    return found


def find_address(given: str | None) -> str:
    """The cluster to talk to: the given address, RAY_ADDRESS, this user's local cluster, or "auto"."""
    if given:
        return given
    if from_environment := os.environ.get("RAY_ADDRESS"):
        return from_environment
    try:
        kept = json.loads(address_file().read_text())
        os.kill(int(kept["pid"]), 0)
        return str(kept["address"])
    except (OSError, ValueError, KeyError):
        return "auto"
