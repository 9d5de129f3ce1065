"""The sampler reads the scope that limits the node, and tells our own replicas from the rest."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.procfs import Roots, pressure_total_s, process_stat, read_number
from actors.telemetry import Sample, Sampler
from tests.actors.proc_tree import Clock, FakeHost, FakeProcess


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """One raylet (pid 10) with a forecaster (pid 11), a replica with a child, and a task."""
    host = FakeHost(tmp_path)
    host.add(
        FakeProcess(1, "init", 0),
        FakeProcess(10, "raylet", 1),
        FakeProcess(11, "ray::Forecaster", 10),
        FakeProcess(12, "ray::ServeRepli", 10),
        FakeProcess(13, "worker (odd) na", 12),
        FakeProcess(14, "ray::hog", 10),
    )
    host.write()
    return host


def sampler(host: FakeHost, clock: Clock, **settings: object) -> Sampler:
    return Sampler(clock, roots=host.roots, pid=11, host_cpus=2.0, **settings)  # type: ignore[arg-type]


def second_reading(host: FakeHost, clock: Clock, s: Sampler) -> Sample:
    host.write()
    clock.now_s += 1.0
    return s.read()


def test_the_first_reading_has_no_rates_but_has_memory(host: FakeHost, clock: Clock) -> None:
    sample = sampler(host, clock).read()
    assert math.isnan(sample.snapshot.cpu_fraction)
    assert sample.snapshot.memory_fraction == pytest.approx(0.4)


def test_on_a_whole_host_the_background_is_the_total_without_replicas_and_their_children(
    host: FakeHost, clock: Clock
) -> None:
    s = sampler(host, clock)
    s.read()
    host.busy += 120
    host.processes[12].ticks += 30
    host.processes[13].ticks += 20
    host.processes[14].ticks += 60
    sample = second_reading(host, clock, s)
    assert sample.scope == "host"
    assert sample.snapshot.cpu_fraction == pytest.approx(1.2 / 2)
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.7 / 2)
    assert sample.replicas == 1


def test_stolen_time_counts_as_used(host: FakeHost, clock: Clock) -> None:
    s = sampler(host, clock)
    s.read()
    host.steal += 100
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.5)


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_above_us_is_the_limit_and_its_group_the_total(host: FakeHost, clock: Clock, version: int) -> None:
    usage_s = [5.0, 5.4]

    def write_group(used_s: float) -> None:
        if version == 2:
            for p in host.processes.values():
                p.cgroup = "0::/pod/leaf\n"
            host.put("cgroup/pod/leaf/cpu.max", "max 100000\n")
            host.put("cgroup/pod/cpu.max", "50000 100000\n")
            host.put("cgroup/pod/cpu.stat", f"usage_usec {int(used_s * 1e6)}\n")
            host.put("cgroup/pod/cpu.pressure", f"some avg10=0 total={int(used_s * 1e5)}\n")
        else:
            for p in host.processes.values():
                p.cgroup = "4:memory:/\n2:cpu,cpuacct:/node1\n0::/\n"
            host.put("cgroup/cpu/node1/cpu.cfs_quota_us", "50000\n")
            host.put("cgroup/cpu/node1/cpu.cfs_period_us", "100000\n")
            host.put("cgroup/cpu/node1/cpu.stat", f"nr_throttled 1\nthrottled_time {int(used_s * 1e8)}\n")
            host.put("cgroup/cpuacct/node1/cpuacct.usage", f"{int(used_s * 1e9)}\n")

    write_group(usage_s[0])
    host.put("proc/self/cgroup", host.processes[11].cgroup)
    host.write()
    s = sampler(host, clock)
    s.read()
    write_group(usage_s[1])
    host.processes[12].ticks += 10
    sample = second_reading(host, clock, s)
    assert sample.scope == "cgroup"
    assert sample.cpu_limit == pytest.approx(0.5)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.4 / 0.5)
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.3 / 0.5)
    assert sample.snapshot.cpu_pressure_fraction == pytest.approx(0.04)


def test_the_memory_limit_that_kills_first_counts_and_page_cache_does_not(host: FakeHost, clock: Clock) -> None:
    host.put("proc/self/cgroup", "0::/pod\n")
    host.put("cgroup/pod/memory.max", "400000\n")
    host.put("cgroup/pod/memory.current", "360000\n")
    host.put("cgroup/pod/memory.stat", "inactive_file 40000\n")
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(0.8)
    host.memory_available_kb = 50
    host.write()
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(0.95)


def two_nodes(host: FakeHost) -> None:
    """A second raylet (pid 20) on the same machine with a replica of its own."""
    host.add(FakeProcess(20, "raylet", 1), FakeProcess(22, "ray::ServeRepli", 20), FakeProcess(30, "hog", 1))
    host.write()


def test_nodes_that_share_a_machine_see_their_own_process_tree(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    s = sampler(host, clock, node_cpus=1.0)
    s.read()
    host.busy += 80
    host.processes[12].ticks += 30
    host.processes[14].ticks += 50
    sample = second_reading(host, clock, s)
    assert sample.scope == "tree"
    assert sample.cpu_limit == 1.0
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.5)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.8)


def test_a_neighbours_replicas_do_not_look_like_background(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    s = sampler(host, clock, node_cpus=1.0)
    s.read()
    host.busy += 190
    host.processes[22].ticks += 190
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.0)


def test_a_hog_outside_every_node_takes_what_it_leaves_no_core_for(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    s = sampler(host, clock, node_cpus=1.0)
    s.read()
    host.busy += 90  # one of two cores: the node's own core is still there
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.0)
    host.busy += 170
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.7)


def test_raylets_with_quotas_of_their_own_are_not_a_shared_machine(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    for pid in (10, 11, 12, 13, 14):
        host.processes[pid].cgroup = "2:cpu:/node1\n"
    host.processes[20].cgroup = "2:cpu:/node2\n"
    host.put("proc/self/cgroup", "2:cpu:/node1\n")
    host.put("cgroup/cpu/node1/cpu.cfs_quota_us", "50000\n")
    host.put("cgroup/cpu/node1/cpu.cfs_period_us", "100000\n")
    host.put("cgroup/cpuacct/node1/cpuacct.usage", "0\n")
    host.write()
    s = sampler(host, clock)
    assert s.read().scope == "cgroup"


def test_cpu_of_processes_that_ended_between_two_readings_is_not_lost(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    host.processes[14].ticks = 40
    host.write()
    s = sampler(host, clock, node_cpus=1.0)
    s.read()
    del host.processes[14]
    host.processes[10].reaped += 40 + 25  # all that the ended task had used, 25 of it since the last reading
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.25)


def test_a_reused_pid_is_a_new_process(host: FakeHost, clock: Clock) -> None:
    two_nodes(host)
    host.processes[14].ticks = 5000
    host.write()
    s = sampler(host, clock, node_cpus=1.0)
    s.read()
    host.add(FakeProcess(14, "ray::other", 10, ticks=20, start=77))
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(0.2)


def test_network_is_the_greater_direction_over_link_speed_without_loopback(host: FakeHost, clock: Clock) -> None:
    s = sampler(host, clock)
    s.read()
    host.rx += 25_000_000
    host.tx += 50_000_000
    snapshot = second_reading(host, clock, s).snapshot
    assert (snapshot.net_rx_bytes_per_s, snapshot.net_tx_bytes_per_s) == (25e6, 50e6)
    assert snapshot.network_fraction == pytest.approx(0.4)


def test_an_unknown_link_speed_leaves_the_fraction_unknown_unless_it_is_configured(
    host: FakeHost, clock: Clock
) -> None:
    shutil.rmtree(host.roots.sys)
    host.link_mbit = None
    for given, expected in ((math.nan, math.nan), (1e8, 0.5)):
        s = sampler(host, clock, link_bytes_per_s=given)
        s.read()
        host.tx += 50_000_000
        assert second_reading(host, clock, s).snapshot.network_fraction == pytest.approx(expected, nan_ok=True)


def test_missing_files_give_nan_and_no_error(tmp_path: Path, clock: Clock) -> None:
    roots = Roots(tmp_path / "no", tmp_path / "such", tmp_path / "files")
    s = Sampler(clock, roots=roots, pid=1, host_cpus=2.0)
    s.read()
    clock.now_s += 1.0
    snapshot = s.read().snapshot
    assert math.isnan(snapshot.cpu_fraction)
    assert math.isnan(snapshot.cpu_background_fraction)
    assert math.isnan(snapshot.memory_fraction)
    assert math.isnan(snapshot.network_fraction)


@pytest.mark.parametrize("text", ["", "garbage", "cpu x y z\n", "cpu 1 2\nctxt\n", "\0\xff"])
def test_malformed_files_give_nan_and_no_error(host: FakeHost, clock: Clock, text: str) -> None:
    s = sampler(host, clock)
    s.read()
    host.write()
    for name in ("stat", "meminfo", "loadavg", "diskstats", "self/net/dev", "pressure/cpu", "12/stat"):
        host.put(f"proc/{name}", text)
    clock.now_s += 1.0
    snapshot = s.read().snapshot
    assert math.isnan(snapshot.cpu_fraction)
    assert math.isnan(snapshot.memory_fraction)


def test_two_readings_at_one_instant_give_nan_not_infinity(host: FakeHost, clock: Clock) -> None:
    s = sampler(host, clock)
    s.read()
    assert math.isnan(s.read().snapshot.cpu_fraction)


def test_a_clock_that_goes_back_or_stands_still_spoils_one_reading_only(host: FakeHost, clock: Clock) -> None:
    s = sampler(host, clock)
    s.read()
    for step_s in (-50.0, 0.0, 1e-6, 1e-3):
        clock.now_s += step_s
        assert math.isnan(s.read().snapshot.cpu_fraction)
    host.busy += 100
    assert second_reading(host, clock, s).snapshot.cpu_fraction == pytest.approx(0.5)


def test_a_counter_that_goes_back_is_unknown_once_and_never_nothing(host: FakeHost, clock: Clock) -> None:
    host.busy, host.rx = 10_000, 10_000
    host.write()
    s = sampler(host, clock)
    s.read()
    host.busy, host.rx = 5, 5
    snapshot = second_reading(host, clock, s).snapshot
    assert math.isnan(snapshot.cpu_fraction)
    assert math.isnan(snapshot.cpu_background_fraction)
    assert math.isnan(snapshot.net_rx_bytes_per_s)
    host.busy += 100
    assert second_reading(host, clock, s).snapshot.cpu_fraction == pytest.approx(0.5)


class Broken:
    """A reader that raises what nobody thought of."""

    def read(self) -> tuple[float, float]:
        raise ZeroDivisionError("float division by zero")


@pytest.mark.parametrize("hidden", ["table", "raylet"])
def test_without_the_process_table_nobody_knows_what_is_background(
    host: FakeHost, clock: Clock, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    s = sampler(host, clock)
    s.read()
    host.busy += 100
    host.write()
    if hidden == "table":
        monkeypatch.setattr("actors.procfs.os.listdir", lambda _: 1 // 0)
    else:
        host.put("proc/10/stat", "")
    clock.now_s += 1.0
    snapshot = s.read().snapshot
    assert snapshot.cpu_fraction == pytest.approx(0.5)
    assert math.isnan(snapshot.cpu_background_fraction)


READERS = {
    "host_stat": "cpu_fraction",
    "memory_fraction": "memory_fraction",
    "network.network_bytes": "net_rx_bytes_per_s",
    "pressure_total_s": "cpu_pressure_fraction",
}


@pytest.mark.parametrize("broken", [*READERS, "disk_use", "cgroups.memory_groups", "gpu"])
def test_no_reader_takes_another_down_and_each_failure_is_told_once(
    host: FakeHost, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_: object, **__: object) -> float:
        return 1 // 0

    if broken != "gpu":
        monkeypatch.setattr(f"actors.telemetry.{broken}", fail)
    s = sampler(host, clock, gpu=Broken() if broken == "gpu" else None)
    s.read()
    for _ in range(5):
        host.busy += 100
        host.rx += 1000
        snapshot = second_reading(host, clock, s).snapshot
    unknown = {name for name in READERS.values() if math.isnan(getattr(snapshot, name))}
    assert unknown == ({READERS[broken]} if broken in READERS else set())
    assert math.isnan(snapshot.gpu_fraction)
    assert 1 <= len(caplog.records) <= 2


@pytest.mark.parametrize("mode", ["empty", "garbage", "folders", "gone"])
def test_trees_that_are_hidden_or_broken_in_the_middle_cost_only_their_values(
    host: FakeHost, clock: Clock, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """Every file of /proc in turn; what the others tell is still there."""
    for path in sorted(p for p in (host.root / "proc").rglob("*") if p.is_file()):
        s = sampler(host, clock)
        s.read()
        whole = path.read_text()
        host.busy += 100
        host.rx += 1000
        host.write()
        path.unlink()
        if mode == "folders":
            path.mkdir()
        elif mode != "gone":
            path.write_text("" if mode == "empty" else "\0x 99999999999999999999 -1 nan inf \n" * 3)
        clock.now_s += 1.0
        snapshot = s.read().snapshot
        known = [not math.isnan(getattr(snapshot, name)) for name in READERS.values()]
        assert sum(known) >= len(known) - 1, path
        if mode == "folders":
            path.rmdir()
        path.write_text(whole)
    assert not caplog.records


def test_a_process_name_with_brackets_is_parsed(host: FakeHost) -> None:
    stat = process_stat(host.roots.proc, 13)
    assert stat is not None
    assert (stat.name, stat.parent) == ("worker (odd) na", 12)


def test_pressure_is_read_in_seconds() -> None:
    assert pressure_total_s("some avg10=0.0 total=2500000\nfull total=1\n") == 2.5
    assert math.isnan(pressure_total_s(None))


def test_a_number_that_says_max_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isnan(read_number(tmp_path / "memory.max"))


CPU_CGROUP = Path("/sys/fs/cgroup/cpu")


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0 or not (CPU_CGROUP / "cpu.cfs_quota_us").exists() or not os.access(CPU_CGROUP, os.W_OK),
    reason="needs root and a writable version 1 cpu cgroup",
)
def test_a_real_cgroup_with_a_hog_reads_as_full() -> None:
    name = f"shadecast-test-{os.getpid()}"
    folders = [CPU_CGROUP / name, CPU_CGROUP.parent / "cpuacct" / name]
    script = (
        "import os, sys, time, threading\n"
        "for f in sys.argv[1:]: open(f + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from actors.telemetry import Sampler\n"
        "s = Sampler(time.monotonic)\n"
        "s.read()\n"
        "until = time.monotonic() + 1.0\n"
        "while time.monotonic() < until: pass\n"
        "sample = s.read()\n"
        "print(sample.scope, sample.cpu_limit, sample.snapshot.cpu_fraction)\n"
    )
    try:
        for folder in folders:
            folder.mkdir(exist_ok=True)
        (folders[0] / "cpu.shares").write_text("262144")  # whatever else the machine does, the quota is reached
        (folders[0] / "cpu.cfs_period_us").write_text("100000")
        (folders[0] / "cpu.cfs_quota_us").write_text("25000")
        command = [sys.executable, "-c", script, *map(str, folders)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    finally:
        for folder in folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.02)
    assert out[0] == "cgroup"
    assert float(out[1]) == pytest.approx(0.25)
    assert float(out[2]) > 0.7
