"""The command line: `shadecast serve | up | down | status | nodes | explain | drain | release | announce | ...`.

Ray is imported by the commands that need it: help and completion by the shell answer at once. docs/command_line.md has
the exit codes and what `--json` prints.
"""

from __future__ import annotations

import contextlib
import datetime
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType

from serve_app.launch import explanations, ids, own_installation, tables, tokens
from serve_app.launch.answers import JsonOption, answer, failed, problems
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.registry_commands import forecaster
from serve_app.launch.report_command import report
from serve_app.launch.times import duration_s, from_now_s
from serve_app.launch.watching import Watching
from serve_app.launch.what_if_command import simulate
from serve_app.page.address import Address, PageError
from serve_app.page.watch import to_json
from shadecast.errors import AwayError, ConfigError, NotInstalledError, OrderError, ShadecastError

if TYPE_CHECKING:
    from serve_app.launch.control_plane import ControlPlane

cli = typer.Typer(no_args_is_help=True, help="Predictive load balancing for Ray Serve.")
cli.add_typer(forecaster, name="forecaster")
cli.command()(report)
cli.command()(simulate)
console = Console()

FAILED, BAD_USE, AWAY = 1, 2, 3
"""Exit codes beside 0, which is: done."""
_WATCH_S = 1.0
_WATCH_ANSWER_S = 3.0
_LEAST_WIDTH, _WIDE = 80, 1000

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
TokenFileOption = Annotated[
    str,
    typer.Option(metavar="FILE", help="Token for orders on the live page; or SHADECAST_TOKEN. [default: one is made]"),
]
LookTokenFileOption = Annotated[
    str,
    typer.Option(
        metavar="FILE", help="Token for reading the page and /metrics; or SHADECAST_LOOK_TOKEN. [default: open]"
    ),
]
AuditLogOption = Annotated[
    str, typer.Option(metavar="FILE", help="Where the coordinator writes down orders, on its node.")
]
WideOption = Annotated[bool, typer.Option("--wide", help="All columns and whole ids, however narrow the terminal.")]
TargetArgument = Annotated[
    str,
    typer.Argument(
        help="Id of a replica or node, its beginning, or a node's host name.", autocompletion=ids.complete_targets
    ),
]


def run() -> None:
    """Run the command line; an error of ours is one line on stderr, and an exit code that says of which kind."""
    try:
        cli()
    except ShadecastError as error:
        raise SystemExit(failed(str(error), exit_code(error))) from None


def exit_code(error: ShadecastError) -> int:
    """3: no cluster or control plane is reached; 2: something given is wrong; 1: it was refused, or has failed."""
    match error:
        case AwayError():
            return AWAY
        case ConfigError() | PageError() | NotInstalledError():
            return BAD_USE
        case _:
            return FAILED


def _status(timeout_s: float = 30.0) -> dict[str, Any]:
    """The coordinator's status as JSON values; what it names is remembered for completion."""
    from serve_app.launch.control_plane import ask_coordinator  # noqa: PLC0415 - see above

    status: dict[str, Any] = to_json(ask_coordinator("status", timeout_s=timeout_s))
    ids.remember(status)
    return status


def _show(view: list[RenderableType], *, wide: bool = False) -> None:
    """Print tables; below 80 columns the terminal wraps them, nothing is cut."""
    Console(width=_WIDE if wide else _width()).print(*view, sep="\n", highlight=False)


