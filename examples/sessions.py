"""Sessions that stay on the replica that knows them, and leave it a few at a time when it is drained.

What you get: every request of a session meets the caches of the ones before. When you take a replica out
(`shadecast drain ID`), its sessions move one after the other, each once and for good, and no request fails: the other
replicas do not have to fill all caches in the same instant.

    python -m examples.sessions
    serve run examples.sessions:app      # on a cluster with `shadecast up`; then, twice or more
    curl localhost:8000 -H 'x-session-id: anna' -d 'Hello'
    shadecast status; shadecast drain ID; shadecast release ID
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

if TYPE_CHECKING:
    from examples.running import Examples

ROUTER = RequestRouterConfig(
    request_router_class="serve_app.router:PredictiveRouter",
    request_router_kwargs={
        "config": {
            "session": {"moves_per_s": 0.0},  # for the sake of balance none moves; by default up to 2 % a second may
            "trial": {"drain_s": 8.0},  # a drain takes no longer; 30 s where nobody waits
        }
    },
)
TURN_S = 0.4
ENOUGH_TURNS = 5
"""That say where a session lives."""


@serve.deployment(
    num_replicas=3, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=32, request_router_config=ROUTER
)
class Assistant:
    """Keeps its conversations in memory, as a language model keeps what it has computed of them."""

    def __init__(self) -> None:
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._said: dict[str, list[str]] = defaultdict(list)

    async def say(self, session: str, text: str) -> dict[str, Any]:
        """Which replica answers, and how much of the conversation it knows."""
        await asyncio.sleep(TURN_S)  # what a real model would take
        self._said[session].append(text)
        return {"replica": self._replica, "turns_known": len(self._said[session])}


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=200)
class Ingress:
    """Names the session to the handle: that is all that it takes."""

    def __init__(self, assistant: DeploymentHandle) -> None:
        self._assistant = assistant

    async def __call__(self, request: Request) -> dict[str, Any]:
        """POST a text; the header x-session-id says whose it is."""
        session, text = request.headers.get("x-session-id", ""), (await request.body()).decode()
        answer: dict[str, Any] = await self._assistant.options(session_id=session).say.remote(session, text)
        return answer


app = Ingress.bind(Assistant.bind())


# ---------------------------------------------------------------- what it shows


@dataclass(frozen=True, slots=True)
class Shown:
    """Where each session lived before a replica was drained and where it lives after, and when it left that replica.

    It lives where most of its turns were answered: while its replica stalls another one answers, and it comes back.
    """

    before: dict[str, str]
    after: dict[str, str]
    drained: str
    left_after_s: list[float]
    requests: int
    failed: int

    @property
    def moved(self) -> set[str]:
        """The sessions that live elsewhere now."""
        return {session for session, home in self.before.items() if self.after[session] != home}

    def __str__(self) -> str:
        when = ", ".join(f"{after_s:.1f}" for after_s in self.left_after_s)
        return (
            f"{len(self.before)} sessions on 3 replicas; {self.drained} was drained. "
            f"{len(self.before) - len(self.moved)} sessions stayed where they are; {len(self.left_after_s)} left it "
            f"after {when} s.\n{self.failed} of {self.requests} requests failed."
        )


async def show(examples: Examples, sessions: int = 18) -> Shown:
    """Talk in many sessions at once, and drain the replica that has most of them."""
    import httpx  # noqa: PLC0415 - replicas need none of it

    from examples.running import load, until  # noqa: PLC0415
    from serve_app.launch.control_plane import order  # noqa: PLC0415

    turns: dict[str, list[tuple[float, str]]] = {f"session-{number}": [] for number in range(sessions)}
    """Of each session when its turns were answered, and by which replica."""
    async with httpx.AsyncClient(base_url=examples.url, timeout=60.0) as client:

        async def say(number: int) -> None:
            session = f"session-{number}"
            headers = {"x-session-id": session}
            answer = (await client.post("/sessions", content="And then?", headers=headers)).raise_for_status().json()
            turns[session].append((time.monotonic(), answer["replica"]))

        def known() -> bool:
            return len(examples.events("sessions", "Assistant")) >= 3

        async def homes() -> dict[str, str]:
            """Where the sessions live from now on."""
            had = {session: len(answered) for session, answered in turns.items()}

            def talked() -> bool:
                return all(len(turns[session]) >= had[session] + ENOUGH_TURNS for session in had)

            await until(talked, 60.0, "each session has had some turns")
            new = {session: [replica for _, replica in turns[session][had[session] :]] for session in had}
            return {session: Counter(replicas).most_common(1)[0][0] for session, replicas in new.items()}

        def all_left() -> bool:
            return all(replica != drained for answered in turns.values() for _, replica in answered[-3:])

        async with load(say, clients=sessions, pause_s=0.02) as seen:
            await until(known, 30.0, "the coordinator knows the replicas")
            before = await homes()
            drained = Counter(before.values()).most_common(1)[0][0]
            began_s = time.monotonic()
            await asyncio.to_thread(order, "drain", drained)
            await until(all_left, 60.0, "all sessions have left the drained replica")
            after = await homes()
        await asyncio.to_thread(order, "release", drained)
    left = sorted(
        max(at_s for at_s, replica in turns[session] if replica == drained) - began_s
        for session, home in before.items()
        if home == drained
    )
    return Shown(before, after, drained, left, seen.sent, len(seen.errors))


if __name__ == "__main__":
    from examples.running import run

    run("sessions")
