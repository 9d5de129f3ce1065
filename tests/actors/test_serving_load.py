"""What Serve has on each node, by the routers' reports."""

from __future__ import annotations

from actors.serving_load import ServingLoad
from shadecast.types import ReplicaReport, RouterReport


def report(seq, *views, partial=True, gone=()):
    return RouterReport("router", "app/model", seq, 1.0, views, partial=partial, gone=tuple(gone))


def view(name, in_flight, started, node=None):
    return ReplicaReport(name, node or f"node-{name}", 8, in_flight, started, started, 0)


def test_loads_are_summed_by_node_and_follow_partial_reports():
    load = ServingLoad()
    load.take(report(1, view("a", 2, 3, "n"), view("b", 1, 4, "n"), partial=False), 0.0)
    assert load.on("n", 0.0) == (3.0, 7.0)
    load.take(report(2, view("a", 0, 1, "n")), 1.0)
    assert load.on("n", 1.0) == (1.0, 1.0)
    load.take(report(3, gone=["b"]), 2.0)
    assert load.on("n", 2.0) == (0.0, 0.0)
    assert load.on("n", 60.0) == (0.0, 0.0)


def test_nodes_that_come_and_go_leave_nothing_behind():
    load = ServingLoad()
    load.take(report(1, view("old", 1, 5), partial=False), 0.0)
    for i in range(2000):
        load.take(report(i + 2, view("old", 1, 5), view(f"r{i}", 1, 3), gone=[f"r{i - 1}"]), float(i))
    assert load.on("node-old", 2000.0) == (1.0, 5.0)
    assert len(load._in_flight) < 5
    assert len(load._arrivals_per_s) < 5
    assert len(load._routers["app/model", "router"].replicas) < 5


def test_a_report_right_after_another_tells_no_rate():
    load = ServingLoad()
    for interval_s in (1e-320, 1e-6, 0.0):
        load.take(RouterReport("router", "app/model", 1, interval_s, (view("a", 0, 3, "n"),)), 0.0)
        assert load.on("n", 0.0) == (0.0, 0.0)
    load.take(report(2, view("a", 0, 3, "n")), 0.0)
    assert load.on("n", 0.0) == (0.0, 3.0)
