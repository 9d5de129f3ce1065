"""Starts and stops the control plane on a Ray cluster: coordinator, node forecasters, live page.

It runs as a job of its own, with this project's packages, apart from the applications that it balances.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app import extras
from serve_app.coordinator import COORDINATOR, NAMESPACE, find_coordinator
from serve_app.launch import tokens
from serve_app.launch.processes import CoordinatorProcess, PageProcess, RetrainerProcess, forecaster_name
from serve_app.page.address import Address
from serve_app.page.rights import Rights, Role, digest
from serve_app.page.watch import one_line
from serve_app.ray_api import HEAD_NODE_RESOURCE
from shadecast.errors import AwayError, ConfigError, OrderError, ShadecastError

logger = logging.getLogger(__name__)

PAGE = "shadecast-page"
RETRAINER = "shadecast-retrainer"
_ON_THE_HEAD = {HEAD_NODE_RESOURCE: 0.001}
"""Where Serve's controller is, too. Ray puts an actor that asks for nothing anywhere, whatever its soft affinity: on a
node that is starved, the coordinator could not tell routers to leave it."""


_DETACHED = {"namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "get_if_exists": True}
_PAGE_ANSWER_S = 20.0


class ControlPlaneError(AwayError):
    """The control plane is not there, does not answer, or did not come up."""


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What is needed to talk to a running control plane."""

    coordinator: Any
    page_url: str
    page_address: Address
    rights: Rights = field(default_factory=Rights)
    token_source: str = ""
    """Where the token for orders is to be found, such as `the file ...`; empty where the page has none."""
    not_taken: tuple[str, ...] = ()
    """Settings that were given, and that the coordinator, which ran already, was not started with."""


def start_control_plane(
    settings: Mapping[str, Any] | None = None,
    page_host: str | None = None,
    page_port: int | None = None,
    page_names: Iterable[str] = (),
    *,
    ray_metrics: bool = True,
    given: tokens.Given | None = None,
    audit_log: str = "",
    retrain: str | None = None,
    retrain_plan: Mapping[str, Any] | None = None,
    retrain_effort: Mapping[str, Any] | None = None,
) -> ControlPlane:
    """Start what is not running yet on the connected cluster; blocks until the coordinator answers.

    `retrain` is off or how often (`shadecast.retraining.EVERY_S`), None: as it is. `retrain_plan` and `retrain_effort`
    hold what differs from the defaults of `RetrainPlan` and `train.retrain.Effort`.

    `page_host`, `page_port` and `page_names` are as in `Address`; port 0 leaves the page out. A page that runs with
    other ones, or other tokens, than are given is started anew; what is not given stays. Without `given`, tokens are
    from the environment. `ray_metrics` and `audit_log` are for a coordinator that is started.

    Raises ConfigError on a wrong forecaster setting or token, PageError on a wrong address, NotInstalledError where the
    extra `control` is missing, before anything is started.
    """
    extras.require("control", "starting the control plane")
    _check(settings or {})
    plan = retraining_plan(retrain, settings or {}, retrain_plan or {}) if retrain is not None else None
    given = tokens.given() if given is None else given
    operate, look = given.operate, given.look
    running = _running_page() if page_port != 0 else None
    before = running.address if running is not None else None
    wanted = (before or Address()).changed(page_host, page_port, page_names)
    if page_port != 0 and wanted != before:
        wanted.check(before)
    was = running.rights if running is not None else Rights()
    if operate is None and not was.operate and page_port != 0:
        operate = _kept_token()
    rights = Rights(
        digest(operate.value) if operate is not None else was.operate,
        digest(look.value) if look is not None else was.look,
    )
    coordinator = (
        ray.remote(CoordinatorProcess)
        .options(name=COORDINATOR, max_restarts=-1, resources=_ON_THE_HEAD, **_DETACHED)
        .remote(dict(settings or {}), ray_metrics=ray_metrics, audit_log=audit_log)
    )
    _answer(coordinator.status.remote(), 60.0)
    not_taken = _not_taken(coordinator, {**(settings or {}), "audit_log": audit_log})
    if plan is not None:
        _start_retraining(settings or {}, plan, retrain_effort or {})
    elif retrain is not None:
        stop_retraining()
    if page_port == 0:
        return ControlPlane(coordinator, "", wanted, not_taken=not_taken)
    if running is not None and (wanted, rights) != (before, was):
        _stop_page(running.actor)
    url = _start_page(wanted, rights)
    source = operate.source if operate is not None else _source(rights)
    return ControlPlane(coordinator, url, wanted, rights, source, not_taken)


