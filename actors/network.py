"""Network devices of this network namespace: which of them to count so that each byte counts once, and their speed.

A byte that a bond, bridge, VLAN or tunnel carries is carried once more by the device below it. So:

1. Where there are real devices (sysfs shows their hardware), they count: all that leaves the machine leaves through
   one of them. So does the link of a pod that was given a real device besides; nothing else does.
2. Elsewhere (a pod, a container) links to another namespace count (veth, macvlan), and what nothing is known about.
3. Where there are none of these either, tunnels and taps count (a namespace with nothing but a VPN in it).

Of the devices of one kind, those that lie on another one of them do not count. Dummies and ifb never leave the machine.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

from actors.procfs import NAN, Roots, number, read_number, read_text


class Kind(IntEnum):
    """In the order in which devices are taken to carry what leaves the machine."""

    REAL = 1
    LINK = 2
    TUNNEL = 3
    STACKED = 4
    """Its bytes are those of the devices that it lies on or joins: bond, bridge, VLAN."""
    INSIDE = 5
    """Never leaves the machine."""


_LOWER = re.compile(r"lower_(.+)|slave_(.+)")
_TUNNEL_TYPES = frozenset({512, 768, 769, 776, 778, 779, 823, 65534})
"""ARPHRD numbers in `type`: ppp, ipip, ip6tnl, sit, gre, pimreg, ip6gre, none (tun, WireGuard)."""
_BY_DEVTYPE = {
    **dict.fromkeys(("bond", "team", "bridge", "vlan", "hsr", "openvswitch", "vrf", "dsa"), Kind.STACKED),
    **dict.fromkeys(("vxlan", "geneve", "gretap", "ip6gretap", "erspan", "ip6erspan", "wireguard", "ppp"), Kind.TUNNEL),
    **dict.fromkeys(("macvlan", "macvtap", "ipvlan", "ipvtap", "veth", "wwan"), Kind.LINK),
    "wlan": Kind.REAL,
}
_BY_NAME = (
    (re.compile(r"(dummy|ifb|nlmon|vcan|kube-ipvs|nodelocaldns|lo$|ip_vti0|ip6_vti0|erspan0|teql)"), Kind.INSIDE),
    (
        re.compile(r"(tun|tap|wg|tailscale|vxlan|flannel|genev|gre|ip6gre|ipip|sit|tunl|ip6tnl|ppp|cilium_vx)"),
        Kind.TUNNEL,
    ),
    (re.compile(r"(bond|team|br\d*$|br-|docker|podman|cni|virbr|lxcbr|lxdbr|vlan|macv|ipv|ovs|cilium_)"), Kind.STACKED),
)
"""For devices of which sysfs does not tell more: hidden, another namespace's, or a driver that names no type."""
_PODS_LINK = re.compile(r"(eth|net)\d+")
"""What container runtimes call a pod's own links."""
_OTHERS_LINK = re.compile(r"veth|cali|lxc|vnet|eni[0-9a-f]{8}|azv|gke[0-9a-f]{8}")
"""What they call this end of another pod's."""
_REPRESENTOR = re.compile(r"(c\d+)?pf\d")
"""`phys_port_name` of the switch's end of a function (switchdev): what it carries leaves through the port, or not."""
_INFINIBAND = 32
_LOWERS_SPEED = frozenset({"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"})
"""Virtual devices that tell the speed of the real one below; veth, tun and bridges tell a constant."""


def network_bytes(proc: Path) -> Mapping[str, tuple[float, float]]:
    """Cumulative (received, sent) bytes of each device of this network namespace, loopback too."""
    out: dict[str, tuple[float, float]] = {}
    for line in (read_text(proc / "self/net/dev") or "").splitlines():
        name, colon, rest = line.partition(":")
        words = rest.split()
        if not colon or len(words) < 9:
            continue
        try:
            out[name.strip()] = (number(words[0]), number(words[8]))
        except ValueError:
            continue
    return out


