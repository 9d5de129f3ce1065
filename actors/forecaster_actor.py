"""The Ray side of a node's forecaster: keeps it in touch with coordinator and registry, and one on every node.

This module stays light (no torch, no pandas): the coordinator imports it to start forecasters. The actor's own process
imports the model when it is constructed.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import ray

from shadecast.config import built_from, check_numbers
from shadecast.errors import ConfigError, ShadecastError
from shadecast.inbox import node_message
from shadecast.types import NodeReport

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 5.0
"""Registry and log are looked after this often; a promotion is loaded within twice this."""
MAX_PENDING = 3


@dataclass(frozen=True, slots=True)
class ForecasterSettings:
    """Settings of node forecasters. Empty `registry` means the shipped checkpoint; empty `telemetry_log`: no log."""

    registry: str = ""
    telemetry_log: str = ""
    challenger: str = ""
    link_bytes_per_s: float = 0.0
    """Link speed where the driver does not tell it; 0 leaves network fractions unknown then."""
    log_flush_s: float = 60.0
    log_max_bytes: int = 512 * 1024 * 1024
    log_max_age_s: float = 30 * 86_400.0
    period_s: float = 1.0
    count_loopback: bool = False
    """Loopback traffic never leaves the node; it counts only where a recording has nothing else."""

    def __post_init__(self) -> None:
        for name in ("registry", "telemetry_log", "challenger"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"forecaster.{name} = {getattr(self, name)!r}: must be text")
        for name in ("registry", "telemetry_log"):
            where = getattr(self, name)
            if where and "://" not in where and not os.path.isabs(os.path.expanduser(where)):
                raise ConfigError(
                    f"forecaster.{name} = {where!r}: must be a whole path (/...) or a URI, because nodes open it, each "
                    "from a folder of its own"
                )
        bounds = {
            "link_bytes_per_s": (0.0, 1e13),
            "log_flush_s": (1.0, 86_400.0),
            "log_max_bytes": (1024, 1 << 50),
            "log_max_age_s": (60.0, 1e10),
            "period_s": (0.05, 60.0),
        }
        check_numbers("forecaster", self, bounds)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; raises ConfigError on unknown names or values out of bounds."""
        return built_from(cls, "forecaster", values)


class CoordinatorLink:
    """Sends reports without ever waiting; looks the coordinator up, and again when it is gone."""

    def __init__(self, look_up: Callable[[], Any | None], on_answer: Callable[[float, float], None]) -> None:
        """`look_up` returns the coordinator's handle, or None while there is none.

        `on_answer` gets what the coordinator answers to a report: requests in flight on the node, arrivals per second.
        """
        self._look_up, self._on_answer = look_up, on_answer
        self._handle: Any = None
        self._pending: list[Any] = []

    def send(self, report: NodeReport) -> None:
        """Fire and forget; a report that cannot be sent is dropped, the next one is a second away."""
        handle = self._handle
        if handle is None or not self._settled():
            return
        self._pending.append(handle.node.remote(node_message(report)))

    def _settled(self) -> bool:
        """Whether few enough reports are under way; an actor that died for good is let go of."""
        if self._pending:
            done, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
            for ref in done:
                try:
                    self._on_answer(*ray.get(ref))
                except ray.exceptions.RayActorError:
                    self._handle = None
        return self._handle is not None and len(self._pending) < MAX_PENDING

    def find(self) -> None:
        """Look the coordinator up where it is lost or does not answer; may block on a slow control store."""
        if self._settled():
            return
        if (found := self._look_up()) is not None:
            self._handle, self._pending = found, []


