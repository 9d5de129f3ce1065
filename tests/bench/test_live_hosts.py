"""Isolated hosts: real ones where this machine allows it, version 2 of cgroups on a tree of plain files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.live import state
from bench.live.cgroups import Group, LabError, version
from bench.live.hosts import Lab, missing, stop

LACKING = missing()
needs_root = pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING))


def tree(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return root


def test_version_2_is_found_by_its_controllers(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert version(tmp_path) == 2


def test_a_unified_tree_without_controllers_beside_version_1_is_version_1(tmp_path):
    tree(tmp_path, "cpu", "cpuacct", "memory", "unified")
    (tmp_path / "unified" / "cgroup.controllers").write_text("")
    assert version(tmp_path) == 1


def test_a_machine_without_controllers_says_what_to_mount(tmp_path):
    with pytest.raises(LabError, match="mount cgroup2"):
        version(tmp_path)


def test_version_2_files(tmp_path):
    group = Group(2, "shadecastlab0/w1", tree(tmp_path, "shadecastlab0"))
    group.make()
    assert (tmp_path / "shadecastlab0" / "cgroup.subtree_control").read_text() == "+cpu +memory"
    folder = tmp_path / "shadecastlab0" / "w1"
    group.set_cpu_quota(0.25)
    assert (folder / "cpu.max").read_text() == "25000 100000"
    group.set_cpu_quota(None)
    assert (folder / "cpu.max").read_text() == "max 100000"
    group.set_memory_limit(1 << 30)
    assert (folder / "memory.max").read_text() == str(1 << 30)
    group.set_memory_limit(None)
    assert (folder / "memory.max").read_text() == "max"
    (folder / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n")
    (folder / "memory.current").write_text("4096\n")
    (folder / "cgroup.procs").write_text("12\n34\n")
    assert (group.cpu_used_s(), group.memory_used_bytes(), group.pids()) == (1.5, 4096, {12, 34})


def test_version_1_files_in_each_controller_and_shared_mounts_once(tmp_path):
    tree(tmp_path, "cpu,cpuacct", "memory")
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    (tmp_path / "cpuacct").symlink_to("cpu,cpuacct")
    group = Group(1, "shadecastlab0", tmp_path)
    group.make()
    assert group.folders == [tmp_path / "cpu,cpuacct" / "shadecastlab0", tmp_path / "memory" / "shadecastlab0"]
    group.set_cpu_quota(0.4)
    assert (tmp_path / "cpu" / "shadecastlab0" / "cpu.cfs_quota_us").read_text() == "40000"
    group.set_cpu_quota(None)
    assert (tmp_path / "cpu" / "shadecastlab0" / "cpu.cfs_quota_us").read_text() == "-1"


@pytest.mark.parametrize("quota", [0.0, -1.0, float("nan")])
def test_a_quota_out_of_bounds_is_refused(tmp_path, quota):
    with pytest.raises(LabError, match="must be from"):
        Group(2, "x", tmp_path).set_cpu_quota(quota)


def test_cleaning_removes_only_what_bears_our_prefix(tmp_path):
    foreign, own = tmp_path / "precious", tmp_path / f"{state.PREFIX}7"
    tree(tmp_path, "precious", f"{state.PREFIX}7/w1")
    names = [str(foreign), f"{own}/../precious", str(own), "/", ""]
    state.remove_all(state.Made(7, 2, links=["lo", "eth0"], folders=names), root=tmp_path)
    assert foreign.exists()
    assert not own.exists()
    assert Path("/sys/class/net/lo").exists()


def test_a_lab_in_use_is_not_cleaned_and_its_slot_not_given_away(tmp_path):
    first = state.claim(2, tmp_path)
    code = (
        "import sys; from pathlib import Path; from bench.live import state; f = Path(sys.argv[1]);"
        "print(state.clean(f), state.claim(2, f).made.slot)"
    )
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert other.stdout.split() == ["[]", "1"]
    first.close(remove=True)
    assert state.clean(tmp_path) == [1], "the other process ended without removing its file"


def test_a_damaged_state_file_is_removed_without_touching_anything(tmp_path):
    (tmp_path / "3.json").write_text('{"slot": 3, "folders"')
    assert state.clean(tmp_path) == []
    assert not (tmp_path / "3.json").exists()


def test_too_many_workers_are_refused_before_anything_is_made():
    with pytest.raises(LabError, match="workers = 99"):
        Lab(workers=99)


@pytest.fixture(scope="module")
def lab():
    with Lab(workers=2, cpu_quota=0.2, memory_limit_bytes=1 << 30) as lab:
        yield lab


@pytest.mark.root
@needs_root
class TestRealHosts:
    def test_hosts_see_each_other_and_nothing_of_each_other(self, lab):
        one, two = lab.workers
        (one.folder / "tmp" / "mine").write_text("x")
        assert one.check(["cat", "/tmp/mine"]) == "x"
        assert "mine" not in two.check(["ls", "/tmp"])
        assert one.check(["hostname"]) != two.check(["hostname"])
        server = two.run([sys.executable, "-I", "-m", "http.server", "8099", "--bind", two.ip], stderr=subprocess.PIPE)
        try:
            fetch = f"""
