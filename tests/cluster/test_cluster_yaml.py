"""`ray up cluster.yaml` over ssh on isolated hosts, as a user does it: serves, retrains, ends.

Not exercised: the download of the dependencies (hosts have them), and machines that do not share a kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from getpass import getuser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.live.hosts import Lab
from tests.cluster import ssh_hosts
from tests.cluster.conftest import wait_for
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
NAME = "shadecast-lab-test"
ZERO = [0,0,5,13,9,1,0,0, 0,0,13,15,10,15,5,0, 0,3,15,2,0,11,8,0, 0,4,12,0,0,8,8,0,
        0,5,8,0,0,9,8,0, 0,4,11,0,1,12,7,0, 0,2,14,5,10,12,0,0, 0,0,6,13,10,0,0,0]  # fmt: skip


class Launcher:
    """The user's machine: a home with a key and a token, this repository, the ray command."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        self.key = self.home / ".ssh/id_ed25519"
        self.public_key = ssh_hosts.make_key(self.key)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SSH_"))}
        self.environment = kept | {
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, *words: str, timeout_s: float) -> str:
        """A command in the repository's folder; its output, which is in the error if it fails."""
        started_s = time.monotonic()
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        print(f"{time.monotonic() - started_s:6.1f} s  {' '.join(words)[:90]}")
        assert done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    @contextmanager
    def forwarded(self, host: str, *ports: int) -> Iterator[list[int]]:
        """`ssh -L` to ports of a host's loopback; the ports here."""
        here = [free_port() for _ in ports]
        forwards = [w for a, b in zip(here, ports, strict=True) for w in ("-L", f"127.0.0.1:{a}:127.0.0.1:{b}")]
        options = ("UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "ExitOnForwardFailure=yes")
        command = ["ssh", "-N", "-i", str(self.key), *(w for o in options for w in ("-o", o)), *forwards]
        tunnel = subprocess.Popen([*command, f"root@{host}"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: _listens("127.0.0.1", here[-1]), 30.0, "ssh -L")
            yield here
        finally:
            tunnel.terminate()
            tunnel.wait(timeout=10)

    def forget(self) -> None:
        """Remove the folder of ssh's control sockets, which ray puts under /tmp."""
        user, cluster = (hashlib.sha256(t.encode()).hexdigest()[:10] for t in (getuser(), NAME))
        shutil.rmtree(f"/tmp/ray_ssh_{user}/{cluster}", ignore_errors=True)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    made.forget()


@pytest.fixture
def lab(launcher: Launcher, tmp_path: Path) -> Iterator[Lab]:
    """A head and two workers that take the launcher's key and see the folder `shared`, as over a network."""
    registry, shared = tmp_path / "registry", tmp_path / "shared"
    shared.mkdir()
    if why := ssh_hosts.build_backend(registry):
        pytest.skip(why)
    with Lab(workers=2, cpu_quota=None, keep=(registry, shared)) as made:
        for host in made.hosts:
            ssh_hosts.prepare(made, host, launcher.public_key, registry)
        for host in made.hosts:
            wait_for(lambda ip=host.ip: _listens(ip, 22), 30.0, f"sshd on {host.name}")
        yield made


@pytest.mark.cluster
@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(ssh_hosts.lacking()), reason="; ".join(ssh_hosts.lacking()))
def test_cluster_yaml_comes_up_over_ssh_serves_retrains_and_leaves_nothing(
    lab: Lab, launcher: Launcher, tmp_path: Path
):
    bare = _pids(lab)
    config = str(_filled_in(lab, launcher, tmp_path))
    launcher.run("ray", "get-auth-token", "--generate", timeout_s=60)
    launcher.run("ray", "up", "-y", config, timeout_s=400)
    try:
        _reaches_no_port_of_the_head(lab.head.ip)
        with launcher.forwarded(lab.head.ip, 8265, 8266, 8000) as (dashboard, page, serve):
            _every_node_is_watched(page, len(lab.hosts))
            _the_dashboard_asks_for_the_token(dashboard, launcher)
            address = f"http://127.0.0.1:{dashboard}"
            launcher.run("serve", "deploy", "-a", address, "examples/serve_config.yaml", timeout_s=120)
            _the_application_knows_a_zero(serve)
            _retrain(launcher, address, tmp_path / "shared")
            launcher.run("ray", "exec", config, "shadecast down && shadecast up", timeout_s=120)
            _every_node_is_watched(page, len(lab.hosts))  # the page is back on the head, not on any node
        for host in lab.hosts:
            log = host.folder / "tmp/home/shadecast-telemetry"
            wait_for(lambda log=log: list(log.rglob("*.parquet")), 120.0, f"telemetry on {host.name}")
            code = "import shadecast; print(shadecast.__file__)"
            found = host.check([f"{ssh_hosts.VENV}/bin/python", "-P", "-c", code])
            assert found.startswith(ssh_hosts.VENV), f"{host.name} runs {found}, not what was installed there"
    finally:
        launcher.run("ray", "down", "-y", config, timeout_s=120)
    with suppress(AssertionError):
        wait_for(lambda: not _left(lab, bare), 120.0, "nothing left")
    assert _left(lab, bare) == [], "`ray down` left processes on the hosts"


def _filled_in(lab: Lab, launcher: Launcher, folder: Path) -> Path:
    """cluster.yaml with the lines that a user edits, edited."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["cluster_name"] = NAME
    config["provider"].update(head_ip=lab.head.ip, worker_ips=[host.ip for host in lab.workers])
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(launcher.key)}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _reaches_no_port_of_the_head(head_ip: str) -> None:
    for port, what in ((8265, "Ray's dashboard"), (8266, "the live page")):
        assert not _listens(head_ip, port), f"{what} is open to the network"


def _every_node_is_watched(page: int, nodes: int) -> None:
    def known() -> int:
        answer = _get(page, "/api/status")
        return len(answer.json()["nodes"]) if answer is not None and answer.status_code == 200 else 0

    wait_for(lambda: known() == nodes, 240.0, f"{nodes} nodes on the live page")


def _the_dashboard_asks_for_the_token(dashboard: int, launcher: Launcher) -> None:
    token = (launcher.home / ".ray/auth_token").read_text().strip()
    answers = [_get(dashboard, "/api/jobs/", {"Authorization": f"Bearer {t}"}) for t in ("wrong" * 8, token)]
    assert [a.status_code if a is not None else None for a in answers] == [403, 200]


def _the_application_knows_a_zero(serve: int) -> None:
    def ready() -> bool:
        answer = _get(serve, "/v2/models/digits/ready")
        return answer is not None and answer.status_code == 200

    wait_for(ready, 180.0, "the application is ready")
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": ZERO}]}
    answer = httpx.post(f"http://127.0.0.1:{serve}/v2/models/digits/infer", json=body, timeout=30)
    outputs: list[dict[str, Any]] = answer.json()["outputs"]
    assert next(o for o in outputs if o["name"] == "digit")["data"] == [0]


def _retrain(launcher: Launcher, address: str, shared: Path) -> None:
    """A short training on the cluster, from telemetry that every host has, into a registry on the shared folder."""
    words = ["--telemetry", f"{ssh_hosts.HOME}/shadecast/models/data", "--registry", str(shared / "registry")]
    words += ["--storage", str(shared / "runs"), "--made-up", "64", "--epochs", "1", "--steps", "5"]
    job = ["ray", "job", "submit", "--address", address, "--", "python", "-m", "train", *words]
    launcher.run(*job, "--version", "lab", "--promote", "always", timeout_s=300)
    card = json.loads((shared / "registry/lab/card.json").read_text())
    assert card["backtest"]
    assert json.loads((shared / "registry/champion.json").read_text())["version"] == "lab"


def _left(lab: Lab, bare: set[int]) -> list[str]:
    """What runs on the hosts beside their own first process and sshd: lines of command, shortened."""
    found = []
    for pid in _pids(lab) - bare:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if command and not command.startswith("sshd: root"):
            found.append(command[:100])
    return found


def _pids(lab: Lab) -> set[int]:
    return {pid for host in lab.hosts for pid in host.group.pids()}


def _get(port: int, path: str, headers: dict[str, str] | None = None) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=30)
    except httpx.TransportError:
        return None


def _listens(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=2).close()
    except OSError:
        return False
    return True
