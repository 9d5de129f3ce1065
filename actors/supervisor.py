"""Keeps one node forecaster on each node that is alive: started when a node joins, gone when it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray

logger = logging.getLogger(__name__)


def alive_nodes() -> list[str]:
    """Ids of the Ray nodes that are alive."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


class ForecasterSupervisor:
    """Call it now and then (it blocks for moments): it starts what is missing and stops what is left over."""

    def __init__(
        self,
        start: Callable[[str, Mapping[str, Any]], Any],
        settings: Mapping[str, Any],
        alive: Callable[[], list[str]] = alive_nodes,
    ) -> None:
        """`start(node_id, settings)` returns the handle of the node's forecaster, found or made."""
        self._start = start
        self._settings = settings
        self._alive = alive
        self._forecasters: dict[str, Any] = {}

    def __call__(self) -> list[str]:
        """One round; returns the ids of the nodes that are alive."""
        alive = self._alive()
        for node_id in alive:
            if node_id not in self._forecasters:
                try:
                    self._forecasters[node_id] = self._start(node_id, self._settings)
                except Exception:
                    logger.exception("node %s: its forecaster did not start; trying again", node_id[:8])
        for node_id in [n for n in self._forecasters if n not in alive]:
            ray.kill(self._forecasters.pop(node_id), no_restart=True)
        return alive
