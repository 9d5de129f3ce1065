"""Serve's autoscaling with our router: from one replica to three under load, and back.

What you get: while requests wait for a place, a new replica serves at once, on the ramp and under guards; with time to
spare it is tried with copies first. Either way it has its share within seconds, and no request fails when
replicas come, nor when Serve takes them away again.

    python -m examples.autoscaling
    serve run examples.autoscaling:app   # on a cluster with `shadecast up`; then
    for i in $(seq 500); do curl -s localhost:8000 > /dev/null & sleep .02; done; shadecast status --watch
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from serve_app.copying import copy_safe

if TYPE_CHECKING:
    from examples.running import Examples

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    # replicas of the first start need no trial; 15 s where nobody waits
    request_router_kwargs={"config": {"balance": {"bootstrap_s": 3.0}}},
)
AUTOSCALING = AutoscalingConfig(
    min_replicas=1,
    max_replicas=3,
    target_ongoing_requests=4,
    # so that the example is short; Serve's defaults are 30 s up and 10 minutes down
    upscale_delay_s=1.0,
    downscale_delay_s=3.0,
    look_back_period_s=2.0,
    metrics_interval_s=0.5,
)
WORK_S = 0.2


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=5,
    autoscaling_config=AUTOSCALING,
    request_router_config=ROUTER,
)
class Model:
    """Takes a fifth of a second, as a model on an accelerator might."""

    def __init__(self) -> None:
        self._replica = serve.get_replica_context().replica_id.unique_id

    @copy_safe
    async def predict(self) -> str:
        """Which replica answers."""
        await asyncio.sleep(WORK_S)
        return self._replica


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=200)
class Ingress:
    """Requests that find no place wait here, in the handle's router, where Serve's autoscaling sees them."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def __call__(self, _: Request) -> str:
        """GET."""
        answer: str = await self._model.predict.remote()
        return answer


app = Ingress.bind(Model.bind())


# ---------------------------------------------------------------- what it shows


@dataclass(frozen=True, slots=True)
class Shown:
    """What happened to the newcomers, how three replicas shared the load, and what became of all requests."""

    newcomers: dict[str, tuple[str, ...]]
    shares: dict[str, float]
    replicas_at_end: int
    requests: int
    failed: int

    def __str__(self) -> str:
        ways = "\n".join(f"  newcomer {replica}: {', '.join(events)}" for replica, events in self.newcomers.items())
        shares = ", ".join(f"{share:.0%}" for share in self.shares.values())
        return (
            f"Under load there were {len(self.shares)} replicas, with {shares} of the requests:\n{ways}\n"
            f"Without it {self.replicas_at_end}. {self.failed} of {self.requests} requests failed."
        )


async def show(examples: Examples) -> Shown:
    """Little load, much, and little again."""
    import httpx  # noqa: PLC0415 - replicas need none of it

    from examples.running import load, until  # noqa: PLC0415

    def running() -> int:
        states = serve.status().applications["autoscaling"].deployments["Model"].replica_states
        return int(states.get("RUNNING", 0))

    def events() -> dict[str, list[str]]:
        return examples.events("autoscaling", "Model")

    def all_serve() -> bool:
        return sum("ramp_done" in each or "admit_untried" in each for each in events().values()) >= 3

    async with httpx.AsyncClient(base_url=examples.url, timeout=60.0) as client:

        async def ask(_: int) -> str:
            return (await client.get("/autoscaling")).raise_for_status().text

        async with load(ask, clients=1, pause_s=0.1) as before:
            await asyncio.sleep(4.0)  # the first start is over
        first = set(before.answers)
        async with load(ask, clients=13) as busy:
            await until(all_serve, 60.0, "three replicas have their share")
            answered = len(busy.answers)
            await asyncio.sleep(3.0)
            shared = Counter(busy.answers[answered:])
        found = await asyncio.to_thread(events)
        async with load(ask, clients=1, pause_s=0.1) as after:
            await until(lambda: running() == 1, 60.0, "one replica is left")
    every = (before, busy, after)
    return Shown(
        newcomers={replica: tuple(each) for replica, each in found.items() if replica not in first},
        shares={replica: count / shared.total() for replica, count in shared.items()},
        replicas_at_end=running(),
        requests=sum(each.sent for each in every),
        failed=sum(len(each.errors) for each in every),
    )


if __name__ == "__main__":
    from examples.running import run

    run("autoscaling")
