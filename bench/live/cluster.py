"""The cluster that is measured: on isolated hosts, or without isolation as raylets of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.live.cgroups import LabError
from bench.live.driver_process import DriverError, DriverProcess
from bench.live.hosts import Host, Lab
from bench.live.ray_hosts import python, ray_environment, start_cluster, start_worker
from bench.live.scenario import QUOTA
from bench.live.workload import bad_path, exchange_folder, role_path

_HOG = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


class Worker:
    """One node that carries replicas."""

    def __init__(self, name: str, node_id: str, host: Host | None) -> None:
        self.name, self.node_id, self.host = name, node_id, host

    def isolated(self, what: str) -> Host:
        """Its host. Raises LabError where there is none."""
        if self.host is None:
            raise LabError(f"{what} needs isolated hosts: run as root, without --unisolated")
        return self.host

    def hog(self, processes: int, max_s: float) -> Callable[[], None]:
        """Busy loops on it for `max_s` at most; call the result to end them."""
        if self.host is not None:
            return self.host.spawn_hog(processes, max_s)
        command = [sys.executable, "-I", "-S", "-c", _HOG, str(max_s)]
        hogs = [subprocess.Popen(["nice", "-n", "5", *command]) for _ in range(processes)]

        def end() -> None:
            for hog in hogs:
                hog.kill()
            for hog in hogs:
                hog.wait()

        return end


class World(ABC):
    """A cluster with its control plane and a driver; use as a context manager."""

    unisolated = False
    driver: DriverProcess

    def __init__(self, on_progress: Callable[[str], None]) -> None:
        self.workers: list[Worker] = []
        self._on_progress = on_progress

    @property
    @abstractmethod
    def exchange(self) -> Path:
        """The head's exchange folder, as seen from here."""

    @abstractmethod
    def role_file(self, worker: Worker) -> Path:
        """Where that node's role is looked for, as seen from here."""

    @abstractmethod
    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster."""

    @abstractmethod
    def kill_worker(self, worker: Worker) -> None:
        """As if the node had lost power."""

    @abstractmethod
    def repair(self) -> None:
        """Bring back what a scenario has killed."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def set_role(self, worker: Worker, role: Mapping[str, float]) -> None:
        """What replicas that start on a node shall be; {} is healthy."""
        path = self.role_file(worker)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(role)))

    def tell_oracle(self, node_ids: set[str]) -> None:
        """Which nodes are bad from now on."""
        path = self.exchange / bad_path().name
        new = path.with_suffix(".new")
        new.write_text(json.dumps(sorted(node_ids)))
        new.replace(path)

    def named(self, part: str) -> list[psutil.Process]:
        """Processes of the cluster whose command line begins with Ray's name of an actor that contains `part`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, IndexError):
                line = process.cmdline()[0]
                if line.startswith("ray::") and part in line:
                    found.append(process)
        return found

    def _connect(self, process: subprocess.Popen[Any]) -> dict[str, str]:
        """Wait for the driver, start the control plane; node id by address."""
        self.driver = DriverProcess(process)
        self._on_progress("driver")
        if not self.driver.event(60.0).get("ready"):
            raise DriverError("the driver did not start: " + self.driver.said)
        self._on_progress("control plane")
        nodes: dict[str, str] = self.driver.call("control_plane", 180.0)["nodes"]
        return nodes


class IsolatedWorld(World):
    """On the hosts of a lab."""

    def __init__(
        self, workers: int, memory_limit_bytes: int | None, on_progress: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(on_progress)
        self.lab = Lab(workers, QUOTA, memory_limit_bytes, on_progress=on_progress)
        self._environment = {**ray_environment(), "RAY_SERVE_LOG_TO_STDERR": "0"}
        self._address = ""

    @property
    def exchange(self) -> Path:
        """The head's /tmp, from outside."""
        return self.lab.head.folder / "tmp" / exchange_folder().name

    def role_file(self, worker: Worker) -> Path:
        """In that host's own /tmp."""
        host = worker.isolated("a role")
        return host.folder / "tmp" / exchange_folder().name / role_path(worker.node_id).name

    def processes(self) -> list[psutil.Process]:
        """Those of the hosts' groups."""
        found = []
        for host in self.lab.hosts:
            for pid in host.group.pids():
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(pid))
        return found

    def kill_worker(self, worker: Worker) -> None:
        """The whole host."""
        worker.isolated("killing a node").kill()

    def repair(self) -> None:
        """Boot what is down, lift what was limited."""
        for worker in self.workers:
            host = worker.isolated("repair")
            if not host.alive:
                self._on_progress(f"{worker.name} boots again")
                host.set_cpu_quota(None)
                host.boot()
                start_worker(host, self._environment, self._address)
            host.set_cpu_quota(self.lab.cpu_quota)
            host.link_up()
            host.shape_link(None)
        deadline_s = time.monotonic() + 30.0
        while True:
            nodes = self.driver.call("nodes", 30.0)["nodes"]
            if all(w.isolated("repair").ip in nodes for w in self.workers):
                break
            if time.monotonic() > deadline_s:
                raise DriverError("a repaired node did not join again")
            time.sleep(0.5)
        for worker in self.workers:
            worker.node_id = nodes[worker.isolated("repair").ip]

    def set_quota(self, cpus: float | None) -> None:
        """Of all workers."""
        for host in self.lab.workers:
            host.set_cpu_quota(cpus)

    def __enter__(self) -> Self:
        self.lab.__enter__()
        try:
            self._address = start_cluster(self.lab, self._environment, self._on_progress)
            self.set_quota(None)
            command = python("bench.live.driver", self._address)
            with open(self.lab.head.folder / "driver.log", "w", encoding="utf-8") as log:
                process = self.lab.head.run(
                    command, self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            nodes = self._connect(process)
            self.set_quota(self.lab.cpu_quota)
            self.workers = [Worker(host.name, nodes[host.ip], host) for host in self.lab.workers]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "driver"):
            self.driver.close()
        self.lab.__exit__(kind, error, trace)


