"""The commands `shadecast forecaster ...`: versions of the model that node forecasters run."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from serve_app.launch.answers import JsonOption, answer
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.tables import number
from serve_app.page.watch import to_json

console = Console()
forecaster = typer.Typer(no_args_is_help=True, help="Versions of the node forecasters' model.", rich_markup_mode=None)
RegistryOption = Annotated[str, typer.Option(help="Folder or URI of the registry; empty: the shipped one.")]


def _registry(uri: str) -> Any:
    from models.registry import SHIPPED, Registry  # noqa: PLC0415 - loads torch, which no other command needs

    return Registry(uri or str(SHIPPED))


@forecaster.command("list")
def forecaster_list(registry: RegistryOption = "", as_json: JsonOption = False) -> None:
    """List the versions, oldest first, and what runs."""
    versions = _registry(registry)
    roles = {versions.challenger(): "in shadow", versions.champion(): "champion"}
    found = []
    for version in versions.versions():
        card = versions.card(version)
        made_s, rows = float(card.get("created_wall_s", 0.0)), card.get("rows")
        found.append({"version": version, "created_wall_s": made_s, "rows": rows, "role": roles.get(version, "")})
    if as_json:
        answer(versions=to_json(found))
        return
    for each in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(each["created_wall_s"]))
        rows = "?" if each["rows"] is None else each["rows"]
        console.print(f"{each['version']:<24} {made} UTC  {rows} rows  {each['role']}", highlight=False)


@forecaster.command("show")
def forecaster_show(
    version: Annotated[str, typer.Argument()], registry: RegistryOption = "", as_json: JsonOption = False
) -> None:
    """Print a version's card. It has data, schema, metrics against every baseline, code."""
    card = _registry(registry).card(version)
    if as_json:
        answer(version=version, card=to_json(card))
    else:
        print(json.dumps(card, indent=1))


@forecaster.command("promote")
def forecaster_promote(
    version: Annotated[str, typer.Argument()], registry: RegistryOption = "", as_json: JsonOption = False
) -> None:
    """Make a version the champion. Running forecasters load it within 10 s."""
    _registry(registry).promote(version)
    _say_champion(version, as_json=as_json)


@forecaster.command("shadow")
def forecaster_shadow(
    version: Annotated[str, typer.Argument(help="A version, or none, which ends the trial.")],
    registry: RegistryOption = "",
    as_json: JsonOption = False,
) -> None:
    """Score a version on live telemetry beside the champion.

    Nothing acts on it; see `shadecast forecaster live`.
    """
    _registry(registry).challenge("" if version == "none" else version)
    if as_json:
        answer(in_shadow=None if version == "none" else version)
    else:
        console.print(f"In shadow: {version}.", highlight=False)


@forecaster.command("live")
def forecaster_live(address: AddressOption = "", as_json: JsonOption = False) -> None:
    """Show what every node runs, with its live skill.

    And what it scores in shadow, and what was refused.
    """
    from serve_app.launch.control_plane import forecaster_states  # noqa: PLC0415 - loads Ray

    with connected(address):
        states = to_json(forecaster_states())
    if as_json:
        answer(nodes=states)
        return
    for node, state in states.items():
        for role, one in state["versions"].items():
            skill = ", ".join(f"{resource} {number(value)}" for resource, value in one["skill"].items())
            console.print(f"{node:<18} {role:<11} {one['version']:<24} {skill}", highlight=False, soft_wrap=True)
        if state["problem"]:
            console.print(f"{node:<18} {state['problem']}", markup=False, highlight=False, soft_wrap=True)


@forecaster.command("rollback")
def forecaster_rollback(registry: RegistryOption = "", as_json: JsonOption = False) -> None:
    """Return to the champion before the present one."""
    _say_champion(_registry(registry).rollback(), as_json=as_json)


def _say_champion(version: str, *, as_json: bool) -> None:
    if as_json:
        answer(champion=version)
    else:
        console.print(f"Champion is now {version}.", highlight=False)
