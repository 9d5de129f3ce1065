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
    cores: dict[int, int] = field(default_factory=dict)
    """Busy ticks of single cores; empty: /proc/stat has no lines of single cores."""
    devices: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(received, sent) bytes of network devices; empty: loopback and eth0 with `rx` and `tx`."""

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

    def group(self, path: str, **files: object) -> None:
        """Files of one cgroup; `__` in a name stands for the dot."""
        for name, text in files.items():
            self.put(f"cgroup/{path}/{name.replace('__', '.')}", f"{text}\n")

    def enter(self, lines: str, *pids: int) -> None:
        """Put the sampler's process and these others into cgroups, one line of /proc/<pid>/cgroup each."""
        self.put("proc/self/cgroup", lines)
        for pid in pids or self.processes:
            self.processes[pid].cgroup = lines

    def device(self, name: str, real: bool = False, lowers: tuple[str, ...] = (), **files: object) -> None:
        """One network device of sysfs: hardware below a real one, links to those that it lies on."""
        folder = f"sys/devices/{'pci0000:00/0000:00:03.0' if real else 'virtual'}/net/{name}"
        for file, text in {"ifindex": len(self.devices) + 2, "iflink": len(self.devices) + 2, **files}.items():
            self.put(f"{folder}/{file}", f"{text}\n")
        (self.root / "sys/class/net").mkdir(parents=True, exist_ok=True)
        (self.root / f"sys/class/net/{name}").symlink_to(self.root / folder)
        if real:
            (self.root / folder / "device").symlink_to(self.root / "sys/devices/pci0000:00/0000:00:03.0")
        for lower in lowers:
            (self.root / folder / f"lower_{lower}").symlink_to(self.root / f"sys/class/net/{lower}")
            self.put(f"sys/class/net/{lower}/upper_{name}/mark", "")
            if not (self.root / f"sys/class/net/{lower}/master").exists():
                (self.root / f"sys/class/net/{lower}/master").symlink_to(self.root / folder)
        self.devices.setdefault(name, (0, 0))

    def carry(self, rx: int, tx: int, *names: str) -> None:
        """Bytes that pass through several devices, one after the other."""
        for name in names:
            old_rx, old_tx = self.devices[name]
            self.devices[name] = old_rx + rx, old_tx + tx

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
        single = "".join(f"cpu{n} {ticks} 0 0 0 0 0 0 0 0 0\n" for n, ticks in self.cores.items())
        every = f"cpu  {self.busy + sum(self.cores.values())} 0 0 {self.idle} 0 0 0 {self.steal} 0 0\n"
        self.put("proc/stat", f"{every}{single}ctxt 500\nprocs_running 3\n")
        self.put("proc/meminfo", f"MemTotal: {self.memory_total_kb} kB\nMemAvailable: {self.memory_available_kb} kB\n")
        self.put("proc/loadavg", "0.50 0.40 0.30 1/100 999\n")
        self.put("proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000\n")
        self.put("proc/pressure/memory", "some avg10=0 total=0\nfull avg10=0 total=0\n")
        self.put("proc/diskstats", "8 0 sda 1 0 0 0 0 0 0 0 0 250 0\n8 1 sda1 1 0 0 0 0 0 0 0 0 250 0\n")
        counters = "0 0 0 0 0 0 0"
        lines = ["Inter-|   Receive  |  Transmit", " face |bytes packets"]
        for name, (rx, tx) in {"lo": (999999, 999999), **(self.devices or {"eth0": (self.rx, self.tx)})}.items():
            lines.append(f"{name:>6}: {rx} {counters} {tx} {counters}")
        self.put("proc/self/net/dev", "\n".join(lines) + "\n")
        if self.link_mbit is not None and not self.devices:
            self.put("sys/class/net/eth0/speed", f"{self.link_mbit}\n")


@dataclass
class Clock:
    """Time that moves only when told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s