import time, urllib.request
for _ in range(100):
    try:
        print(urllib.request.urlopen("http://{two.ip}:8099/", timeout=2).status); break
    except OSError:
        time.sleep(0.1)
"""
            assert one.check([sys.executable, "-I", "-c", fetch]).strip() == "200"
            assert "http.server" not in one.check(["ps", "ax"])
        finally:
            stop(server)

    def test_a_hog_stays_within_the_quota_and_ends(self, lab):
        host = lab.workers[0]
        lab.limit_workers()
        end = host.spawn_hog(4, max_s=30.0)
        try:
            before_s, at_s = host.group.cpu_used_s(), time.monotonic()
            while time.monotonic() < at_s + 1.5:
                time.sleep(0.1)
            rate = (host.group.cpu_used_s() - before_s) / (time.monotonic() - at_s)
        finally:
            end()
            host.set_cpu_quota(None)
        assert 0.02 < rate < 0.25
        deadline_s = time.monotonic() + 5.0
        while "monotonic" in host.check(["ps", "axww"]):
            assert time.monotonic() < deadline_s, "hogs are still there"

    def test_a_killed_host_is_gone_at_once_and_can_boot_again(self, lab):
        host = lab.workers[1]
        process = host.run(["sleep", "1000"])
        host.kill()
        assert process.wait(timeout=10) != 0
        assert not host.alive
        assert not host.group.pids()
        with pytest.raises(LabError, match="is down"):
            host.run(["true"])
        host.boot()
        assert "sleep" not in host.check(["ps", "ax"])

    def test_a_link_can_be_pulled_and_slowed(self, lab):
        host = lab.workers[0]
        link = f"{lab.bridge}{host.name}"
        host.link_down()
        assert link_flags(link)["operstate"] == "DOWN"
        host.link_up()
        host.shape_link(1e6)
        shown = json.loads(
            subprocess.run(["tc", "-j", "qdisc", "show", "dev", link], check=True, capture_output=True).stdout
        )
        assert any(q["kind"] == "tbf" and abs(q["options"]["rate"] - 1e6) < 1e4 for q in shown)
        assert "tbf" in host.check(["tc", "qdisc", "show", "dev", "eth0"])
        host.shape_link(None)
        assert "tbf" not in host.check(["tc", "qdisc", "show", "dev", "eth0"])

    def test_the_memory_limit_kills_inside_the_host_only(self, lab):
        host = lab.workers[0]
        host.set_memory_limit(64 << 20)
        try:
            with pytest.raises(LabError, match="exit"):
                host.check([sys.executable, "-I", "-c", "x = bytearray(300 << 20); print(len(x))"])
        finally:
            host.set_memory_limit(1 << 30)
        assert host.alive

    def test_nothing_is_left_after_the_driver_was_killed(self):
        code = """
import os, sys, time
from bench.live.hosts import Lab
with Lab(workers=1) as lab:
    lab.workers[0].run(["sleep", "1000"]); lab.workers[0].spawn_hog(2)
    print(lab.state.made.slot, lab.head._holder.pid, flush=True)
    time.sleep(1000)
"""
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        slot, holder = driver.stdout.readline().split()
        file = state.FOLDER / f"{slot}.json"
        made = state.Made(**json.loads(file.read_text()))
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        deadline_s = time.monotonic() + 10.0
        while Path(f"/proc/{holder}").exists():  # hosts end by themselves
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert state.leftovers(made), "bridge and groups are still there: otherwise this test shows nothing"
        subprocess.run([sys.executable, "-m", "bench.live", "--clean"], check=True, capture_output=True)
        assert state.leftovers(made) == []
        assert not file.exists()


def link_flags(link: str) -> dict[str, object]:
    found = subprocess.run(["ip", "-j", "link", "show", link], check=True, capture_output=True).stdout
    return json.loads(found)[0]
