"""One imitated machine of a recording: runs its jobs and reads its own telemetry once a second.

`train.record` starts it, and tells it what it is in one line of JSON. It says "ready" when it has started, begins when
it is told "go", and ends with its jobs when its input ends, so also when whoever started it is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.procfs import NAN, TICKS_PER_S, read_fields, read_text
from actors.telemetry import Sample, Sampler, log_row
from actors.telemetry_log import LogLimits, TelemetryLog
from train.jobs import prepare, shell
from train.loads import Job, jobs_of

PERIOD_S = 1.0
FLUSH_S = 10.0
LINK_BYTES_PER_S = 1.25e9
CHATTER = ("127.0.0.1", 9)
"""The discard port: nobody listens there."""
LONGEST_JOB_S = 180.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SUBREAPER = 36
_LOAD_KEEP = math.exp(-PERIOD_S / 60.0)


@dataclass(frozen=True, slots=True)
class Spec:
    """What a machine is. `isolated`: it has a group with limits and namespaces of its own."""

    name: str
    seed: int
    index: int
    cpus: float
    memory_bytes: int
    isolated: bool
    out: str
    scratch: str


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over a machine's processes. What a process that has ended used is its parent's then, so sums only grow."""

    at_s: float
    cpu_s: float = 0.0
    system_s: float = 0.0
    page_faults: float = 0.0
    io_bytes: float = 0.0
    rss_bytes: float = 0.0
    runnable: int = 0
    blocked: int = 0
    switches: dict[int, float] = field(default_factory=dict)
    """By process: the kernel keeps none of those that have ended."""


@dataclass(slots=True)
class Processes:
    """Sums up the processes of one machine from /proc.

    A group tells nothing of runnable and waiting processes, of context switches and load, and the host's are those of
    all machines together. A machine of its own would show its own, so these come from here. Without a group everything
    does.
    """

    cpus: float
    memory_bytes: int
    isolated: bool
    proc: Path = Path("/proc")
    _last: _Totals | None = None
    _load1: float = 0.0

    def complete(self, sample: Sample, now_s: float) -> Sample:
        """The sample as a machine of its own would show it."""
        new, old = self._sum(now_s), self._last
        self._last = new
        self._load1 = _LOAD_KEEP * self._load1 + (1.0 - _LOAD_KEEP) * (new.runnable + new.blocked)
        sample = replace(sample, runnable=float(new.runnable), blocked=float(new.blocked), load1=self._load1)
        dt_s = now_s - old.at_s if old else NAN

        def rate(name: str) -> float:
            return max(0.0, getattr(new, name) - getattr(old, name)) / dt_s if old else NAN

        switches = (
            sum(max(0.0, n - old.switches.get(pid, 0.0)) for pid, n in new.switches.items()) / dt_s if old else NAN
        )
        io_bytes = rate("io_bytes") if math.isnan(sample.io_bytes_per_s) else sample.io_bytes_per_s
        if self.isolated:
            return replace(sample, context_switches_per_s=switches, io_bytes_per_s=io_bytes)
        cpu = min(1.0, rate("cpu_s") / self.cpus) if old else NAN
        snapshot = replace(
            sample.snapshot,
            cpu_fraction=cpu,
            cpu_background_fraction=cpu,
            memory_fraction=min(1.0, new.rss_bytes / self.memory_bytes),
            network_fraction=NAN,
            network_background_fraction=NAN,
            net_rx_bytes_per_s=NAN,
            net_tx_bytes_per_s=NAN,
            cpu_pressure_fraction=NAN,
            memory_pressure_fraction=NAN,
        )
        return replace(
            sample,
            snapshot=snapshot,
            scope="processes",
            context_switches_per_s=switches,
            disk_busy_fraction=NAN,
            process_starts_per_s=len(new.switches.keys() - old.switches.keys()) / dt_s if old else NAN,
            system_fraction=min(1.0, rate("system_s") / self.cpus) if old else NAN,
            io_wait_fraction=NAN,
            page_faults_per_s=rate("page_faults"),
            io_bytes_per_s=rate("io_bytes"),
        )

    def _sum(self, now_s: float) -> _Totals:
        """Of all processes that are seen in a namespace of our own, else of those of our session."""
        own = os.getpid()
        mine = _stat(self.proc, own)
        cpu_s = system_s = faults = io_bytes = rss_bytes = 0.0
        runnable = blocked = 0
        switches: dict[int, float] = {}
        for name in os.listdir(self.proc):
            words = _stat(self.proc, int(name)) if name.isdecimal() else None
            if words is None or mine is None or (not self.isolated and words[3] != mine[3]):
                continue
            numbers = [float(w) for w in words[7:15]]
            faults += sum(numbers[:4])
            cpu_s += sum(numbers[4:]) / TICKS_PER_S
            system_s += (numbers[5] + numbers[7]) / TICKS_PER_S
            rss_bytes += float(words[21]) * _PAGE_BYTES
            runnable += words[0] == "R" and int(name) != own  # this process reads: it always runs
            blocked += words[0] == "D"
            status = read_fields(f"{self.proc}/{name}/status")
            switches[int(name)] = sum(
                status.get(f"{kind}_ctxt_switches", 0.0) for kind in ("voluntary", "nonvoluntary")
            )
            moved = read_fields(f"{self.proc}/{name}/io")
            io_bytes += moved.get("read_bytes", 0.0) + moved.get("write_bytes", 0.0)
        return _Totals(now_s, cpu_s, system_s, faults, io_bytes, rss_bytes, runnable, blocked, switches)