class UnisolatedWorld(World):
    """Raylets of one machine, which share its cores: hogs are niced processes, links and quotas cannot be changed."""

    unisolated = True

    def __init__(self, workers: int, on_progress: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(on_progress)
        from serve_app.launch.local import LocalCluster  # noqa: PLC0415 - imports Ray, which the isolated variant need not

        self._cluster = LocalCluster(workers, on_progress=on_progress)

    @property
    def exchange(self) -> Path:
        """This machine's own."""
        return exchange_folder()

    def role_file(self, worker: Worker) -> Path:
        """This machine's own."""
        return role_path(worker.node_id)

    def processes(self) -> list[psutil.Process]:
        """Descendants of this process, which started the raylets."""
        return psutil.Process(os.getpid()).children(recursive=True)

    def kill_worker(self, worker: Worker) -> None:
        """The raylet and what it started."""
        self._cluster.remove_worker(worker.node_id)

    def repair(self) -> None:
        """A new raylet for each that is gone."""
        for worker in self.workers:
            if worker.node_id not in self._cluster.node_ids:
                worker.node_id = self._cluster.add_worker()

    def __enter__(self) -> Self:
        shutil.rmtree(exchange_folder(), ignore_errors=True)
        exchange_folder().mkdir(parents=True)
        self._cluster.__enter__()
        try:
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            process = subprocess.Popen(
                python("bench.live.driver", self._cluster.address), env=environment, stdin=subprocess.PIPE, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._connect(process)
            ids = self._cluster.node_ids[1:]
            self.workers = [Worker(f"w{i + 1}", node_id, None) for i, node_id in enumerate(ids)]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "driver"):
            self.driver.close()
        self._cluster.__exit__(kind, error, trace)
        shutil.rmtree(exchange_folder(), ignore_errors=True)
