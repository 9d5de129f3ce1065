"""Token streams that go on from another replica when theirs dies.

What you get: a reader has every token once and in order, also while a replica is killed in the middle of its stream.
It needs a method that can go on after what the reader has had (`balance.resume` names the argument), and does not say
something else the second time: a greedy decoder, or as here a sampler whose random numbers follow from the prompt.

    python -m examples.token_streams
    serve run examples.token_streams:app     # on a cluster with `shadecast up`; then
    curl -N 'localhost:8000?prompt=The+value+of&tokens=60'
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from examples.running import Examples

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={"config": {"balance": {"resume": "had"}}},
)
TOKEN_S = 0.02


@serve.deployment(
    num_replicas=2, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=32, request_router_config=ROUTER
)
class Writer:
    """A small language model: which words follow which in Python's own reference manual."""

    def __init__(self) -> None:
        words = " ".join(topics.values()).split()
        self._followers: dict[str, list[str]] = defaultdict(list)
        for word, follower in zip(words, [*words[1:], words[0]], strict=True):
            self._followers[word].append(follower)
        self._anything = sorted(self._followers)
        self._streams = 0

    async def generate(self, prompt: str, tokens: int, had: Sequence[str] = ()) -> AsyncIterator[str]:
        """So many words after the prompt. `had`: those that the reader of a stream that goes on here has had."""
        text = [*prompt.split(), *had]
        self._streams += 1
        try:
            for position in range(len(had), tokens):
                follows = self._followers.get(text[-1] if text else "") or self._anything
                text.append(random.Random(f"{prompt} {position}").choice(follows))
                yield text[-1]
                await asyncio.sleep(TOKEN_S)  # what a real model would take
        finally:
            self._streams -= 1

    async def streams(self) -> tuple[int, int]:
        """Streams under way here, and the id of this process."""
        return self._streams, os.getpid()


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
class Ingress:
    """Reads the stream through a handle: one that Serve's proxy itself reads stays with its replica."""

    def __init__(self, writer: DeploymentHandle) -> None:
        self._writer = writer.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        """The words as plain text, as they come."""
        asked = request.query_params
        words = self._writer.generate.remote(asked.get("prompt", "The"), int(asked.get("tokens", "60")))
        return StreamingResponse((word + " " async for word in words), media_type="text/plain")


app = Ingress.bind(Writer.bind())


# ---------------------------------------------------------------- what it shows


@dataclass(frozen=True, slots=True)
class Shown:
    """Texts that were read in peace, and those of the same prompts while a replica with some of the streams died."""

    undisturbed: list[str]
    disturbed: list[str]
    killed: int

    def __str__(self) -> str:
        same = sum(a == b for a, b in zip(self.undisturbed, self.disturbed, strict=True))
        return (
            f"A replica was killed that had {self.killed} of {len(self.disturbed)} streams under way: {same} readers "
            f"had every word once and in order.\nOne of them: {self.disturbed[0]}"
        )


async def show(examples: Examples, readers: int = 8, tokens: int = 80) -> Shown:
    """Read some streams, then once more while the replica that has most of them is killed."""
    import httpx  # noqa: PLC0415 - replicas need none of it

    from examples.running import until  # noqa: PLC0415

    prompts = [f"reader {number} asks for the" for number in range(readers)]
    async with httpx.AsyncClient(base_url=examples.url, timeout=60.0) as client:

        async def read(prompt: str) -> str:
            answer = await client.get("/token_streams", params={"prompt": prompt, "tokens": tokens})
            return answer.raise_for_status().text

        undisturbed = await asyncio.gather(*map(read, prompts))
        reading = [asyncio.create_task(read(prompt)) for prompt in prompts]

        def under_way() -> list[tuple[int, int]]:
            found = examples.of_each_replica("token_streams", "Writer", "streams")
            return found if sum(streams for streams, _ in found) == readers else []

        streams, process = max(await until(under_way, 10.0, "all streams are under way"))
        os.kill(process, signal.SIGKILL)  # on this machine, as the whole of the local cluster
        disturbed = await asyncio.gather(*reading)
    return Shown(undisturbed, disturbed, streams)


if __name__ == "__main__":
    from examples.running import run

    run("token_streams")
