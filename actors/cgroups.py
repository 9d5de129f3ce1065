"""Which cgroups limit this node's CPU and memory, on hierarchies of version 1 and 2, and what was used of them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.procfs import NAN, Roots, number, pressure_total_s, read_fields, read_number, read_text

MOUNT = "/sys/fs/cgroup"
MAX_CORE = 1 << 16
"""No kernel has cores beyond this number: a list that names one is garbage."""
Parts = tuple[str, ...]
_HIDDEN_LIMITS = {
    "memory.limit_in_bytes": "hierarchical_memory_limit",
    "memory.memsw.limit_in_bytes": "hierarchical_memsw_limit",
}
"""Limits of version 1, and where memory.stat has the least of a group's own and of all above it."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy and the folders from its top to a process's group.

    `upward` are the folders from the group up to the mount, each with its own parts; what a container does not see is
    left out.
    """

    mount: Path
    parts: Parts
    upward: tuple[tuple[Path, Parts], ...]


@dataclass(frozen=True, slots=True)
class CpuGroup:
    """A group whose own use counts. `usage` and `stalled` are files that tell it, None where there are none."""

    folder: Path
    usage: Path | None
    stalled: Path | None

    def used_s(self) -> float:
        """Cumulative CPU seconds of everything in the group; NaN where unreadable."""
        if self.usage is None:
            return NAN
        if self.usage.name == "cpu.stat":
            return read_fields(self.usage).get("usage_usec", NAN) / 1e6
        return read_number(self.usage) / 1e9

    def stalled_s(self) -> float:
        """Cumulative seconds in which something waited for CPU: PSI in version 2, throttled time in version 1."""
        if self.stalled is None:
            return NAN
        if self.stalled.name == "cpu.pressure":
            return pressure_total_s(read_text(self.stalled))
        return read_fields(self.stalled).get("throttled_time", NAN) / 1e9


@dataclass(frozen=True, slots=True)
class CpuScope:
    """What a process may use of the host's CPUs, and whose use counts.

    `cores` are those it may run on, empty where nothing tells. `group` is None where the cores are no group's own.
    With a `quota` only the group's use counts. Without one, whatever else runs on the same cores takes from us.
    `shared` are further quotas above the process, each with its group: others may use up what is ours there.
    """

    limit_cpus: float = NAN
    cores: frozenset[int] = frozenset()
    group: CpuGroup | None = None
    quota: bool = False
    whole_host: bool = True
    shared: tuple[tuple[float, CpuGroup], ...] = ()

    def shares_with(self, other: CpuScope) -> bool:
        """Whether two processes live on the same quota, or else on the same cores."""
        if self.quota or other.quota:
            mine, theirs = (s.group.folder if s.quota and s.group else None for s in (self, other))
            return mine == theirs
        return not self.cores or not other.cores or bool(self.cores & other.cores)


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A memory limit above this process, which kills or (memory.high) throttles whoever is above it.

    `usage` is what the kernel compares with it.
    """

    folder: Path
    usage: str
    limit_bytes: float

    def stat(self) -> dict[str, float]:
        """Its memory.stat; empty where unreadable."""
        return dict(read_fields(self.folder / "memory.stat"))

    def used_bytes(self, stat: Mapping[str, float]) -> float:
        """What cannot be reclaimed: usage less the file pages on the reclaim lists and reclaimable slab.

        These are what MemAvailable of /proc/meminfo counts as available. tmpfs and shared memory (on the anonymous
        lists), mlocked pages (on the unevictable one), kernel memory and sockets stay in. Dirty pages do not: reclaim
        writes them out, and the kernel slows whoever makes more. Anonymous memory stays in even where there is swap: a
        model that is swapped out does not answer. NaN without `stat`, memory.stat: usage alone may be mostly cache.
        """
        total = "total_" if "total_inactive_file" in stat or "total_active_file" in stat else ""
        lists = [stat.get(total + name, 0.0) for name in ("active_file", "inactive_file", "slab_reclaimable")]
        return max(0.0, read_number(self.folder / self.usage) - sum(lists)) if stat else NAN

    def stalled_s(self) -> float:
        """Cumulative seconds in which something waited for memory; NaN in version 1."""
        return pressure_total_s(read_text(self.folder / "memory.pressure"))


