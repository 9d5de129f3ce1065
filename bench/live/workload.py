"""The deployment that is measured: real CPU per request, answers that can be checked, faults taken on at the start.

A replica that starts on a node looks for that node's role: `role_path`. No role is a healthy replica.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from serve_app.copying import copy_safe

NODE, VALUE = 0, 1
BATCH_SIZE, BATCH_WAIT_S = 8, 0.02
_NEXT_IN_BATCH = 0.25
"""CPU of each further request of a batch, as a part of the first one's."""


def exchange_folder() -> Path:
    """Where driver, router and replicas of one host leave files for each other and for the benchmark outside."""
    return Path(tempfile.gettempdir()) / "shadecast-live"


def role_path(node_id: str) -> Path:
    """What the next replicas to start on this node shall be: JSON with any of slow, fail, wrong."""
    return exchange_folder() / f"role-{node_id}.json"


def bad_path() -> Path:
    """Node ids that are bad just now, as JSON: what the oracle is told."""
    return exchange_folder() / "bad.json"


def right_answer(x: int) -> int:
    """What a healthy replica answers."""
    return 3 * x + 1


def same_value(primary: Any, copy: Any) -> bool:
    """Whether two answers agree; which node gave them does not matter."""
    if isinstance(primary, list):
        return [item[VALUE] for item in primary] == [item[VALUE] for item in copy]
    return bool(primary[VALUE] == copy[VALUE])


def burn(cpu_s: float) -> None:
    """Use that much CPU time on this thread."""
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


class BrokenReplicaError(RuntimeError):
    """What a failing newcomer raises."""


class Work:
    """One replica."""

    def __init__(self) -> None:
        self._node_id = ray.get_runtime_context().get_node_id()
        path = role_path(self._node_id)
        role = json.loads(path.read_text()) if path.exists() else {}
        self._slow: float = role.get("slow", 1.0)
        self._fail: float = role.get("fail", 0.0)
        self._wrong: int = role.get("wrong", 0)
        self._random = random.Random()

    @copy_safe
    async def infer(self, x: int, cpu_s: float, payload: bytes = b"") -> tuple[str, int, int]:
        """(node id, answer, bytes received), after `cpu_s` of CPU."""
        if self._fail and self._random.random() < self._fail:
            raise BrokenReplicaError("this replica is broken, as the scenario wants it")
        burn(cpu_s * self._slow)
        return self._node_id, right_answer(x) + self._wrong, len(payload)

    @copy_safe
    async def infer_batched(self, x: int, cpu_s: float, payload: bytes = b"") -> tuple[str, int, int]:
        """As `infer`, together with what else is there."""
        if self._fail and self._random.random() < self._fail:
            raise BrokenReplicaError("this replica is broken, as the scenario wants it")
        value: int = await self._batch((x, cpu_s))
        return self._node_id, value, len(payload)

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _batch(self, requests: list[tuple[int, float]]) -> list[int]:
        first_s, *others_s = sorted((cpu_s for _, cpu_s in requests), reverse=True)
        burn((first_s + _NEXT_IN_BATCH * sum(others_s)) * self._slow)
        return [right_answer(x) + self._wrong for x, _ in requests]

    @copy_safe
    async def stream(
        self, x: int, items: int, gap_s: float, cpu_s: float, had: Sequence[Any] = ()
    ) -> AsyncIterator[tuple[str, int]]:
        """Items `gap_s` apart at best, each after `cpu_s` of CPU; those of `had` were given by another replica."""
        due_s = time.monotonic()
        for i in range(len(had), items):
            burn(cpu_s * self._slow)
            yield self._node_id, right_answer(x + i) + self._wrong
            due_s += gap_s
            await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
