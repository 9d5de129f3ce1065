"""Samples one node's CPU, memory, network and GPU at about 1 Hz, in the scope that limits the node.

Scope of CPU:

1. `cgroup`: a quota (version 1 or 2) above this process, or a cpuset that is its group's own. Total is the group's use,
   limit the quota or the cores. A quota: what others do on the host shows as less CPU for the group only through the
   kernel's shares, which the quota is meant to hold. A cpuset without a lower quota: what anything else does on these
   very cores (/proc/stat tells it core by core) takes from us and counts; what goes on on other cores does not. Where
   the cores are ours alone (a static CPU manager) nothing else is there, and the group's own use is all there is.
   Where others share a quota further up, what they use of it counts once they leave less than our own limit.
2. `host`: neither, one raylet. Total is /proc/stat of the cores that the process may use: all, or what an affinity
   leaves (stolen time counts as used), limit these cores.
3. `tree`, before both: several raylets share that quota or those cores (a local multi-node cluster). Total is the
   process tree of this node's raylet, limit the CPUs the node declared. Nothing isolates such nodes, so CPU that
   anything else takes there counts too: what is left for this node's replicas is
   `min(limit - own background, shared cores - everything in the shared scope that is no Serve replica)`. Replicas of
   *all* nodes are left out of that last term, or a node would look worse merely because its neighbours carry our own
   requests; the total is then the background plus this node's replicas.

Limits and cores are read again with every sample: quotas are set, pods resized, and cpusets moved while we run.
Background is the total minus the processes of Serve replicas (and their children) under this node's raylet.
Where a group keeps no accounts, and /proc/stat tells no cores or counts nothing, the total is the raylet's process
tree.
Memory is compared with every limit that can kill or throttle, those of all groups above us and the host; the greatest
fraction counts. Used is what cannot be reclaimed.
Network is the fullest device, the greater direction over its link speed; `actors.network` says which devices count. The
kernel does not account network by process, so the background is the total less what `serving_bytes_per_s` says our own
requests moved (default 0).

Starts, waits, page faults, input and output are those of the scope (`actors.activity`), NaN where several raylets
share it.

Readers are independent: what one of them cannot read is NaN, and the others go on.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from actors import cgroups, network
from actors.activity import Activity, group_activity, host_activity, own_pids
from actors.gpu import GpuReader
from actors.procfs import (
    NAN,
    TICKS_PER_S,
    DiskUse,
    HostStat,
    RayTrees,
    Roots,
    TreeUse,
    disk_use,
    host_stat,
    memory_fraction,
    number,
    pressure_total_s,
    raylet_above,
    read_fields,
    read_text,
)
from shadecast.types import NodeSnapshot

logger = logging.getLogger(__name__)
T = TypeVar("T")
RESOLVE_S = 10.0
"""Who shares our scope, and network devices, are looked up again this often."""


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
    blocked: float = NAN
    process_starts_per_s: float = NAN
    system_fraction: float = NAN
    io_wait_fraction: float = NAN
    page_faults_per_s: float = NAN
    io_bytes_per_s: float = NAN
    replicas: int = 0


def log_row(sample: Sample, t_s: float) -> dict[str, Any]:
    """One line of the telemetry log, columns as in `models.schema`."""
    return {"t_s": t_s, **asdict(sample.snapshot), **{name: getattr(sample, name) for name in _LOGGED}}


_LOGGED = (
    "disk_busy_fraction",
    "load1",
    "context_switches_per_s",
    "runnable",
    "blocked",
    "process_starts_per_s",
    "system_fraction",
    "io_wait_fraction",
    "page_faults_per_s",
    "io_bytes_per_s",
    "replicas",
)


@dataclass(frozen=True, slots=True)
class _Counters:
    """Cumulative readings at one instant; rates are differences of two of these.

    The sources are the groups that counters come from: there is no rate from one group to another.
    """

    at_s: float
    host: HostStat
    cpu_source: str
    memory_source: str
    group_s: float
    shared_s: Mapping[Path, float]
    stalled_cpu_s: float
    stalled_memory_s: float
    network: Mapping[str, tuple[float, float]]
    disks: Mapping[str, DiskUse]
    activity: Activity


@dataclass(slots=True)
class Sampler:
    """Reads the node's telemetry; each call covers the time since the last one.

    `clock` is monotonic seconds. `node_cpus` are the CPUs the Ray node declares (0: unknown).
    `link_bytes_per_s` stands in where the driver does not tell the link speed; NaN leaves network fractions NaN.
    `host_cpus` is the number of cores that may be used, where it is less than what the kernel says (0: it is not).
    """

    clock: Callable[[], float]
    roots: Roots = field(default_factory=Roots)
    node_cpus: float = 0.0
    link_bytes_per_s: float = NAN
    pid: int = field(default_factory=os.getpid)
    host_cpus: float = 0.0
    serving_bytes_per_s: float = 0.0
    count_loopback: bool = False
    gpu: GpuReader | None = None
    _trees: RayTrees = field(init=False)
    _raylet: int = 0
    _sharing: tuple[int, ...] = ()
    _own: str | None = None
    """/proc/self/cgroup; while it stays the same, so do the folders of our groups."""
    _found: Mapping[str, cgroups.Hierarchy] = field(default_factory=dict)
    _links: dict[str, float] = field(default_factory=dict)
    """Speed of each network device that counts."""
    _devices: frozenset[str] = frozenset()
    _own_pids: bool = False
    """Whether the last pid of /proc/loadavg is that of our own container."""
    _resolved_s: float = -math.inf
    _last: _Counters | None = None
    _told: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._trees = RayTrees(self.roots.proc)

    def read(self) -> Sample:
        """Take one reading. The first has NaN rates; so has one whose scope has just changed."""
        now_s, roots = self.clock(), self.roots
        host = self._try("host", lambda: host_stat(roots.proc), HostStat())
        resolve = not 0.0 <= now_s - self._resolved_s < RESOLVE_S
        own = read_text(roots.proc / "self/cgroup")
        if resolve or own != self._own:
            self._own = own
            self._found = self._try("cgroups", lambda: cgroups.hierarchies(roots), {})
        found = self._found
        scope = self._try("CPU limits", lambda: self._own_scope(found, host), cgroups.CpuScope())
        info: Mapping[str, float] = self._try("memory", lambda: read_fields(roots.proc / "meminfo"), {})
        host_bytes = info.get("MemTotal", NAN) * 1024.0
        memory: Sequence[cgroups.MemoryGroup] = self._try(
            "memory limits", lambda: cgroups.memory_groups(found, host_bytes), ()
        )
        stats = {g.folder: self._try("memory of groups", g.stat, dict[str, float]()) for g in memory}
        load = (read_text(roots.proc / "loadavg") or "").split()
        if resolve:
            self._resolved_s, self._own_pids = now_s, own_pids(roots.proc)
            self._try("processes", lambda: self._look_around(scope), None)
        uses = self._try("processes", self._trees.scan, dict[int, TreeUse]())
        seen = self._raylet in uses if self._raylet else bool(self._trees.known)
        use = uses.get(self._raylet, TreeUse())
        new, old = self._count(now_s, host, scope, memory, stats, load[-1:]), self._last
        self._last = new
        if resolve or self._devices != new.network.keys():
            self._try("network devices", lambda: self._look_at_devices(frozenset(new.network)), None)
        dt_s = now_s - old.at_s if old else NAN
        if old is None or not dt_s >= 1.0 / TICKS_PER_S:  # a shorter time than the kernel counts in
            old, dt_s = new, NAN

        limit = scope.limit_cpus
        cpus = self._cpus(old, new, scope, use, dt_s)
        background = max(0.0, cpus - use.replicas_s / dt_s)
        sharing = [uses[r] for r in self._sharing if r in uses]
        if len(self._sharing) > 1:
            shared_cpus, limit = limit, min(self.node_cpus or limit, limit)
            outside = max(0.0, cpus - sum(u.replicas_s for u in sharing) / dt_s)
            rest = max(0.0, use.tree_s - use.replicas_s) / dt_s
            background = min(limit, max(rest, limit - max(0.0, shared_cpus - outside)))
            cpus = background + use.replicas_s / dt_s if not math.isnan(cpus) else NAN
        if math.isnan(cpus) or not seen:  # without the process table nobody knows what is Serve's
            background = NAN

        rx, tx, carried = self._network(old, new, dt_s)
        serving = self.serving_bytes_per_s / max(self.serving_bytes_per_s, rx, tx, 1.0)
        stalled = (
            _rate(old.stalled_cpu_s, new.stalled_cpu_s, dt_s) if old.cpu_source == new.cpu_source else NAN,
            _rate(old.stalled_memory_s, new.stalled_memory_s, dt_s) if old.memory_source == new.memory_source else NAN,
        )
        gpu, gpu_memory = self._try("GPU", self.gpu.read, (NAN, NAN)) if self.gpu else (NAN, NAN)
        snapshot = NodeSnapshot(
            cpu_fraction=_fraction(cpus / limit),
            cpu_background_fraction=_fraction(background / limit),
            memory_fraction=self._memory_fraction(info, memory, stats),
            network_fraction=_fraction(carried),
            network_background_fraction=_fraction(carried * (1.0 - serving)),
            net_rx_bytes_per_s=rx,
            net_tx_bytes_per_s=tx,
            cpu_pressure_fraction=_fraction(stalled[0]),
            memory_pressure_fraction=_fraction(stalled[1]),
            gpu_fraction=gpu,
            gpu_memory_fraction=gpu_memory,
        )
        busiest = [_rate(old.disks[d].busy_s, new.disks[d].busy_s, dt_s) for d in new.disks if d in old.disks]
        did, does = old.activity, new.activity
        did_dt_s = dt_s if did.source == does.source else NAN
        return Sample(
            snapshot=snapshot,
            scope="tree" if len(self._sharing) > 1 else "cgroup" if scope.group else "host",
            cpu_limit=limit,
            memory_limit_bytes=memory[0].limit_bytes if memory else NAN,
            disk_busy_fraction=_fraction(_greatest(busiest)),
            load1=_number(load[:1]),
            context_switches_per_s=_rate(old.host.context_switches, host.context_switches, dt_s),
            runnable=does.runnable,
            blocked=does.blocked,
            process_starts_per_s=_rate(did.starts, does.starts, did_dt_s),
            system_fraction=_fraction(_rate(did.system_s, does.system_s, did_dt_s) / limit),
            io_wait_fraction=_fraction(_rate(did.io_wait_s, does.io_wait_s, did_dt_s)),
            page_faults_per_s=_rate(did.page_faults, does.page_faults, did_dt_s),
            io_bytes_per_s=_rate(did.io_bytes, does.io_bytes, did_dt_s),
            replicas=use.replicas,
        )

    def _try(self, reader: str, call: Callable[[], T], otherwise: T) -> T:
        """One reader's value; what it raises is written once, and the other readers go on."""
        try:
            return call()
        except Exception as error:
            told = (reader, type(error).__name__)
            if told not in self._told:
                self._told.add(told)
                logger.warning("telemetry: %s cannot be read, its values are unknown: %r", reader, error)
            return otherwise

    def _own_scope(self, found: Mapping[str, cgroups.Hierarchy], host: HostStat) -> cgroups.CpuScope:
        """The cores are the raylet's: libraries pin threads of this process, and what is pinned is not the node."""
        allowed = cgroups.affinity(self.roots, self._raylet) or cgroups.affinity(self.roots, "self")
        if not allowed and not self.host_cpus:
            allowed = frozenset(os.sched_getaffinity(0))
        online = cgroups.online(self.roots)
        return cgroups.cpu_scope(found, frozenset(host.cores), online, allowed, self.host_cpus or math.inf)

    def _shares(self, scope: cgroups.CpuScope, pid: int) -> bool:
        """Whether another raylet lives on the same quota or cores."""
        found, allowed = cgroups.hierarchies(self.roots, pid), cgroups.affinity(self.roots, pid)
        online = cgroups.online(self.roots)
        return scope.shares_with(cgroups.cpu_scope(found, online, online, allowed, self.host_cpus or math.inf))

    def _look_around(self, scope: cgroups.CpuScope) -> None:
        self._trees.forget_outsiders()
        if not self._trees.known:
            self._trees.scan()
        self._raylet = raylet_above(self.roots.proc, self.pid) or 0
        raylets = [pid for pid, entry in self._trees.known.items() if pid == entry.raylet]
        others = (pid for pid in raylets if pid != self._raylet and self._shares(scope, pid))
        self._sharing = (self._raylet, *others) if self._raylet else ()

    def _count(  # noqa: PLR0917 - what has been read so far
        self,
        now_s: float,
        host: HostStat,
        scope: cgroups.CpuScope,
        memory: Sequence[cgroups.MemoryGroup],
        stats: Mapping[Path, Mapping[str, float]],
        last_pid: Sequence[str],
    ) -> _Counters:
        proc = self.roots.proc
        group, limited = scope.group, memory[0] if memory else None

        def stalled_cpu_s() -> float:
            return group.stalled_s() if group else pressure_total_s(read_text(proc / "pressure/cpu"))

        def stalled_memory_s() -> float:
            return limited.stalled_s() if limited else pressure_total_s(read_text(proc / "pressure/memory"), "full")

        def activity() -> Activity:
            if len(self._sharing) > 1:
                return Activity()
            if group:
                stat = stats[limited.folder] if limited else {}
                return group_activity(group, self._found, stat, _number(last_pid) if self._own_pids else NAN)
            return host_activity(proc, host, disks) if scope.whole_host else Activity()

        disks: Mapping[str, DiskUse] = self._try("disks", lambda: disk_use(proc), {})
        return _Counters(
            at_s=now_s,
            host=host,
            cpu_source=str(group.folder) if group else "host",
            memory_source=str(limited.folder) if limited else "host",
            group_s=self._try("CPU", group.used_s, NAN) if group else NAN,
            shared_s={g.folder: self._try("CPU", g.used_s, NAN) for _, g in scope.shared},
            stalled_cpu_s=self._try("CPU pressure", stalled_cpu_s, NAN),
            stalled_memory_s=self._try("memory pressure", stalled_memory_s, NAN),
            network=self._try("network", lambda: network.network_bytes(proc), {}),
            disks=disks,
            activity=self._try("activity", activity, Activity()),
        )

    def _cpus(self, old: _Counters, new: _Counters, scope: cgroups.CpuScope, use: TreeUse, dt_s: float) -> float:
        """CPUs used in the scope; NaN where nothing tells, or tells of another group than the reading before."""
        if old.cpu_source != new.cpu_source:
            return NAN
        around: list[float] = []
        if scope.whole_host:
            around = [_rate(old.host.busy_s, new.host.busy_s, dt_s)]
        elif not scope.quota:
            before, after = old.host.cores, new.host.cores
            around = [_rate(before[c], after[c], dt_s) for c in scope.cores if c in before and c in after]
        taken = [
            _rate(old.shared_s.get(g.folder, NAN), new.shared_s[g.folder], dt_s) - (quota - scope.limit_cpus)
            for quota, g in scope.shared
        ]
        total = _greatest([_rate(old.group_s, new.group_s, dt_s), sum(around) if around else NAN, *taken])
        told = (new.host.counts and (scope.whole_host or around)) or not math.isnan(new.group_s)
        return total if told or not use.processes else use.tree_s / dt_s

    def _memory_fraction(
        self,
        info: Mapping[str, float],
        groups: Sequence[cgroups.MemoryGroup],
        stats: Mapping[Path, Mapping[str, float]],
    ) -> float:
        host = self._try("memory", lambda: memory_fraction(info), NAN)
        used = [
            self._try("memory of groups", partial(g.used_bytes, stats[g.folder]), NAN) / g.limit_bytes for g in groups
        ]
        return _fraction(_greatest([host, *used]))

    def _network(self, old: _Counters, new: _Counters, dt_s: float) -> tuple[float, float, float]:
        """Received and sent bytes per second of the devices that count, and the fullest link's fraction."""
        rates: dict[str, tuple[float, float]] = {}
        for name in self._links:
            if name in old.network and name in new.network:
                (old_rx, old_tx), (new_rx, new_tx) = old.network[name], new.network[name]
                rates[name] = _rate(old_rx, new_rx, dt_s), _rate(old_tx, new_tx, dt_s)
        known = {name: pair for name, pair in rates.items() if not math.isnan(sum(pair))}
        if not known:
            return NAN, NAN, NAN
        rx, tx = (sum(pair[i] for pair in known.values()) for i in (0, 1))
        return rx, tx, network.fullest({name: max(pair) for name, pair in known.items()}, self._links)

    def _look_at_devices(self, names: frozenset[str]) -> None:
        self._devices = names
        counted = network.counted(self.roots, names, self.count_loopback)
        self._links = {n: network.link_bytes_per_s(self.roots.sys, n, self.link_bytes_per_s) for n in counted}


def _rate(old: float, new: float, dt_s: float) -> float:
    """What a counter gained a second; NaN where it went back: it was reset or has wrapped, and nobody knows which."""
    return (new - old) / dt_s if new >= old else NAN


def _number(words: Sequence[str]) -> float:
    try:
        return number(words[0])
    except (IndexError, ValueError):
        return NAN


def _greatest(values: Sequence[float]) -> float:
    return max((v for v in values if not math.isnan(v)), default=NAN)


def _fraction(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(0.0, value))
