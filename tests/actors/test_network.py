"""Each byte counts once, against the speed of a real device: trees of hosts, pods and tunnels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from actors.telemetry import Sample, Sampler
from tests.actors.proc_tree import Clock, FakeHost, FakeProcess

MB = 1_000_000
GBIT_BYTES = 125 * MB


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    host = FakeHost(tmp_path)
    host.add(FakeProcess(10, "raylet", 1), FakeProcess(11, "ray::Forecaster", 10))
    return host


def sampler(host: FakeHost, clock: Clock, **settings: object) -> Sampler:
    host.write()
    s = Sampler(clock, roots=host.roots, pid=11, host_cpus=2.0, **settings)  # type: ignore[arg-type]
    s.read()
    return s


def reading(host: FakeHost, clock: Clock, s: Sampler) -> Sample:
    host.write()
    clock.now_s += 1.0
    return s.read()


def bytes_of(sample: Sample) -> tuple[float, float]:
    return sample.snapshot.net_rx_bytes_per_s, sample.snapshot.net_tx_bytes_per_s


def test_a_bond_with_bridges_counts_each_byte_once_at_its_members(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000)
    host.device("eth1", real=True, speed=1000)
    host.device("bond0", speed=2000, uevent="DEVTYPE=bond", lowers=("eth0", "eth1"))
    host.device("br0", speed=2000, uevent="DEVTYPE=bridge", lowers=("bond0",))
    host.device("docker0", speed=10000, uevent="DEVTYPE=bridge", lowers=())
    host.device("veth12ab", speed=10000, iflink=99)
    host.device("bond0.100", speed=2000, uevent="DEVTYPE=vlan", lowers=("bond0",))
    for name in ("tun0", "wg0", "vxlan.calico", "tunl0", "dummy0", "ifb0", "kube-ipvs0"):
        host.device(name, speed=10)
    s = sampler(host, clock)
    host.carry(50 * MB, 10 * MB, "eth0", "bond0", "br0", "docker0", "veth12ab")
    host.carry(25 * MB, 10 * MB, "eth1", "bond0", "bond0.100", "tun0", "wg0", "vxlan.calico", "tunl0", "ifb0")
    sample = reading(host, clock, s)
    assert bytes_of(sample) == (75 * MB, 20 * MB)
    assert sample.snapshot.network_fraction == pytest.approx(50 * MB / GBIT_BYTES)


def test_a_device_in_a_bridge_counts_beside_one_that_is_in_none(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000, **{"brport/mark": ""})
    host.device("eth1", real=True, speed=1000)
    host.device("br0", speed=1000, uevent="DEVTYPE=bridge", lowers=("eth0",))
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0", "br0")
    host.carry(25 * MB, 0, "eth1")
    assert bytes_of(reading(host, clock, s)) == (75 * MB, 0)


def test_a_bond_counts_once_where_only_names_tell(host: FakeHost, clock: Clock) -> None:
    """sysfs is hidden, or another namespace's."""
    host.devices = dict.fromkeys(("eth0", "eth1", "bond0", "docker0", "veth12ab", "eth0.7", "tun0"), (0, 0))
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0", "bond0", "docker0", "veth12ab", "eth0.7")
    host.carry(25 * MB, 0, "eth1", "bond0", "tun0")
    assert bytes_of(reading(host, clock, s)) == (75 * MB, 0)


@pytest.mark.parametrize("speed", [10000, -1, 4294967295])
def test_a_pods_only_link_counts_and_its_made_up_speed_does_not(host: FakeHost, clock: Clock, speed: int) -> None:
    host.device("eth0", speed=speed, iflink=41)
    for given, fraction in ((math.nan, math.nan), (GBIT_BYTES, 0.4)):
        s = sampler(host, clock, link_bytes_per_s=given)
        host.carry(50 * MB, 0, "eth0")
        sample = reading(host, clock, s)
        assert bytes_of(sample) == (50 * MB, 0)
        assert sample.snapshot.network_fraction == pytest.approx(fraction, nan_ok=True)