def _stat(proc: Path, pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat behind the name; None where it is gone."""
    text = read_text(f"{proc}/{pid}/stat")
    words = text.rpartition(")")[2].split() if text else []
    return words if len(words) > 21 else None


def record(spec: Spec, stop: threading.Event, began_s: float) -> None:
    """Read the machine's telemetry once a second until the end."""
    sampler = Sampler(time.monotonic, node_cpus=spec.cpus, link_bytes_per_s=LINK_BYTES_PER_S, count_loopback=True)
    processes = Processes(spec.cpus, spec.memory_bytes, spec.isolated)
    log = TelemetryLog(spec.out, spec.name, f"{spec.name}-{int(time.time())}", LogLimits(flush_s=FLUSH_S))
    rng = random.Random(spec.seed * 1000 + spec.index + 1)
    usual_bytes = math.exp(rng.uniform(math.log(100.0), math.log(5000.0)))
    chatter = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    due_s = time.monotonic()
    while not stop.wait(max(0.0, due_s - time.monotonic())):
        now_s = time.monotonic()
        row = log_row(processes.complete(sampler.read(), now_s), now_s - began_s)
        log.append(row, time.time())
        with suppress(OSError):  # no machine's network is ever quite silent
            chatter.sendto(bytes(min(60_000, int(usual_bytes * rng.lognormvariate(0.0, 0.5)))), CHATTER)
        due_s += PERIOD_S * (1 + max(0, int((time.monotonic() - due_s) / PERIOD_S)))
    log.flush(time.time())
    chatter.close()


def run_job(spec: Spec, job: Job, stop: threading.Event, began_s: float) -> None:
    """One job to its end, each of its phases told as it begins."""
    arguments = [job.kind, str(job.seed), spec.scratch, str(spec.cpus), str(spec.memory_bytes)]
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("jobs.py")), *arguments]
    process = subprocess.Popen(  # noqa: S603 - our own script
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    ends = threading.Timer(LONGEST_JOB_S, process.kill)
    ends.start()
    ended = threading.Event()

    def end_early() -> None:
        while not ended.wait(0.1):
            if stop.is_set():
                process.kill()
                return

    threading.Thread(target=end_early, daemon=True).start()
    try:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
        json.dump([[p.name, p.seconds, p.intensity] for p in job.phases], process.stdin)
        process.stdin.close()
        for line in process.stdout:
            say(event="phase", kind=job.kind, phase=line.strip(), t_s=round(time.monotonic() - began_s, 2))
    except BrokenPipeError:
        pass  # it ended before it knew what to do: its exit status says so
    finally:
        code = process.wait()
        ended.set()
        ends.cancel()
    if not stop.is_set():
        say(event="end", kind=job.kind, code=code, t_s=round(time.monotonic() - began_s, 2))


def rest(spec: Spec, seconds: float, rate_per_s: float, rng: random.Random, stop: threading.Event) -> None:
    """Nothing but housekeeping: small programs now and then, as on any machine."""
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0.0:
        if stop.wait(min(left_s, rng.expovariate(rate_per_s))):
            return
        if time.monotonic() < until_s:
            shell("ls data | head -n 3; cat /proc/loadavg", Path(spec.scratch))


def say(**words: Any) -> None:
    """Tell whoever started us; nobody may be there any more."""
    try:
        print(json.dumps(words), flush=True)
    except OSError:
        os._exit(1)


def loopback_up() -> None:
    """In a network namespace of our own loopback is down at first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # up and running
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def main() -> None:
    """Be the machine that standard input says."""
    spec = Spec(**json.loads(sys.stdin.readline()))
    stop = threading.Event()
    if spec.isolated:
        loopback_up()
    else:  # what jobs leave behind comes back to us, so that it is counted; in a namespace it does anyhow
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    prepare(Path(spec.scratch), spec.seed * 1000 + spec.index)
    say(event="ready")
    if not sys.stdin.readline():
        return

    def end_with_input() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=end_with_input, daemon=True).start()
    began_s = time.monotonic()
    reader = threading.Thread(target=record, args=(spec, stop, began_s))
    reader.start()
    rng = random.Random(spec.seed * 1000 + spec.index)
    rate_per_s = math.exp(rng.uniform(math.log(0.03), math.log(1.0)))
    for job in jobs_of(spec.seed, spec.index):
        rest(spec, job.pause_s, rate_per_s, rng, stop)
        if stop.is_set() or not reader.is_alive():
            break
        run_job(spec, job, stop, began_s)
    reader.join()
    shutil.rmtree(spec.scratch, ignore_errors=True)
    with suppress(OSError):
        Path(spec.scratch).parent.rmdir()  # the last one does, where whoever started us is gone
    say(event="done")


if __name__ == "__main__":
    main()
