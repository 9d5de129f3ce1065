"""`make test` runs two processes: one has all tests of real clusters, one after the other, the other one the rest."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


@cache
def _place(file: str) -> str:
    """Files stay together; those with clusters are one, but for that on isolated hosts, which disturbs nobody."""
    text = Path(__file__).parents[1].joinpath(file).read_text()
    return "clusters" if "mark.cluster" in text and "mark.root" not in text else file


class _Places(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        return _place(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Places:
    """`xdist_group`, which would do, has no effect with pytest 9.2."""
    return _Places(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clusters take longest, and come first."""
    items.sort(key=lambda item: _place(item.nodeid.partition("::")[0]) != "clusters")
