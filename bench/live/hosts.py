"""Isolated hosts on one Linux machine: network, pid, mount, ipc and uts namespaces, a cpu and a memory group each.

    with Lab(workers=4, cpu_quota=0.25) as lab:
        lab.workers[0].run(["python3", "-c", "print('on a host of its own')"])

The hosts share one bridge (no way out of this machine), the machine's files, and nothing else: /tmp, /dev/shm, process
ids and hostname are their own. Nothing outlives the lab: hosts end when their driver does, even if it is killed; the
rest (bridge, groups, folders) is removed by `with`, by the next lab, or by `python -m bench.live --clean`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.live import state
from bench.live.cgroups import ROOT, Group, LabError, version

_INIT = Path(__file__).with_name("init.py")
_TOOLS = ("ip", "unshare", "nsenter", "mount", "tc")
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 97; shift; done; shift; exec "$@"'
_HOG = """
import os, sys, time
until = time.monotonic() + float(sys.argv[2])
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
while time.monotonic() < until:
    pass
"""


def missing(root: Path = ROOT) -> list[str]:
    """What this machine lacks for isolated hosts, one sentence each; empty if nothing."""
    found = []
    if not sys.platform.startswith("linux"):
        return ["Linux: namespaces and cgroups are its own"]
    if os.geteuid() != 0:
        found.append("root: run it with sudo")
    found += [f"the command {tool!r} (packages util-linux, iproute2)" for tool in _TOOLS if shutil.which(tool) is None]
    try:
        version(root)
    except LabError as error:
        found.append(str(error))
    if not found:
        tried = subprocess.run(
            ["unshare", "--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "true"],
            check=False,
            capture_output=True,
            text=True,
        )
        if tried.returncode:
            found.append(f"the right to make namespaces ({tried.stderr.strip()}): run outside this container")
    return found


class Host:
    """One host of a lab."""

    def __init__(self, lab: Lab, name: str, *, ip: str, link: str, group: Group, folder: Path) -> None:
        self.name, self.ip, self.group = name, ip, group
        self.folder = folder
        """Its private folder as seen from outside; `folder / "tmp"` is its /tmp."""
        self._lab, self._link = lab, link
        self._holder: subprocess.Popen[str] | None = None
        self._inner_pid = 0

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self._holder is not None and self._holder.poll() is None

    def boot(self) -> None:
        """Bring it up (again), with nothing running on it."""
        if self.alive:
            raise LabError(f"host {self.name} is up already")
        made = self._lab.state.made
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        keep = sorted({str(Path(p).resolve()) for p in (*self._lab.keep, sys.prefix, sys.base_prefix)})
        separate = ["--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
        init = [sys.executable, "-I", "-S", str(_INIT), self._lab.hostname(self.name), str(self.folder), *keep]
        self._holder = subprocess.Popen(
            self._inside_group(["unshare", *separate, "--", *init]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        made.processes[self.name], made.born[self.name] = self._holder.pid, state.birth(self._holder.pid)
        self._lab.state.save()
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline().strip()
        if said != "ready":
            raise LabError(f"host {self.name} did not come up: {said or 'it said nothing'}")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._inner_pid = int(children[0])
        self._plug_in()

    def _plug_in(self) -> None:
        inner = f"{self._link}i"
        _ip("link", "add", self._link, "type", "veth", "peer", "name", inner)
        _ip("link", "set", self._link, "master", self._lab.bridge, "up")
        _ip("link", "set", inner, "netns", str(self._inner_pid))
        for words in (
            ("link", "set", inner, "name", "eth0"),
            ("addr", "add", f"{self.ip}/{self._lab.network.prefixlen}", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _command(["nsenter", "--target", str(self._inner_pid), "--net", "ip", *words])

    def _inside_group(self, argv: Sequence[str]) -> list[str]:
        """The command, started inside the host's groups."""
        return ["sh", "-c", _ENTER, "lab", *(str(folder) for folder in self.group.folders), "--", *argv]

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any) -> subprocess.Popen[Any]:
        """Start a command inside; `env` is added to this process's. Its process group ends with `stop` or the host."""
        if not self.alive:
            raise LabError(f"host {self.name} is down: boot() it before running {argv[0]}")
        enter = ["nsenter", "--target", str(self._inner_pid), "--net", "--pid", "--mount", "--ipc", "--uts"]
        environment = {**os.environ, **(env or {})}
        return subprocess.Popen(
            self._inside_group([*enter, "--wd=" + str(popen.pop("cwd", None) or Path.cwd()), "--", *argv]),
            env=environment,
            start_new_session=True,
            **popen,
        )

    def check(self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
        """Run a command inside to its end; its output. Raises LabError with the output if it fails or is too slow."""
        process = self.run(argv, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stop(process)
            raise LabError(f"host {self.name}: {argv[0]} did not end within {timeout_s:g} s") from None
        if process.returncode:
            raise LabError(f"host {self.name}: {' '.join(argv)[:200]}: exit {process.returncode}: {output[-1500:]}")
        return str(output)

    def set_cpu_quota(self, fraction: float | None) -> None:
        """At most this many cores; None lifts the limit."""
        self.group.set_cpu_quota(fraction)

    def set_memory_limit(self, limit_bytes: int | None) -> None:
        """At most this many bytes; beyond, the kernel ends processes of this host."""
        self.group.set_memory_limit(limit_bytes)

    def link_down(self) -> None:
        """Pull the plug: packets to and from it are lost."""
        _ip("link", "set", self._link, "down")

    def link_up(self) -> None:
        """Put the plug back."""
        _ip("link", "set", self._link, "up")

    def shape_link(self, bytes_per_s: float | None) -> None:
        """Limit its link, in both directions; None lifts the limit."""
        inside = ["nsenter", "--target", str(self._inner_pid), "--net"]
        for prefix, device in (([], self._link), (inside, "eth0")):
            _command([*prefix, "tc", "qdisc", "delete", "dev", device, "root"], check=False)
            if bytes_per_s is not None:
                rate, burst = f"{8 * bytes_per_s:.0f}bit", f"{max(int(bytes_per_s / 50), 20_000)}"
                shape = ["tbf", "rate", rate, "burst", burst, "latency", "500ms"]
                _command([*prefix, "tc", "qdisc", "add", "dev", device, "root", *shape])

    def spawn_hog(self, processes: int, max_s: float = 300.0) -> Callable[[], None]:
        """That many busy loops inside, under the host's quota, for `max_s` at most; call the result to end them."""
        if not 1 <= processes <= 64:
            raise LabError(f"hog processes = {processes}: must be from 1 to 64")
        command = [sys.executable, "-I", "-S", "-c", _HOG, str(processes), str(max_s)]
        hog = self.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return lambda: stop(hog, grace_s=0.0)

    def kill(self) -> None:
        """As if it had lost power: every process at once, no goodbye."""
        if self._holder is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._holder.pid, signal.SIGKILL)  # its child, process 1 of the host, goes with it
        self._holder.wait(timeout=10)
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()
        deadline_s = time.monotonic() + 10.0
        while self.group.pids() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        state.remove_link(self._link)


class Lab:
    """A head and some workers on one bridge; use as a context manager. `cpu_quota` is for `limit_workers`."""

    def __init__(
        self,
        workers: int = 4,
        cpu_quota: float | None = 0.25,
        memory_limit_bytes: int | None = None,
        keep: Sequence[str | Path] = (),
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`keep`: folders that stay visible although they lie under /tmp, which is each host's own."""
        if not 0 <= workers <= 32:
            raise LabError(f"workers = {workers}: must be from 0 to 32, because all share this machine")
        if cpu_quota is not None and not 0.01 <= cpu_quota <= 4096:
            raise LabError(f"cpu_quota = {cpu_quota}: must be from 0.01 to 4096 cores, or None for no limit")
        lacking = missing()
        if lacking:
            raise LabError("isolated hosts need " + "; ".join(lacking) + ". Without them use --unisolated.")
        self.cpu_quota, self.memory_limit_bytes = cpu_quota, memory_limit_bytes
        self.keep = (*keep, Path(__file__).resolve().parents[2])
        self._count, self._on_progress = workers, on_progress
        self.hosts: list[Host] = []

    @property
    def head(self) -> Host:
        """The first host."""
        return self.hosts[0]

    @property
    def workers(self) -> list[Host]:
        """All others."""
        return self.hosts[1:]

    def hostname(self, name: str) -> str:
        """What a host calls itself."""
        return f"lab{self.state.made.slot}-{name}"

    def limit_workers(self) -> None:
        """Set every worker's CPU quota: after the raylets are up, because starting under it takes 14 s each."""
        for host in self.workers:
            host.set_cpu_quota(self.cpu_quota)

    def __enter__(self) -> Self:
        self.state = state.claim(version())
        made = self.state.made
        try:
            self.network = _free_network(made.slot)
            self.bridge = f"{state.LINK_PREFIX}{made.slot}"
            top = Group(made.version, f"{state.PREFIX}{made.slot}")
            folder = Path(tempfile.gettempdir()) / f"{state.PREFIX}{made.slot}"
            names = ["head", *(f"w{i + 1}" for i in range(self._count))]
            made.groups = [top.name, *(f"{top.name}/{name}" for name in names)]
            made.links = [self.bridge, *(f"{self.bridge}{name}" for name in names)]
            made.folders = [str(folder)]
            self.state.save()
            state.remove_all(made)
            top.make()
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("addr", "add", f"{self.network[254]}/{self.network.prefixlen}", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            for i, name in enumerate(names):
                self._on_progress(f"host {name}")
                group = Group(made.version, f"{top.name}/{name}")
                group.make()
                ip, link = str(self.network[i + 1]), f"{self.bridge}{name}"
                host = Host(self, name, ip=ip, link=link, group=group, folder=folder / name)
                self.hosts.append(host)
                if name != "head" and self.memory_limit_bytes is not None:
                    host.set_memory_limit(self.memory_limit_bytes)
                host.boot()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in reversed(self.hosts):
            host.kill()
        state.remove_all(self.state.made)
        self.state.close(remove=True)
        self.hosts = []


def stop(process: subprocess.Popen[Any], grace_s: float = 5.0) -> None:
    """End a command that `Host.run` started, with its whole process group: politely first, if there is grace."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if number is signal.SIGTERM and grace_s <= 0.0:
            continue
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=wait_s)
        except subprocess.TimeoutExpired:
            continue
        if number is signal.SIGTERM:
            with suppress(ProcessLookupError):  # members of the group that ignored it
                os.killpg(process.pid, signal.SIGKILL)
        return


def _free_network(slot: int) -> ipaddress.IPv4Network:
    """A /24 that nothing on this machine has an address or a route in."""
    used = [ipaddress.ip_network(a["local"]) for link in _ip_json("addr") for a in link["addr_info"] if "local" in a]
    used += [ipaddress.ip_network(r["dst"]) for r in _ip_json("-4", "route") if "/" in r["dst"]]
    for i in range(200):
        network = ipaddress.IPv4Network(f"10.{87 + i}.{slot}.0/24")
        if not any(network.overlaps(other) for other in used if isinstance(other, ipaddress.IPv4Network)):
            return network
    raise LabError("no free 10.x.y.0/24 network on this machine")


def _ip(*words: str) -> None:
    _command(["ip", *words])


def _ip_json(*words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_command(["ip", "-j", *words]) or "[]")
    return found


def _command(argv: Sequence[str], *, check: bool = True) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