def _not_taken(coordinator: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of the settings that are given a coordinator was not started with. One of an older version does not say."""
    if not hasattr(coordinator, "settings"):
        return ()
    taken = _answer(coordinator.settings.remote(), 60.0)
    return tuple(name for name, value in given.items() if value and taken.get(name) != value)


def retraining_plan(
    retrain: str, settings: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What `RetrainPlan` is built of; None where it is off. Raises ConfigError."""
    from shadecast.retraining import RetrainPlan, every_s  # noqa: PLC0415 - as in `_check`

    if (seconds := every_s(retrain)) is None:
        return None
    plan = {"every_s": seconds, **(given or {})}
    RetrainPlan.from_mapping(plan)
    missing = [f"--{name.replace('_', '-')}" for name in ("telemetry_log", "registry") if not settings.get(name)]
    if missing:
        raise ConfigError(
            f"--retrain {retrain}: needs {' and '.join(missing)}: it trains on the log, and puts new versions into a "
            "registry of yours; give folders that all nodes see"
        )
    if "://" in str(settings["telemetry_log"]):
        raise ConfigError(
            f"--retrain {retrain}: --telemetry-log {settings['telemetry_log']} must be a folder: trainings read files; "
            "mount it, or run `shadecast train` where it is mounted"
        )
    return plan


def _start_retraining(settings: Mapping[str, Any], plan: Mapping[str, Any], effort: Mapping[str, Any]) -> None:
    """Start it, anew where it runs with something else."""
    where = {"telemetry": str(settings["telemetry_log"]), "registry": str(settings["registry"])}
    asked = (where, dict(plan), dict(effort))
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        if ray.get(ray.get_actor(RETRAINER, NAMESPACE).asked.remote(), timeout=_PAGE_ANSWER_S) == asked:
            return
    stop_retraining()
    started = (
        ray.remote(RetrainerProcess)
        .options(name=RETRAINER, max_restarts=-1, resources=_ON_THE_HEAD, max_concurrency=2, **_DETACHED)
        .remote(*asked)
    )
    _answer(started.status.remote(), 60.0)


def stop_retraining() -> bool:
    """Stop it, with a training that is under way; whether it ran. Versions stay as they are."""
    try:
        actor = ray.get_actor(RETRAINER, NAMESPACE)
    except ValueError:
        return False
    _end(actor, RETRAINER)
    with contextlib.suppress(ShadecastError):
        ask_coordinator("retraining", None, timeout_s=5.0)
    return True


def _kept_token() -> tokens.Token | None:
    """The token of whoever gives none; None where it cannot be kept: the page then takes no orders."""
    try:
        return tokens.kept_or_made()
    except OSError as error:
        logger.warning("no token for orders can be kept (%s): the page takes none; give one with --token-file", error)
        return None


def _source(rights: Rights) -> str:
    """Where the token of a page that ran already is, as far as that can be told."""
    with contextlib.suppress(tokens.TokenError):
        own = tokens.kept()
        if own is not None and digest(own.value) == rights.operate:
            return own.source
    return "where it was given" if rights.operate else ""


@dataclass(frozen=True, slots=True)
class _RunningPage:
    actor: Any
    address: Address
    rights: Rights


def _running_page() -> _RunningPage | None:
    """The page of this cluster, None if there is none: one that does not answer, its node being gone, is ended.

    One of Shadecast 0.1 was started with nothing but a port.
    """
    try:
        actor = ray.get_actor(PAGE, NAMESPACE)
    except ValueError:
        return None
    try:
        has_rights = hasattr(actor, "rights")
        rights = Rights.of(ray.get((actor.rights if has_rights else actor.token).remote(), timeout=_PAGE_ANSWER_S))
        if not hasattr(actor, "address"):
            return _RunningPage(actor, Address(), rights)
        host, port, names = ray.get(actor.address.remote(), timeout=_PAGE_ANSWER_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        _end(actor)
        return None
    return _RunningPage(actor, Address(host, port, tuple(names)), rights)


def _start_page(address: Address, rights: Rights) -> str:
    """URL of the page; raises PageError, and leaves none behind, where it cannot listen."""
    here = ray.get_runtime_context().get_node_id()
    only_here = NodeAffinitySchedulingStrategy(here, soft=False)  # the page's address is one of this node's
    page = (
        ray.remote(PageProcess)
        .options(name=PAGE, max_restarts=3, scheduling_strategy=only_here, **_DETACHED)
        .remote(address.host, address.port, rights.plain(), address.names)
    )
    try:
        url: str = ray.get(page.start.remote(), timeout=60)
    except ray.exceptions.RayTaskError as error:
        ray.kill(page, no_restart=True)
        raise error.cause from None
    return url


def _stop_page(page: Any) -> None:
    """Stop the page, and wait until its name and its port are free."""
    if hasattr(page, "stop"):
        ray.get(page.stop.remote(), timeout=_PAGE_ANSWER_S)
    _end(page)


def _end(actor: Any, name: str = PAGE) -> None:
    ray.kill(actor, no_restart=True)
    deadline_s = time.monotonic() + _PAGE_ANSWER_S
    with contextlib.suppress(ValueError):  # the name is free
        while ray.get_actor(name, NAMESPACE) and time.monotonic() < deadline_s:
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
    """What each node's forecaster says of itself: versions with live skill, failures, what is wrong. By node.

    Raises ControlPlaneError where no control plane runs.
    """
    running_coordinator()
    found = forecasters()
    return dict(zip(found, ray.get([a.status.remote() for a in found.values()], timeout=timeout_s), strict=True))


def ask_coordinator(method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
    """What the coordinator answers to a call. Raises ControlPlaneError where none does."""
    coordinator = running_coordinator()
    if not hasattr(coordinator, method):
        raise ControlPlaneError("the control plane is of an older version: `shadecast down`, then `shadecast up`")
    return _answer(getattr(coordinator, method).remote(*arguments), timeout_s)


def _answer(asked: Any, timeout_s: float) -> Any:
    """The coordinator's answer. Raises ControlPlaneError where none comes, ShadecastError where it has failed."""
    try:
        return ray.get(asked, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ControlPlaneError(f"the coordinator did not answer within {timeout_s:g} s") from None
    except ray.exceptions.RayTaskError as error:
        raise ShadecastError(f"the coordinator failed: {one_line(error.cause or error)}") from error
    except ray.exceptions.RayError as error:
        raise ControlPlaneError(f"the coordinator is down or restarting ({type(error).__name__})") from None


def order(what: str, target: str, **values: Any) -> dict[str, Any]:
    """Order as somebody who may use the cluster: drain, release, announce, cancel. Raises OrderError."""
    asked = {"order": what, "target": target, **values, "who": {"by": "command line", **_user()}}
    answer: dict[str, Any] = ask_coordinator("order", asked)
    if "refused" in answer:
        raise OrderError(str(answer["refused"]))
    return answer


def _user() -> dict[str, str]:
    """Whoever runs this process, and where; Ray's own token, not one of ours, lets them in."""
    with contextlib.suppress(OSError, KeyError):
        return {"role": Role.OPERATE.value, "user": getpass.getuser(), "host": socket.gethostname()}
    return {"role": Role.OPERATE.value, "host": socket.gethostname()}


def stop_control_plane() -> int:
    """Stop coordinator, page and all node forecasters; routers fall back to power of two choices. How many stopped."""
    with contextlib.suppress(ShadecastError):
        down = {"order": "down", "who": {"by": "command line", **_user()}, "outcome": "done"}
        ask_coordinator("write_down", down, timeout_s=5.0)
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
