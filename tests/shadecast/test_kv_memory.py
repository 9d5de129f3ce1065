"""The memory of engines for keys and values in place of the node's: what it explains, and what waits for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from shadecast import capacity as cap
from shadecast.balancer import Balancer, TickInput
from shadecast.config import Config
from shadecast.connection import Connection
from shadecast.fleet import Fleet
from shadecast.types import Forecast, NodeReport, NodeSnapshot, ReplicaReport, RouterReport, State
from tests.shadecast.world import World

NAN = math.nan


def view(name="r", own=-1.0, told=-1.0, **more):
    return ReplicaReport(name, f"node-{name}", 8, 0, kv_own=own, kv_told=told, **more)


def report(*views, router="router", seq=1):
    return RouterReport(router, "app/d", seq, 1.0, views)


def node(name="r", memory=0.5, forecast=None):
    return NodeReport(f"node-{name}", 1, NodeSnapshot(0.2, 0.2, memory, 0.0, 0.1, 0.0, 0.0), forecast)


@pytest.mark.parametrize(
    ("told", "fraction", "engine"),
    [
        ([(-1.0, -1.0)], NAN, NAN),
        ([(0.5, -1.0)], 0.5, NAN),
        ([(0.3, -1.0), (0.4, -1.0)], 0.7, NAN),
        ([(0.8, -1.0), (0.9, -1.0)], 1.0, NAN),
        ([(0.3, 0.6), (0.4, 0.5)], 0.6, 0.6),
        ([(0.3, -1.0), (0.4, 0.9)], 0.9, 0.9),
        ([(0.3, 7.0)], 1.0, 1.0),
        ([(0.3, 0.0)], 0.0, 0.0),
        ([(NAN, NAN)], NAN, NAN),
    ],
)
def test_routers_counts_add_up_and_the_engines_word_outranks_them(told, fraction, engine):
    fleet = Fleet("app/d", Config())
    for k, (own, used) in enumerate(told):
        fleet.take_router(report(view(own=own, told=used), router=f"r{k}"))
    known = fleet.replicas["r"]
    assert (known.kv_fraction, known.kv_told) == (
        pytest.approx(fraction, nan_ok=True),
        pytest.approx(engine, nan_ok=True),
    )


def test_what_a_router_does_not_tell_any_more_is_forgotten_and_so_is_a_router_that_is_gone():
    fleet = Fleet("app/d", Config())
    fleet.take_router(report(view(own=0.5)))
    fleet.take_router(report(view(own=0.2), router="other"))
    fleet.take_router(report(view(), seq=2))
    assert fleet.replicas["r"].kv_fraction == pytest.approx(0.2)
    fleet.now_s = 100.0
    fleet.forget()
    assert math.isnan(fleet.replicas["r"].kv_fraction)


def test_it_takes_the_place_of_the_nodes_memory_in_the_headroom_of_that_deployment_alone():
    fleet = Fleet("app/d", Config())
    fleet.take_node(node())
    known = fleet.add(Connection("r", "node-r"), 0.0)
    cpu, memory, network = fleet.headroom(known)
    assert memory == pytest.approx(math.log(0.5))
    fleet.now_s = 0.5
    fleet.take_router(report(view(own=0.25)))
    assert fleet.headroom(known) == (cpu, pytest.approx(math.log(0.75)), network)


@pytest.mark.parametrize(("own", "falls"), [(0.1, False), (-1.0, True)])
def test_a_forecast_of_the_nodes_memory_is_no_news_for_an_engine(monkeypatch, own, falls):
    monkeypatch.setattr(cap.Sensitivity, "solve", lambda _: (1.0, 1.0, 0.0))  # as if memory had been seen to matter
    rows = {name: ((load,) * 3,) * 6 for name, load in (("cpu", 0.2), ("memory", 0.9), ("network", 0.1))}
    forecast = Forecast(rows, gate=dict.fromkeys(rows, 1.0))
    balancer = Balancer("app/d", Config(), epoch=1)
    nodes, routers = (node("r", forecast=forecast), node("s")), (report(view("r", own), view("s", own)),)
    balancer.on_tick(TickInput(0.0, nodes=nodes, routers=routers))
    change = {each.replica_id: each.forecast_log_change for each in balancer.views()}
    assert (change["r"] < -0.5) is falls
    assert change["s"] == 0.0


class Engines(World):
    """Engines of which "new" tells how full its memory is."""

    told = -1.0

    def serve(self):
        made = super().serve()
        views = (replace(v, kv_own=0.5, kv_told=self.told if v.replica_id == "new" else -1.0) for v in made.replicas)
        return replace(made, replicas=tuple(views))


@pytest.mark.parametrize(("told", "passes"), [(0.5, True), (0.99, False), (-1.0, True)])
def test_a_step_of_the_ramp_is_not_passed_while_the_engine_says_that_its_memory_is_full(told, passes):
    world = Engines()
    world.told = told
    for name in "abcd":
        world.add(name)
    world.run(60)
    world.add("new")
    world.run(70)
    assert world.state("new") is (State.ACTIVE if passes else State.SHIFTING)
    world.run(160)
    assert world.state("new") is State.ACTIVE, "after a while it is, all the same: it serves, if not more"
