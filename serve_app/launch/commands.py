"""The command line: `shadecast serve | up | down | status | drain | release | forecaster ...`."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray import serve as ray_serve
from rich.console import Console
from rich.table import Table

from serve_app.grpc_proxy import grpc_options
from serve_app.launch import own_installation
from serve_app.launch.control_plane import (
    ControlPlane,
    announce,
    forecaster_states,
    running_coordinator,
    start_control_plane,
    stop_control_plane,
    wait_until_forecasting,
)
from serve_app.launch.local import LocalCluster, find_address
from serve_app.page.address import Address
from shadecast.errors import ShadecastError

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="Predictive load balancing for Ray Serve.")
console = Console()
problems = Console(stderr=True)

AddressOption = Annotated[str, typer.Option(help="Ray cluster; default: RAY_ADDRESS, the local cluster, or auto.")]
PageOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port of the live page; 0 turns it off. [default: 8266]")
]
PageHostOption = Annotated[
    str | None,
    typer.Option(help="Address that the live page and /metrics listen at; 0.0.0.0 or :: for all. [default: 127.0.0.1]"),
]
PageNameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--page-allow-host", metavar="NAME", help="A further name that the page may be asked by; may be given often."
    ),
]


def run() -> None:
    """Run the command line; an error of ours is one line on stderr and exit status 2."""
    try:
        cli()
    except ShadecastError as error:
        problems.print(f"shadecast: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    target = find_address(address)
    try:
        ray.init(address=target, namespace="shadecast", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ShadecastError(
            f"no Ray cluster at {target!r}: start one (`make serve`, or `ray start --head`), or give --address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@cli.command()
def serve(  # noqa: PLR0917 - options of a command are named by the user
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker nodes beside the head.")] = 3,
    replicas: Annotated[int, typer.Option(min=1, max=1000, help="Replicas of the model.")] = 3,
    model: Annotated[str, typer.Option(help='"digits", or your own class as module:Class.')] = "digits",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port on loopback.")] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="gRPC port, on all addresses of this machine; 0: no gRPC.")
    ] = 0,
    page_port: PageOption = None,
    page_host: PageHostOption = None,
    page_allow_host: PageNameOption = None,
    router: Annotated[str, typer.Option(help="predictive or default (Serve's own).")] = "predictive",
    dashboard: Annotated[bool, typer.Option(help="Start Ray's own dashboard, too.")] = False,
) -> None:
    """Start a local cluster, the control plane and an application; stop everything on Ctrl-C."""
    from serve_app.app import AppArgs, build  # noqa: PLC0415 - the other commands do not need these
    from serve_app.gateway.model_server import ModelInfo, load_class  # noqa: PLC0415

    folder = str(Path.cwd())
    with own_installation.users_folder_first(folder):
        application = build(AppArgs.model_validate({"model": model, "replicas": replicas, "router": router}))
        name = ModelInfo.of(load_class(model)).name
    for each in filter(None, (port, grpc_port)):
        _check_free(each)
    if page_port != 0:
        Address().changed(page_host, page_port, page_allow_host or ()).check(None)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    started_s = time.monotonic()
    with console.status("Starting") as status:

        def progress(text: str) -> None:
            status.update(f"[bold]{text}[/] ({time.monotonic() - started_s:.0f} s)")
            if stop.is_set():
                raise KeyboardInterrupt

        try:
            cluster = LocalCluster(workers, dashboard=dashboard, on_progress=lambda t: progress(f"Ray cluster: {t}"))
            with cluster:
                _done("Ray cluster", f"{workers + 1} nodes at {cluster.address}", started_s)
                progress("Control plane")
                cluster.connect()
                plane = start_control_plane(None, page_host, page_port, page_allow_host or ())
                _done("Control plane", "coordinator runs", started_s)
                progress("Application: starting replicas")
                sys.path.insert(0, folder)  # the application's job, unlike the control plane's, has this folder
                cluster.connect()
                url = _deploy(application, port, grpc_port)
                _done("Application", f"{replicas} replicas of {model}", started_s)
                nodes = workers + 1
                heard = wait_until_forecasting(running_coordinator(), nodes, 90.0, lambda t: progress(f"Nodes: {t}"))
                _done("Forecasters", "all nodes report" if heard else "not all nodes report yet", started_s)
                status.stop()
                _print_addresses(plane, f"{url}/v2/models/{name}/infer", grpc_port, cluster.address)
                while not stop.wait(0.5):
                    pass
                console.print("Stopping ...")
        except KeyboardInterrupt:
            console.print("Stopped while starting.")
    console.print("Stopped.")


def _check_free(port: int) -> None:
    """Raise ShadecastError if something listens on a port of loopback already."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ShadecastError(
                f"port {port}: 127.0.0.1:{port} is taken ({error.strerror}); stop what uses it or give another port"
            ) from None


