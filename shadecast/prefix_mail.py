"""What the coordinator passes on between the routers of one deployment: prompts that they sent where, and loads.

A router posts with each exchange and takes what the others have posted since. Everything is bounded, and what is left
out costs a prompt that is computed again. Nothing here outlives the coordinator: decisions are of the last seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadecast.config import LOST_AFTER_S
from shadecast.errors import MessageError
from shadecast.messages import as_list, numbers
from shadecast.prefix import Decision
from shadecast.prefix_exchange import read_decisions

KEPT_S = 10.0
"""Older decisions are passed on to nobody."""
_MOST_BYTES = 4_000_000
"""Of all decisions that are kept: the last second of twenty routers at their most."""
_MOST_TAKEN_BYTES = 500_000
"""In one answer; the rest comes with the next one."""
_MOST_REPLICAS = 10_000
_TRUST, _HALF_LIFE_S = 0.7, 1.0
_MOST_TOKENS = 1e12


def trust(age_s: float) -> float:
    """How far what others said of a replica's load differs from their mean still: loads change within a second.

    Without it routers herd: all send to what was idle when they heard of it (docs/decisions/0090).
    """
    return _TRUST * math.exp2(-max(age_s, 0.0) / _HALF_LIFE_S)


def others_load(tokens: Mapping[str, float], age_s: float, replica_ids: Collection[str]) -> dict[str, float]:
    """Pending tokens of the other routers on each replica, as good as they are known after `age_s`."""
    if not replica_ids:
        return {}
    mean, kept = sum(tokens.get(each, 0.0) for each in replica_ids) / len(replica_ids), trust(age_s)
    return {each: mean + kept * (tokens.get(each, 0.0) - mean) for each in replica_ids}


@dataclass(frozen=True, slots=True)
class News:
    """What a router takes of the others."""

    number: int = 0
    """Of the last decisions in it: the next ones are asked for behind it."""
    decisions: Sequence[Decision] = ()
    tokens: Mapping[str, float] = field(default_factory=dict)
    """Pending on each replica, all other routers together."""
    age_s: float = 0.0


def read_news(received: Any) -> News:
    """What `Mail.take` made; raises MessageError if it is none of that."""
    number, age_s = numbers(received, ("number", "age_s"))
    posted = as_list(received.get("decisions", ()), "prefixes.decisions")
    decisions = [decision for each in posted for decision in read_decisions(each)]
    return News(int(number), decisions, _read_load(received), max(float(age_s), 0.0))


def load_columns(tokens: Mapping[str, float]) -> dict[str, list[Any]]:
    """Pending tokens by replica, as they travel."""
    return {"load_of": list(tokens), "tokens": [round(each) for each in tokens.values()]}


def _read_load(received: Mapping[str, Any]) -> dict[str, float]:
    replicas, tokens = (as_list(received.get(name, ()), f"prefixes.{name}") for name in ("load_of", "tokens"))
    if len(replicas) != len(tokens) or len(replicas) > _MOST_REPLICAS:
        raise MessageError(
            f"prefixes: loads of {len(replicas)} replicas (at most {_MOST_REPLICAS}), {len(tokens)} values"
        )
    if not all(isinstance(each, str) for each in replicas):
        raise MessageError("prefixes.load_of: names are expected")
    for each in tokens:
        if not isinstance(each, (int, float)) or isinstance(each, bool) or not 0.0 <= each <= _MOST_TOKENS:
            raise MessageError(f"prefixes.tokens = {each!r}: a number from 0 to {_MOST_TOKENS:g} is expected")
    return dict(zip(replicas, map(float, tokens), strict=True))


class Mail:
    """One deployment's."""

    def __init__(self) -> None:
        self._number = 0
        self._posted: deque[tuple[int, float, str, dict[str, Any], int]] = deque()
        """Number, time, router, decisions and their bytes, the oldest first."""
        self._bytes = 0
        self._loads: dict[str, tuple[float, dict[str, float]]] = {}
        """What each router has pending, and when it said so."""

    def post(self, received: Any, now_s: float) -> tuple[str, int]:
        """A router's decisions and load; its id and what it asks for. Raises MessageError, and takes nothing then."""
        (after,) = numbers(received, ("after",))
        router_id = received.get("router_id")
        if not isinstance(router_id, str) or not router_id:
            raise MessageError(f"prefixes.router_id = {router_id!r}: text is expected")
        posted, load = received.get("decisions"), _read_load(received)
        if posted is not None and read_decisions(posted):
            size = sum(len(str(each)) for each in posted.values())
            self._number += 1
            self._posted.append((self._number, now_s, router_id, dict(posted), size))
            self._bytes += size
        self._loads[router_id] = now_s, load
        while self._posted and (self._bytes > _MOST_BYTES or self._posted[0][1] < now_s - KEPT_S):
            self._bytes -= self._posted.popleft()[-1]
        return router_id, int(after)

    def take(self, router_id: str, after: int, now_s: float) -> dict[str, Any]:
        """What others have posted behind `after`; after a restart of the coordinator, all there is."""
        number, size = after if after <= self._number else 0, 0
        decisions: list[dict[str, Any]] = []
        for at, _, whose, posted, length in self._posted:
            if at <= number:
                continue
            if whose != router_id:
                if decisions and size + length > _MOST_TAKEN_BYTES:
                    break
                decisions.append(posted)
                size += length
            number = at
        self._loads = {name: said for name, said in self._loads.items() if said[0] >= now_s - LOST_AFTER_S}
        tokens: dict[str, float] = {}
        aged = 0.0
        for name, (at_s, load) in self._loads.items():
            for replica_id, count in load.items() if name != router_id else ():
                tokens[replica_id] = tokens.get(replica_id, 0.0) + count
                aged += count * (now_s - at_s)
        age_s = aged / max(sum(tokens.values()), 1.0)
        return {"number": number, "decisions": decisions, "age_s": age_s, **load_columns(tokens)}
