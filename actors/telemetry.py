"""Samples one node's CPU, memory, network and GPU at about 1 Hz, in the scope that limits the node.

Scope of CPU:

1. `cgroup`: a quota (version 1 or 2) above this process. Total and limit are the group's: what others do on the host
   shows as less CPU for the group only through the kernel's shares, which the quota is meant to hold.
2. `host`: no quota, one raylet. Total is /proc/stat (stolen time counts as used), limit the cores.
3. `tree`, before both: several raylets share that group or host (a local multi-node cluster). Total is the process
   tree of this node's raylet, limit the CPUs the node declared. Nothing isolates such nodes, so CPU that anything
   else takes there counts too: what is left for this node's replicas is
   `min(limit - own background, shared cores - everything in the shared scope that is no Serve replica)`. Replicas of
   *all* nodes are left out of that last term, or a node would look worse merely because its neighbours carry our own
   requests; the total is then the background plus this node's replicas.

Background is the total minus the processes of Serve replicas (and their children) under this node's raylet.
Memory is compared with every limit that can kill: the tightest cgroup limit and the host; the greater fraction counts.
Network is the fullest interface, the greater direction over its link speed. The kernel does not account network by
process, so the background is the total less what `serving_bytes_per_s` says our own requests moved (default 0).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from actors import cgroups
from actors.gpu import GpuReader
from actors.procfs import (
    NAN,
    HostStat,
    RayTrees,
    Roots,
    TreeUse,
    disk_busy_s,
    host_stat,
    link_bytes_per_s,
    network_bytes,
    pressure_total_s,
    raylet_above,
    read_fields,
    read_number,
    read_text,
)
from shadecast.types import NodeSnapshot

RESOLVE_S = 10.0
"""Limits and scope are looked up again this often: quotas are set and pods resized while we run."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading: the snapshot that travels, and what only the log keeps."""

    snapshot: NodeSnapshot
    scope: str
    cpu_limit: float = NAN
    memory_limit_bytes: float = NAN
    disk_busy_fraction: float = NAN
    load1: float = NAN
    context_switches_per_s: float = NAN
    runnable: float = NAN
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class _Counters:
    """Cumulative readings at one instant; rates are differences of two of these."""

    at_s: float
    source: str
    cpu_s: float
    host: HostStat
    stalled_cpu_s: float
    stalled_memory_s: float
    network: dict[str, tuple[float, float]]
    disks: dict[str, float]


