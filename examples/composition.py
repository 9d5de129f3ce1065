"""A graph of deployments, scale -> two models side by side -> combine, and what a copy causes in it.

What you get: new replicas of any step may be tried with copies of real requests, and nothing that a request causes
happens twice: a call that a copy makes is marked as one in every deployment further down. Here both models bill their
requests, and a copy is billed to nobody.

    python -m examples.composition
    serve run examples.composition:app   # on a cluster with `shadecast up`; then
    curl localhost:8000 -d '[0,0,5,13,9,1,0,0, 0,0,13,15,10,15,5,0, 0,3,15,2,0,11,8,0, 0,4,12,0,0,8,8,0,
      0,5,8,0,0,9,8,0, 0,4,11,0,1,12,7,0, 0,2,14,5,10,12,0,0, 0,0,6,13,10,0,0,0]'
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from serve_app.copying import copy_safe
from serve_app.mirror import is_shadow

if TYPE_CHECKING:
    from examples.running import Examples

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={
        "config": {
            "balance": {
                "rescue_fraction": 0.0,  # no second attempts: a request that is stuck would be billed twice
                "bootstrap_s": 3.0,  # replicas of the first start need no trial; 15 s where nobody waits
            }
        }
    },
)
SMALL = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=32, request_router_config=ROUTER)
class Scale:
    """The first step: 64 pixels of 0 to 16 become a row of 0 to 1."""

    @copy_safe
    async def row(self, pixels: list[float]) -> NDArray[np.float64]:
        """`[1, 64]`."""
        return np.asarray(pixels, dtype=float).reshape(1, 64) / 16.0


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=32, request_router_config=ROUTER)
class Model:
    """A classifier of digits, fitted as its replica starts."""

    def __init__(self, kind: str) -> None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second, and only models need it
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
        from sklearn.neighbors import KNeighborsClassifier  # noqa: PLC0415

        pixels, digits = load_digits(return_X_y=True)
        classifier = LogisticRegression(max_iter=1000) if kind == "linear" else KNeighborsClassifier()
        self._classifier = classifier.fit(pixels[1::2] / 16.0, digits[1::2])
        self._bill: Counter[str] = Counter()

    @copy_safe
    async def probabilities(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the ten digits. A copy costs the user nothing."""
        self._bill["copies" if is_shadow() else "billed"] += 1
        found: NDArray[np.float64] = (await asyncio.to_thread(self._classifier.predict_proba, row))[0]
        return found

    async def bill(self) -> Counter[str]:
        """How many requests and copies this replica had."""
        return self._bill


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=32, request_router_config=ROUTER)
class Combine:
    """The whole way of a request."""

    def __init__(self, scale: DeploymentHandle, *models: DeploymentHandle) -> None:
        self._scale, self._models = scale, models

    @copy_safe
    async def read(self, pixels: list[float]) -> dict[str, float]:
        """The digit that both models together hold most likely, and how likely."""
        row = await self._scale.row.remote(pixels)
        answers = await asyncio.gather(*(model.probabilities.remote(row) for model in self._models))
        mean = np.mean(answers, axis=0)
        return {"digit": int(mean.argmax()), "probability": float(mean.max())}


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=100)
class Ingress:
    """Calls the graph through a handle: requests that Serve's proxy itself sends cannot be copied."""

    def __init__(self, combine: DeploymentHandle) -> None:
        self._combine = combine

    async def __call__(self, request: Request) -> dict[str, float]:
        """POST 64 pixels."""
        answer: dict[str, float] = await self._combine.read.remote(await request.json())
        return answer


app = Ingress.bind(
    Combine.bind(
        Scale.bind(),
        Model.options(name="Linear").bind("linear"),
        Model.options(name="Neighbours").bind("neighbours"),
    )
)


# ---------------------------------------------------------------- what it shows


@dataclass(frozen=True, slots=True)
class Shown:
    """Requests, what they were read as, and what each model billed."""

    requests: int
    failed: int
    right: float
    newcomer: tuple[str, ...]
    bills: dict[str, Counter[str]]

    def __str__(self) -> str:
        bills = "; ".join(
            f"{name} billed {bill['billed']}, copies {bill['copies']}" for name, bill in self.bills.items()
        )
        return (
            f"{self.requests} requests, {self.failed} failed, {self.right:.0%} of the digits are read right.\n"
            f"A second replica of Combine joined ({', '.join(self.newcomer)}). {bills}."
        )


async def show(examples: Examples) -> Shown:
    """Read digits while a second replica of `Combine` joins; then compare requests and bills."""
    import httpx  # noqa: PLC0415 - replicas need none of it
    from sklearn.datasets import load_digits  # noqa: PLC0415

    from examples.running import load, until  # noqa: PLC0415

    pixels, digits = load_digits(return_X_y=True)
    images = cycle(range(0, len(digits), 2))  # the other half was learned from

    def bills() -> dict[str, Counter[str]]:
        each = {name: examples.of_each_replica("composition", name, "bill") for name in ("Linear", "Neighbours")}
        return {name: sum(found, Counter()) for name, found in each.items()}

    async with httpx.AsyncClient(base_url=examples.url, timeout=60.0) as client:

        async def read(_: int) -> bool:
            image = next(images)
            answer = await client.post("/composition", json=pixels[image].tolist())
            return bool(answer.raise_for_status().json()["digit"] == digits[image])

        events = dict[str, list[str]]()

        def newcomer() -> tuple[str, ...]:
            events.update(examples.events("composition", "Combine"))
            return next((tuple(e) for e in events.values() if "admit" in e and len(e) > 1), ())

        async with load(read, clients=2, pause_s=0.08) as seen:
            await asyncio.sleep(4.0)  # the first start is over
            await asyncio.to_thread(examples.deploy, {"composition": {"Combine": 2}})
            events_of_newcomer = await until(newcomer, 60.0, "a newcomer has had its trial")
        found = await asyncio.to_thread(bills)
    return Shown(seen.sent, len(seen.errors), sum(seen.answers) / len(seen.answers), events_of_newcomer, found)


if __name__ == "__main__":
    from examples.running import run

    run("composition")
