"""`make test` runs two processes: one has all tests of real clusters, one after the other, the other one the rest.

The rest runs with the lowest priority: clusters have time limits.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# how long an example takes says nothing where others have the processor first
settings.register_profile("lowest priority", deadline=None)
settings.load_profile("lowest priority")


@cache
def _place(file: str) -> str:
    """Files stay together; those with clusters are one."""
    return "clusters" if "mark.cluster" in Path(__file__).parents[1].joinpath(file).read_text() else file


class _Places(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        return _place(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Places:
    """`xdist_group`, which would do, has no effect with pytest 9.2."""
    return _Places(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A process that is given anything else has no cluster, or none any more."""
    if "PYTEST_XDIST_WORKER" in os.environ and _place(item.nodeid.partition("::")[0]) != "clusters":
        os.nice(max(19 - os.nice(0), 0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clusters take longest, and come first."""
    items.sort(key=lambda item: _place(item.nodeid.partition("::")[0]) != "clusters")