@dataclass(slots=True)
class Sampler:
    """Reads the node's telemetry; each call covers the time since the last one.

    `clock` is monotonic seconds. `node_cpus` are the CPUs the Ray node declares (0: unknown).
    `link_bytes_per_s` stands in where the driver does not tell the link speed; NaN leaves network fractions NaN.
    """

    clock: Callable[[], float]
    roots: Roots = field(default_factory=Roots)
    node_cpus: float = 0.0
    link_bytes_per_s: float = NAN
    pid: int = field(default_factory=os.getpid)
    host_cpus: float = field(default_factory=lambda: float(len(os.sched_getaffinity(0))))
    serving_bytes_per_s: float = 0.0
    count_loopback: bool = False
    gpu: GpuReader | None = None
    _trees: RayTrees = field(init=False)
    _raylet: int = 0
    _sharing: tuple[int, ...] = ()
    _cpu: cgroups.CpuGroup | None = None
    _memory: cgroups.MemoryGroup | None = None
    _scope: str = ""
    _links: dict[str, float] = field(default_factory=dict)
    _resolved_s: float = -math.inf
    _last: _Counters | None = None

    def __post_init__(self) -> None:
        self._trees = RayTrees(self.roots.proc)

    def read(self) -> Sample:
        """Take one reading. The first has NaN rates; so has one whose scope has just changed."""
        now_s = self.clock()
        if now_s - self._resolved_s >= RESOLVE_S:
            self._resolve(now_s)
        uses = self._trees.scan()
        use = uses.get(self._raylet, TreeUse())
        new, old = self._count(now_s), self._last
        self._last = new
        dt_s = now_s - old.at_s if old else NAN
        if not dt_s > 0 or old is None:
            old, dt_s = new, NAN

        limit = self._cpu.limit_cpus if self._cpu else self.host_cpus
        cpus = (new.cpu_s - old.cpu_s) / dt_s if new.source == old.source else NAN
        background = max(0.0, cpus - use.replicas_s / dt_s)
        if len(self._sharing) > 1:
            shared_cpus, limit = limit, min(self.node_cpus or limit, limit)
            outside = max(0.0, cpus - sum(uses[r].replicas_s for r in self._sharing if r in uses) / dt_s)
            own = max(0.0, use.tree_s - use.replicas_s) / dt_s
            background = min(limit, max(own, limit - max(0.0, shared_cpus - outside)))
            cpus = background + use.replicas_s / dt_s
        if math.isnan(cpus):
            background = NAN

        rx, tx, network = self._network(old, new, dt_s)
        serving = self.serving_bytes_per_s / max(self.serving_bytes_per_s, rx, tx, 1.0)
        gpu, gpu_memory = self.gpu.read() if self.gpu else (NAN, NAN)
        snapshot = NodeSnapshot(
            cpu_fraction=_fraction(cpus / limit),
            cpu_background_fraction=_fraction(background / limit),
            memory_fraction=self._memory_fraction(),
            network_fraction=_fraction(network),
            network_background_fraction=_fraction(network * (1.0 - serving)),
            net_rx_bytes_per_s=rx,
            net_tx_bytes_per_s=tx,
            cpu_pressure_fraction=_fraction((new.stalled_cpu_s - old.stalled_cpu_s) / dt_s),
            memory_pressure_fraction=_fraction((new.stalled_memory_s - old.stalled_memory_s) / dt_s),
            gpu_fraction=gpu,
            gpu_memory_fraction=gpu_memory,
        )
        busiest = [(new.disks[d] - old.disks[d]) / dt_s for d in new.disks if d in old.disks]
        return Sample(
            snapshot=snapshot,
            scope=self._scope,
            cpu_limit=limit,
            memory_limit_bytes=self._memory.limit_bytes if self._memory else NAN,
            disk_busy_fraction=_fraction(max(busiest, default=NAN)),
            load1=read_number(self.roots.proc / "loadavg"),
            context_switches_per_s=(new.host.context_switches - old.host.context_switches) / dt_s,
            runnable=new.host.runnable,
            replicas=use.replicas,
        )

    def _resolve(self, now_s: float) -> None:
        self._resolved_s = now_s
        self._trees.forget_outsiders()
        if not self._trees.known:
            self._trees.scan()
        self._raylet = raylet_above(self.roots.proc, self.pid) or 0
        host_bytes = read_fields(self.roots.proc / "meminfo").get("MemTotal", NAN) * 1024.0
        self._cpu = cgroups.cpu_group(self.roots, self.host_cpus)
        self._memory = cgroups.memory_group(self.roots, host_bytes)
        home = cgroups.cpu_home(self.roots, self._raylet)
        raylets = [pid for pid, entry in self._trees.known.items() if pid == entry.raylet]
        self._sharing = tuple(pid for pid in raylets if self._raylet and cgroups.cpu_home(self.roots, pid) == home)
        self._scope = "tree" if len(self._sharing) > 1 else "cgroup" if self._cpu else "host"
        self._links = {
            name: link_bytes_per_s(self.roots.sys, name) for name in network_bytes(self.roots.proc, self.count_loopback)
        }

    def _count(self, now_s: float) -> _Counters:
        host = host_stat(self.roots.proc)
        pressure = self.roots.proc / "pressure"
        if self._cpu:
            cpu_s, stalled_s = self._cpu.used_s(), self._cpu.stalled_s()
        else:
            cpu_s, stalled_s = host.busy_s, pressure_total_s(read_text(pressure / "cpu"))
        stalled_memory_s = (
            self._memory.stalled_s() if self._memory else pressure_total_s(read_text(pressure / "memory"), "full")
        )
        return _Counters(
            at_s=now_s,
            source=str(self._cpu.folder) if self._cpu else "host",
            cpu_s=cpu_s,
            host=host,
            stalled_cpu_s=stalled_s,
            stalled_memory_s=stalled_memory_s,
            network=dict(network_bytes(self.roots.proc, self.count_loopback)),
            disks=dict(disk_busy_s(self.roots.proc)),
        )

    def _memory_fraction(self) -> float:
        host = read_fields(self.roots.proc / "meminfo")
        fractions = [1.0 - host["MemAvailable"] / host["MemTotal"]] if {"MemAvailable", "MemTotal"} <= set(host) else []
        if self._memory:
            fractions.append(self._memory.used_bytes() / self._memory.limit_bytes)
        return _fraction(max((f for f in fractions if not math.isnan(f)), default=NAN))

    def _network(self, old: _Counters, new: _Counters, dt_s: float) -> tuple[float, float, float]:
        """Received and sent bytes per second over all interfaces, and the fullest link's fraction."""
        rx = tx = 0.0
        fullest = NAN
        for name, (new_rx, new_tx) in new.network.items():
            if name not in old.network:
                continue
            old_rx, old_tx = old.network[name]
            one_rx, one_tx = max(0.0, new_rx - old_rx) / dt_s, max(0.0, new_tx - old_tx) / dt_s
            rx, tx = rx + one_rx, tx + one_tx
            fraction = max(one_rx, one_tx) / self._links.get(name, NAN)
            fullest = fraction if math.isnan(fullest) else max(fullest, fraction)
        if not new.network:
            return NAN, NAN, NAN
        if math.isnan(fullest):
            fullest = max(rx, tx) / self.link_bytes_per_s
        return rx, tx, fullest


def _fraction(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(0.0, value))
