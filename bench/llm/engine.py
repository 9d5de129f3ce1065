"""One simulated replica: an engine with chunked prefill, continuous batching and a prefix cache.

Modelled after vLLM. Requests are admitted in order while their keys and values fit into the GPU's memory. A step
computes the next token of every request that decodes, and a chunk of the prompts of those that do not yet. It takes

    base + n sequence + K token + chunk / rate

seconds with n requests decoding and K tokens of context among them. Prompt blocks stay in memory once computed, the
least recently used are dropped first. Not modelled: preemption, answers that are cached, the network.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 512
"""Of the engine's cache and of all traces."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engine runs on; the defaults are a model of 32 billion parameters on two H100."""

    prefill_per_s: float = 15_928.0
    """Prompt tokens a second."""
    base_s: float = 0.012
    """A step: reading the weights."""
    sequence_s: float = 0.00005
    token_s: float = 3.9e-8
    """Reading the keys and values of one token of context."""
    chunk_tokens: int = 8192
    """Of a step, those that decode included."""
    gpu_tokens: int = 280_000
    """Tokens of which keys and values fit into the memory of the GPU."""
    cache_tokens: int = 280_000
    """Of computed prompts that are kept; more than on the GPU with a tier on the host."""


@dataclass(slots=True)
class Job:
    """One request."""

    number: int
    at_s: float
    hashes: Sequence[bytes]
    """Of the prompt's whole blocks; each stands for all up to there."""
    prompt_tokens: int
    answer_tokens: int
    session: int = -1
    """Whose it is; -1 for nobody's."""
    router: int = 0
    uncached: int = 0
    """Prompt tokens that the router takes for not cached where it sends it."""
    ahead: float = 0.0
    """Prompt tokens that the router takes for those to compute until its first token."""
    others: float = 0.0
    """Requests that the router takes for those there when it came."""
    context: float = 0.0
    """Tokens of their prompts."""
    replica: int = -1
    left: int = 0
    """Prompt tokens that the engine has not computed yet."""
    depth: int = 0
    """Blocks that the engine had."""
    expected: int = 0
    """Prompt tokens that it lacked when the request came."""
    hits: int = 0
    """Prompt tokens that it had; one at least is computed."""
    first_s: float = math.nan
    end_s: float = math.nan


