"""`make test` runs two processes: one has all tests of real clusters, one after the other, the other one the rest."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay together; clusters, which take longest, come first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        clusters = item.get_closest_marker("cluster") is not None
        item.add_marker(pytest.mark.xdist_group("clusters" if clusters else str(item.path)))
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)
