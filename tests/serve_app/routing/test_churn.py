"""Replicas, sessions and multiplexed ids come and go by the thousand; what a router keeps does not grow with them."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from actors.coordinator import Coordinator
from serve_app import user_functions
from serve_app.routing import link as module
from tests.deep_size import deep_size
from tests.serve_app.routing.serve import Replica, Serve, VirtualTime, settle
from tests.serve_app.routing.test_link import at_once

GENERATIONS = 400
SETTINGS = {
    "session": {"max_sessions": 50},
    "trial": {"copy_methods": ["*"]},
    "balance": {"resume": "had", "cost": f"{__name__}:two"},
}


def two(args, kwargs):
    return 2


class Call:
    def __init__(self, answer):
        self.answer = answer

    def remote(self, *arguments):
        return asyncio.ensure_future(self.answer(*arguments))


async def dies(_):
    raise RayActorError


async def hangs(_):
    await asyncio.Event().wait()


async def raises(_):
    raise RuntimeError("broken")


def control_plane(kind):
    """A coordinator of that kind, None if there is none, and the real one inside it."""
    real = Coordinator(now_s=time.monotonic) if kind in ("well", "comes and goes") else None
    if kind == "none":
        return None, None

    async def sometimes(received):
        if int(time.monotonic() / 40.0) % 2:
            raise RayActorError
        return await real.exchange(received)

    kinds = {"dead": dies, "hangs": hangs, "broken": raises, "comes and goes": sometimes}
    return SimpleNamespace(exchange=Call(kinds.get(kind) or real.exchange)), real


def kept(serve):
    """What hangs on a router, without the event loop, and without what hangs on the replicas of the moment.

    Nor its ring of decisions, which has a size of its own (`test_explained`).
    """
    calls = serve.router.calls
    routes, loop = calls.routes, asyncio.get_running_loop()
    parts = (calls.book, calls.ledger, calls.second.patience, calls.second.stream_patience, calls.soon.left)
    own = sum(deep_size(part, loop, calls, routes) for part in parts)
    sessions = routes.sessions._map
    places = (routes._told, routes._reported, routes.ejections, routes.alive, routes.mirrored, sessions)
    held = (calls._open, calls._reserved, calls.mirror._under_way, calls.mirror._tasks, calls.second._tasks)
    return own + sum(deep_size(part, loop, calls, calls.book, serve.router.explained) for part in (*places, *held))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "dead", "hangs", "broken", "comes and goes", "well"])
def test_what_a_router_keeps_does_not_grow_with_replicas_that_have_gone(monkeypatch, kind):
    async def scenario():
        asyncio.get_running_loop().run_in_executor = at_once
        coordinator, real = control_plane(kind)
        monkeypatch.setattr(module, "find_coordinator", lambda: coordinator)
        monkeypatch.setattr(module, "shared_secret", lambda *_: b"secret")
        monkeypatch.setattr(module, "ray", SimpleNamespace(is_initialized=lambda: True))
        serve = Serve(Replica("first"), router_kwargs={"config": SETTINGS})
        sizes = []
        for generation in range(GENERATIONS):
            names = [f"g{generation}-{i}" for i in range(5)]
            ids = {f"m{generation}"}
            serve.scale(*(Replica(name, node_id=f"node-{name}", multiplexed_model_ids=ids) for name in names))
            await asyncio.sleep(1.0)
            for i in range(8):
                labels = [{}, {"session_id": f"s{generation}-{i}"}, {"multiplexed_model_id": f"m{generation}"}]
                result = await serve.send(1, **labels[i % 3], stream=i % 2 == 1)
                for replica in serve.replicas.values():
                    for sent in replica.sent:
                        sent.end(raised=ValueError("user code") if i == 7 else None)
                if i % 2:
                    await read(result)
                else:
                    await result.get_async()
                del result
            await settle()
            await asyncio.sleep(6.0)  # so long are sessions idle here
            if generation in (GENERATIONS // 10, GENERATIONS - 1):
                serve.scale(Replica("last"))
                await asyncio.sleep(70.0)
                sizes.append(kept(serve))
        serve.close()
        if real is not None:
            await real.close()
        return sizes

    early, late = VirtualTime().run(scenario(), 100_000.0)
    print(f"{kind}: {early} objects after {GENERATIONS // 10} generations, {late} after {GENERATIONS}")
    assert late <= 1.1 * early + 50
    assert not user_functions._awaited


async def read(stream):
    try:
        while True:
            await stream.__anext__()
    except (StopAsyncIteration, ValueError):
        pass