def core_list(text: str | None) -> frozenset[int]:
    """Cores of a list as the kernel writes it ("0-1,4,6-7"); empty where it is empty or malformed."""
    cores: set[int] = set()
    try:
        for part in (text or "").strip().split(","):
            low, dash, high = part.partition("-")
            if not 0 <= int(low) <= (last := int(high) if dash else int(low)) < MAX_CORE:
                return frozenset()
            cores.update(range(int(low), last + 1))
    except ValueError:
        return frozenset()
    return frozenset(cores)


def affinity(roots: Roots, pid: int | str) -> frozenset[int]:
    """Cores a process may be scheduled on by /proc/<pid>/status; may name cores that are offline."""
    for line in (read_text(roots.proc / str(pid) / "status") or "").splitlines():
        name, _, cores = line.partition(":")
        if name == "Cpus_allowed_list":
            return core_list(cores)
    return frozenset()


def online(roots: Roots) -> frozenset[int]:
    """Cores of the host that are there."""
    return core_list(read_text(roots.sys / "devices/system/cpu/online"))


def cgroup_paths(roots: Roots, pid: int | str = "self") -> dict[str, str]:
    """Path of each controller's hierarchy from /proc/<pid>/cgroup; key "" is the version 2 hierarchy."""
    paths: dict[str, str] = {}
    for line in (read_text(roots.proc / str(pid) / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        for controller in controllers.split(",") if colon else ():
            paths[controller] = path
    return paths


def hierarchies(roots: Roots, pid: int | str = "self") -> dict[str, Hierarchy]:
    """The mounted hierarchies that a process is in, by controller; key "" is version 2."""
    mounts = _mounts(roots)
    paths = cgroup_paths(roots, pid)
    return {c: _hierarchy(mounts[c][0], _parts(path, mounts[c][1])) for c, path in paths.items() if c in mounts}


def _hierarchy(mount: Path, parts: Parts) -> Hierarchy:
    levels = [(mount.joinpath(*parts[:depth]), parts[:depth]) for depth in range(len(parts), -1, -1)]
    return Hierarchy(mount, parts, tuple((folder, own) for folder, own in levels if os.path.isdir(folder)))


def cpu_scope(
    found: Mapping[str, Hierarchy],
    host_cores: frozenset[int],
    online: frozenset[int],
    allowed: frozenset[int],
    cpus: float = math.inf,
) -> CpuScope:
    """What limits the CPU of a process in these hierarchies: a quota below its cores, or else its cores.

    `host_cores` are those of /proc/stat, `allowed` those of the process's affinity; of all cores, empty means unknown.
    `cpus` is the most that counts. The kernel keeps a cpuset within what is online; where it is not, lxcfs has numbered
    the cores of a container anew, and `online` tells only how many.
    """
    cpuset, owner = _cpuset(found)
    if renumbered := bool(online) and not cpuset <= online:
        cpus, online = min(cpus, float(len(online))), frozenset()
    cores = (allowed & cpuset) or cpuset or allowed
    cores = (cores & online) or cores
    host_cores = host_cores or online
    count = min(cpus, float(len(cores or host_cores)) or math.inf)
    quotas = _quotas(found)
    quota = quotas[0] if quotas else None
    if quota is not None and (quota[0] < count or (quota[0] == count and (renumbered or not host_cores))):
        return CpuScope(quota[0], cores, quota[1], quota=True, whole_host=False, shared=tuple(quotas[1:]))
    owns = owner is not None and ((cpuset & online) or cpuset) <= cores
    whole_host = not owns
    if host_cores:
        whole_host = host_cores <= cores if cores else len(host_cores) <= count
    group = owner if owns else quota[1] if quota is not None and quota[0] == count else None
    limit = count if math.isfinite(count) else NAN
    if whole_host:
        return CpuScope(limit, cores)
    return CpuScope(limit, cores, group, whole_host=False, shared=tuple(quotas))


def memory_groups(found: Mapping[str, Hierarchy], host_bytes: float) -> Sequence[MemoryGroup]:
    """Every memory limit not above the host's memory, the tightest first: any of them can kill or throttle.

    In version 1 the outermost group that is seen tells of limits above it, too.
    """
    ceiling = min(host_bytes if host_bytes > 0 else math.inf, 2.0**60)
    files = (
        ("memory", "memory.usage_in_bytes", "memory.limit_in_bytes"),
        ("memory", "memory.memsw.usage_in_bytes", "memory.memsw.limit_in_bytes"),  # memory and swap together
        ("", "memory.current", "memory.max"),
        ("", "memory.current", "memory.high"),
    )
    groups = []
    for controller, usage, limit in files:
        upward = found[controller].upward if controller in found else ()
        limits = [(folder, read_number(folder / limit)) for folder, _ in upward]
        if limits and (name := _HIDDEN_LIMITS.get(limit)):
            folder = limits[-1][0]
            limits.append((folder, read_fields(folder / "memory.stat").get(name, NAN)))
        groups += [MemoryGroup(folder, usage, most) for folder, most in dict.fromkeys(limits) if 0 < most <= ceiling]
    return sorted(groups, key=lambda g: g.limit_bytes)


def _quotas(found: Mapping[str, Hierarchy]) -> list[tuple[float, CpuGroup]]:
    """The quotas above a process, in CPUs, each with its group; the tightest first."""
    limits: list[tuple[float, Path, Parts, str]] = []
    for folder, parts in found["cpu"].upward if "cpu" in found else ():
        quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if quota > 0 and period > 0:
            limits.append((quota / period, folder, parts, "cpu.stat"))
    for folder, parts in found[""].upward if "" in found else ():
        words = (read_text(folder / "cpu.max") or "").split()
        try:
            limit = number(words[0]) / number(words[1])
        except (IndexError, ValueError, ZeroDivisionError):
            continue
        if limit > 0:
            limits.append((limit, folder, parts, "cpu.pressure"))
    limits.sort(key=lambda one: one[0])
    return [
        (limit, CpuGroup(folder, _usage(found, parts), folder / stalled)) for limit, folder, parts, stalled in limits
    ]


def _cpuset(found: Mapping[str, Hierarchy]) -> tuple[frozenset[int], CpuGroup | None]:
    """A process's effective cpuset, and the highest group above it that has this very set; empty where none tells."""
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    for controller in ("cpuset", ""):
        sets = [
            (cores, folder, parts)
            for folder, parts in (found[controller].upward if controller in found else ())
            if (cores := next((c for n in names if (c := core_list(read_text(folder / n)))), frozenset[int]()))
        ]
        if sets:
            _, same = next(itertools.groupby(sets, key=lambda one: one[0]))
            cores, folder, parts = list(same)[-1]
            return cores, CpuGroup(folder, _usage(found, parts), None if controller else folder / "cpu.pressure")
    return frozenset(), None


def _usage(found: Mapping[str, Hierarchy], parts: Parts) -> Path | None:
    """The CPU accounts of the group with these parts, wherever CPU is accounted; None where its processes are not."""
    for controller, name in (("cpuacct", "cpuacct.usage"), ("", "cpu.stat")):
        hierarchy = found.get(controller)
        if hierarchy is not None and hierarchy.parts[: len(parts)] == parts:
            file = hierarchy.mount.joinpath(*parts, name)
            if os.path.isfile(file):
                return file
    return None


def _mounts(roots: Roots) -> dict[str, tuple[Path, str | None]]:
    """Folder of each controller's hierarchy ("" is version 2), and which group its top is (None: not told)."""
    try:
        names = os.listdir(roots.cgroup)
    except OSError:
        names = []
    mounts: dict[str, tuple[Path, str | None]] = {c: (roots.cgroup / n, None) for n in names for c in n.split(",")}
    unified = roots.cgroup / "unified"
    mounts[""] = (unified if os.path.isdir(unified) else roots.cgroup, None)
    for line in (read_text(roots.proc / "self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        usual = words[4] == MOUNT or words[4].startswith(MOUNT + "/")
        folder = roots.cgroup / words[4][len(MOUNT) + 1 :] if usual else Path(words[4])
        for controller in kind[2].split(",") if kind[0] == "cgroup" else [""]:
            if os.path.isdir(folder) and (usual or controller not in mounts):
                mounts[controller] = (folder, words[3])
    return mounts


def _parts(path: str, top: str | None) -> Parts:
    """Folders below a mount's top group. A group that is not below the top counts as the top itself."""
    if top is not None and top != "/":
        path = path[len(top) :] if path == top or path.startswith(top + "/") else "/"
    parts = path.split("/")
    if top is not None and ".." in parts:
        return ()
    return tuple(p for p in parts if p not in ("", ".", ".."))
