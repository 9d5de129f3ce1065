"""Readers of /proc, /sys and cgroup files under injectable roots.

Every reader returns None or NaN where a file is missing or malformed: kernels, containers and sandboxes differ,
and a sampler that dies of a missing file is worse than one that reports what it has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = float(os.sysconf("SC_CLK_TCK"))
NAN = float("nan")
SECTOR_BYTES = 512
"""What the kernel counts disks in, whatever their own sectors."""
_STACKED_DISKS = ("dm-", "md", "bcache", "drbd")
"""LVM, encryption, RAID: each byte is counted once more by the disks below."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the pseudo file systems are mounted; tests point these at recorded trees."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")
    sys: Path = Path("/sys")


def read_text(path: Path | str) -> str | None:
    """Whole content of a small file, None where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
        return b"".join(chunks).decode("utf-8", "replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def number(word: str) -> float:
    """A number as the kernel writes it; raises ValueError on anything else, on "nan" and "inf" too."""
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value


def read_number(path: Path | str) -> float:
    """First word of a file as a number; NaN where missing, malformed or "max"."""
    text = read_text(path)
    try:
        return number((text or "").split()[0])
    except (IndexError, ValueError):
        return NAN


def read_fields(path: Path | str) -> Mapping[str, float]:
    """Files of "name number" lines (cpu.stat, memory.stat, meminfo) as a mapping; bad lines are left out."""
    out: dict[str, float] = {}
    for line in (read_text(path) or "").splitlines():
        words = line.split()
        try:
            out[words[0].rstrip(":")] = number(words[1])
        except (IndexError, ValueError):
            continue
    return out


@dataclass(frozen=True, slots=True)
class HostStat:
    """Cumulative counters of /proc/stat. CPU in seconds; `busy_s` over all cores, `cores` one by one.

    Busy includes stolen time; idle and iowait are not busy, guest time is already inside user time. `system_s` includes
    interrupts. `starts` counts threads, too; `runnable` and `blocked` are threads of this moment. `counts` is False
    where the file is all zeros (gVisor): then only the number of `cores` is known.
    """

    busy_s: float = NAN
    context_switches: float = NAN
    runnable: float = NAN
    blocked: float = NAN
    starts: float = NAN
    system_s: float = NAN
    io_wait_s: float = NAN
    cores: Mapping[int, float] = field(default_factory=dict)
    counts: bool = True


def host_stat(proc: Path) -> HostStat:
    """Read /proc/stat; lines that are malformed are left out."""
    busy_s = switches = runnable = blocked = starts = system_s = io_wait_s = NAN
    cores: dict[int, float] = {}
    for line in (read_text(proc / "stat") or "").splitlines():
        words = line.split()
        try:
            if line.startswith("cpu"):
                user, nice, system, _idle, waiting, irq, softirq, steal = (number(w) for w in words[1:9])
                used_s = (user + nice + system + irq + softirq + steal) / TICKS_PER_S
                if words[0] == "cpu":
                    busy_s = used_s
                    system_s, io_wait_s = (system + irq + softirq) / TICKS_PER_S, waiting / TICKS_PER_S
                else:
                    cores[int(words[0][3:])] = used_s
            elif line.startswith("ctxt"):
                switches = number(words[1])
            elif line.startswith("procs_running"):
                runnable = number(words[1])
            elif line.startswith("procs_blocked"):
                blocked = number(words[1])
            elif line.startswith("processes"):
                starts = number(words[1])
        except (IndexError, ValueError):
            continue
    if switches == 0.0:
        return HostStat(cores=dict.fromkeys(cores, NAN), counts=False)
    return HostStat(busy_s, switches, runnable, blocked, starts, system_s, io_wait_s, cores)


def memory_fraction(info: Mapping[str, float]) -> float:
    """Part of the host's memory that is not available, by the fields of /proc/meminfo; NaN where they do not tell.

    Without MemAvailable (before Linux 3.14, some sandboxes) it is what the kernel makes it of: free pages, file pages
    on the reclaim lists and reclaimable slab.
    """
    total = info.get("MemTotal", NAN)
    if not total > 0:
        return NAN
    if "Active(file)" in info or "Inactive(file)" in info:
        files = info.get("Active(file)", 0.0) + info.get("Inactive(file)", 0.0)
    else:
        files = info.get("Buffers", 0.0) + max(0.0, info.get("Cached", 0.0) - info.get("Shmem", 0.0))
    made = info.get("MemFree", NAN) + files + info.get("SReclaimable", 0.0)
    return 1.0 - info.get("MemAvailable", made) / total


def pressure_total_s(text: str | None, kind: str = "some") -> float:
    """Cumulative stall time of a PSI file in seconds; NaN where the kernel offers none."""
    for line in (text or "").splitlines():
        if line.startswith(kind):
            for word in line.split():
                if word.startswith("total="):
                    try:
                        return number(word[6:]) / 1e6
                    except ValueError:
                        return NAN
    return NAN


class DiskUse(NamedTuple):
    """Cumulative: seconds in which the disk was busy, bytes that it has read and written."""

    busy_s: float
    moved_bytes: float


def disk_use(proc: Path) -> Mapping[str, DiskUse]:
    """What each whole disk has done (loop, ram and partitions left out, and what lies on other disks)."""
    out: dict[str, DiskUse] = {}
    for line in (read_text(proc / "diskstats") or "").splitlines():
        words = line.split()
        if len(words) < 13 or words[2].startswith(("loop", "ram", "zram")):
            continue
        name = words[2]
        if any(name.startswith(disk) and _is_partition(disk, name) for disk in out):
            continue
        try:
            moved_bytes = (number(words[5]) + number(words[9])) * SECTOR_BYTES
            out[name] = DiskUse(number(words[12]) / 1000.0, moved_bytes)
        except ValueError:
            continue
    return {name: use for name, use in out.items() if not name.startswith(_STACKED_DISKS)} or out


def _is_partition(disk: str, name: str) -> bool:
    """Whether so the kernel names a partition: sda1 of sda, nvme0n1p1 of nvme0n1."""
    mark = "p" if disk[-1].isdigit() else ""
    number_of = name.removeprefix(disk + mark)
    return number_of != name and number_of.isdecimal()


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One process of /proc/<pid>/stat. `own_s` is its CPU time, `reaped_s` that of children it has waited for."""

    pid: int
    name: str
    parent: int
    own_s: float
    reaped_s: float
    start_ticks: int


