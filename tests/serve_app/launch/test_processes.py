"""The actors of the control plane: calls are handed on as they are, and the starter loads nothing of theirs."""

from __future__ import annotations

import inspect

import pytest

from actors.coordinator import Coordinator
from actors.forecaster_actor import ForecasterActor
from serve_app.launch.processes import CoordinatorProcess, ForecasterProcess, PageProcess, forecaster_name
from serve_app.page.server import Page


def signatures(kind):
    return {
        name: (inspect.iscoroutinefunction(method), parameters(method))
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


def parameters(method):
    """Without the one that `ray.remote` adds to the methods of a class."""
    return [str(p) for name, p in inspect.signature(method).parameters.items() if name != "_ray_trace_ctx"]


@pytest.mark.parametrize(
    ("process", "works", "for_use_without_ray", "of_how_it_was_started"),
    [
        (CoordinatorProcess, Coordinator, {"close", "tick"}, {"settings"}),
        (ForecasterProcess, ForecasterActor, set(), set()),
        (PageProcess, Page, {"serve_forever"}, set()),
    ],
)
def test_an_actor_takes_the_calls_of_the_object_that_does_the_work(
    process, works, for_use_without_ray, of_how_it_was_started
):
    expected = {name: what for name, what in signatures(works).items() if name not in for_use_without_ray}
    own = signatures(process)
    assert {name: own.pop(name) for name in of_how_it_was_started}.keys() == of_how_it_was_started
    assert own == expected


def test_a_forecaster_is_named_after_its_node():
    assert forecaster_name("abcdef0123456789ffff") == "shadecast-forecaster-abcdef0123456789"
