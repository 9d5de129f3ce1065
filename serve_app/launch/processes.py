"""The control plane's actors as Ray starts them, each in a process of its own: coordinator, node forecasters, page.

Ray imports this module in the actor's process before any code of ours runs there, so it imports none of our packages
that a user's may hide. Each class then puts our own installation first and hands every call on to the object that does
the work. Whoever starts these actors needs neither `actors` nor `models`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.coordinator import NAMESPACE, find_coordinator
from serve_app.launch import own_installation

if TYPE_CHECKING:
    from shadecast.types import RoutingTable


logger = logging.getLogger(__name__)

_COLLECT_EVERY = 200_000
"""New objects between two collections: ticks and reports of 1,000 replicas keep none, and one takes 30 ms of a tick."""
_FORECASTER_ANSWER_S = 5.0


class CoordinatorProcess:
    """`actors.coordinator.Coordinator` with a supervisor that keeps a forecaster on every node."""

    def __init__(self, settings: Mapping[str, Any], *, ray_metrics: bool = True, audit_log: str = "") -> None:
        """`audit_log`: the file on this node that orders are written to; empty: the usual one."""
        own_installation.put_first()
        self._settings = {**settings, "audit_log": audit_log}
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

    async def retraining(self, view: Any) -> None:
        """What self-retraining says of itself."""
        await self._coordinator.retraining(view)

    async def command(self, target: str, drain: bool) -> int:
        """Drain or release a replica or a node, as older versions order it."""
        return await self._coordinator.command(target, drain)

    async def explain(self, received: Any) -> dict[str, Any]:
        """Why requests, a replica or a node went, or stand, where they do."""
        return await self._coordinator.explain(received)

    async def observed(self) -> list[dict[str, Any]]:
        """As `Coordinator.observed`."""
        return await self._coordinator.observed()

    async def status(self) -> dict[str, Any]:
        """Everything that the coordinator knows, as plain values."""
        return await self._coordinator.status()

    def settings(self) -> dict[str, Any]:
        """What it was started with."""
        return self._settings


class ForecasterProcess:
    """`actors.forecaster_actor.ForecasterActor` of one node."""

    def __init__(self, node_id: str, settings: Mapping[str, Any], node_cpus: float) -> None:
        own_installation.put_first()
        from actors.forecaster_actor import ForecasterActor  # noqa: PLC0415 - not before our installation is first
        from serve_app import extras  # noqa: PLC0415 - as above

        extras.require("control", f"the forecaster of node {node_id[:8]}")  # this node's Python may have less
        self._forecaster = ForecasterActor(node_id, find_coordinator, settings, node_cpus)

    def status(self) -> dict[str, Any]:
        """Versions with live skill, failures, the last refusal, the process id."""
        return self._forecaster.status()

    def announce(self, starts_in_s: float, lasts_s: float, strength: float = 1.0) -> None:
        """Tell of a load that is known to come to this node."""
        self._forecaster.announce(starts_in_s, lasts_s, strength)

    def cancel(self) -> None:
        """What was announced for this node does not come."""
        self._forecaster.cancel()

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


class RetrainerProcess:
    """`actors.retrainer.Retrainer` with a thread that looks, and one that tells the coordinator how it stands.

    Neither torch nor the log is loaded here: each step of a training runs in a process of its own.
    """

    def __init__(
        self, where: Mapping[str, str], plan: Mapping[str, Any], effort: Mapping[str, Any], answer_s: float = 5.0
    ) -> None:
        """`where`: folder of the log, registry; `plan` and `effort` as in `RetrainPlan` and `train.retrain.Effort`."""
        own_installation.put_first()
        from actors.retrainer import Retrainer  # noqa: PLC0415 - not before our installation is first
        from serve_app import ray_api  # noqa: PLC0415 - as above
        from serve_app.launch.own_files import cache_folder  # noqa: PLC0415 - as above
        from shadecast.retraining import RetrainPlan  # noqa: PLC0415 - as above

        self._plan = RetrainPlan.from_mapping(plan)
        self._asked = (dict(where), dict(plan), dict(effort))
        cluster = ray.get_runtime_context().gcs_address.replace(":", "_")
        storage = str(cache_folder() / "retrain" / cluster)
        self._values = {"where": {**where, "storage": storage}, "plan": dict(plan), "effort": dict(effort)}
        self._answer_s, self._head = answer_s, {ray_api.HEAD_NODE_RESOURCE: 0.001}
        kept = ray_api.Kept(NAMESPACE, "retraining")
        self._retrainer = Retrainer(self._plan, self._work, self._live_errors, kept, self._write_down)
        for run, every_s in ((self._retrainer.look, self._plan.look_s), (self._tell, min(5.0, self._plan.look_s))):
            threading.Thread(target=_again_and_again, args=(run, every_s), name=run.__name__, daemon=True).start()

    def asked(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What it was started with."""
        return self._asked

    def status(self) -> dict[str, Any]:
        """How it stands."""
        return self._retrainer.view()

    def _work(self, what: str, **values: Any) -> dict[str, Any]:
        """A step in a process of its own, which Ray ends with this one. Raises what Ray raises where it dies."""
        step = ray.remote(max_calls=1)(in_a_process_of_its_own).options(
            name=f"shadecast-{what}",
            num_cpus=0,  # at the lowest priority it takes what others leave; a cluster that is full may retrain, too
            resources=self._head,
            max_retries=0,
        )
        found: dict[str, Any] = ray.get(step.remote(what, {**self._values, **values}))
        return found

    def _live_errors(self) -> list[Any]:
        """Of the forecasters that answer."""
        from serve_app.launch.control_plane import forecasters  # noqa: PLC0415 - it imports this module
        from shadecast.retraining import LiveErrors  # noqa: PLC0415 - not before our installation is first

        asked = {forecaster.status.remote(): node for node, forecaster in forecasters().items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._answer_s) if asked else ([], [])
        found = []
        for ref in answered:
            with contextlib.suppress(ray.exceptions.RayError, KeyError, TypeError):
                errors = ray.get(ref)["live_errors"]
                known: dict[str, Any] = {k: float("nan") if v is None else v for k, v in errors.items()}
                found.append(LiveErrors(asked[ref], **known))
        return found

    def _tell(self) -> None:
        if (coordinator := find_coordinator()) is not None:
            ray.get(coordinator.retraining.remote(self._retrainer.view()), timeout=self._answer_s)

    def _write_down(self, entry: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # what was done is done
            self._tell()
            if (coordinator := find_coordinator()) is not None:
                ray.get(coordinator.write_down.remote(entry), timeout=self._answer_s)


def _again_and_again(run: Callable[[], None], every_s: float) -> None:
    while True:
        try:
            run()
        except Exception as error:  # the coordinator restarts, say
            logger.debug("%s: %r", run.__name__, error)
        time.sleep(every_s)


def in_a_process_of_its_own(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`train.retrain.carry_out`, imported by name: only a process that trains may load it."""
    own_installation.put_first()
    found: dict[str, Any] = importlib.import_module("train.retrain").carry_out(what, values)
    return found


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

    def cancel(self, node_id: str) -> None:
        """What was told does not come."""
        ray.get(self._of(node_id).cancel.remote(), timeout=_FORECASTER_ANSWER_S)

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
