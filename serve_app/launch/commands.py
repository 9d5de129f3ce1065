"""The command line: `shadecast serve | up | down | status | nodes | explain | drain | release | announce | ...`.

Ray is imported by the commands that need it: help and completion by the shell answer at once. docs/command_line.md has
the exit codes and what `--json` prints.
"""

from __future__ import annotations

import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serve_app.launch import own_installation, tokens
from serve_app.launch.answers import JsonOption, answer, failed, problems
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.look_commands import explain, nodes, status
from serve_app.launch.order_commands import announce, drain, release
from serve_app.launch.registry_commands import forecaster
from serve_app.launch.report_command import report
from serve_app.launch.what_if_command import simulate
from serve_app.page.address import Address, PageError
from shadecast.errors import AwayError, ConfigError, NotInstalledError, ShadecastError

if TYPE_CHECKING:
    from serve_app.launch.control_plane import ControlPlane

cli = typer.Typer(no_args_is_help=True, help="Predictive load balancing for Ray Serve.", rich_markup_mode=None)
console = Console()

FAILED, BAD_USE, AWAY = 1, 2, 3
"""Exit codes beside 0, which is: done."""
_UsageError: Any = typer.BadParameter.__base__
"""Of click, which typer has within itself from some version on."""

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


def run() -> None:
    """Run the command line; an error of ours is one line on stderr, and an exit code that says of which kind."""
    try:
        code = cli(prog_name="shadecast", standalone_mode=False)
    except ShadecastError as error:
        code = failed(str(error), exit_code(error))
    except _UsageError as error:
        code = _wrong_use(error)
    raise SystemExit(code)


def _wrong_use(error: Any) -> int:
    """A command or option that does not exist, or a value that cannot be."""
    text = error.format_message()
    if "\n" in text:  # the help that whoever gives nothing gets
        print(text, file=sys.stderr)
        return BAD_USE
    command = error.ctx.command_path if error.ctx is not None else "shadecast COMMAND"
    return failed(f"{text.rstrip('.')}; see `{command} --help`", BAD_USE)


def exit_code(error: ShadecastError) -> int:
    """3: no cluster or control plane is reached; 2: something given is wrong; 1: it was refused, or has failed."""
    match error:
        case AwayError():
            return AWAY
        case ConfigError() | PageError() | NotInstalledError():
            return BAD_USE
        case _:
            return FAILED


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
    """Start a local cluster, the control plane and an application. Ctrl-C stops everything."""
    from serve_app.app import AppArgs, build  # noqa: PLC0415 - the other commands do not need these
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
    """Stop the control plane. Applications go on by power of two choices."""
    from serve_app.launch.control_plane import stop_control_plane  # noqa: PLC0415 - see above

    with connected(address):
        stopped = stop_control_plane()
    if as_json:
        answer(stopped=stopped)
    else:
        console.print(f"Stopped {stopped} actors.")


for _command in (status, nodes, explain, drain, release, announce, report, simulate):
    cli.command()(_command)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Retrain the forecaster, as `python -m train` does.

    It finds ours, also where another `train` hides it.
    """
    sys.argv[1:] = context.args
    runpy.run_module("train", run_name="__main__", alter_sys=True)


cli.add_typer(forecaster, name="forecaster")
