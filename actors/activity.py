"""What a node's processes do beside using CPU: starts, waits, page faults, input and output. Jobs show here first.

| scope | process starts | runnable, blocked | system share | waiting for IO | page faults | bytes read and written |
|---|---|---|---|---|---|---|
| whole host | /proc/stat | /proc/stat | /proc/stat | /proc/stat | /proc/vmstat | /proc/diskstats |
| group, version 2 | last pid of /proc/loadavg | - | cpu.stat | io.pressure | memory.stat | io.stat |
| group, version 1 | last pid of /proc/loadavg | - | cpuacct.usage_sys | - | memory.stat | blkio |

What a scope does not tell is NaN: /proc/stat and its like tell of the whole host, and what others do there is not ours.
The last pid is that of the reader's PID namespace, so it tells of a container's processes only where the container has
one of its own. Threads count as starts, as they do in /proc/stat.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.cgroups import CpuGroup, Hierarchy
from actors.procfs import NAN, DiskUse, HostStat, number, pressure_total_s, read_fields, read_number, read_text

INITIAL_PIDS = "pid:[4026531836]"
"""The host's own PID namespace bears this number in every kernel."""


@dataclass(frozen=True, slots=True)
class Activity:
    """Counters since some start, but for `runnable` and `blocked`, which are numbers of this moment.

    `io_wait_s` is seconds of the mean core on a host, seconds in which anything waited in a group. There is no rate
    from one `source` to another.
    """

    source: str = ""
    starts: float = NAN
    runnable: float = NAN
    blocked: float = NAN
    system_s: float = NAN
    io_wait_s: float = NAN
    page_faults: float = NAN
    io_bytes: float = NAN


def host_activity(proc: Path, host: HostStat, disks: Mapping[str, DiskUse]) -> Activity:
    """Of the whole host; reads /proc/vmstat, the rest has been read."""
    return Activity(
        source="host",
        starts=host.starts,
        runnable=host.runnable,
        blocked=host.blocked,
        system_s=host.system_s,
        io_wait_s=host.io_wait_s / max(1, len(host.cores)),
        page_faults=_field(read_text(proc / "vmstat"), "pgfault"),
        io_bytes=sum(d.moved_bytes for d in disks.values()) if disks else NAN,
    )


def group_activity(
    group: CpuGroup, found: Mapping[str, Hierarchy], memory_stat: Mapping[str, float], last_pid: float
) -> Activity:
    """Of one group; `memory_stat` is its memory.stat, `last_pid` NaN where it is not the group's own."""
    version_2 = group.usage is None or group.usage.name == "cpu.stat"
    if version_2:
        system_s = read_fields(group.folder / "cpu.stat").get("system_usec", NAN) / 1e6
        io_wait_s = pressure_total_s(read_text(group.folder / "io.pressure"))
        io_bytes = _io_stat(read_text(group.folder / "io.stat"))
    else:
        system_s = read_number(group.usage.with_name("cpuacct.usage_sys")) / 1e9 if group.usage else NAN
        io_wait_s = NAN
        blkio = found.get("blkio")
        own = blkio is not None and bool(blkio.parts) and bool(blkio.upward)
        io_bytes = _blkio(blkio.upward[0][0]) if blkio is not None and own else NAN
    return Activity(
        source=str(group.folder),
        starts=last_pid,
        system_s=system_s,
        io_wait_s=io_wait_s,
        page_faults=memory_stat.get("total_pgfault", memory_stat.get("pgfault", NAN)),
        io_bytes=io_bytes,
    )


def own_pids(proc: Path) -> bool:
    """Whether this process lives in a PID namespace of its own; False where that cannot be told."""
    try:
        return os.readlink(proc / "self/ns/pid") != INITIAL_PIDS
    except OSError:
        return False


def _field(text: str | None, name: str) -> float:
    """One value of a long file of "name number" lines, without taking the others apart."""
    at = f"\n{text or ''}".find(f"\n{name} ")
    try:
        return number((text or "")[at:].split(None, 2)[1]) if at >= 0 else NAN
    except (IndexError, ValueError):
        return NAN


def _io_stat(text: str | None) -> float:
    """Bytes read and written, all devices; a group that has moved nothing has an empty file."""
    if text is None:
        return NAN
    words = (word.partition("=") for word in text.split())
    try:
        return sum((number(value) for name, _, value in words if name in ("rbytes", "wbytes")), 0.0)
    except ValueError:
        return NAN


def _blkio(folder: Path) -> float:
    for name in ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"):
        text = read_text(folder / name)
        if text is not None:
            total = text.rpartition("Total ")[2].split()
            try:
                return number(total[0]) if total else NAN
            except ValueError:
                return NAN
    return NAN