def _deploy(application: Any, port: int, grpc_port: int) -> str:
    """Serve an application on loopback, through one proxy: the nodes of a local cluster share the machine's ports."""
    http = {"host": "127.0.0.1", "port": port}
    ray_serve.start(proxy_location="HeadOnly", http_options=http, grpc_options=grpc_options(grpc_port))
    ray_serve.run(application, name="default", route_prefix="/")
    return f"http://127.0.0.1:{port}"


def _done(what: str, detail: str, started_s: float) -> None:
    console.print(f"[green]ready[/]  {what:<14} {detail} [dim]({time.monotonic() - started_s:.0f} s)[/]")


def _print_addresses(plane: ControlPlane, url: str, grpc_port: int, address: str) -> None:
    console.print()
    console.print(f"  Predictions   {url}", highlight=False)
    if grpc_port:
        console.print(f"  gRPC          127.0.0.1:{grpc_port}", highlight=False)
    if plane.page_url:
        console.print(f"  Live page     {plane.page_url}", highlight=False)
        console.print(f"  Page token    {plane.token}  (for drain and release)", highlight=False)
        _say_who_reaches(plane.page_address)
    console.print("  Status        .venv/bin/shadecast status", highlight=False)
    console.print(f"  Ray cluster   RAY_ADDRESS={address}", highlight=False)
    console.print("\nCtrl-C stops everything.", highlight=False)


def _say_who_reaches(page: Address) -> None:
    """Reading is open to whoever reaches the port: said where that is more than this machine."""
    if not page.is_local:
        names = ", ".join(page.names) or "none (--page-allow-host NAME)"
        text = f"  Whoever reaches {page.host} may read the page and /metrics: by its address, by name: {names}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@cli.command()
def up(  # noqa: PLR0917 - as above
    address: AddressOption = "",
    page_port: PageOption = None,
    page_host: PageHostOption = None,
    page_allow_host: PageNameOption = None,
    telemetry_log: Annotated[str, typer.Option(help="Folder or URI for telemetry; empty: none is kept.")] = "",
    registry: Annotated[str, typer.Option(help="Forecaster registry; empty: the shipped model.")] = "",
    link_bytes_per_s: Annotated[
        float, typer.Option(help="Speed of nodes' links that do not tell it (VMs, pods).")
    ] = 0.0,
    ray_metrics: Annotated[bool, typer.Option(help="Publish metrics through Ray's own export, too.")] = True,
) -> None:
    """Start the control plane on a cluster that runs already."""
    settings = {"telemetry_log": telemetry_log, "registry": registry, "link_bytes_per_s": link_bytes_per_s}
    with _connected(address):
        names = page_allow_host or ()
        plane = start_control_plane(settings, page_host, page_port, names, ray_metrics=ray_metrics)
        console.print("Control plane runs.")
        if plane.page_url:
            console.print(f"Live page {plane.page_url}, token {plane.token}", highlight=False)
            _say_who_reaches(plane.page_address)


@cli.command()
def down(address: AddressOption = "") -> None:
    """Stop the control plane; applications go on by power of two choices."""
    with _connected(address):
        console.print(f"Stopped {stop_control_plane()} actors.")


