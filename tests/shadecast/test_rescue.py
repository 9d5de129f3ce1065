"""Which replicas have collapsed under their requests, by a table."""

import pytest

from shadecast.config import BalanceConfig
from shadecast.rescue import collapsed, hardly_answering
from shadecast.types import RoutingTable, State, TableRow

CONFIG = BalanceConfig()


def table(*capacities):
    """Rows r0, r1, ... of (capacity, live capacity)."""
    rows = tuple(
        TableRow(f"r{i}", "node", State.ACTIVE, 1.0, capacity, 0.0, live_capacity=live)
        for i, (capacity, live) in enumerate(capacities)
    )
    return RoutingTable("app/model", 1, 1, 1, rows)


@pytest.mark.parametrize(
    ("capacities", "slow", "silent"),
    [
        ([(0.05, 0.01), (1.0, 1.0), (0.9, 1.1)], {"r0"}, {"r0"}),
        ([(0.2, 0.2), (1.0, 1.0), (0.9, 1.1)], {"r0"}, set()),
        ([(0.05, 0.0), (1.0, 0.0), (0.9, 0.0)], {"r0"}, {"r0"}),
        ([(0.05, 1.0), (1.0, 1.0), (0.9, 1.1)], {"r0"}, {"r0"}),
        ([(0.3, 0.3), (1.0, 1.0), (0.9, 1.1)], set(), set()),
        ([(0.02, 0.02), (0.28, 0.04), (0.47, 0.04)], set(), set()),
        ([(0.05, 0.01)], set(), set()),
    ],
    ids=["hog", "slow", "live unknown", "vetoed", "slower", "all have more work to do", "alone"],
)
def test_a_collapsed_replica_is_far_slower_than_the_others(capacities, slow, silent):
    assert set(collapsed(table(*capacities), CONFIG)) == slow
    assert hardly_answering(table(*capacities), CONFIG) == silent
