"""Writes small /proc, /sys and cgroup trees as kernels do; tests move time by writing them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from actors.procfs import Roots


@dataclass
class FakeProcess:
    """One process: CPU in clock ticks (100 a second)."""

    pid: int
    name: str
    parent: int
    ticks: int = 0
    reaped: int = 0
    start: int = 1
    cgroup: str = "0::/\n"


@dataclass
class FakeHost:
    """A machine whose files a sampler reads."""

    root: Path
    processes: dict[int, FakeProcess] = field(default_factory=dict)
    busy: int = 0
    idle: int = 0
    steal: int = 0
    rx: int = 0
    tx: int = 0
    memory_total_kb: int = 1000
    memory_available_kb: int = 600
    link_mbit: int | None = 1000

    def __post_init__(self) -> None:
        self.roots = Roots(self.root / "proc", self.root / "cgroup", self.root / "sys")
        for folder in (self.roots.proc / "self/net", self.roots.proc / "pressure", self.roots.cgroup, self.roots.sys):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, *processes: FakeProcess) -> None:
        for p in processes:
            self.processes[p.pid] = p

    def put(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def write(self) -> None:
        """Write everything as it stands now."""
        for folder in self.roots.proc.iterdir():
            if folder.name.isdigit() and int(folder.name) not in self.processes:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        for p in self.processes.values():
            fields = ["S", p.parent, *[0] * 9, p.ticks, 0, p.reaped, 0, 20, 0, 1, 0, p.start, *[0] * 30]
            self.put(f"proc/{p.pid}/stat", f"{p.pid} ({p.name}) " + " ".join(map(str, fields)))
            self.put(f"proc/{p.pid}/cgroup", p.cgroup)
        self.put("proc/stat", f"cpu  {self.busy} 0 0 {self.idle} 0 0 0 {self.steal} 0 0\nctxt 500\nprocs_running 3\n")
        self.put("proc/meminfo", f"MemTotal: {self.memory_total_kb} kB\nMemAvailable: {self.memory_available_kb} kB\n")
        self.put("proc/loadavg", "0.50 0.40 0.30 1/100 999\n")
        self.put("proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000\n")
        self.put("proc/pressure/memory", "some avg10=0 total=0\nfull avg10=0 total=0\n")
        self.put("proc/diskstats", "8 0 sda 1 0 0 0 0 0 0 0 0 250 0\n8 1 sda1 1 0 0 0 0 0 0 0 0 250 0\n")
        counters = "0 0 0 0 0 0 0"
        lines = [
            "Inter-|   Receive  |  Transmit",
            " face |bytes packets",
            f"    lo: 999999 {counters} 999999 {counters}",
            f"  eth0: {self.rx} {counters} {self.tx} {counters}",
        ]
        self.put("proc/self/net/dev", "\n".join(lines) + "\n")
        if self.link_mbit is not None:
            self.put("sys/class/net/eth0/speed", f"{self.link_mbit}\n")


@dataclass
class Clock:
    """Time that moves only when told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s
