"""Commands that look: `shadecast status | nodes | explain`."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType

from serve_app.launch import explanations, ids, tables
from serve_app.launch.answers import JsonOption, answer
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.times import duration_s
from serve_app.launch.watching import Watching
from serve_app.page.watch import to_json
from shadecast.errors import ConfigError, OrderError, ShadecastError

console = Console()
_WATCH_S = 1.0
_WATCH_ANSWER_S = 3.0
_LEAST_WIDTH, _WIDE = 80, 1000
WideOption = Annotated[bool, typer.Option("--wide", help="All columns and whole ids, however narrow the terminal.")]


def ask_status(timeout_s: float = 30.0) -> dict[str, Any]:
    """The coordinator's status as JSON values; what it names is remembered for completion."""
    from serve_app.launch.control_plane import ask_coordinator  # noqa: PLC0415 - loads Ray

    status: dict[str, Any] = to_json(ask_coordinator("status", timeout_s=timeout_s))
    ids.remember(status)
    return status


def _show(view: list[RenderableType], *, wide: bool = False) -> None:
    """Print tables; below 80 columns the terminal wraps them, nothing is cut."""
    Console(width=_WIDE if wide else _width()).print(*view, sep="\n", highlight=False)


def status(
    address: AddressOption = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second, until Ctrl-C.")] = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show nodes, replicas and changes of state.

    Nodes with what is free and will be, replicas with state, share and KPIs, the table's age.
    """
    with connected(address):
        if watch:
            _watch(wide=wide, as_json=as_json)
            return
        state = ask_status()
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
                watching.heard(ask_status(_WATCH_ANSWER_S))
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


def nodes(address: AddressOption = "", wide: WideOption = False, as_json: JsonOption = False) -> None:
    """Show a row for each node.

    State, what is free now and expected to be, age of its telemetry, hold, replicas.
    """
    with connected(address):
        state = ask_status()
    if as_json:
        answer(nodes=tables.node_rows(state))
    else:
        _show(tables.nodes_view(state, _width(), wide=wide), wide=wide)


def explain(  # noqa: PLR0917 - options of a command are named by the user
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
    """Say why a request went there, a replica gets what it gets.

    Give one of --last, --request, --replica and --node.
    """
    given = [(what, target) for what, target in (("request", request), ("replica", replica), ("node", node)) if target]
    if last:
        given.append(("last", ""))
    if len(given) != 1:
        raise ConfigError("explain: give one of --last, --request ID, --replica ID and --node ID")
    if wait and not request:
        raise ConfigError("explain: --wait is for --request: the others are known already")
    wait_s = _wait_s(wait) if wait else 0.0
    told = _explain(*given[0], address, most=50 if request else most, wait_s=wait_s)
    if as_json:
        answer(**told)
    else:
        _show(explanations.view(told, _width(), wide=wide), wide=wide)


def _wait_s(wait: str) -> float:
    from actors.explanations import LONGEST_WAIT_S  # noqa: PLC0415 - numpy, which help and completion do without

    if (wait_s := duration_s(wait, "--wait")) > LONGEST_WAIT_S:
        raise ConfigError(f"--wait {wait!r}: must be at most {LONGEST_WAIT_S:g} s")
    return wait_s


def _explain(what: str, target: str, address: str, **more: Any) -> dict[str, Any]:
    """The coordinator's explanation, as JSON values. Raises OrderError where nothing has that id."""
    from serve_app.launch.control_plane import ask_coordinator  # noqa: PLC0415 - loads Ray

    with connected(address):
        if what in ("replica", "node"):
            state = ask_status()
            names = ids.node_names(state) if what == "node" else {}
            target = ids.resolve(target, names or ids.replica_ids(state), names, what)
        asked = {"what": what, "target": target, **more}
        told: dict[str, Any] = to_json(ask_coordinator("explain", asked, timeout_s=30.0 + more["wait_s"]))
    if "refused" in told:
        raise OrderError(str(told["refused"]))
    return told
