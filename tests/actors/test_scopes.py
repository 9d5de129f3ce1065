"""CPU is the group's own use over the cores that it may use, memory what cannot be reclaimed: trees of real layouts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from actors.cgroups import core_list
from actors.telemetry import Sample, Sampler
from tests.actors.proc_tree import Clock, FakeHost, FakeProcess

GIB = 2**30


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """16 cores and one raylet (pid 10) with a forecaster (pid 11) and a replica (pid 12), used by nobody yet."""
    host = FakeHost(tmp_path, cores=dict.fromkeys(range(16), 0), memory_total_kb=64 * 2**20)
    host.memory_available_kb = 60 * 2**20
    host.add(FakeProcess(1, "init", 0), FakeProcess(10, "raylet", 1))
    host.add(FakeProcess(11, "ray::Forecaster", 10), FakeProcess(12, "ray::ServeRepli", 10))
    host.put("sys/devices/system/cpu/online", "0-15\n")
    allow(host, "0-15")
    host.write()
    return host


def allow(host: FakeHost, cores: str, *pids: int | str) -> None:
    for pid in pids or ("self", 10):
        host.put(f"proc/{pid}/status", f"Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{cores}\n")


def sampler(host: FakeHost, clock: Clock, **settings: object) -> Sampler:
    return Sampler(clock, roots=host.roots, pid=11, **settings)  # type: ignore[arg-type]


def second_reading(host: FakeHost, clock: Clock, s: Sampler) -> Sample:
    host.write()
    clock.now_s += 1.0
    return s.read()


def six_busy_and_own(host: FakeHost, *own: int, ticks: int = 10) -> None:
    """A second in which six of the other cores are busy, and ours for so many ticks together."""
    others = [core for core in host.cores if core not in own][:6]
    for core in others:
        host.cores[core] += 100
    host.cores[own[0]] += ticks


def guaranteed_pod(host: FakeHost, usage_s: float = 100.0, quota: str = "200000 100000", cores: str = "4-5") -> None:
    """Version 2, static CPU manager: the container has a cpuset of its own, and the quota that goes with it."""
    pod = "kubepods.slice/kubepods-podab.slice"
    host.enter(f"0::/{pod}/cri-1.scope\n")
    host.group("", cpuset__cpus__effective="0-15")
    for path, cpus, limit in ((pod, "0-15", quota), (f"{pod}/cri-1.scope", cores, quota)):
        host.group(path, cpuset__cpus__effective=cpus, cpu__max=limit, cpu__stat=f"usage_usec {int(usage_s * 1e6)}")
    allow(host, cores)


@pytest.mark.parametrize("quota", ["max 100000", "200000 100000"])
def test_a_guaranteed_pod_reads_its_own_use_whatever_is_busy_on_other_cores(
    host: FakeHost, clock: Clock, quota: str
) -> None:
    guaranteed_pod(host, 100.0, quota)
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 4, 5)
    guaranteed_pod(host, 100.1, quota)
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("cgroup", 2.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.05)
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.05)


def test_own_use_needs_no_lines_of_single_cores(host: FakeHost, clock: Clock) -> None:
    host.cores.clear()
    (host.root / "sys/devices/system/cpu/online").unlink()
    guaranteed_pod(host, 100.0)
    s = sampler(host, clock, host_cpus=2.0)
    s.read()
    host.busy += 610
    guaranteed_pod(host, 100.1)
    assert second_reading(host, clock, s).snapshot.cpu_fraction == pytest.approx(0.05)


def test_what_others_do_on_the_same_cores_takes_from_us(host: FakeHost, clock: Clock) -> None:
    guaranteed_pod(host, 100.0)
    s = sampler(host, clock)
    s.read()
    host.cores[4] += 10
    host.cores[5] += 100
    guaranteed_pod(host, 100.1)
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(1.1 / 2)


def test_a_cpuset_that_moves_counts_at_once(host: FakeHost, clock: Clock) -> None:
    guaranteed_pod(host, 100.0)
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 8, 9, 10, 11, ticks=100)
    guaranteed_pod(host, 101.0, "400000 100000", cores="8-11")
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 4.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.25)


def test_a_quota_below_the_cpuset_is_the_limit_and_its_group_the_total(host: FakeHost, clock: Clock) -> None:
    guaranteed_pod(host, 100.0, "50000 100000")
    s = sampler(host, clock)
    s.read()
    host.cores[5] += 100
    guaranteed_pod(host, 100.1, "50000 100000")
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 0.5
    assert sample.snapshot.cpu_fraction == pytest.approx(0.1 / 0.5)


@pytest.mark.parametrize(("own", "fraction"), [("200000 100000", 0.95), ("max 100000", 2.9 / 3)])
def test_what_others_use_of_a_quota_further_up_is_not_ours(
    host: FakeHost, clock: Clock, own: str, fraction: float
) -> None:
    host.enter("0::/job/node\n")
    host.group("job", cpu__max="300000 100000", cpu__stat="usage_usec 0")
    host.group("job/node", cpu__max=own, cpu__stat="usage_usec 0")
    s = sampler(host, clock)
    s.read()
    host.group("job", cpu__stat="usage_usec 2900000")
    host.group("job/node", cpu__stat="usage_usec 100000")
    assert second_reading(host, clock, s).snapshot.cpu_background_fraction == pytest.approx(fraction)


def pod_of_version_1(host: FakeHost, usage_s: float, mount: str, accounts: bool = True) -> None:
    path = "kubepods/podab/c1"
    host.enter(f"5:cpuset:/{path}\n4:{mount}:/{path}\n3:memory:/{path}\n1:name=systemd:/{path}\n")
    host.group("cpuset", cpuset__cpus="0-15", cpuset__effective_cpus="0-15")
    host.group("cpuset/kubepods", cpuset__cpus="0-15", cpuset__effective_cpus="0-15")
    host.group(f"cpuset/{path}", cpuset__cpus="4-5", cpuset__effective_cpus="4-5")
    host.group(f"{mount}/{path}", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    if accounts:
        host.group(f"{mount}/{path}", cpuacct__usage=int(usage_s * 1e9))


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize("accounts", [True, False], ids=["cpuacct", "no-cpuacct"])
def test_version_1_finds_its_controllers_under_either_name(
    host: FakeHost, clock: Clock, mount: str, accounts: bool
) -> None:
    pod_of_version_1(host, 7.0, mount, accounts)
    allow(host, "4-5")
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 4, 5)
    pod_of_version_1(host, 7.1, mount, accounts)
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 2.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.05)


def test_without_a_cgroup_namespace_the_mount_is_the_group(host: FakeHost, clock: Clock) -> None:
    """A container of version 1: its group's path is the host's, its mounts begin at the group."""
    host.enter("2:cpuset:/docker/ab\n1:cpu,cpuacct:/docker/ab\n")
    mounts = ("cpuset", "cpu,cpuacct")
    lines = [f"30 29 0:2 /docker/ab /sys/fs/cgroup/{m} ro,nosuid - cgroup cgroup rw,{m}\n" for m in mounts]
    host.put("proc/self/mountinfo", "".join(lines))
    host.group("cpuset", cpuset__cpus="4-5", cpuset__effective_cpus="4-5")
    host.group("cpu,cpuacct", cpuacct__usage=10**9, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    host.group("cpu,cpuacct/docker/ab", cpu__cfs_quota_us=1000, cpu__cfs_period_us=100000)  # a container inside ours
    allow(host, "4-5")
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 4, 5)
    host.group("cpu,cpuacct", cpuacct__usage=int(1.1e9))
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("cgroup", 2.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.05)


@pytest.mark.parametrize("path", ["/", "/../..", "/../../elsewhere"])
def test_in_a_cgroup_namespace_the_top_that_is_seen_is_the_group(host: FakeHost, clock: Clock, path: str) -> None:
    host.enter(f"0::{path}\n")
    files = {"cpuset__cpus__effective": "0-1,4,6-7", "cpu__max": "max 100000", "memory__max": 8 * GIB}
    host.group("", **files, cpu__stat="usage_usec 5000000", memory__current=2 * GIB, memory__stat="anon 1")
    allow(host, "0-1,4,6-7")
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 0, 1, 4, 6, 7, ticks=50)
    host.group("", cpu__stat="usage_usec 5500000")
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 5.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.1)
    assert sample.snapshot.memory_fraction == pytest.approx(0.25)


def test_accounts_of_version_2_serve_where_version_1_has_none(host: FakeHost, clock: Clock) -> None:
    """Hybrid mounts: cpuset of version 1, version 2 at `unified` without controllers."""
    host.enter("3:cpuset:/job\n0::/job\n")
    host.group("cpuset", cpuset__cpus="0-15")
    host.group("cpuset/job", cpuset__cpus="4-5")
    host.group("unified/job", cpu__stat="usage_usec 1000000")
    host.cores.clear()
    s = sampler(host, clock)
    s.read()
    host.busy += 610
    host.group("unified/job", cpu__stat="usage_usec 1100000")
    assert second_reading(host, clock, s).snapshot.cpu_fraction == pytest.approx(0.05)


def slurm(host: FakeHost, version: int, usage_s: float, used: float = 2 * GIB) -> None:
    """A step of a job: cores of the job, a memory limit at the job, accounts where the version keeps them."""
    if version == 2:
        job = "system.slice/slurmstepd.scope/job_7"
        host.enter(f"0::/{job}/step_0/user/task_0\n")
        host.group("", cpuset__cpus__effective="0-15")
        host.group("system.slice/slurmstepd.scope", cpuset__cpus__effective="0-15", memory__max="max")
        host.group(job, memory__max=8 * GIB, memory__current=int(used), memory__stat="anon 1\nactive_file 0")
        host.group(job, cpuset__cpus__effective="4-7")
        for path in (job, f"{job}/step_0"):
            host.group(path, cpuset__cpus__effective="4-7", cpu__stat=f"usage_usec {int(usage_s * 1e6)}")
        host.group(f"{job}/step_0/user/task_0", cpu__stat=f"usage_usec {int(usage_s * 1e6)}")
        host.group(f"{job}/step_0", memory__max="max", memory__current=int(used), memory__stat="anon 1")
    else:
        job = "slurm/uid_5/job_7"
        host.enter(f"5:cpuset:/{job}/step_0\n4:memory:/{job}/step_0/task_0\n3:cpu,cpuacct:/\n")
        host.group("cpuset", cpuset__cpus="0-15")
        for path, cores in (("slurm", "0-15"), (job, "4-7"), (f"{job}/step_0", "4-7")):
            host.group(f"cpuset/{path}", cpuset__cpus=cores)
        host.group("cpu,cpuacct", cpuacct__usage=10**15)  # the whole host's: no account of the job
        unlimited = 9223372036854771712
        host.group("memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=50 * GIB)
        host.group(f"memory/{job}", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=int(used))
        host.group(f"memory/{job}", memory__stat="cache 1\ntotal_inactive_file 0\ntotal_active_file 0")
        host.group(f"memory/{job}/step_0/task_0", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=int(used))


@pytest.mark.parametrize("version", [1, 2])
def test_a_slurm_job_reads_its_own_cores_and_the_jobs_memory(host: FakeHost, clock: Clock, version: int) -> None:
    slurm(host, version, 100.0)
    allow(host, "4-7")
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 4, 5, 6, 7, ticks=200)
    slurm(host, version, 102.0, used=6 * GIB)
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 4.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.5)
    assert sample.snapshot.memory_fraction == pytest.approx(0.75)
    assert sample.memory_limit_bytes == 8 * GIB


def test_an_affinity_without_a_cgroup_counts_its_cores_whoever_uses_them(host: FakeHost, clock: Clock) -> None:
    host.enter("0::/user.slice/session-1.scope\n")
    host.group("user.slice/session-1.scope", cpu__stat="usage_usec 1")
    host.group("", cpuset__cpus__effective="0-15")
    allow(host, "4-5")
    s = sampler(host, clock)
    s.read()
    six_busy_and_own(host, 4, 5, ticks=50)
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("host", 2.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.25)


def test_where_nothing_tells_of_our_cores_the_process_tree_is_the_total(host: FakeHost, clock: Clock) -> None:
    host.cores.clear()
    allow(host, "4-5")
    s = sampler(host, clock)
    s.read()
    host.busy += 600
    host.processes[11].ticks += 20
    host.processes[12].ticks += 30
    sample = second_reading(host, clock, s)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.25)
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.1)


def test_offline_cores_are_none_of_ours(host: FakeHost, clock: Clock) -> None:
    """An unrestricted process of a machine with room for 64 cores, of which 16 are there."""
    allow(host, "0-63")
    s = sampler(host, clock)
    s.read()
    for core in range(8):
        host.cores[core] += 100
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("host", 16.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.5)


def test_a_kernel_that_counts_nothing_leaves_the_process_tree(host: FakeHost, clock: Clock) -> None:
    """gVisor: /proc/stat is all zeros, and there are no cgroups."""
    s = sampler(host, clock)
    for ticks in (0, 80):
        host.processes[11].ticks = host.processes[12].ticks = ticks
        host.write()
        cores = "".join(f"cpu{n} 0 0 0 0 0 0 0 0 0 0\n" for n in range(16))
        host.put("proc/stat", f"cpu  0 0 0 0 0 0 0 0 0 0\n{cores}ctxt 0\nprocesses 0\nprocs_running 0\n")
        clock.now_s += 1.0
        sample = s.read()
    assert sample.cpu_limit == 16.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.1)
    assert sample.snapshot.cpu_background_fraction == pytest.approx(0.05)
    assert math.isnan(sample.context_switches_per_s)


@pytest.mark.parametrize("cores", ["2,5,9,11", "2-5", "8-11"])
def test_cores_that_lxcfs_numbers_anew_are_as_many_as_the_cpuset_has(host: FakeHost, clock: Clock, cores: str) -> None:
    """/proc/stat and sysfs of such a container begin with core 0, the cpuset and the affinity do not."""
    host.cores = dict.fromkeys(range(4), 0)
    host.put("sys/devices/system/cpu/online", "0-3\n")
    allow(host, cores)
    host.enter("0::/\n")
    host.group("", cpuset__cpus__effective=cores, cpu__max="max 100000", cpu__stat="usage_usec 0")
    s = sampler(host, clock)
    s.read()
    host.cores = dict.fromkeys(range(4), 50)
    host.group("", cpu__stat="usage_usec 2000000")
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("cgroup", 4.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.5)


@pytest.mark.parametrize("quota", ["200000 100000", "max 100000"], ids=["own", "of-a-group-above"])
def test_a_quota_that_lxcfs_shows_as_cores_is_the_limit(host: FakeHost, clock: Clock, quota: str) -> None:
    host.cores = dict.fromkeys(range(2), 0)
    host.put("sys/devices/system/cpu/online", "0-1\n")
    host.enter("0::/\n")
    host.group("", cpuset__cpus__effective="0-15", cpu__max=quota, cpu__stat="usage_usec 0")
    s = sampler(host, clock)
    s.read()
    host.cores[0] += 10
    host.group("", cpu__stat="usage_usec 100000")
    sample = second_reading(host, clock, s)
    assert sample.cpu_limit == 2.0
    assert sample.snapshot.cpu_fraction == pytest.approx(0.05)


def test_raylets_with_cores_of_their_own_do_not_share_a_machine(host: FakeHost, clock: Clock) -> None:
    host.add(FakeProcess(20, "raylet", 1))
    allow(host, "0-1")
    allow(host, "2-3", 20)
    host.write()
    assert sampler(host, clock, node_cpus=2.0).read().scope == "host"
    allow(host, "1-3", 20)
    assert sampler(host, clock, node_cpus=2.0).read().scope == "tree"


def test_raylets_below_one_quota_share_it_from_groups_of_their_own(host: FakeHost, clock: Clock) -> None:
    host.add(FakeProcess(20, "raylet", 1, cgroup="0::/pod/b\n"))
    host.enter("0::/pod/a\n", 10, 11, 12)
    host.group("pod", cpu__max="200000 100000", cpu__stat="usage_usec 1")
    host.group("pod/a", cpu__max="max 100000")
    host.group("pod/b", cpu__max="max 100000")
    host.write()
    sample = sampler(host, clock, node_cpus=1.0).read()
    assert (sample.scope, sample.cpu_limit) == ("tree", 1.0)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0-1,4,6-7\n", {0, 1, 4, 6, 7}),
        ("3", {3}),
        ("", set()),
        ("\n", set()),
        ("x-y", set()),
        ("5-2", set()),
        ("-1", set()),
        ("0-99999999999", set()),
        (None, set()),
    ],
)
def test_core_lists(text: str | None, cores: set[int]) -> None:
    assert core_list(text) == cores


def fill(host: FakeHost, current: float, stat: str, limit: float = 8 * GIB) -> None:
    host.enter("0::/pod\n")
    host.group("pod", memory__max=int(limit), memory__current=int(current), memory__stat=stat)


def test_page_cache_that_is_used_is_no_used_memory(host: FakeHost, clock: Clock) -> None:
    fill(host, 7.95 * GIB, f"anon {2 * GIB}\nfile {int(5.9 * GIB)}\nactive_file {int(5.5 * GIB)}\ninactive_file 0")
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(2.45 / 8)


def test_what_cannot_be_reclaimed_stays_used(host: FakeHost, clock: Clock) -> None:
    """Shared memory is part of `file` and on the anonymous lists, mlocked pages are on the unevictable list."""
    parts = {"anon": 1, "file": 5, "shmem": 3, "inactive_anon": 4, "unevictable": 1, "slab_unreclaimable": 0.5}
    parts |= {"active_file": 0.5, "inactive_file": 0.5, "file_dirty": 0.2, "slab_reclaimable": 0.5, "slab": 1}
    fill(host, 7 * GIB, "\n".join(f"{name} {int(part * GIB)}" for name, part in parts.items()))
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(5.5 / 8)


def test_the_limit_that_is_fullest_counts_not_the_smallest(host: FakeHost, clock: Clock) -> None:
    host.enter("0::/pod/c\n")
    host.group("pod", memory__max=16 * GIB, memory__current=15 * GIB, memory__stat="anon 1")
    host.group("pod/c", memory__max=8 * GIB, memory__current=1 * GIB, memory__stat="anon 1")
    sample = sampler(host, clock).read()
    assert sample.snapshot.memory_fraction == pytest.approx(15 / 16)
    assert sample.memory_limit_bytes == 8 * GIB


def test_swap_counts_where_its_limit_kills(host: FakeHost, clock: Clock) -> None:
    host.enter("4:memory:/job\n")
    host.group("memory/job", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=4 * GIB)
    host.group("memory/job", memory__memsw__limit_in_bytes=8 * GIB, memory__memsw__usage_in_bytes=7 * GIB)
    host.group("memory/job", memory__stat=f"active_file 5\ntotal_active_file {GIB}\ntotal_inactive_file 0")
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(6 / 8)


def test_a_limit_that_throttles_counts_as_one_that_kills(host: FakeHost, clock: Clock) -> None:
    fill(host, 7 * GIB, f"anon {6 * GIB}\nactive_file {GIB}", limit=16 * GIB)
    host.group("pod", memory__high=8 * GIB)
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(6 / 8)


def test_a_limit_of_a_group_that_a_container_does_not_see_counts(host: FakeHost, clock: Clock) -> None:
    """Version 1: the mount begins at the container's own group, the limit is at the one above it."""
    host.enter("4:memory:/slice/ab\n")
    host.put("proc/self/mountinfo", "30 29 0:2 /slice/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n")
    host.group("memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=4 * GIB)
    host.group("memory", memory__stat=f"hierarchical_memory_limit {4 * GIB}\ntotal_active_file {GIB}")
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(3 / 4)


def test_a_group_without_memory_stat_is_unknown_and_the_host_counts(host: FakeHost, clock: Clock) -> None:
    host.enter("0::/pod\n")
    host.group("pod", memory__max=8 * GIB, memory__current=int(7.9 * GIB))
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(4 / 64)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("MemTotal: 1000 kB\nMemFree: 200 kB\nActive(file): 100 kB\nInactive(file): 50 kB\nSReclaimable: 50 kB\n", 0.6),
        ("MemTotal: 1000 kB\nMemFree: 200 kB\nBuffers: 50 kB\nCached: 300 kB\nShmem: 250 kB\n", 0.7),
        ("MemTotal: 0 kB\nMemAvailable: 0 kB\n", math.nan),
        ("MemTotal: 1000 kB\n", math.nan),
    ],
)
def test_meminfo_without_memavailable(host: FakeHost, clock: Clock, text: str, fraction: float) -> None:
    host.put("proc/meminfo", text)
    assert sampler(host, clock).read().snapshot.memory_fraction == pytest.approx(fraction, nan_ok=True)


@pytest.mark.parametrize("text", ["0 0", "1 1e309", "nan 100000", "inf 100000", "-5 100000", "max", "", "5", "\0"])
def test_a_quota_that_is_none_limits_nothing(host: FakeHost, clock: Clock, text: str) -> None:
    host.enter("0::/pod\n")
    host.group("pod", cpu__max=text, cpu__stat="usage_usec 1", memory__max=text, memory__current=text)
    s = sampler(host, clock)
    s.read()
    host.cores[3] += 80
    sample = second_reading(host, clock, s)
    assert (sample.scope, sample.cpu_limit) == ("host", 16.0)
    assert sample.snapshot.cpu_fraction == pytest.approx(0.05)