@cli.command()
def serve(  # noqa: PLR0915, PLR0917 - options of a command are named by the user
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
    token_file: TokenFileOption = "",
    look_token_file: LookTokenFileOption = "",
    audit_log: AuditLogOption = "",
    as_json: JsonOption = False,
) -> None:
    """Start a local cluster, the control plane and an application; stop everything on Ctrl-C."""
    from serve_app.app import AppArgs, ArgumentError, build  # noqa: PLC0415 - the other commands do not need these
    from serve_app.gateway.model_server import ModelInfo, load_class  # noqa: PLC0415
    from serve_app.launch.control_plane import (  # noqa: PLC0415
        running_coordinator,
        start_control_plane,
        wait_until_forecasting,
    )
    from serve_app.launch.local import LocalCluster  # noqa: PLC0415

    given = tokens.given(token_file, look_token_file)  # before the model's code and Ray's processes see the environment
    folder = str(Path.cwd())
    with own_installation.users_folder_first(folder):
        try:
            application = build(AppArgs.model_validate({"model": model, "replicas": replicas, "router": router}))
            name = ModelInfo.of(load_class(model)).name
        except ArgumentError as error:  # typer would print it itself, with an exit code of its own
            raise ConfigError(error.format_message()) from error
    for each in filter(None, (port, grpc_port)):
        _check_free(each)
    if page_port != 0:
        Address().changed(page_host, page_port, page_allow_host or ()).check(None)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    started_s = time.monotonic()
    progress_console = problems if as_json else console

    def done(what: str, detail: str) -> None:
        text = f"[green]ready[/]  {what:<14} {detail} [dim]({time.monotonic() - started_s:.0f} s)[/]"
        progress_console.print(text)

    with progress_console.status("Starting") as status:

        def progress(text: str) -> None:
            status.update(f"[bold]{text}[/] ({time.monotonic() - started_s:.0f} s)")
            if stop.is_set():
                raise KeyboardInterrupt

        try:
            cluster = LocalCluster(workers, dashboard=dashboard, on_progress=lambda t: progress(f"Ray cluster: {t}"))
            with cluster:
                done("Ray cluster", f"{workers + 1} nodes at {cluster.address}")
                progress("Control plane")
                cluster.connect()
                plane = start_control_plane(
                    None,
                    page_host,
                    page_port,
                    page_allow_host or (),
                    given=given,
                    audit_log=audit_log,
                )
                done("Control plane", "coordinator runs")
                progress("Application: starting replicas")
                sys.path.insert(0, folder)  # the application's job, unlike the control plane's, has this folder
                cluster.connect()
                url = _deploy(application, port, grpc_port)
                done("Application", f"{replicas} replicas of {model}")
                nodes = workers + 1
                heard = wait_until_forecasting(running_coordinator(), nodes, 90.0, lambda t: progress(f"Nodes: {t}"))
                done("Forecasters", "all nodes report" if heard else "not all nodes report yet")
                status.stop()
                predictions = f"{url}/v2/models/{name}/infer"
                if as_json:
                    grpc = f"127.0.0.1:{grpc_port}" if grpc_port else None
                    answer(predictions_url=predictions, grpc=grpc, ray_address=cluster.address, **_of(plane))
                else:
                    _print_addresses(plane, predictions, grpc_port, cluster.address)
                while not stop.wait(0.5):
                    pass
                progress_console.print("Stopping ...")
        except KeyboardInterrupt:
            progress_console.print("Stopped while starting.")
    progress_console.print("Stopped.")


def _check_free(port: int) -> None:
    """Raise ConfigError if something listens on a port of loopback already."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port}: 127.0.0.1:{port} is taken ({error.strerror}); stop what uses it or give another port"
            ) from None


def _deploy(application: Any, port: int, grpc_port: int) -> str:
    """Serve an application on loopback, through one proxy: the nodes of a local cluster share the machine's ports."""
    from ray import serve as ray_serve  # noqa: PLC0415 - see above

    from serve_app.grpc_proxy import grpc_options  # noqa: PLC0415

    http = {"host": "127.0.0.1", "port": port}
    ray_serve.start(proxy_location="HeadOnly", http_options=http, grpc_options=grpc_options(grpc_port))
    ray_serve.run(application, name="default", route_prefix="/")
    return f"http://127.0.0.1:{port}"


