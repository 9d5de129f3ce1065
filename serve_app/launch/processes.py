"""The control plane's actors as Ray starts them, each in a process of its own: coordinator, node forecasters, page.

Ray imports this module in the actor's process before any code of ours runs there, so it imports none of our packages
that a user's may hide. Each class then puts our own installation first and hands every call on to the object that does
the work. Whoever starts these actors needs neither `actors` nor `models`.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.coordinator import NAMESPACE, find_coordinator
from serve_app.launch import own_installation

if TYPE_CHECKING:
    from shadecast.types import RoutingTable


_COLLECT_EVERY = 200_000
"""New objects between two collections: ticks and reports of 1,000 replicas keep none, and one takes 30 ms of a tick."""
_FORECASTER_ANSWER_S = 5.0


class CoordinatorProcess:
    """`actors.coordinator.Coordinator` with a supervisor that keeps a forecaster on every node."""

    def __init__(self, settings: Mapping[str, Any], *, ray_metrics: bool = True, audit_log: str = "") -> None:
        """`audit_log`: the file on this node that orders are written to; empty: the usual one."""
        own_installation.put_first()
        from actors.audit_log import AuditLog  # noqa: PLC0415 - not before our installation is first
        from actors.coordinator import Coordinator  # noqa: PLC0415 - not before our installation is first
        from actors.forecaster_actor import ForecasterFleet  # noqa: PLC0415

        fleet = ForecasterFleet(functools.partial(start_forecaster, settings))
        from serve_app import ray_api  # noqa: PLC0415 - as above
        from serve_app.launch.own_files import audit_file  # noqa: PLC0415 - as above
        from serve_app.launch.ray_metrics import RayMetrics  # noqa: PLC0415 - as above

        self._coordinator = Coordinator(
            supervise=fleet,
            deployed=_deployed,
            holds=ray_api.Kept(NAMESPACE, "holds"),
            announced=ray_api.Kept(NAMESPACE, "announced"),
            forecasters=NodeForecasters(),
            audit=AuditLog(audit_log or str(audit_file())),
            draining=ray_api.draining_nodes,
            restarted=ray.get_runtime_context().was_current_actor_reconstructed,
            publish=RayMetrics().publish if ray_metrics else None,
        )
        gc.freeze()  # what Ray has loaded lives as long as the process: a collection that looks through it is a pause
        gc.set_threshold(_COLLECT_EVERY, 20, 20)

    async def exchange(self, received: Any) -> dict[str, Any]:
        """Take a router's report, and answer with its deployment's next table."""
        return await self._coordinator.exchange(received)

    async def node(self, received: Any) -> tuple[float, float]:
        """Take a node's telemetry and forecast."""
        return await self._coordinator.node(received)

    async def report_router(self, received: Any, settings: Any) -> bool:
        """A report as Shadecast 0.1 sends it."""
        return await self._coordinator.report_router(received, settings)

    async def report_node(self, received: Any) -> tuple[float, float]:
        """A forecaster's report as Shadecast 0.1 sends it."""
        return await self._coordinator.report_node(received)

    async def wait_table(self, deployment: str, seen: tuple[int, int], timeout_s: float) -> RoutingTable | None:
        """The next table as Shadecast 0.1 asks for it."""
        return await self._coordinator.wait_table(deployment, seen, timeout_s)

    async def order(self, received: Any) -> dict[str, Any]:
        """Carry out what a person orders, and write it down."""
        return await self._coordinator.order(received)

    async def write_down(self, entry: Any) -> None:
        """An order that was refused before it came here."""
        await self._coordinator.write_down(entry)

    async def command(self, target: str, drain: bool) -> int:
        """Drain or release a replica or a node, as older versions order it."""
        return await self._coordinator.command(target, drain)

    async def explain(self, received: Any) -> dict[str, Any]:
        """Why requests, a replica or a node went, or stand, where they do."""
        return await self._coordinator.explain(received)

    async def status(self) -> dict[str, Any]:
        """Everything that the coordinator knows, as plain values."""
        return await self._coordinator.status()


