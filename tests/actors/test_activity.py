"""What processes do is read in the scope that limits the node; where the scope is silent it is unknown."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from actors.node_forecaster import UNKNOWN, channel_values
from actors.procfs import disk_use
from actors.telemetry import Sample, Sampler, log_row
from models.grid import CHANNELS, EXTENDED
from models.schema import arrow_schema
from tests.actors.proc_tree import Clock, FakeHost, FakeProcess

NAMES = (
    "process_starts_per_s",
    "blocked",
    "system_fraction",
    "io_wait_fraction",
    "page_faults_per_s",
    "io_bytes_per_s",
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path)
    host.add(FakeProcess(1, "init", 0), FakeProcess(10, "raylet", 1), FakeProcess(11, "ray::Forecaster", 10))
    host.write()
    return host


def sampler(host: FakeHost, clock: Clock) -> Sampler:
    return Sampler(clock, roots=host.roots, pid=11, host_cpus=2.0)


def read(host: FakeHost, clock: Clock, s: Sampler, second: int) -> Sample:
    """A host that starts 7 processes a second, is in the kernel for .4 s of it, waits for .5 s, and moves 2 MiB."""
    host.write()
    cpu = f"cpu  {100 * second} 0 {40 * second} 0 {50 * second} 0 0 0 0 0\n"
    host.put("proc/stat", f"{cpu}ctxt 500\nprocesses {1000 + 7 * second}\nprocs_running 3\nprocs_blocked 2\n")
    host.put("proc/vmstat", f"nr_free_pages 5\npgfault_odd 1\npgfault {900 * second}\npgmajfault 4\n")
    host.put("proc/diskstats", f"8 0 sda 1 0 {2048 * second} 0 1 0 {2048 * second} 0 0 {100 * second} 0\n")
    host.put("proc/loadavg", f"0.50 0.40 0.30 1/100 {2000 + 3 * second}\n")
    clock.now_s += 1.0
    return s.read()


def told(sample: Sample) -> dict[str, float]:
    return {name: getattr(sample, name) for name in NAMES if not math.isnan(getattr(sample, name))}


def test_on_a_whole_host_proc_tells_everything(host: FakeHost, clock: Clock) -> None:
    s = sampler(host, clock)
    assert told(read(host, clock, s, 0)) == {"blocked": 2.0}, "the first reading has no rates"
    sample = read(host, clock, s, 1)
    assert told(sample) == pytest.approx(
        {
            "process_starts_per_s": 7.0,
            "blocked": 2.0,
            "system_fraction": 0.2,
            "io_wait_fraction": 0.5,
            "page_faults_per_s": 900.0,
            "io_bytes_per_s": 2 * 2048 * 512.0,
        }
    )
    assert sample.runnable == 3.0
    assert sample.disk_busy_fraction == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        ("sda sda1 sda2 dm-0 dm-1 md127", "sda"),
        ("sda sda1 sdaa sdaa1 sdab", "sda sdaa sdab"),
        ("nvme0n1 nvme0n1p1 nvme0n10 nvme0n10p2 bcache0", "nvme0n1 nvme0n10"),
        ("nbd1 nbd1p1 nbd10 loop0 zram0", "nbd1 nbd10"),
        ("xvda1 xvdb", "xvda1 xvdb"),
        ("dm-0 dm-10", "dm-0 dm-10"),
    ],
)
def test_each_disk_counts_once(host: FakeHost, names: str, counted: str) -> None:
    host.put("proc/diskstats", "".join(f"8 0 {n} 1 0 2 0 1 0 2 0 0 100 0\n" for n in names.split()))
    assert set(disk_use(host.roots.proc)) == set(counted.split())


def enter(host: FakeHost, version: int, second: int) -> None:
    if version == 2:
        host.enter("0::/pod\n")
        host.group(
            "pod",
            cpu__max="50000 100000",
            cpu__stat=f"usage_usec {300_000 * second}\nsystem_usec {100_000 * second}",
            io__pressure=f"some avg10=0 total={250_000 * second}\nfull avg10=0 total=0",
            io__stat=f"8:0 rbytes={4096 * second} wbytes={8192 * second} rios=1\n8:16 rbytes=0 wbytes={100 * second}",
            memory__max="500000",
            memory__current="1000",
            memory__stat=f"inactive_file 0\npgfault {60 * second}",
        )
    else:
        host.enter("5:memory:/pod\n4:blkio:/pod\n2:cpu,cpuacct:/pod\n")
        host.group("cpu/pod", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
        host.group("cpuacct/pod", cpuacct__usage=300_000_000 * second, cpuacct__usage_sys=100_000_000 * second)
        text = f"8:0 Read {4096 * second}\n8:0 Total {12388 * second}\nTotal {12388 * second}"
        host.group("blkio/pod", blkio__throttle__io_service_bytes_recursive=text)
        stat = f"pgfault 5\ntotal_inactive_file 0\ntotal_pgfault {60 * second}"
        host.group("memory/pod", memory__limit_in_bytes=500000, memory__usage_in_bytes=1000, memory__stat=stat)


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_group_its_own_files_tell_and_the_hosts_do_not_count(host: FakeHost, clock: Clock, version: int) -> None:
    s = sampler(host, clock)
    for second in (0, 1):
        enter(host, version, second)
        sample = read(host, clock, s, second)
    assert sample.scope == "cgroup"
    expected = {"system_fraction": 0.2, "page_faults_per_s": 60.0, "io_bytes_per_s": 12388.0}
    assert told(sample) == pytest.approx(expected | ({"io_wait_fraction": 0.25} if version == 2 else {}))
    assert math.isnan(sample.runnable)


@pytest.mark.parametrize(("namespace", "expected"), [("pid:[4026531836]", math.nan), ("pid:[4026532200]", 3.0)])
def test_in_a_container_with_a_pid_namespace_the_last_pid_tells_how_many_were_started(
    host: FakeHost, clock: Clock, namespace: str, expected: float
) -> None:
    (host.roots.proc / "self/ns").mkdir(parents=True)
    os.symlink(namespace, host.roots.proc / "self/ns/pid")
    s = sampler(host, clock)
    for second in (0, 1):
        enter(host, 2, second)
        sample = read(host, clock, s, second)
    assert sample.process_starts_per_s == pytest.approx(expected, nan_ok=True)


def test_nodes_that_share_a_machine_are_told_nothing_of_it(host: FakeHost, clock: Clock) -> None:
    host.add(FakeProcess(20, "raylet", 1))
    s = sampler(host, clock)
    for second in (0, 1):
        sample = read(host, clock, s, second)
    assert sample.scope == "tree"
    assert told(sample) == {}


@pytest.mark.parametrize("garbage", ["", "pgfault\n", "8:0 rbytes=x", "Total\n"])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_garbage_is_unknown_and_no_error(host: FakeHost, clock: Clock, version: int, garbage: str) -> None:
    s = sampler(host, clock)
    for second in (0, 1):
        if version:
            enter(host, version, second)
        read(host, clock, s, second)
    files = (
        "proc/vmstat",
        "proc/diskstats",
        "cgroup/pod/io.stat",
        "cgroup/pod/io.pressure",
        "cgroup/blkio/pod/blkio.throttle.io_service_bytes_recursive",
        "cgroup/cpuacct/pod/cpuacct.usage_sys",
    )
    for file in files:
        host.put(file, garbage)
    clock.now_s += 1.0
    sample = s.read()
    assert all(math.isnan(value) or value >= 0.0 for value in told(sample).values())


def test_a_sample_has_every_column_of_the_log_and_every_channel_of_a_model() -> None:
    row = log_row(Sample(snapshot=UNKNOWN, scope="host"), 1.0)
    known_elsewhere = {"machine", "recording", "wall_s", "in_flight", "arrivals_per_s"}
    assert set(arrow_schema().names) - set(row) == known_elsewhere
    assert channel_values(Sample(snapshot=UNKNOWN, scope="host")).shape == (1, len(CHANNELS) + len(EXTENDED))