def _print_addresses(plane: ControlPlane, url: str, grpc_port: int, address: str) -> None:
    console.print()
    console.print(f"  Predictions   {url}", highlight=False)
    if grpc_port:
        console.print(f"  gRPC          127.0.0.1:{grpc_port}", highlight=False)
    if plane.page_url:
        console.print(f"  Live page     {plane.page_url}", highlight=False)
        token = plane.token_source or "none: it takes no orders"
        console.print(f"  Page token    {token}", markup=False, highlight=False, soft_wrap=True)
        _say_who_reaches(plane)
    console.print("  Status        .venv/bin/shadecast status --watch", highlight=False)
    console.print(f"  Ray cluster   RAY_ADDRESS={address}", highlight=False)
    console.print("\nCtrl-C stops everything.", highlight=False)


def _say_who_reaches(plane: ControlPlane) -> None:
    """Say who may read, where more than this machine reaches the port."""
    page = plane.page_address
    if not page.is_local:
        names = ", ".join(page.names) or "none (--page-allow-host NAME)"
        who = "Whoever has a token and" if plane.rights.look else "Whoever"
        text = f"  {who} reaches {page.host} may read the page and /metrics: by its address, by name: {names}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _of(plane: ControlPlane) -> dict[str, Any]:
    """What a program wants to know of a control plane."""
    return {
        "page_url": plane.page_url or None,
        "page_host": plane.page_address.host if plane.page_url else None,
        "page_names": list(plane.page_address.names),
        "operate_token": plane.token_source or None,
        "reading": "token" if plane.rights.look else "open",
    }


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
    retrain: Annotated[
        str | None,
        typer.Option(metavar="off|hourly|daily|weekly", help="Retrain the forecaster on the log. [default: off]"),
    ] = None,
    retrain_machine_hours: Annotated[float, typer.Option(help="Machine hours that the log must hold for that.")] = 2.0,
    retrain_onsets: Annotated[int, typer.Option(help="Onsets of others' load that it must hold.")] = 50,
    ray_metrics: Annotated[bool, typer.Option(help="Publish metrics through Ray's own export, too.")] = True,
    token_file: TokenFileOption = "",
    look_token_file: LookTokenFileOption = "",
    audit_log: AuditLogOption = "",
    as_json: JsonOption = False,
) -> None:
    """Start the control plane on a cluster that runs already."""
    from serve_app.launch.control_plane import retraining_plan, start_control_plane  # noqa: PLC0415 - see above

    given = tokens.given(token_file, look_token_file)
    settings = {"telemetry_log": telemetry_log, "registry": registry, "link_bytes_per_s": link_bytes_per_s}
    plan = {"least_machine_hours": retrain_machine_hours, "least_onsets": retrain_onsets}
    if retrain is not None:
        retraining_plan(retrain, settings, plan)  # before a cluster is looked for
    with connected(address):
        plane = start_control_plane(
            settings,
            page_host,
            page_port,
            page_allow_host or (),
            ray_metrics=ray_metrics,
            given=given,
            audit_log=audit_log,
            retrain=retrain,
            retrain_plan=plan,
        )
    if plane.not_taken:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in plane.not_taken)
        text = f"It runs already, started otherwise: {options} not taken; `shadecast down`, then this again."
        problems.print(text, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        answer(**_of(plane))
        return
    console.print("Control plane runs.")
    if plane.page_url:
        token = plane.token_source or "none, it takes no orders"
        console.print(
            f"Live page {plane.page_url}; token for orders: {token}", markup=False, highlight=False, soft_wrap=True
        )
        _say_who_reaches(plane)


@cli.command()
def down(address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Stop the control plane; applications go on by power of two choices."""
    from serve_app.launch.control_plane import stop_control_plane  # noqa: PLC0415 - see above

    with connected(address):
        stopped = stop_control_plane()
    if as_json:
        answer(stopped=stopped)
    else:
        console.print(f"Stopped {stopped} actors.")


@cli.command()
def status(
    address: AddressOption = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second, until Ctrl-C.")] = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show nodes with what is free and will be, replicas with state, share and KPIs, the table's age, and changes."""
    with connected(address):
        if watch:
            _watch(wide=wide, as_json=as_json)
            return
        state = _status()
    if as_json:
        answer(**state)
    else:
        _show(tables.status_view(state, _width(), wide=wide), wide=wide)


def _watch(*, wide: bool, as_json: bool) -> None:
    """Show the status every second until Ctrl-C; while the control plane is away, what it said last."""
    watching = Watching(time.monotonic)
    live = console.is_terminal and not as_json
    with contextlib.suppress(KeyboardInterrupt), console.screen() if live else contextlib.nullcontext() as screen:
        while True:
            try:
                watching.heard(_status(_WATCH_ANSWER_S))
            except ShadecastError as error:
                watching.away(str(error))
            if as_json:
                answer(**watching.plain())
            elif screen is not None:
                screen.update(Group(*watching.view(_width(), wide=wide)))
            else:
                _show(watching.view(_width(), wide=wide), wide=wide)
            time.sleep(_WATCH_S)


def _width() -> int:
    return max(console.width, _LEAST_WIDTH)


@cli.command()
def nodes(address: AddressOption = "", wide: WideOption = False, as_json: JsonOption = False) -> None:
    """Show a row for each node: state, what is free now and expected to be, age of its telemetry, hold, replicas."""
    with connected(address):
        state = _status()
    if as_json:
        answer(nodes=tables.node_rows(state))
    else:
        _show(tables.nodes_view(state, _width(), wide=wide), wide=wide)


@cli.command()
def explain(  # noqa: PLR0917 - as above
    last: Annotated[bool, typer.Option("--last", help="What routers decided last.")] = False,
    request: Annotated[str, typer.Option(metavar="ID", help="One request, by the x-request-id of its answer.")] = "",
    replica: Annotated[
        str, typer.Option(metavar="ID", help="Why it gets what it gets.", autocompletion=ids.complete_targets)
    ] = "",
    node: Annotated[
        str, typer.Option(metavar="ID", help="What is known of it, and why.", autocompletion=ids.complete_nodes)
    ] = "",
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="With --request: until it comes, 300 s at most. [e.g. 60s]")
    ] = "",
    most: Annotated[int, typer.Option(min=1, max=50, help="With --last: so many.")] = 5,
    address: AddressOption = "",
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say why: where requests went and what the replicas' scores were, what a replica or node gets, what is missing."""
    given = [(what, target) for what, target in (("request", request), ("replica", replica), ("node", node)) if target]
    if last:
        given.append(("last", ""))
    if len(given) != 1:
        raise ConfigError("explain: give one of --last, --request ID, --replica ID and --node ID")
    if wait and not request:
        raise ConfigError("explain: --wait is for --request: the others are known already")
    told = _explain(
        *given[0], address, most=50 if request else most, wait_s=duration_s(wait, "--wait") if wait else 0.0
    )
    if as_json:
        answer(**told)
    else:
        _show(explanations.view(told, _width(), wide=wide), wide=wide)


def _explain(what: str, target: str, address: str, **more: Any) -> dict[str, Any]:
    """The coordinator's explanation, as JSON values. Raises OrderError where nothing has that id."""
    from serve_app.launch.control_plane import ask_coordinator  # noqa: PLC0415 - see above

    with connected(address):
        if what in ("replica", "node"):
            state = _status()
            names = ids.node_names(state) if what == "node" else {}
            target = ids.resolve(target, names or ids.replica_ids(state), names, what)
        asked = {"what": what, "target": target, **more}
        told: dict[str, Any] = to_json(ask_coordinator("explain", asked, timeout_s=30.0 + more["wait_s"]))
    if "refused" in told:
        raise OrderError(str(told["refused"]))
    return told


@cli.command()
def drain(target: TargetArgument, address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Take a replica, or all replicas of a node, out of traffic; requests under way finish."""
    told = _order("drain", target, address)
    if as_json:
        answer(**told)
    else:
        now = f"{told['concerned']} of what runs now"
        console.print(f"Kept out of traffic until `shadecast release {target}`: {now}.", markup=False, highlight=False)


@cli.command()
def release(target: TargetArgument, address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Let a drained replica or node back in, through a trial."""
    told = _order("release", target, address)
    if as_json:
        answer(**told)
    else:
        console.print(f"Let back in, through a trial: {told['concerned']} of what runs now.", highlight=False)


@cli.command()
def announce(  # noqa: PLR0917 - as above
    node: Annotated[
        str, typer.Argument(help="Id of a node, its beginning, or its host name.", autocompletion=ids.complete_nodes)
    ],
    from_: Annotated[str, typer.Option("--from", metavar="TIME", help="now, +10m, 14:30, or ISO 8601.")] = "now",
    to: Annotated[str, typer.Option("--to", metavar="TIME", help="As --from.")] = "",
    for_: Annotated[str, typer.Option("--for", metavar="DURATION", help="90s, 10m, 1.5h; in place of --to.")] = "",
    strength: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Part of the node that is taken; 1: as if it were away.")
    ] = 1.0,
    cancel: Annotated[bool, typer.Option("--cancel", help="Nothing that was announced for it comes.")] = False,
    address: AddressOption = "",
    as_json: JsonOption = False,
) -> None:
    """Tell in advance that a node will be slow or away: a batch job, a pause. Load leaves it in time, and returns."""
    values: dict[str, Any] = {}
    if not cancel:
        starts_in_s, lasts_s = _interval(from_, to, for_)
        values = {"starts_in_s": starts_in_s, "lasts_s": lasts_s, "strength": strength}
    told = _order("cancel" if cancel else "announce", node, address, nodes_only=True, **values)
    if as_json:
        answer(**told)
    elif cancel:
        console.print(f"Cancelled for node {told['target'][:16]}: {told['cancelled']}.", highlight=False)
    else:
        starts, ends = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told[f"{e}_wall_s"])) for e in ("starts", "ends")
        )
        console.print(f"Announced for node {told['target'][:16]}: from {starts} to {ends}.", highlight=False)
    if not told["told"]:
        text = "Its forecaster does not answer now; it hears of this when it reports again."
        problems.print(text, highlight=False)