def test_a_pod_with_a_tunnel_counts_what_leaves_it(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", speed=10000, iflink=41)
    host.device("tun0", tun_flags="0x1001", type=65534)
    host.device("vpn", type=65534, uevent="DEVTYPE=wireguard")
    host.device("docker0", **{"bridge/mark": ""}, uevent="DEVTYPE=bridge")
    host.device("inner", iflink=7, **{"brport/mark": ""})
    s = sampler(host, clock)
    host.carry(50 * MB, 5 * MB, "eth0", "tun0", "vpn", "docker0", "inner")
    assert bytes_of(reading(host, clock, s)) == (50 * MB, 5 * MB)


def test_links_of_a_pod_count_whatever_numbers_other_namespaces_use(host: FakeHost, clock: Clock) -> None:
    """A second network of a pod: macvlan on the host's device 2, which is also the number of the pod's eth0."""
    host.device("eth0", speed=10000, iflink=3)
    host.device("net1", speed=1000, iflink=2, uevent="DEVTYPE=macvlan")
    s = sampler(host, clock)
    host.carry(20 * MB, 0, "eth0")
    host.carry(50 * MB, 0, "net1")
    assert bytes_of(reading(host, clock, s)) == (70 * MB, 0)


def test_a_macvlan_beside_the_device_below_it_counts_once(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", speed=10000, iflink=41)
    host.device("mv0", iflink=2, uevent="DEVTYPE=macvlan", lowers=("eth0",))
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0", "mv0")
    assert bytes_of(reading(host, clock, s)) == (50 * MB, 0)


def test_a_pod_with_a_virtual_function_counts_its_usual_link_too(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", speed=10000, iflink=41)
    host.device("net1", real=True, speed=1000)
    s = sampler(host, clock)
    host.carry(20 * MB, 0, "eth0")
    host.carry(50 * MB, 0, "net1")
    assert bytes_of(reading(host, clock, s)) == (70 * MB, 0)


def test_a_virtual_function_that_joins_the_device_of_the_machine_counts_once(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000)
    host.device("enP1", real=True, speed=1000)
    (host.root / "sys/class/net/enP1/master").symlink_to(host.root / "sys/class/net/eth0")
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0", "enP1")
    assert bytes_of(reading(host, clock, s)) == (50 * MB, 0)


def test_the_switchs_ends_of_virtual_functions_are_no_ports(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000, phys_port_name="p0")
    host.device("eth0_0", real=True, speed=1000, phys_port_name="pf0vf0")
    host.device("eth0_1", real=True, speed=1000, phys_port_name="c1pf0sf88")
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0", "eth0_0", "eth0_1")
    assert bytes_of(reading(host, clock, s)) == (50 * MB, 0)


def test_a_partition_of_infiniband_counts_beside_its_parent(host: FakeHost, clock: Clock) -> None:
    host.device("ib0", real=True, speed=1000, type=32)
    host.device("ib0.8001", real=True, speed=1000, type=32, iflink=2)
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "ib0")
    host.carry(25 * MB, 0, "ib0.8001")
    assert bytes_of(reading(host, clock, s)) == (75 * MB, 0)


@pytest.mark.parametrize("name", ["wg0", "tap0", "tun0"])
def test_a_namespace_with_nothing_but_a_tunnel_counts_it(host: FakeHost, clock: Clock, name: str) -> None:
    host.device(name, type=65534)
    host.device("dummy0")
    s = sampler(host, clock)
    host.carry(50 * MB, 0, name)
    host.carry(10 * MB, 0, "dummy0")
    assert bytes_of(reading(host, clock, s)) == (50 * MB, 0)


def test_a_busy_link_of_unknown_speed_is_not_hidden_by_an_idle_one(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=-1)
    host.device("eth1", real=True, speed=1000)
    s = sampler(host, clock)
    host.carry(50 * MB, 0, "eth0")
    assert math.isnan(reading(host, clock, s).snapshot.network_fraction)
    host.carry(50 * MB, 0, "eth1")
    assert reading(host, clock, s).snapshot.network_fraction == pytest.approx(0.4)


def test_devices_that_come_go_and_start_again_spoil_nothing(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000)
    host.device("eth1", real=True, speed=1000)
    host.carry(90 * MB, 90 * MB, "eth0", "eth1")
    s = sampler(host, clock)
    host.devices["eth0"] = (0, 0)
    host.carry(25 * MB, 0, "eth1")
    assert bytes_of(reading(host, clock, s)) == (25 * MB, 0)
    del host.devices["eth1"]
    host.device("eth2", real=True, speed=1000)
    host.carry(10 * MB, 0, "eth0")
    assert bytes_of(reading(host, clock, s)) == (10 * MB, 0)
    host.carry(50 * MB, 0, "eth2")
    sample = reading(host, clock, s)
    assert bytes_of(sample) == (50 * MB, 0)
    assert sample.snapshot.network_fraction == pytest.approx(0.4), "its speed is known as soon as it is there"


def test_loopback_counts_on_demand_only(host: FakeHost, clock: Clock) -> None:
    host.device("eth0", real=True, speed=1000)
    host.device("lo")
    for wanted, rx in ((False, 1 * MB), (True, 4 * MB)):
        s = sampler(host, clock, count_loopback=wanted)
        host.carry(1 * MB, 0, "eth0")
        host.carry(3 * MB, 0, "lo")
        assert bytes_of(reading(host, clock, s)) == (rx, 0)
