"""What the live page knows: the newest status, asked for at most twice a second, and the last five minutes.

However many browsers look, the coordinator is asked once. The ring lets a page that is opened late, or loaded again,
show how the present came about.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from shadecast.errors import AwayError

HISTORY_S = 300.0
NODE_SERIES = (
    "cpu_fraction",
    "cpu_background_fraction",
    "memory_fraction",
    "network_fraction",
    "network_background_fraction",
)
_PERIOD_S = 1.0
_FRESH_S = 0.5
"""A status younger than this is shown again instead of asked for again."""
_ANSWER_S = 5.0


class ControlPlaneAwayError(AwayError):
    """The coordinator does not answer; routers go on without it."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One moment: `nodes[node_id]` in the order of NODE_SERIES, `rates[deployment][replica_id]` in requests per s."""

    at_s: float
    nodes: dict[str, tuple[float | None, ...]]
    rates: dict[str, dict[str, float | None]]


class Watch:
    """Asks `ask` for the status and remembers; `now_s` is a monotonic clock."""

    def __init__(
        self, ask: Callable[[], Awaitable[dict[str, Any]]], now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._now_s = now_s
        self._lock = asyncio.Lock()
        self._asked_s = -math.inf
        self._status: dict[str, Any] = {}
        self._away = "not asked yet"
        self._ring: deque[_Sample] = deque()

    async def latest(self) -> dict[str, Any]:
        """The newest status as JSON values (None for what is not known). Raises ControlPlaneAwayError."""
        async with self._lock:
            if self._now_s() - self._asked_s >= _FRESH_S:
                await self._refresh()
        if self._away:
            raise ControlPlaneAwayError(self._away)
        return self._status

    async def run(self) -> None:
        """Ask every second, for ever."""
        while True:
            with contextlib.suppress(ControlPlaneAwayError):
                await self.latest()
            await asyncio.sleep(_PERIOD_S)

    async def _refresh(self) -> None:
        try:
            answer = await _answer(self._ask)
        except ControlPlaneAwayError as error:
            self._away = str(error)
        else:
            self._status, self._away = answer, ""
            self._remember(self._now_s())
        self._asked_s = self._now_s()

    def _remember(self, now_s: float) -> None:
        if self._ring and now_s - self._ring[-1].at_s < 0.9 * _PERIOD_S:
            return
        nodes = {
            str(node.get("node_id")): tuple(_rounded((node.get("current") or {}).get(name)) for name in NODE_SERIES)
            for node in self._status.get("nodes", [])
        }
        rates = {
            str(deployment.get("deployment")): {
                str(replica.get("replica_id")): _rounded(replica.get("rate_per_s"))
                for replica in deployment.get("replicas", [])
            }
            for deployment in self._status.get("deployments", [])
        }
        self._ring.append(_Sample(now_s, nodes, rates))
        while now_s - self._ring[0].at_s > HISTORY_S:
            self._ring.popleft()

    def history(self) -> dict[str, Any]:
        """The ring as columns, oldest first; None where a node or replica was not there.

        `ago_s` [time], `nodes[node_id][name]` [time] for each name of NODE_SERIES, and
        `rates[deployment][replica_id]` [time] in requests per second.
        """
        samples, now_s = tuple(self._ring), self._now_s()
        nodes: dict[str, dict[str, list[float | None]]] = {}
        rates: dict[str, dict[str, list[float | None]]] = {}
        for i, sample in enumerate(samples):
            for node_id, values in sample.nodes.items():
                if node_id not in nodes:
                    nodes[node_id] = {name: [None] * len(samples) for name in NODE_SERIES}
                for name, value in zip(NODE_SERIES, values, strict=True):
                    nodes[node_id][name][i] = value
            for deployment, by_replica in sample.rates.items():
                of_deployment = rates.setdefault(deployment, {})
                for replica_id, rate in by_replica.items():
                    if replica_id not in of_deployment:
                        of_deployment[replica_id] = [None] * len(samples)
                    of_deployment[replica_id][i] = rate
        return {"ago_s": [_rounded(now_s - s.at_s) for s in samples], "nodes": nodes, "rates": rates}


class Explanations:
    """Why a replica or node stands where it does: however many ask, the coordinator has one question at a time."""

    def __init__(
        self, ask: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] | None, now_s: Callable[[], float]
    ) -> None:
        self._ask, self._now_s = ask, now_s
        self._lock = asyncio.Lock()
        self._kept: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}

    async def of(self, what: str, target: str) -> dict[str, Any]:
        """As JSON values, at most half a second old. Raises ControlPlaneAwayError."""
        async with self._lock:
            now_s = self._now_s()
            self._kept = {key: kept for key, kept in self._kept.items() if now_s - kept[0] < _FRESH_S}
            kept = self._kept.get((what, target))
            if kept is None:
                kept = self._kept[what, target] = (now_s, await self._asked(what, target))
        return kept[1]

    async def _asked(self, what: str, target: str) -> dict[str, Any]:
        ask = self._ask
        if ask is None:
            raise ControlPlaneAwayError("nobody to ask")
        return await _answer(lambda: ask({"what": what, "target": target}))


async def _answer(ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    """The coordinator's, as JSON values. Raises ControlPlaneAwayError, whatever has gone wrong."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            answer: dict[str, Any] = to_json(await ask())
    except TimeoutError:
        raise ControlPlaneAwayError(f"the coordinator did not answer within {_ANSWER_S:g} s") from None
    except ControlPlaneAwayError:
        raise
    except Exception as error:
        raise ControlPlaneAwayError(f"asking the coordinator failed: {one_line(error)}") from error
    return answer


def to_json(value: Any) -> Any:
    """`value` with only what JSON can carry: NaN and infinities become None, tuples lists, unknown things text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(entry) for entry in value]
    if isinstance(value, Real):  # other widths of numpy
        return to_json(float(value))
    return str(value)


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its text, bounded."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _rounded(value: Any) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, (int, float)) else None