def _interval(from_: str, to: str, for_: str) -> tuple[float, float]:
    """Seconds until it starts, and how long it lasts. Raises ConfigError."""
    if bool(to) == bool(for_):
        raise ConfigError("announce: give one of --to TIME and --for DURATION, or --cancel")
    now = datetime.datetime.now().astimezone()
    starts_in_s = from_now_s(from_, "--from", now)
    if starts_in_s < 0.0:
        raise ConfigError(f"--from {from_!r}: lies {-starts_in_s:.0f} s back; give `now` or a time to come")
    lasts_s = duration_s(for_, "--for") if for_ else from_now_s(to, "--to", now) - starts_in_s
    if lasts_s <= 0.0:
        raise ConfigError(f"{'--for' if for_ else '--to'} {for_ or to!r}: must be after --from {from_!r}")
    return starts_in_s, lasts_s


def _order(what: str, given: str, address: str, *, nodes_only: bool = False, **values: Any) -> dict[str, Any]:
    """Order for the one replica or node that `given` means. Raises OrderError."""
    from serve_app.launch.control_plane import order  # noqa: PLC0415 - see above

    with connected(address):
        state = _status()
        names = ids.node_names(state)
        known = set(names)
        if not nodes_only:
            known |= ids.replica_ids(state) | set(state.get("holds", ()))
        target = ids.resolve(given, known, names, "node" if nodes_only else "replica or node")
        return order(what, target, **values)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Retrain the forecaster, as `python -m train` does where no other `train` hides ours; `--help` has the options."""
    sys.argv[1:] = context.args
    runpy.run_module("train", run_name="__main__", alter_sys=True)
