"""The client: sends conversations at their times, streams their answers, and notes when what came."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import httpx

from bench.llm_real.workload import Conversation, Traffic
from examples.llm.serving import MODEL

_TIMEOUT_S = 60.0
"""A request that takes longer is an error."""


@dataclass(slots=True)
class Answer:
    """What became of one request. Times are in seconds since the traffic began; NaN is never."""

    sent_s: float
    turn: int
    phase: str
    place: int = -1
    """Of the replica that had it, by that one's own word."""
    first_s: float = math.nan
    """From sending to the first character."""
    end_s: float = math.nan
    """From sending to the end of the stream."""
    tokens: int = 0
    error: str = ""


def columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """For JSON: by field, times to a tenth of a millisecond, None for what never came."""
    found: dict[str, list[Any]] = {}
    for field in fields(Answer):
        values = [getattr(answer, field.name) for answer in answers]
        if field.name.endswith("_s"):
            values = [round(value, 4) if math.isfinite(value) else None for value in values]
        found[field.name] = values
    return found


def from_columns(found: Mapping[str, Sequence[Any]]) -> list[Answer]:
    """The answers again."""
    back: list[Answer] = []
    for row in zip(*(found[field.name] for field in fields(Answer)), strict=True):
        cells: list[Any] = [math.nan if value is None else value for value in row]
        back.append(Answer(*cells))
    return back


class Client:
    """Of one run."""

    def __init__(self, url: str, traffic: Traffic) -> None:
        self._url, self._traffic = url, traffic
        self.answers: list[Answer] = []
        self.phase = ""
        self._began_s = time.monotonic()
        self._open = True

    async def warm_up(self, rounds: int) -> None:
        """Prompts that have nothing in common with those to come, four at a time."""
        async with httpx.AsyncClient(base_url=self._url, timeout=_TIMEOUT_S) as client:
            for number in range(rounds):
                talks = ([{"role": "user", "content": f"{4 * number + k} " * 60}] for k in range(4))
                await asyncio.gather(*(self.ask(client, talk, 0) for talk in talks))

    async def play(self, jobs: Sequence[Conversation], events: Sequence[tuple[float, Callable[[], Any]]]) -> None:
        """Send all conversations; `events` are called (in a thread) at their times. Ends when all have answers.

        No turn begins after the last event.
        """
        self._began_s = time.monotonic()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Ray's server for language models logs each request
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        async with httpx.AsyncClient(base_url=self._url, timeout=_TIMEOUT_S, limits=limits) as client:
            talks = [asyncio.create_task(self._talk(client, job)) for job in jobs]
            for at_s, event in events:
                await asyncio.sleep(max(self._began_s + at_s - time.monotonic(), 0.0))
                await asyncio.to_thread(event)
            self._open = False
            await asyncio.gather(*talks)

    def close(self) -> None:
        """No turn begins from now on."""
        self._open = False

    @property
    def now_s(self) -> float:
        """Seconds since the traffic began."""
        return time.monotonic() - self._began_s

    async def _talk(self, client: httpx.AsyncClient, job: Conversation) -> None:
        await asyncio.sleep(max(job.at_s - self.now_s, 0.0))
        for turn in range(len(job.turns)):
            await asyncio.sleep(job.turns[turn].pause_s)
            if not self._open:
                return
            await self.ask(client, job.messages(turn), turn)

    async def ask(self, client: httpx.AsyncClient, messages: list[dict[str, str]], turn: int) -> Answer:
        """One request."""
        answer = Answer(self.now_s, turn, self.phase)
        number = len(self.answers)
        self.answers.append(answer)
        body = {
            "model": MODEL,
            "messages": messages,
            "user": str(number),  # nobody goes by it; a replica notes whom it has served
            "max_tokens": self._traffic.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        finished = False
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        answer.error = str(chunk["error"])[:200]
                    for choice in chunk.get("choices", ()):
                        if choice["delta"].get("content") and math.isnan(answer.first_s):
                            answer.first_s = self.now_s - answer.sent_s
                        finished = finished or bool(choice.get("finish_reason"))
                    if chunk.get("usage"):
                        answer.tokens = int(chunk["usage"]["completion_tokens"])
            answer.end_s = self.now_s - answer.sent_s
            if not finished or answer.tokens <= 0:
                answer.error = answer.error or "cut off"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:200]
        return answer
