"""What `shadecast explain` shows: sentences, and a table of the replicas that a decision saw."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from serve_app.launch.ids import short_ids
from serve_app.launch.tables import Column, number, percent, span, table


def view(told: Mapping[str, Any], width: int, *, wide: bool = False) -> list[RenderableType]:
    """An answer of the coordinator's `explain`, as JSON values."""
    if told["what"] in ("last", "request"):
        return _decisions(told, width, wide=wide)
    name = f"{told['replica_id']} of {told['deployment']}" if told["what"] == "replica" else f"Node {told['node_id']}"
    found: list[RenderableType] = [Text(name, style="bold")]
    found += [_hanging(f"- {sentence}", 2, width) for sentence in told["sentences"]]
    if told["changes"]:
        found += [Text(), Text("Last changes", style="bold")]
    for each in told["changes"]:
        who = "" if told["what"] == "replica" else f"{each['replica_id'] if wide else each['replica_id'][:8]}  "
        change = f"{span(each['ago_s']):>7} ago  {who}{each['before']} -> {each['after']}: {each['reason']}"
        found.append(_hanging(change, 13, width))
    return found


def _hanging(text: str, by: int, width: int) -> Text:
    """A paragraph whose lines but the first are indented."""
    return Text(textwrap.fill(text, width, subsequent_indent=" " * by, break_on_hyphens=False))


def _decisions(told: Mapping[str, Any], width: int, *, wide: bool) -> list[RenderableType]:
    found: list[RenderableType] = []
    for each in told["decisions"]:
        title = f"{each['request_id']}: {each['method']} of {each['deployment']}, {span(each['ago_s'])} ago"
        found.append(Text(title, style="bold"))
        found += [_hanging(f"- {sentence}", 2, width) for sentence in each["sentences"]]
        found += _candidates(each, width, wide=wide) if each["candidates"] else [Text()]
    if told["what"] == "request" and not told["decisions"]:
        found += [Text(line) for line in _not_kept(told["request_id"])]
    elif not told["decisions"]:
        found.append(Text("No router has decided anything lately."))
    if told["answered"] < told["routers"]:
        found.append(Text(f"{told['routers'] - told['answered']} of {told['routers']} routers have not answered."))
    return found


def _not_kept(request_id: str) -> list[str]:
    return [
        f"No router has kept a decision on {request_id}.",
        "They keep the first of every second, and those that waited, came back,",
        "were refused or sent again, or whose session moved, for some minutes at most.",
        "To have it kept, ask before it comes, and send it with this id:",
        f"  shadecast explain --request {request_id} --wait 60s",
        f"  curl -H 'X-Request-ID: {request_id}' ...",
    ]


def _candidates(each: Mapping[str, Any], width: int, *, wide: bool) -> list[RenderableType]:
    """The replicas that a decision saw, and what their scores are made of."""
    by = "prefix_score" if each["prompt_tokens"] else "score"
    rows = sorted(each["candidates"], key=lambda c: (not c["looked_at"], c[by] is None, c[by]))
    ids = [row["replica_id"] for row in rows]
    short = dict(zip(ids, ids, strict=True)) if wide else short_ids(ids)
    prompt = [
        Column("prefix score", [number(row["prefix_score"]) for row in rows], 0, True),
        Column("cached", [number(row["cached_tokens"], 0) for row in rows], 0, True),
        Column("waiting", [number(row["waiting_tokens"], 0) for row in rows], 0, True),
    ]
    columns = [
        Column("replica", [short[row["replica_id"]] for row in rows]),
        Column("", [_role(row, each["chosen"]) for row in rows]),
        *(prompt if each["prompt_tokens"] else []),
        Column("score", [number(row["score"]) for row in rows], 0, True),
        Column("cost", [number(row["cost"]) for row in rows], 0, True),
        Column("queue", [number(row["queue"], 1) for row in rows], 0, True),
        Column("capacity", [number(row["capacity"]) for row in rows], 0, True),
        Column("live", [number(row["live_capacity"]) for row in rows], 1, True),
        Column("forecast", [_factor(row["forecast_factor"]) for row in rows], 1, True),
        Column("share", [percent(row["share"]) for row in rows], 2, True),
        Column("state", [row["state"] or "-" for row in rows], 3),
        Column("own calls", [str(row["mine"]) for row in rows], 4, True),
    ]
    drawn = table("", columns, (math.inf if wide else width) - 2)[1:]  # it has its title already
    return [Padding(part, (0, 0, 0, 2)) for part in drawn[:-1]] + drawn[-1:]


def _role(row: Mapping[str, Any], chosen: str) -> str:
    if row["replica_id"] == chosen:
        return "chosen"
    return str(row["out"] or ("drawn" if row["looked_at"] else "not drawn"))


def _factor(value: Any) -> str:
    return f"x{value:.2f}" if value is not None else "-"
