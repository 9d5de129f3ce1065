"""CPU and memory groups that stand for machines, on cgroup version 1 and 2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shadecast.errors import ShadecastError

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
"""The kernel's and Kubernetes' default: a quota of .25 is 25 ms in every 100 ms."""
_V1 = ("cpu", "cpuacct", "memory")


class GroupError(ShadecastError):
    """Groups cannot be set up here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group: a folder in the one hierarchy of version 2, or one for each controller of version 1."""

    version: int
    name: str
    """Path below the mount, e.g. "shadecastlab0/w1"."""
    root: Path = ROOT

    @property
    def folders(self) -> list[Path]:
        """Every folder that makes up the group (controllers mounted together count once)."""
        if self.version == 2:
            return [self.root / self.name]
        mounts = dict.fromkeys((self.root / controller).resolve() for controller in _V1)
        return [mount / self.name for mount in mounts]

    def _folder(self, controller: str) -> Path:
        return self.root / self.name if self.version == 2 else self.root / controller / self.name

    def make(self) -> None:
        """Create it; in version 2 hand the controllers down from its parent."""
        for folder in self.folders:
            if self.version == 2:
                (folder.parent / "cgroup.subtree_control").write_text("+cpu +memory")
            folder.mkdir(exist_ok=True)

    def set_cpu_quota(self, cpus: float | None) -> None:
        """At most that many cores; None lifts the limit."""
        if cpus is not None and not 0.01 <= cpus <= 4096:
            raise GroupError(f"cpu quota = {cpus}: must be from 0.01 to 4096 cores, or None for no limit")
        quota = str(round(cpus * PERIOD_US)) if cpus is not None else ("max" if self.version == 2 else "-1")
        if self.version == 2:
            (self._folder("cpu") / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        else:
            (self._folder("cpu") / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._folder("cpu") / "cpu.cfs_quota_us").write_text(quota)

    def set_memory_limit(self, limit_bytes: int | None) -> None:
        """At most that many bytes; None lifts the limit."""
        if limit_bytes is not None and limit_bytes < 1 << 20:
            raise GroupError(f"memory limit = {limit_bytes}: must be at least 1 MiB, or None for no limit")
        if self.version == 2:
            (self._folder("memory") / "memory.max").write_text(str(limit_bytes) if limit_bytes is not None else "max")
        else:
            path = self._folder("memory") / "memory.limit_in_bytes"
            path.write_text(str(limit_bytes if limit_bytes is not None else -1))

    def cpu_used_s(self) -> float:
        """CPU seconds used by everything in it since it was made."""
        if self.version == 1:
            return int((self._folder("cpuacct") / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (self._folder("cpu") / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def memory_used_bytes(self) -> int:
        """Memory charged to it, page cache included."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int((self._folder("memory") / name).read_text())

    def pids(self) -> set[int]:
        """Processes in it."""
        found: set[int] = set()
        for folder in self.folders:
            with suppress(OSError):
                found |= {int(word) for word in (folder / "cgroup.procs").read_text().split()}
        return found

    def remove(self, timeout_s: float = 5.0) -> None:
        """End what still runs in it and in groups below it, and remove them; no error if it is not there."""
        for folder in self.folders:
            for each in _deepest_first(folder):
                _remove(each, time.monotonic() + timeout_s)


def _deepest_first(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for child in folder.iterdir():
            if child.is_dir():
                yield from _deepest_first(child)
        yield folder


def _remove(folder: Path, deadline_s: float) -> None:
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:  # processes are in it, or on their way out
            if time.monotonic() > deadline_s:
                raise
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        else:
            return


def version(root: Path = ROOT) -> int:
    """2 where cpu and memory are in the one hierarchy, 1 where each has its own. Raises GroupError where neither is."""
    controllers = root / "cgroup.controllers"
    if controllers.exists() and {"cpu", "memory"} <= set(controllers.read_text().split()):
        return 2
    if all((root / controller).is_dir() for controller in _V1):
        return 1
    raise GroupError(
        f"no cpu and memory cgroup controllers under {root}: mount cgroup2 there (or version 1's cpu, cpuacct, memory)"
    )
