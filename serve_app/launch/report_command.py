"""`shadecast report`: what Serve's own routing did while ours observed, and what ours would have done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from serve_app.launch.answers import JsonOption, answer
from serve_app.launch.connection import AddressOption, connected
from serve_app.launch.html_file import html_path, write_html
from serve_app.page.watch import to_json
from shadecast.errors import OrderError

_LEAST_WIDTH, _WIDE = 80, 200


def report(  # noqa: PLR0917 - options of a command are named by the user
    slo: Annotated[
        float,
        typer.Option(min=0.0, show_default=False, help="Seconds that a request may take. [default: 4 x the median]"),
    ] = 0.0,
    deployment: Annotated[
        str, typer.Option(metavar="APP/NAME", help="Only this one. [default: all that observe]")
    ] = "",
    html: Annotated[
        str, typer.Option(metavar="FILE", help='The page; it needs no internet. "": none.')
    ] = "shadecast-report.html",
    wide: Annotated[bool, typer.Option("--wide", help="All columns, however narrow the terminal.")] = False,
    address: AddressOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what deployments that only observe would have gained.

    SLO misses, latency, and replicas better left alone.
    """
    from serve_app.launch.control_plane import ask_coordinator  # noqa: PLC0415 - loads Ray
    from serve_app.launch.report_view import HOW, DeploymentReport, page  # noqa: PLC0415 - numpy

    page_file = html_path(html)
    with connected(address):
        observed = ask_coordinator("observed")
        status: Mapping[str, Any] = to_json(ask_coordinator("status"))
    found = _with_data(observed, deployment)
    told = [DeploymentReport(each, slo, status) for each in found]
    if page_file is not None:
        write_html(page_file, page(told))
    if as_json:
        answer(deployments=to_json([each.plain() for each in told]), how=list(HOW), html=html or None)
        return
    width = max(Console().width, _LEAST_WIDTH)
    view = [line for each in told for line in each.view(math.inf if wide else width)]
    how = [Text("How this is estimated", style="bold"), *(Padding(Text(line), (0, 0, 0, 2)) for line in HOW)]
    Console(width=_WIDE if wide else width).print(*view, *how, sep="\n", highlight=False)
    if page_file is not None:
        Console().print(f"Wrote {page_file}", markup=False, highlight=False, soft_wrap=True)


def _with_data(observed: Sequence[Mapping[str, Any]], wanted: str) -> list[Mapping[str, Any]]:
    """The deployments to report. Raises OrderError where there is none."""
    known = [each for each in observed if not wanted or each["deployment"] == wanted]
    if wanted and not known:
        names = ", ".join(each["deployment"] for each in observed) or "none"
        raise OrderError(f"--deployment {wanted!r}: no deployment of that name routes by Shadecast; there are {names}")
    found = [each for each in known if each["blocks"]]
    if found:
        return found
    if any(each["observing"] for each in known):
        raise OrderError("nothing was observed yet: no request has ended since the coordinator started")
    raise OrderError(
        f"{wanted or 'no deployment'} {'does not observe' if wanted else 'observes'}: set request_router_class to "
        "serve_app.router:ObservingRouter, and ask again when it has served for ten minutes"
    )
