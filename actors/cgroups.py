"""Which cgroup limits this process, on hierarchies of version 1 and 2, and what it has used of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.procfs import NAN, Roots, pressure_total_s, read_fields, read_number, read_text


@dataclass(frozen=True, slots=True)
class CpuGroup:
    """The tightest CPU quota above this process. `folder` holds the accounting files, `quota_folder` the quota's."""

    version: int
    folder: Path
    quota_folder: Path
    limit_cpus: float

    def used_s(self) -> float:
        """Cumulative CPU seconds of everything in the group; NaN where unreadable."""
        if self.version == 2:
            return read_fields(self.folder / "cpu.stat").get("usage_usec", NAN) / 1e6
        return read_number(self.folder / "cpuacct.usage") / 1e9

    def stalled_s(self) -> float:
        """Cumulative seconds in which something waited for CPU: PSI in version 2, throttled time in version 1."""
        if self.version == 2:
            return pressure_total_s(read_text(self.folder / "cpu.pressure"))
        return read_fields(self.quota_folder / "cpu.stat").get("throttled_time", NAN) / 1e9


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The tightest memory limit above this process."""

    version: int
    folder: Path
    limit_bytes: float

    def used_bytes(self) -> float:
        """Working set: usage less the page cache that the kernel drops first, as kubelet counts it."""
        usage, inactive = (
            ("memory.current", "inactive_file")
            if self.version == 2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        used = read_number(self.folder / usage)
        return max(0.0, used - read_fields(self.folder / "memory.stat").get(inactive, 0.0))

    def stalled_s(self) -> float:
        """Cumulative seconds in which something waited for memory; NaN in version 1."""
        return pressure_total_s(read_text(self.folder / "memory.pressure")) if self.version == 2 else NAN


def cgroup_paths(roots: Roots, pid: int | str = "self") -> dict[str, str]:
    """Path of each controller's hierarchy from /proc/<pid>/cgroup; key "" is the version 2 hierarchy."""
    paths: dict[str, str] = {}
    for line in (read_text(roots.proc / str(pid) / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(",") if controllers else [""]:
            paths[controller] = path
    return paths


def cpu_home(roots: Roots, pid: int) -> tuple[str | None, str | None]:
    """Which CPU groups a process lives in: equal for processes that share one quota."""
    paths = cgroup_paths(roots, pid)
    return paths.get("cpu"), paths.get("")


def cpu_group(roots: Roots, host_cpus: float) -> CpuGroup | None:
    """The tightest quota below the host's cores, None where no cgroup limits CPU."""
    paths = cgroup_paths(roots)
    best: CpuGroup | None = None
    for folder in _upward(roots.cgroup / "cpu", paths.get("cpu")):
        quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if quota > 0 and period > 0 and quota / period < (best.limit_cpus if best else host_cpus):
            relative = folder.relative_to(roots.cgroup / "cpu")
            best = CpuGroup(1, roots.cgroup / "cpuacct" / relative, folder, quota / period)
    for folder in _upward(roots.cgroup, paths.get("")):
        words = (read_text(folder / "cpu.max") or "").split()
        try:
            limit = float(words[0]) / float(words[1])
        except (IndexError, ValueError, ZeroDivisionError):
            continue
        if 0 < limit < (best.limit_cpus if best else host_cpus):
            best = CpuGroup(2, folder, folder, limit)
    return best


def memory_group(roots: Roots, host_bytes: float) -> MemoryGroup | None:
    """The tightest memory limit below the host's memory, None where no cgroup limits it."""
    paths = cgroup_paths(roots)
    ceiling = host_bytes if host_bytes > 0 else math.inf
    best: MemoryGroup | None = None
    hierarchies = (
        (1, roots.cgroup / "memory", paths.get("memory"), "memory.limit_in_bytes"),
        (2, roots.cgroup, paths.get(""), "memory.max"),
    )
    for version, mount, path, name in hierarchies:
        for folder in _upward(mount, path):
            limit = read_number(folder / name)
            if 0 < limit < min(ceiling, best.limit_bytes if best else ceiling, 2.0**60):
                best = MemoryGroup(version, folder, limit)
    return best


def _upward(mount: Path, path: str | None) -> Iterator[Path]:
    """From the group's folder up to the mount; where a container sees only its own part, the mount itself."""
    if path is None:
        return
    parts = [p for p in path.split("/") if p not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        if folder.is_dir():
            yield folder