def process_stat(proc: Path, pid: int) -> ProcessStat | None:
    """Read one process; None where it is gone. `name` is the kernel's, cut at 15 characters."""
    text = read_text(f"{proc}/{pid}/stat")
    if text is None:
        return None
    left, right = text.find("("), text.rfind(")")
    words = text[right + 2 :].split()
    try:
        return ProcessStat(
            pid=pid,
            name=text[left + 1 : right],
            parent=int(words[1]),
            own_s=(int(words[11]) + int(words[12])) / TICKS_PER_S,
            reaped_s=(int(words[13]) + int(words[14])) / TICKS_PER_S,
            start_ticks=int(words[19]),
        )
    except (IndexError, ValueError):
        return None


@dataclass(slots=True)
class _Known:
    stat: ProcessStat
    raylet: int
    """Pid of the raylet above it, 0 for processes outside every Ray node."""
    in_replica: bool


@dataclass(slots=True)
class TreeUse:
    """CPU seconds that one raylet's process tree used since the last scan, and its replicas' part of that."""

    tree_s: float = 0.0
    replicas_s: float = 0.0
    replicas: int = 0
    processes: int = 0


REPLICA_NAME = "ray::ServeReplica"[:15]


@dataclass(slots=True)
class RayTrees:
    """Process trees below the raylets of this host, scanned incrementally.

    Only members are read again on each scan (about 15 us each); others are read once. A process belongs to a replica
    if it or an ancestor bears Serve's replica name. CPU of members that ended between two scans is taken from what
    their parents reaped, less what had been counted already.
    """

    proc: Path
    known: dict[int, _Known] = field(default_factory=dict)

    def scan(self) -> dict[int, TreeUse]:
        """Walk the process table once; use by pid of the raylet. The first scan has no earlier one: use is 0."""
        try:
            pids = {int(name) for name in os.listdir(self.proc) if name.isdecimal()}
        except OSError:
            return {}
        before, after = self.known, dict[int, _Known]()
        for pid in pids:
            self._place(pid, pids, before, after)
        self.known = after
        uses = {pid: TreeUse() for pid, entry in after.items() if pid == entry.raylet}
        reaped_s = dict.fromkeys(uses, 0.0)
        for pid, entry in after.items():
            if entry.raylet not in uses:
                continue
            use, old = uses[entry.raylet], before.get(pid)
            use.processes += 1
            use.replicas += entry.stat.name.startswith(REPLICA_NAME)
            known = old is not None and old.stat.start_ticks == entry.stat.start_ticks
            used_s = entry.stat.own_s
            if old is not None and known:
                used_s = max(0.0, used_s - old.stat.own_s)
                reaped_s[entry.raylet] += max(0.0, entry.stat.reaped_s - old.stat.reaped_s)
            if before:
                use.tree_s += used_s
                use.replicas_s += used_s if entry.in_replica else 0.0
        for pid, old in before.items():
            new = after.get(pid)
            if old.raylet in uses and (new is None or new.stat.start_ticks != old.stat.start_ticks):
                reaped_s[old.raylet] -= old.stat.own_s + old.stat.reaped_s
        for raylet, extra_s in reaped_s.items():
            uses[raylet].tree_s += max(0.0, extra_s)
        return uses

    def forget_outsiders(self) -> None:
        """Read processes outside every Ray node again: a pid may have been reused, a child become a raylet."""
        self.known = {pid: entry for pid, entry in self.known.items() if entry.raylet}

    def _place(self, pid: int, pids: set[int], before: dict[int, _Known], after: dict[int, _Known]) -> _Known | None:
        if pid in after:
            return after[pid]
        old = before.get(pid)
        if old is not None and not old.raylet:
            after[pid] = old
            return old
        stat = process_stat(self.proc, pid)
        if stat is None:
            return None
        raylet, in_replica = (pid, False) if stat.name == "raylet" else (0, False)
        if not raylet and old is not None and old.stat.start_ticks == stat.start_ticks:
            raylet = old.raylet  # an orphan stays with its node
            in_replica = old.in_replica and stat.parent not in after
        if raylet != pid and stat.parent in pids and stat.parent != pid:
            parent = self._place(stat.parent, pids, before, after)
            if parent is not None and parent.raylet:
                raylet, in_replica = parent.raylet, parent.in_replica
        entry = _Known(stat, raylet, in_replica or stat.name.startswith(REPLICA_NAME))
        after[pid] = entry
        return entry


def raylet_above(proc: Path, pid: int) -> int | None:
    """Pid of the raylet among the ancestors of `pid`, None where there is none."""
    for _ in range(64):
        stat = process_stat(proc, pid)
        if stat is None:
            return None
        if stat.name == "raylet":
            return pid
        if stat.parent in (0, pid):
            return None
        pid = stat.parent
    return None