class ForecasterProcess:
    """`actors.forecaster_actor.ForecasterActor` of one node."""

    def __init__(self, node_id: str, settings: Mapping[str, Any], node_cpus: float) -> None:
        own_installation.put_first()
        from actors.forecaster_actor import ForecasterActor  # noqa: PLC0415 - not before our installation is first

        self._forecaster = ForecasterActor(node_id, find_coordinator, settings, node_cpus)

    def status(self) -> dict[str, Any]:
        """Versions with live skill, failures, the last refusal, the process id."""
        return self._forecaster.status()

    def announce(self, starts_in_s: float, lasts_s: float, strength: float = 1.0) -> None:
        """Tell of a load that is known to come to this node."""
        self._forecaster.announce(starts_in_s, lasts_s, strength)

    def withdraw(self) -> None:
        """What was announced for this node does not come."""
        self._forecaster.withdraw()

    def stop(self) -> None:
        """Stop sampling and write what is left of the log."""
        self._forecaster.stop()


class PageProcess:
    """`serve_app.page.server.Page` on the starter's node."""

    def __init__(self, host: str, port: int, rights: Mapping[str, str] | str, names: Sequence[str] = ()) -> None:
        own_installation.put_first()
        from serve_app.page.server import Page  # noqa: PLC0415 - not before our installation is first

        self._page = Page(host, port, rights, names)

    async def start(self) -> str:
        """Listen, and return the address."""
        return await self._page.start()

    async def rights(self) -> dict[str, str]:
        """Digests of the tokens that it takes, by role."""
        return await self._page.rights()

    async def address(self) -> tuple[str, int, tuple[str, ...]]:
        """Host, port and names that it was started with."""
        return await self._page.address()

    async def stop(self) -> None:
        """Stop listening."""
        await self._page.stop()


def _deployed(deployment: str) -> tuple[bool, Any] | None:
    """Whether the router that a deployment was last deployed with only observes, and its settings.

    Where that is Serve's own, the routers of ours that Serve has kept do as Serve does.
    """
    from serve_app.ray_api import deployed_router  # noqa: PLC0415 - loads Serve, which forecasters do not need
    from shadecast.config import sections  # noqa: PLC0415 - not before our installation is first

    app_name, _, name = deployment.rpartition("/")
    found = deployed_router(app_name, name)
    if found is None:
        return None
    path, router_kwargs = found
    return not path or path.endswith("ObservingRouter"), sections(router_kwargs)


def forecaster_name(node_id: str) -> str:
    """Name of a node's forecaster in the namespace `shadecast`."""
    return f"shadecast-forecaster-{node_id[:16]}"


class NodeForecasters:
    """The running forecasters, as people's orders reach them. Blocks; raises what Ray raises."""

    def announce(self, node_id: str, starts_in_s: float, lasts_s: float, strength: float) -> None:
        """Tell of a load that is known to come."""
        ray.get(self._of(node_id).announce.remote(starts_in_s, lasts_s, strength), timeout=_FORECASTER_ANSWER_S)

    def withdraw(self, node_id: str) -> None:
        """What was told does not come."""
        ray.get(self._of(node_id).withdraw.remote(), timeout=_FORECASTER_ANSWER_S)

    def _of(self, node_id: str) -> Any:
        return ray.get_actor(forecaster_name(node_id), NAMESPACE)


def start_forecaster(
    settings: Mapping[str, Any], node_id: str, node_cpus: float = 0.0, *, detached: bool = True
) -> Any:
    """The handle of the node's forecaster, started if there is none.

    Pinned to the node, takes no CPU from the scheduler, restarted by Ray while the node lives; detached, so that it
    outlives the coordinator.
    """
    remote = ray.remote(ForecasterProcess).options(
        name=forecaster_name(node_id),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached" if detached else "non_detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=2,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    return remote.remote(node_id, dict(settings), node_cpus)
