"""Orders: `shadecast drain | release | announce`."""

from __future__ import annotations

import datetime
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from serve_app.launch import ids
from serve_app.launch.answers import JsonOption, answer, problems
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.look_commands import ask_status
from serve_app.launch.times import duration_s, from_now_s
from shadecast.errors import ConfigError

console = Console()

TargetArgument = Annotated[
    str,
    typer.Argument(
        help="Id of a replica or node, its beginning, or a node's host name.", autocompletion=ids.complete_targets
    ),
]


def drain(target: TargetArgument, address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Take a replica, or all of a node, out of traffic. Requests under way finish."""
    told = _order("drain", target, address)
    if as_json:
        answer(**told)
    else:
        now = f"{told['concerned']} of what runs now"
        console.print(f"Kept out of traffic until `shadecast release {target}`: {now}.", markup=False, highlight=False)


def release(target: TargetArgument, address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Let a drained replica or node back in, through a trial."""
    held: set[str] = set()
    told = _order("release", target, address, held=held)
    if as_json:
        answer(**told)
    elif told["target"] in held:
        console.print(f"Let back in, through a trial: {told['concerned']} of what runs now.", highlight=False)
    else:
        others = ", ".join(sorted(ids.short_ids(held).values())) or "nothing"
        text = f"No order held {target} itself, so nothing changes. Held are: {others}."
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def announce(  # noqa: PLR0917 - options of a command are named by the user
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
    """Tell in advance that a node will be slow or away. Load leaves it in time, and returns."""
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
        text = f"Announced for node {told['target'][:16]}: from {starts} to {ends}."
        console.print(text, highlight=False, soft_wrap=True)
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


def _order(
    what: str, given: str, address: str, *, nodes_only: bool = False, held: set[str] | None = None, **values: Any
) -> dict[str, Any]:
    """Order for the one replica or node that `given` means; into `held` go those held before. Raises OrderError."""
    from serve_app.launch.control_plane import order  # noqa: PLC0415 - loads Ray

    with connected(address):
        state = ask_status()
        names = ids.node_names(state)
        known = set(names)
        if not nodes_only:
            known |= ids.replica_ids(state) | set(state.get("holds", ()))
        if held is not None:
            held.update(state.get("holds", ()))
        target = ids.resolve(given, known, names, "node" if nodes_only else "replica or node")
        return order(what, target, **values)