def counted(roots: Roots, devices: Iterable[str], loopback: bool = False) -> frozenset[str]:
    """Those of the devices whose bytes, taken together, are each byte once; loopback only on demand."""
    names = sorted(set(devices))
    kinds = {name: _kind(roots.sys, name) for name in names if name != "lo"}
    chosen: list[str] = []
    for kind in (Kind.REAL, Kind.LINK, Kind.TUNNEL, Kind.STACKED):
        chosen = [name for name, k in kinds.items() if k is kind]
        if chosen:
            break
    if any(kinds[name] is Kind.REAL for name in chosen):
        links = (n for n, k in kinds.items() if k is Kind.LINK and _PODS_LINK.fullmatch(n))
        chosen += [n for n in links if _peer_elsewhere(roots.sys / "class/net" / n)]
    else:  # links of containers inside this one join a bridge, or bear such names
        chosen = [name for name in chosen if not _OTHERS_LINK.match(name)] or chosen
        chosen = [n for n in chosen if not os.path.exists(roots.sys / "class/net" / n / "brport")] or chosen
    kept = [name for name in chosen if not _below(roots.sys, name, names) & set(chosen)]
    return frozenset([*(kept or chosen), *(["lo"] if loopback and "lo" in names else [])])


def link_bytes_per_s(sys: Path, device: str, configured: float = NAN) -> float:
    """Speed of a device's link; `configured` where the driver does not tell (virtio), or makes it up (veth, tun)."""
    folder = sys / "class/net" / device
    megabits = read_number(folder / "speed")
    told = 0 < megabits < 2.0**31 and megabits != 65535  # -1, and as older kernels write it
    if _virtual(folder) and _devtype(folder) not in _LOWERS_SPEED:
        told = False
    return megabits * 125_000.0 if told else configured


def fullest(rates: Mapping[str, float], links: Mapping[str, float]) -> float:
    """Greatest fraction of its link that a device carries; NaN where one of unknown speed carries more bytes."""
    known = [name for name in rates if not math.isnan(links.get(name, NAN))]
    most = max((rates[name] for name in known), default=-1.0)
    if not known or any(rates[name] > most for name in rates):
        return NAN
    return max(rates[name] / links[name] for name in known)


def _kind(sys: Path, name: str) -> Kind:
    folder = sys / "class/net" / name
    if os.path.exists(folder / "device"):
        port = read_text(folder / "phys_port_name") or ""
        return Kind.STACKED if _REPRESENTOR.match(port) else Kind.REAL
    if os.path.exists(folder / "bridge") or os.path.exists(folder / "bonding"):
        return Kind.STACKED
    if os.path.exists(folder / "tun_flags"):
        return Kind.TUNNEL
    if (kind := _BY_DEVTYPE.get(_devtype(folder))) is not None:
        # A VLAN whose device below is in another namespace is this namespace's link to it.
        return Kind.LINK if kind is Kind.STACKED and _peer_elsewhere(folder) else kind
    if read_number(folder / "type") in _TUNNEL_TYPES:
        return Kind.TUNNEL
    return next((kind for pattern, kind in _BY_NAME if pattern.match(name)), Kind.LINK)


def _peer_elsewhere(folder: Path) -> bool:
    own, peer = read_number(folder / "ifindex"), read_number(folder / "iflink")
    return own != peer and peer > 0 and not any(_LOWER.fullmatch(n) for n in _entries(folder))


def _below(sys: Path, name: str, names: Sequence[str]) -> set[str]:
    """Devices of this namespace that a device lies on; the other end of a veth pair counts as one.

    `iflink` alone does not tell: it may be a number of another namespace.
    """
    folder = sys / "class/net" / name
    if read_number(folder / "type") == _INFINIBAND:  # a partition (ib0.8001) has queues of its own, and counts them
        return set()
    below = {match[1] or match[2] for n in _entries(folder) if (match := _LOWER.fullmatch(n))}
    below.add(name.rpartition(".")[0])
    own, peer = (read_number(folder / n) for n in ("ifindex", "iflink"))
    for other in names:
        theirs = sys / "class/net" / other
        if own != peer and peer == read_number(theirs / "ifindex"):
            real = os.path.exists(folder / "device") and os.path.exists(theirs / "device")
            if real or read_number(theirs / "iflink") == own:
                below.add(other)
    if os.path.exists(folder / "device") and os.path.exists(folder / "master/device"):
        below.add(
            os.path.basename(os.path.realpath(folder / "master"))
        )  # a virtual function that its host device joins
    return below - {name}


def _virtual(folder: Path) -> bool:
    """Whether sysfs shows this device and no hardware below it."""
    return not os.path.exists(folder / "device") and (
        "virtual" in Path(os.path.realpath(folder)).parts or os.path.exists(folder / "iflink")
    )


def _devtype(folder: Path) -> str:
    for line in (read_text(folder / "uevent") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "DEVTYPE":
            return value
    return ""


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
