"""Starts and stops the control plane on a Ray cluster: coordinator, node forecasters, live page.

It runs as a job of its own, with this project's packages, apart from the applications that it balances.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.coordinator import COORDINATOR, NAMESPACE, find_coordinator
from serve_app.launch.processes import CoordinatorProcess, PageProcess, forecaster_name
from serve_app.page.address import Address
from serve_app.ray_api import HEAD_NODE_RESOURCE
from shadecast.errors import ShadecastError

PAGE = "shadecast-page"
_ON_THE_HEAD = {HEAD_NODE_RESOURCE: 0.001}
"""Where Serve's controller is, too. Ray puts an actor that asks for nothing anywhere, whatever its soft affinity: on a
node that is starved, the coordinator could not tell routers to leave it."""


_DETACHED = {"namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "get_if_exists": True}
_PAGE_ANSWER_S = 20.0


class ControlPlaneError(ShadecastError):
    """The control plane is not there, or did not come up."""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What is needed to talk to a running control plane."""

    coordinator: Any
    page_url: str
    token: str
    page_address: Address


def start_control_plane(
    settings: Mapping[str, Any] | None = None,
    page_host: str | None = None,
    page_port: int | None = None,
    page_names: Iterable[str] = (),
    *,
    ray_metrics: bool = True,
) -> ControlPlane:
    """Start what is not running yet on the connected cluster; blocks until the coordinator answers.

    `page_host`, `page_port` and `page_names` are as in `Address`; port 0 leaves the page out. A page that runs with
    other ones than are given is started anew, with the same token. `ray_metrics` is for a coordinator that is started.

    Raises ConfigError on a wrong forecaster setting, PageError on a wrong address, before anything is started.
    """
    _check(settings or {})
    running = _running_page() if page_port != 0 else None
    before = running.address if running is not None else None
    wanted = (before or Address()).changed(page_host, page_port, page_names)
    if page_port != 0 and wanted != before:
        wanted.check(before)
    coordinator = (
        ray.remote(CoordinatorProcess)
        .options(name=COORDINATOR, max_restarts=-1, resources=_ON_THE_HEAD, **_DETACHED)
        .remote(dict(settings or {}), ray_metrics=ray_metrics)
    )
    ray.get(coordinator.status.remote(), timeout=60)
    if page_port == 0:
        return ControlPlane(coordinator, "", "", wanted)
    token = os.environ.get("SHADECAST_TOKEN") or secrets.token_urlsafe(16)
    if running is not None and wanted != before:
        token = os.environ.get("SHADECAST_TOKEN") or running.token
        _stop_page(running.actor)
    url, token = _start_page(wanted, token)
    return ControlPlane(coordinator, url, token, wanted)


@dataclass(frozen=True, slots=True)
class _RunningPage:
    actor: Any
    address: Address
    token: str


def _running_page() -> _RunningPage | None:
    """The page of this cluster, None if there is none: one that does not answer, its node being gone, is ended.

    One of Shadecast 0.1 was started with nothing but a port.
    """
    try:
        actor = ray.get_actor(PAGE, NAMESPACE)
    except ValueError:
        return None
    try:
        token = ray.get(actor.token.remote(), timeout=_PAGE_ANSWER_S)
        if not hasattr(actor, "address"):
            return _RunningPage(actor, Address(), token)
        host, port, names = ray.get(actor.address.remote(), timeout=_PAGE_ANSWER_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        _end(actor)
        return None
    return _RunningPage(actor, Address(host, port, tuple(names)), token)


def _start_page(address: Address, token: str) -> tuple[str, str]:
    """URL and token of the page; raises PageError, and leaves none behind, where it cannot listen."""
    here = ray.get_runtime_context().get_node_id()
    only_here = NodeAffinitySchedulingStrategy(here, soft=False)  # the page's address is one of this node's
    page = (
        ray.remote(PageProcess)
        .options(name=PAGE, max_restarts=3, scheduling_strategy=only_here, **_DETACHED)
        .remote(address.host, address.port, token, address.names)
    )
    try:
        url, token = ray.get([page.start.remote(), page.token.remote()], timeout=60)
    except ray.exceptions.RayTaskError as error:
        ray.kill(page, no_restart=True)
        raise error.cause from None
    return url, token


def _stop_page(page: Any) -> None:
    """Stop the page, and wait until its name and its port are free."""
    if hasattr(page, "stop"):
        ray.get(page.stop.remote(), timeout=_PAGE_ANSWER_S)
    _end(page)


def _end(page: Any) -> None:
    ray.kill(page, no_restart=True)
    deadline_s = time.monotonic() + _PAGE_ANSWER_S
    with contextlib.suppress(ValueError):  # the name is free
        while ray.get_actor(PAGE, NAMESPACE) and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _check(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError on a wrong forecaster setting."""
    if settings:
        from actors.forecaster_actor import ForecasterSettings  # noqa: PLC0415 - a driver may have an `actors` of its own

        ForecasterSettings.from_mapping(settings)


def running_coordinator() -> Any:
    """The coordinator's handle. Raises ControlPlaneError, saying how to start one."""
    if (found := find_coordinator()) is None:
        raise ControlPlaneError(
            "no Shadecast control plane on this cluster: start one with `shadecast up`, or `make serve` for a local one"
        )
    return found


def forecasters() -> dict[str, Any]:
    """The running forecasters by the beginning of their node's id."""
    names = [e["name"] for e in ray.util.list_named_actors(all_namespaces=True) if e["namespace"] == NAMESPACE]
    prefix = forecaster_name("")
    return {name.removeprefix(prefix): ray.get_actor(name, NAMESPACE) for name in names if name.startswith(prefix)}


def forecaster_states(timeout_s: float = 30.0) -> dict[str, dict[str, Any]]:
    """What each node's forecaster says of itself: versions with live skill, failures, the last refusal. By node."""
    found = forecasters()
    return dict(zip(found, ray.get([a.status.remote() for a in found.values()], timeout=timeout_s), strict=True))


def announce(node_id: str, starts_in_s: float, lasts_s: float, strength: float) -> str:
    """Tell a node's forecaster of a known load. Raises ControlPlaneError without such a node, or on nonsense."""
    found = {name: actor for name, actor in forecasters().items() if name.startswith(node_id[:16]) and node_id}
    if len(found) != 1:
        known = ", ".join(forecasters()) or "none"
        raise ControlPlaneError(f"node {node_id!r}: fits {len(found)} forecasters; there are {known}")
    (name,) = found
    try:
        ray.get(found[name].announce.remote(starts_in_s, lasts_s, strength), timeout=30)
    except ray.exceptions.RayTaskError as error:
        raise ControlPlaneError(str(error.cause)) from None
    return name


def stop_control_plane() -> int:
    """Stop coordinator, page and all node forecasters; routers fall back to power of two choices. How many stopped."""
    stopped = 0
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith("shadecast-"):
            ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE), no_restart=True)
            stopped += 1
    return stopped


def wait_until_forecasting(coordinator: Any, nodes: int, timeout_s: float, on_progress: Callable[[str], None]) -> bool:
    """Wait until that many nodes report telemetry; False after `timeout_s` (routing works without)."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        heard = len(ray.get(coordinator.status.remote(), timeout=30)["nodes"])
        on_progress(f"{heard} of {nodes} nodes report")
        if heard >= nodes:
            return True
        time.sleep(0.5)
    return False