class Engine:
    """A replica. The owner calls `advance` at `due_s` and `submit` at arrivals, in order of time."""

    def __init__(self, machine: Machine, speed: float = 1.0) -> None:
        self.machine, self.speed = machine, speed
        self.due_s = math.inf
        """When the present step, or run of equal steps, ends."""
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._decoding: list[tuple[int, int, Job]] = []
        """(number of the decode step that makes its last token, number, job), a heap."""
        self._decoded = 0
        """Decode steps so far."""
        self._context = 0
        """K."""
        self._reserved = 0
        """Tokens of requests that are admitted: their own ones, and blocks in use."""
        self._used: dict[bytes, int] = {}
        """Blocks in use -> by how many requests."""
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        """Blocks that nobody uses, the least recently used first."""
        self.pending_tokens = 0
        """Prompt tokens to compute: of those that wait as it looked when they came."""
        self.held_tokens = 0
        """Prompts and answers of all that are here, shared ones once for each."""
        self._next_speed = speed
        """From the next step on."""
        self._run = (0.0, 0, 0)
        """Of equal decode steps: their beginning, how many, and prompt tokens computed in the step (then one)."""

    @property
    def requests(self) -> int:
        """All that are here."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Those that have no place in the batch yet."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Those whose first token is made."""
        return len(self._decoding)

    @property
    def context_tokens(self) -> int:
        """Of those that decode."""
        return self._context

    @property
    def used_tokens(self) -> int:
        """Memory that requests take: vLLM's KV cache usage times its size."""
        return self._reserved

    @property
    def blocks_in_use(self) -> int:
        """Of prompts, shared ones once."""
        return len(self._used)

    def cached_tokens(self, hashes: Sequence[bytes]) -> int:
        """Of a prompt with these blocks, what is in memory now."""
        return self._depth(hashes) * BLOCK_TOKENS

    def _depth(self, hashes: Sequence[bytes]) -> int:
        used, kept = self._used, self._kept
        depth = 0
        for block in hashes:
            if block not in used and block not in kept:
                break
            depth += 1
        return depth

    def set_speed(self, speed: float, now_s: float) -> None:
        """Faster or slower from the next step on."""
        self._next_speed = speed
        if self.due_s == math.inf:
            self.speed = speed
        else:
            self._cut(now_s)

    def submit(self, job: Job, now_s: float) -> None:
        """A request arrives. A run of steps is cut after the step that is under way."""
        self._waiting.append(job)
        job.expected = max(job.prompt_tokens - self.cached_tokens(job.hashes), 1)
        self.pending_tokens += job.expected
        self.held_tokens += job.prompt_tokens + job.answer_tokens
        if self.due_s == math.inf:
            self._start(now_s)
        else:
            self._cut(now_s)

    def _cut(self, now_s: float) -> None:
        began_s, steps, chunk = self._run
        if steps > 1 and not chunk:
            steps = min(max(self._steps_until(now_s - began_s), 1), steps)
            self._run = (began_s, steps, 0)
            self.due_s = began_s + self._steps_s(steps)

    def advance(self) -> tuple[list[Job], list[Job]]:
        """The present run of steps is over: requests that got their first token, and those that ended, with times."""
        now_s, (_, steps, chunk) = self.due_s, self._run
        decoding = len(self._decoding)
        self._decoded += steps if decoding else 0
        self._context += steps * decoding
        firsts = self._prefilled(chunk, now_s)
        ended = [job for job in firsts if math.isfinite(job.end_s)]
        while self._decoding and self._decoding[0][0] <= self._decoded:
            job = heapq.heappop(self._decoding)[2]
            job.end_s = now_s
            self._context -= job.prompt_tokens + job.answer_tokens
            self._release(job)
            ended.append(job)
        self._start(now_s)
        return firsts, ended

    def _prefilled(self, chunk: int, now_s: float) -> list[Job]:
        firsts = []
        while chunk and self._prefilling:
            job = self._prefilling[0]
            done = min(job.left, chunk)
            job.left -= done
            self.pending_tokens -= done
            chunk -= done
            if job.left:
                break
            self._prefilling.popleft()
            job.first_s = now_s
            firsts.append(job)
            for block in job.hashes[job.depth :]:  # what it has computed is there for others from now on
                users = self._used.get(block, 0)
                self._used[block] = users + 1
                self._kept.pop(block, None)
                if users:
                    self._reserved -= BLOCK_TOKENS  # two have computed the same at once
            if job.answer_tokens <= 1:
                job.end_s = now_s
                self._release(job)
            else:
                self._context += job.prompt_tokens + 1
                heapq.heappush(self._decoding, (self._decoded + job.answer_tokens - 1, job.number, job))
        return firsts

    def _start(self, now_s: float) -> None:
        """Admit who fits, and begin the next step, or as many equal ones as there are."""
        self.speed = self._next_speed
        self._admit()
        decoding = len(self._decoding)
        room = max(self.machine.chunk_tokens - decoding, 0)
        chunk = 0
        for job in self._prefilling:
            chunk += job.left
            if chunk >= room:
                chunk = room
                break
        if not decoding and not chunk:
            self.due_s = math.inf
            return
        steps = 1 if chunk else self._decoding[0][0] - self._decoded
        self._run = (now_s, steps, chunk)
        self.due_s = now_s + self._steps_s(steps) + chunk / (self.machine.prefill_per_s * self.speed)

    def _steps_s(self, steps: int) -> float:
        """Seconds that so many decode steps take from now on: contexts grow by one token each."""
        m, n = self.machine, len(self._decoding)
        each_s = m.base_s + m.sequence_s * n + m.token_s * self._context
        return (steps * each_s + m.token_s * n * steps * (steps - 1) / 2.0) / self.speed

    def _steps_until(self, passed_s: float) -> int:
        """Steps that have begun after so many seconds."""
        m, n = self.machine, len(self._decoding)
        grow_s = m.token_s * n / 2.0
        each_s = m.base_s + m.sequence_s * n + m.token_s * self._context - grow_s
        root = math.sqrt(each_s * each_s + 4.0 * grow_s * passed_s * self.speed)
        return math.ceil((root - each_s) / (2.0 * grow_s) if grow_s > 0.0 else passed_s * self.speed / each_s)

    # ------------------------------------------------------------------ memory

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            depth = self._depth(job.hashes)
            revived = sum(block not in self._used for block in job.hashes[:depth])
            own = job.prompt_tokens - depth * BLOCK_TOKENS + job.answer_tokens
            needed = own + revived * BLOCK_TOKENS
            if self._reserved and self._reserved + needed > self.machine.gpu_tokens:
                return
            self._waiting.popleft()
            for block in job.hashes[:depth]:
                self._used[block] = self._used.get(block, 0) + 1
                self._kept.pop(block, None)
            self._reserved += needed
            job.hits = min(depth * BLOCK_TOKENS, job.prompt_tokens - 1)
            job.left = job.prompt_tokens - job.hits
            job.depth = depth
            self.pending_tokens += job.left - job.expected
            self._prefilling.append(job)
            self._shrink()

    def _release(self, job: Job) -> None:
        """A request has ended: its own tokens are free, its blocks are kept while there is room."""
        self.held_tokens -= job.prompt_tokens + job.answer_tokens
        for block in reversed(job.hashes):
            self._used[block] -= 1
            if not self._used[block]:
                del self._used[block]
                self._kept[block] = None
                self._reserved -= BLOCK_TOKENS
        self._reserved -= job.prompt_tokens - len(job.hashes) * BLOCK_TOKENS + job.answer_tokens
        self._shrink()

    def _shrink(self) -> None:
        room = self.machine.cache_tokens - self._reserved
        while self._kept and len(self._kept) * BLOCK_TOKENS > room:
            self._kept.popitem(last=False)