class ForecasterActor:
    """One per node. A thread samples at 1 Hz, another looks after coordinator, registry and log; calls only ask."""

    def __init__(
        self,
        node_id: str,
        find_coordinator: Callable[[], Any | None],
        settings: Mapping[str, Any],
        node_cpus: float,
    ) -> None:
        import torch  # noqa: PLC0415 - the process that starts forecasters must not load torch

        from actors.gpu import open_gpu  # noqa: PLC0415
        from actors.node_forecaster import NodeForecaster  # noqa: PLC0415
        from actors.telemetry import Sampler  # noqa: PLC0415
        from models.registry import SHIPPED, Registry  # noqa: PLC0415

        torch.set_num_threads(1)
        self._settings = ForecasterSettings.from_mapping(settings)
        self._registry = Registry(self._settings.registry or str(SHIPPED))
        self._link = CoordinatorLink(find_coordinator, self._note_serving)
        self._log = self._log_writer(node_id) if self._settings.telemetry_log else None
        self._forecaster = NodeForecaster(
            node_id=node_id,
            sampler=Sampler(
                time.monotonic,
                node_cpus=node_cpus,
                link_bytes_per_s=self._settings.link_bytes_per_s or float("nan"),
                count_loopback=self._settings.count_loopback,
                gpu=open_gpu(),
            ),
            send=self._link.send,
            clock=time.monotonic,
            wall=time.time,
            log=self._log.put if self._log is not None else None,
            period_s=self._settings.period_s,
            hostname=socket.gethostname(),
        )
        self._loaded = {"champion": "", "challenger": ""}
        self._problems: dict[str, str] = {}
        self._look_after()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._forecaster.run, args=(self._stop,), name="sampling", daemon=True),
            threading.Thread(target=self._housekeeping, name="housekeeping", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        stand_up_to_others()

    def status(self) -> dict[str, Any]:
        """Versions with live skill and errors, failures, and what is wrong (a version refused, a log not written)."""
        log = [self._log.problem] if self._log is not None else []
        return {
            "versions": self._forecaster.versions(),
            "live_errors": self._forecaster.live_errors(),
            "failures": self._forecaster.failures,
            "problem": "; ".join(filter(None, [*self._problems.values(), *log])),
            "pid": os.getpid(),
        }

    def announce(self, starts_in_s: float, lasts_s: float, strength: float = 1.0) -> None:
        """Tell of a load that is known to come to this node."""
        self._forecaster.announce(starts_in_s, lasts_s, strength)

    def cancel(self) -> None:
        """What was announced for this node does not come."""
        self._forecaster.cancel()

    def stop(self) -> None:
        """Stop sampling and write what is left of the log."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._log is not None:
            self._log.write(to_the_end_s=time.time())

    def _note_serving(self, in_flight: float, arrivals_per_s: float) -> None:
        self._forecaster.note_serving(in_flight, arrivals_per_s)

    def _log_writer(self, node_id: str) -> Any:
        from actors.telemetry_log import LogLimits, LogWriter, TelemetryLog  # noqa: PLC0415

        settings = self._settings
        limits = LogLimits(settings.log_flush_s, settings.log_max_bytes, settings.log_max_age_s)
        recording = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        return LogWriter(
            settings.telemetry_log, lambda: TelemetryLog(settings.telemetry_log, node_id, recording, limits)
        )

    def _housekeeping(self) -> None:
        while not self._stop.wait(HOUSEKEEPING_S):
            self._look_after()

    def _look_after(self) -> None:
        for step in (self._link.find, self._follow_registry, self._write_rows):
            try:
                step()
            except Exception:
                logger.exception("housekeeping: %s failed; tried again in %g s", step.__name__, HOUSEKEEPING_S)

    def _follow_registry(self) -> None:
        """Load what is newly promoted; a version that is refused leaves the one in use where it is."""
        for role in ("champion", "challenger"):
            try:
                wanted = self._wanted(role)
                if wanted != self._loaded[role]:
                    self._take(wanted, role)
                self._problems.pop(role, None)
            except ShadecastError as error:
                if str(error) != self._problems.get(role):
                    logger.warning("%s not loaded, %s stays: %s", role, self._loaded[role] or "no forecast", error)
                self._problems[role] = str(error)

    def _take(self, wanted: str, role: str) -> None:
        if wanted:
            self._forecaster.use(self._registry.load(wanted), challenger=role == "challenger")
        else:
            self._forecaster.drop_challenger()
        self._loaded[role] = wanted

    def _wanted(self, role: str) -> str:
        if role == "champion":
            return self._registry.champion()
        return self._settings.challenger or self._registry.challenger()

    def _write_rows(self) -> None:
        if self._log is not None:
            self._log.write()


def stand_up_to_others() -> bool:
    """Give all threads of this process the usual priority; whether the system allows it (root, CAP_SYS_NICE).

    Ray runs its workers at nice 15. A program that takes the node's CPU at the usual priority weighs as much as 28 of
    them, and keeps telemetry waiting for up to 13 s just when it is wanted.
    """
    try:
        for thread_id in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread_id), 0)
    except OSError:
        return False
    return True


class ForecasterFleet:
    """Keeps one forecaster on every node that is alive; call it every few seconds."""

    def __init__(self, start: Callable[[str, float], Any]) -> None:
        """`start(node_id, node_cpus)` returns the handle of that node's forecaster, started if there is none."""
        self._start = start
        self._handles: dict[str, Any] = {}

    def __call__(self) -> list[str]:
        """Start forecasters where they are missing, end those of nodes that left; ids of the nodes that are alive."""
        alive = {n["NodeID"]: float(n["Resources"].get("CPU", 0.0)) for n in ray.nodes() if n["Alive"]}
        for node_id, node_cpus in alive.items():
            self._handles[node_id] = self._start(node_id, node_cpus)
        for node_id in [n for n in self._handles if n not in alive]:
            ray.kill(self._handles.pop(node_id), no_restart=True)
        return list(alive)

    def stop(self) -> None:
        """End every forecaster that this fleet knows."""
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        self._handles.clear()