@cli.command()
def status(
    address: AddressOption = "", as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False
) -> None:
    """Show nodes with current and predicted resources, replicas with state, share and KPIs, and the table's age."""
    with _connected(address):
        state = ray.get(running_coordinator().status.remote(), timeout=30)
    if as_json:
        print(json.dumps(_finite(state), indent=2))
        return
    console.print(_node_table(state))
    for what, targets in (
        ("Kept out until `shadecast release ID`", state.get("holds")),
        ("Nodes that Ray is about to take away, drained", state.get("leaving")),
    ):
        if targets:
            console.print(f"{what}: {', '.join(targets)}", markup=False, highlight=False)
    for deployment in state["deployments"]:
        console.print(_replica_table(deployment))
    for entry in state["transitions"][-10:]:
        change = f"{entry['before']} -> {entry['after']}: {entry['reason']}"
        console.print(f"{entry['ago_s']:7.0f} s ago  {entry['replica_id']}  {change}", markup=False, highlight=False)


@cli.command()
def drain(target: Annotated[str, typer.Argument(help="Replica or node id.")], address: AddressOption = "") -> None:
    """Take a replica, or all replicas of a node, out of traffic; requests under way finish."""
    _command(address, target, True)


@cli.command()
def release(target: Annotated[str, typer.Argument(help="Replica or node id.")], address: AddressOption = "") -> None:
    """Let a drained replica or node back in, through a trial."""
    _command(address, target, False)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Retrain the forecaster, as `python -m train` does where no other `train` hides ours; `--help` has the options."""
    sys.argv[1:] = context.args
    runpy.run_module("train", run_name="__main__", alter_sys=True)


forecaster = typer.Typer(no_args_is_help=True, help="Versions of the node forecasters' model.")
cli.add_typer(forecaster, name="forecaster")
RegistryOption = Annotated[str, typer.Option(help="Folder or URI of the registry; empty: the shipped one.")]


def _registry(uri: str) -> Any:
    from models.registry import SHIPPED, Registry  # noqa: PLC0415 - loads torch, which no other command needs

    return Registry(uri or str(SHIPPED))


@forecaster.command("list")
def forecaster_list(registry: RegistryOption = "") -> None:
    """List the versions, oldest first, with the champion and what runs in shadow."""
    versions = _registry(registry)
    roles = {versions.challenger(): "in shadow", versions.champion(): "champion"}
    for version in versions.versions():
        card = versions.card(version)
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(float(card.get("created_wall_s", 0.0))))
        role = roles.get(version, "")
        console.print(f"{version:<24} {made} UTC  {card.get('rows', '?')} rows  {role}", highlight=False)


@forecaster.command("show")
def forecaster_show(version: Annotated[str, typer.Argument()], registry: RegistryOption = "") -> None:
    """Print a version's card: data, schema, metrics against every baseline, code."""
    print(json.dumps(_registry(registry).card(version), indent=1))


@forecaster.command("promote")
def forecaster_promote(version: Annotated[str, typer.Argument()], registry: RegistryOption = "") -> None:
    """Make a version the champion; running forecasters load it within 10 s."""
    _registry(registry).promote(version)
    console.print(f"Champion is now {version}.", highlight=False)


@forecaster.command("shadow")
def forecaster_shadow(
    version: Annotated[str, typer.Argument(help="A version, or none, which ends the trial.")],
    registry: RegistryOption = "",
) -> None:
    """Score a version on live telemetry beside the champion, without acting on it; see `shadecast forecaster live`."""
    _registry(registry).challenge("" if version == "none" else version)
    console.print(f"In shadow: {version}.", highlight=False)


@forecaster.command("live")
def forecaster_live(address: AddressOption = "") -> None:
    """Show the versions that every node runs and scores in shadow, with their live skill and what was refused."""
    with _connected(address):
        states = forecaster_states()
    for node, state in states.items():
        for role, one in state["versions"].items():
            skill = ", ".join(f"{resource} {_number(value)}" for resource, value in one["skill"].items())
            console.print(f"{node:<18} {role:<11} {one['version']:<24} {skill}", highlight=False)
        if state["problem"]:
            console.print(f"{node:<18} refused: {state['problem']}", markup=False, highlight=False)


