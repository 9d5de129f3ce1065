"""What `shadecast status` and `nodes` show: tables that fit the terminal. A status in, lines and tables out.

Each column has a rank. Where the terminal is too narrow, those of the greatest rank are left out, and named below the
table; no cell is cut, except for hosts' names, which may be long.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from serve_app.launch.ids import node_names, replica_ids, short_ids
from shadecast.config import LOST_AFTER_S

_GAP = 2
_LONGEST_HOST = 16
_HORIZON = "5.0"
_WEIGHTS = (0.3, 0.4, 0.3)
"""Of the quantiles .1, .5 and .9 in an expected value (Swanson's rule), as in `shadecast.capacity`."""
_LOADS = {"cpu": "cpu_background_fraction", "memory": "memory_fraction", "network": "network_background_fraction"}
_CHANGES = 10
_SILENT_S = 30.0

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: `rank` 0 is always shown."""

    heading: str
    cells: Sequence[str]
    rank: int = 0
    right: bool = False

    @property
    def width(self) -> int:
        """In cells of the terminal."""
        return max(cell_len(text) for text in (self.heading, *self.cells))


def fit(columns: Sequence[Column], width: float) -> tuple[list[Column], list[Column]]:
    """Those that fit into `width`, and those that are left out."""
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) - _GAP > width:
        last = max(shown, key=lambda column: column.rank)
        if last.rank == 0:
            break
        shown.remove(last)
    return shown, [column for column in columns if column not in shown]


def table(title: str, columns: Sequence[Column], width: float) -> list[RenderableType]:
    """A title, the columns that fit, and the names of the others."""
    shown, left_out = fit(columns, width)
    drawn = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in shown:
        drawn.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
    for row in zip(*(column.cells for column in shown), strict=True):
        drawn.add_row(*(Text(cell) for cell in row))
    found: list[RenderableType] = [Text(title, style="bold"), drawn]
    if left_out:
        found.append(Text(f"left out: {', '.join(c.heading for c in left_out)}; --wide shows all", style="dim"))
    return [*found, Text()]


def status_view(status: Status, width: int, *, wide: bool = False) -> list[RenderableType]:
    """Nodes, each deployment's replicas, and the last changes of state."""
    nodes, replicas = _shown_ids(node_names(status), wide), _shown_ids(replica_ids(status), wide)
    found = nodes_view(status, width, wide=wide)
    if not status["deployments"]:
        text = "No deployment routes by Shadecast yet: set request_router_class to serve_app.router:PredictiveRouter."
        found += [Text(text), Text()]
    for deployment in status["deployments"]:
        found += _deployment(deployment, nodes, replicas, width, wide=wide)
    found += [Text(line) for line in retraining_lines(status.get("retraining"))]
    for entry in status["transitions"][-_CHANGES:]:
        replica = replicas.get(entry["replica_id"]) or entry["replica_id"][: None if wide else 8]
        change = f"{entry['before']} -> {entry['after']}: {entry['reason']}"
        found.append(Text(f"{span(entry['ago_s']):>7} ago  {replica}  {change}"))
    return found


def retraining_lines(view: Mapping[str, Any] | None) -> list[str]:
    """How self-retraining stands, and what came of it last; nothing where it is off."""
    if view is None:
        return []
    since, reason = span(view["since_s"]), view["reason"]
    match view["state"]:
        case "training":
            now = f"under way for {since}"
        case "probation":
            now = f"{view['version']} on probation for {since}, beside {view['former']}; {reason}"
        case _:
            now = f"next look at the log in {span(view['next_in_s'])}; {reason or 'nothing has happened yet'}"
    silent = f" (as it said {span(view['age_s'])} ago)" if view["age_s"] > _SILENT_S else ""
    lines = [f"retraining every {span(view['every_s'])}: {now}{silent}"]
    if (last := view["last"]) is not None:
        lines.append(f"  last: {' '.join(filter(None, (last['version'], last['outcome'])))}: {last['reason']}")
    return [*lines, ""]


def nodes_view(status: Status, width: int, *, wide: bool = False) -> list[RenderableType]:
    """A row for each node: its state, what others leave of it now and will leave, how old that is, holds, replicas."""
    rows = node_rows(status)
    short = _shown_ids((row["node_id"] for row in rows), wide)

    def column(heading: str, key: str, rank: int = 0, right: bool = False) -> Column:
        return Column(heading, [row[key] for row in rows], rank, right)

    free = [_free(row) for row in rows]
    hosts = [row["hostname"] if wide else _cut(row["hostname"], _LONGEST_HOST) for row in rows]
    columns = [
        Column("node", [short[row["node_id"]] for row in rows]),
        Column("host", hosts, 2),
        column("state", "state"),
        *(Column(f"{name} free", [each[name] for each in free], 0, True) for name in _LOADS),
        Column("age", [span(row["age_s"]) for row in rows], 1, True),
        column("hold", "hold"),
        Column("replicas", [str(len(row["replicas"])) for row in rows], 0, True),
        Column("their states", [_states(row["replicas"]) for row in rows], 3),
        Column("cpu used", [percent(row["cpu_fraction"]) for row in rows], 4, True),
        Column("skill", [_by_resource(row["skill"]) for row in rows], 6),
        Column("model", [row["model_version"] or "-" for row in rows], 5),
    ]
    found = table("Nodes: what others leave free, now->in 5 s", columns, math.inf if wide else width)
    found[-1:] = [Text(line) for line in _announced(status, short)] + found[-1:]
    return found


def node_rows(status: Status) -> list[dict[str, Any]]:
    """Each node's row as `shadecast nodes --json` has it; None is "not known"."""
    holds, leaving = set(status.get("holds", ())), set(status.get("leaving", ()))
    known = {node["node_id"]: node for node in status["nodes"]}
    announced = status.get("announced", ())
    rows = []
    for node_id, hostname in sorted(node_names(status).items(), key=lambda item: (item[1], item[0])):
        node = known.get(node_id) or {}
        now, predicted = node.get("current") or {}, node.get("predicted") or {}
        age_s = node.get("age_s")
        hold = "Ray" if node_id in leaving else "operator" if node_id in holds else "-"
        rows.append(
            {
                "node_id": node_id,
                "hostname": hostname,
                "state": _node_state(node, hold, any(_under_way(a, node_id) for a in announced)),
                "age_s": age_s,
                "hold": hold,
                "free": {r: _rest(now.get(field)) for r, field in _LOADS.items()},
                "expected_free": {r: _rest(_expected(predicted.get(r))) for r in _LOADS},
                "cpu_fraction": now.get("cpu_fraction"),
                "skill": node.get("skill") or {},
                "model_version": node.get("model_version") or "",
                "announced": [dict(a) for a in announced if a["node_id"] == node_id],
                "replicas": [
                    {"replica_id": r["replica_id"], "deployment": d["deployment"], "state": r["state"]}
                    for d in status["deployments"]
                    for r in d["replicas"]
                    if r["node_id"] == node_id
                ],
            }
        )
    return rows


def _node_state(node: Mapping[str, Any], hold: str, announced: bool) -> str:
    if hold != "-":
        return "leaving" if hold == "Ray" else "held"
    if not node:
        return "unheard"
    if (node.get("age_s") or 0.0) > LOST_AFTER_S:
        return "silent"
    if announced:
        return "announced"
    return "ok" if node.get("predicted") else "no forecast"


def _under_way(announcement: Mapping[str, Any], node_id: str) -> bool:
    return bool(announcement["node_id"] == node_id and announcement["starts_in_s"] <= 0.0)


def _announced(status: Status, short: Mapping[str, str]) -> Iterable[str]:
    for each in status.get("announced", ()):
        node = short.get(each["node_id"], each["node_id"][:8])
        begins = "since" if each["starts_in_s"] <= 0.0 else "in"
        when = f"{begins} {span(abs(each['starts_in_s']))}, over in {span(each['ends_in_s'])}"
        yield f"announced for {node}: {percent(each['strength'])} of it taken, {when}"


def _free(row: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _LOADS:
        now, then = row["free"][name], row["expected_free"][name]
        found[name] = (
            "-" if now is None else f"{100 * now:.0f}%" if then is None else f"{100 * now:.0f}->{100 * then:.0f}%"
        )
    return found


def _expected(rows: Mapping[str, Sequence[float]] | None) -> float | None:
    """Expected load at the horizon."""
    quantiles = (rows or {}).get(_HORIZON)
    if quantiles is None or any(not _known(q) for q in quantiles):
        return None
    return sum(w * q for w, q in zip(_WEIGHTS, quantiles, strict=True))


def _deployment(
    deployment: Mapping[str, Any], nodes: Mapping[str, str], replicas: Mapping[str, str], width: int, *, wide: bool
) -> list[RenderableType]:
    levels = ", ".join(sorted({r["level"] for r in deployment["routers"]})) or "no router"
    age = span(deployment["table_age_s"])
    title = f"{deployment['deployment']}: table {deployment['table_version']}, {age} old; routers go by: {levels}"
    if deployment["panic"]:
        title += "; PANIC: load goes to all that live"
    if (observed := deployment["observed"])["requests"]:
        saved = 1.0 - observed["time_ours"] / max(observed["time_taken"], 1e-9)
        title += f"\nonly observing: of {observed['requests']} requests, Shadecast's choice would have saved "
        title += f"{saved:.0%} of the time, by its own estimates"
    rows = deployment["replicas"]
    notes = [_note(row) for row in rows]
    columns = [
        Column("replica", [replicas[row["replica_id"]] for row in rows]),
        Column("node", [nodes[row["node_id"]] for row in rows], 1),
        Column("state", [str(row["state"]) for row in rows]),
        Column("share", [percent(row["share"]) for row in rows], 0, True),
        Column("capacity", [number(row["capacity"]) for row in rows], 0, True),
        Column("queue", [number(row["queue"], 0) for row in rows], 0, True),
        Column("req/s", [number(row["rate_per_s"], 1) for row in rows], 0, True),
        Column("mean", [milliseconds(row["mean_s"]) for row in rows], 0, True),
        Column("errors", [percent(row["error_fraction"]) for row in rows], 0, True),
        Column("copies", [percent(row["mirror_fraction"]) for row in rows], 2, True),
        Column("note", notes, 4),
    ]
    limit = math.inf if wide else width
    found = table(title, columns, limit)
    if columns[-1] in fit(columns, limit)[1]:
        told = [Text(f"  {replicas[row['replica_id']]}: {note}") for row, note in zip(rows, notes, strict=True) if note]
        found[2:2] = told
    return found


def _note(row: Mapping[str, Any]) -> str:
    held = "kept out, until it is released" if row.get("held") else ""
    retry = f"next trial in {span(row['retry_in_s'])}" if _known(row["retry_in_s"]) and row["retry_in_s"] > 0 else ""
    return "; ".join(filter(None, (held, row["trial"] or retry)))


# ---------------------------------------------------------------- words and numbers


def percent(value: Any) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.0f} %" if _known(value) else "-"


def number(value: Any, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    return f"{value:.{digits}f}" if _known(value) else "-"


def milliseconds(value_s: Any) -> str:
    """A duration of requests."""
    return f"{1000 * value_s:.{1 if value_s < 1 else 0}f} ms" if _known(value_s) else "-"


def span(value_s: Any) -> str:
    """A time that has passed, or will, in the unit that fits."""
    if not _known(value_s):
        return "-"
    for unit, size_s, limit_s in (("s", 1.0, 100.0), ("min", 60.0, 6000.0), ("h", 3600.0, 172_800.0)):
        if value_s < limit_s:
            return f"{value_s / size_s:.{1 if unit == 's' and value_s < 10 else 0}f} {unit}"
    return f"{value_s / 86_400.0:.0f} d"


def _states(replicas: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(Counter(str(r["state"]) for r in replicas).items())) or "-"


def _by_resource(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items()) or "-"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 2] + ".."


def _shown_ids(ids: Iterable[str], wide: bool) -> dict[str, str]:
    return {each: each for each in ids} if wide else short_ids(ids)


def _rest(load: Any) -> float | None:
    return min(max(1.0 - load, 0.0), 1.0) if _known(load) else None


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
