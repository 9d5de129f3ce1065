"""Ids as people read and type them: the shortest beginnings that are not ambiguous."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.launch.own_files import cache_folder
from shadecast.errors import OrderError

LEAST = 8
"""Characters of a short id; more where two begin alike."""


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """A beginning of each id that no other has."""
    known = sorted(set(ids))
    short = {}
    for before, this, after in zip(["", *known], known, [*known[1:], ""], strict=False):
        alike = max(_alike(before, this), _alike(this, after))
        short[this] = this[: max(LEAST, alike + 1)]
    return short


def _alike(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def node_names(status: Mapping[str, Any]) -> dict[str, str]:
    """Every node that a status knows of, with its host's name where that is known: id -> name."""
    found = {str(r["node_id"]): "" for d in status["deployments"] for r in d["replicas"]}
    found |= dict.fromkeys(map(str, (*status.get("leaving", ()), *status.get("unheard", ()))), "")
    return found | {str(n["node_id"]): str(n.get("hostname") or "") for n in status["nodes"]}


def replica_ids(status: Mapping[str, Any]) -> set[str]:
    """Every replica that a status knows of."""
    return {str(r["replica_id"]) for d in status["deployments"] for r in d["replicas"]}


def resolve(given: str, ids: Iterable[str], names: Mapping[str, str], what: str) -> str:
    """The one id that begins so, or whose host's name (`names[id]`) it is. Raises OrderError, saying which fit."""
    known = set(ids)
    if given in known:
        return given
    fitting = sorted(each for each in known if given and (each.startswith(given) or names.get(each) == given))
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise OrderError(f"no {what} {given!r}: `shadecast status` shows those that exist")
    short = short_ids(known)
    shown = ", ".join(short[each] for each in fitting[:5]) + (", ..." if len(fitting) > 5 else "")
    raise OrderError(f"{given!r} fits {len(fitting)}: {shown}; give more of the id")


# ---------------------------------------------------------------- for completion by the shell


def remember(status: Mapping[str, Any]) -> None:
    """Keep the ids that a status shows: completion must answer at once, and cannot ask a cluster."""
    nodes = node_names(status)
    kept = {"nodes": sorted(short_ids(nodes).values()), "replicas": sorted(short_ids(replica_ids(status)).values())}
    kept["nodes"] += sorted(set(filter(None, nodes.values())))
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        (cache_folder() / "ids.json").write_text(json.dumps(kept))


def complete_nodes(incomplete: str) -> list[str]:
    """Nodes that were seen last."""
    return [each for each in _remembered("nodes") if each.startswith(incomplete)]


def complete_targets(incomplete: str) -> list[str]:
    """Replicas and nodes that were seen last."""
    return [each for each in [*_remembered("replicas"), *_remembered("nodes")] if each.startswith(incomplete)]


def _remembered(what: str) -> list[str]:
    try:
        return [str(each) for each in json.loads((cache_folder() / "ids.json").read_text())[what]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