@forecaster.command("announce")
def forecaster_announce(
    node: Annotated[str, typer.Argument(help="Node id, as `shadecast status` shows it.")],
    starts_in_s: Annotated[float, typer.Argument(help="Seconds from now.")],
    lasts_s: Annotated[float, typer.Argument(help="Seconds.")],
    strength: Annotated[float, typer.Option(help="Share of the node that it takes.", min=0.0, max=1.0)] = 1.0,
    address: AddressOption = "",
) -> None:
    """Tell a node's forecaster of a load that is known to come: a batch job, a burst, a scheduled pause."""
    with _connected(address):
        told = announce(node, starts_in_s, lasts_s, strength)
    console.print(f"Announced to {told}.", highlight=False)


@forecaster.command("rollback")
def forecaster_rollback(registry: RegistryOption = "") -> None:
    """Return to the champion before the present one."""
    console.print(f"Champion is now {_registry(registry).rollback()}.", highlight=False)


def _command(address: str, target: str, out: bool) -> None:
    with _connected(address):
        concerned = ray.get(running_coordinator().command.remote(target, out), timeout=30)
    if not concerned:
        raise ShadecastError(f"no replica or node {target!r}: see `shadecast status` for those that exist")
    if out:
        console.print(f"Kept out of traffic until `shadecast release {target}`: {concerned} of what runs now.")
    else:
        console.print(f"Let back in, through a trial: {concerned} of what runs now.")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _percent(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f} %"


def _number(value: Any, unit: str = "", digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{unit}"


def _node_table(state: dict[str, Any]) -> Table:
    table = Table(title="Nodes: now -> in 5 s (.1 to .9 quantile)", title_justify="left")
    for heading in ("node", "cpu", "background cpu", "memory", "network", "skill", "model", "age"):
        table.add_column(heading)
    for node in state["nodes"]:
        now, predicted = node["current"], node["predicted"]
        columns = [_percent(now["cpu_fraction"])]
        for resource, field in (
            ("cpu", "cpu_background_fraction"),
            ("memory", "memory_fraction"),
            ("network", "network_background_fraction"),
        ):
            text = _percent(now[field])
            if predicted and resource in predicted:
                low, middle, high = predicted[resource]["5.0"]
                text += f" -> {_percent(middle)} ({_percent(low)} to {_percent(high)})"
            columns.append(text)
        skill = ", ".join(f"{r} {_number(s)}" for r, s in node["skill"].items()) or "-"
        table.add_row(
            node["node_id"][:8], *columns, skill, node["model_version"] or "-", _number(node["age_s"], " s", 1)
        )
    return table


def _replica_table(deployment: dict[str, Any]) -> Table:
    age = _number(deployment["table_age_s"], " s", 1)
    levels = ", ".join(sorted({r["level"] for r in deployment["routers"]})) or "no router"
    panic = ", PANIC" if deployment["panic"] else ""
    title = f"{deployment['deployment']}: table {deployment['table_version']} ({age} old), routers: {levels}{panic}"
    if (observed := deployment["observed"])["requests"]:
        saved = 1.0 - observed["time_ours"] / max(observed["time_taken"], 1e-9)
        title += f"\nonly observing: of {observed['requests']} requests, Shadecast's choice would have saved "
        title += f"{saved:.0%} of the time, by its own estimates"
    table = Table(title=title, title_justify="left")
    for heading in (
        "replica",
        "node",
        "state",
        "share",
        "capacity",
        "queue",
        "req/s",
        "mean",
        "errors",
        "mirrored",
        "",
    ):
        table.add_column(heading)
    for r in deployment["replicas"]:
        note = r["trial"] or (f"next trial in {r['retry_in_s']:.0f} s" if r["retry_in_s"] > 0 else "")
        table.add_row(
            r["replica_id"],
            r["node_id"][:8],
            r["state"],
            _percent(r["share"]),
            _number(r["capacity"]),
            _number(r["queue"], digits=0),
            _number(r["rate_per_s"], digits=1),
            _number(1000 * r["mean_s"], " ms", 1),
            _percent(r["error_fraction"]),
            _percent(r["mirror_fraction"]),
            note,
        )
    return table
