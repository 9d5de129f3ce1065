"""What can go wrong: each fault starts something on the scene and returns what ends it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.live.cgroups import LabError
from bench.live.cluster import IsolatedWorld, Worker, World
from bench.live.hosts import stop
from bench.live.replay import schedule
from bench.live.scenario import QUOTA, Fault, Scenario

_LEAK = """
import sys, time
total, seconds = int(float(sys.argv[1])), float(sys.argv[2])
held, steps = [], 100
for _ in range(steps):
    held.append(bytearray(b"x") * (total // steps))
    time.sleep(seconds / steps)
time.sleep(600)
"""
_PLAYER = Path(__file__).with_name("player.py")
_PLAYERS = 8
"""Processes of a player, as many as a hog has."""
_DISCARD_PORT = 9
_MEMORY_PART = 0.5
"""Of what is free on a node: recorded jobs do not end for want of memory."""


@dataclass(slots=True)
class Scene:
    """Where a fault happens."""

    world: World
    scenario: Scenario
    node: Worker
    """The node that turns bad, or that the newcomer will be on."""
    seed: int = 0


End = Callable[[], None]


def _nothing() -> None:
    pass


def hog(scene: Scene, fault: Fault) -> End:
    """Busy loops beside the replica."""
    return scene.node.hog(int(fault.value), scene.scenario.length_s * (fault.end - fault.start) + 10.0)


def quota(scene: Scene, fault: Fault) -> End:
    """A smaller CPU quota."""
    host = scene.node.isolated("a quota")
    host.set_cpu_quota(fault.value)
    return lambda: host.set_cpu_quota(QUOTA)


def leak(scene: Scene, fault: Fault) -> End:
    """A process that fills the node's memory, up to `value` times the limit, until the kernel ends something."""
    host = scene.node.isolated("a memory limit")
    if scene.scenario.memory_limit_bytes is None:
        raise LabError(f"scenario {scene.scenario.name}: a leak needs memory_limit_bytes")
    free = scene.scenario.memory_limit_bytes * fault.value - host.group.memory_used_bytes()
    seconds = scene.scenario.length_s * (fault.end - fault.start)
    process = host.run([sys.executable, "-I", "-S", "-c", _LEAK, str(free), str(seconds)])
    return lambda: stop(process, grace_s=0.0)


def replay(scene: Scene, fault: Fault) -> End:
    """Recorded jobs on every node, each with its own; nobody is told when one begins."""
    limit_bytes = scene.scenario.memory_limit_bytes
    if limit_bytes is None:
        raise LabError(f"scenario {scene.scenario.name}: a replay needs memory_limit_bytes")
    seconds = scene.scenario.length_s * (fault.end - fault.start)
    players: list[subprocess.Popen[str]] = []

    def end() -> None:
        for player in players:
            stop(player, grace_s=0.0)

    try:
        hosts = [worker.isolated("a replay") for worker in scene.world.workers]
        for number, host in enumerate(hosts):
            neighbour = hosts[(number + 1) % len(hosts)]
            free = max(limit_bytes - host.group.memory_used_bytes(), 0)
            rows = schedule(scene.seed, number, seconds, QUOTA, int(_MEMORY_PART * free))
            command = [sys.executable, "-I", "-S", str(_PLAYER), str(seconds), str(_PLAYERS)]
            player = host.run(
                [*command, neighbour.ip, str(_DISCARD_PORT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            players.append(player)
            assert player.stdin is not None
            player.stdin.write(json.dumps(rows))
            player.stdin.close()
    except BaseException:
        end()
        raise
    return end


def slow_link(scene: Scene, fault: Fault) -> End:
    """A thinner link."""
    host = scene.node.isolated("a link's speed")
    host.shape_link(fault.value)
    return lambda: host.shape_link(None)


def link_down(scene: Scene, fault: Fault) -> End:
    """The plug is pulled."""
    host = scene.node.isolated("a link")
    host.link_down()
    return host.link_up


def kill(scene: Scene, fault: Fault) -> End:
    """The node loses power; it is back only after the run."""
    scene.world.kill_worker(scene.node)
    return _nothing


def coordinator_kill(scene: Scene, fault: Fault) -> End:
    """SIGKILL to the coordinator; Ray restarts it."""
    return _kill_actor(scene.world.named("CoordinatorProcess"), "the coordinator")


def replica_kill(scene: Scene, fault: Fault) -> End:
    """SIGKILL to the node's replica; Serve starts another."""
    own = scene.node.isolated("killing a replica").group.pids()
    return _kill_actor([p for p in scene.world.named("ServeReplica") if p.pid in own], "a replica", required=False)


def forecaster_kill(scene: Scene, fault: Fault) -> End:
    """SIGKILL to the node's forecaster."""
    found = scene.world.named("ForecasterProcess")
    if scene.node.host is not None:
        own = scene.node.host.group.pids()
        found = [process for process in found if process.pid in own]
    return _kill_actor(found[:1], "a node forecaster")


def gateway_kill(scene: Scene, fault: Fault) -> End:
    """SIGKILL to one replica of the gateway."""
    return _kill_actor(scene.world.named("Gateway")[:1], "a gateway")


def rolling(scene: Scene, fault: Fault) -> End:
    """A new version of the deployment."""
    scene.world.driver.call("rolling", 200.0)
    return _nothing


def newcomer_well(scene: Scene, fault: Fault) -> End:
    """More replicas that are well."""
    return _join(scene, {})


def newcomer_slow(scene: Scene, fault: Fault) -> End:
    """One more replica, `value` times as slow."""
    return _join(scene, {"slow": fault.value})


def newcomer_failing(scene: Scene, fault: Fault) -> End:
    """One more replica, which fails that fraction of requests."""
    return _join(scene, {"fail": fault.value})


def newcomer_wrong(scene: Scene, fault: Fault) -> End:
    """One more replica, which answers wrong."""
    return _join(scene, {"wrong": fault.value})


def _join(scene: Scene, role: Mapping[str, float]) -> End:
    scene.world.set_role(scene.node, role)
    scene.world.driver.call("scale", 200.0, replicas=scene.scenario.replicas + scene.scenario.joins)
    return lambda: scene.world.set_role(scene.node, {})


def _kill_actor(found: list[psutil.Process], what: str, *, required: bool = True) -> End:
    if not found and required:
        raise LabError(f"{what} was not found among the cluster's processes")
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return _nothing


FAULTS: Mapping[str, Callable[[Scene, Fault], End]] = {
    each.__name__: each
    for each in (
        *(
            hog,
            quota,
            leak,
            replay,
            slow_link,
            link_down,
            kill,
            coordinator_kill,
            forecaster_kill,
            gateway_kill,
            rolling,
            replica_kill,
        ),
        *(newcomer_well, newcomer_slow, newcomer_failing, newcomer_wrong),
    )
}
NEEDS_ISOLATION = frozenset({"quota", "leak", "replay", "slow_link", "link_down", "replica_kill", "gateway_kill"})


def runs_on(scenario: Scenario, world: World | type[World]) -> bool:
    """Whether a scenario's faults can be made on that kind of cluster."""
    isolated = isinstance(world, IsolatedWorld) or world is IsolatedWorld
    return isolated or not any(fault.kind in NEEDS_ISOLATION for fault in scenario.faults)
