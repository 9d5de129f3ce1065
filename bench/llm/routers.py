"""The rules that choose a replica for each prompt, each as it is published, and ours.

A router knows what it sent and what came back. Of several routers each has its own book; what the others have sent and
had back it learns from their reports, four times a second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.llm.engine import BLOCK_TOKENS, Job
from shadecast.pick import load_cost
from shadecast.prefix import Decision, PrefixIndex
from shadecast.prefix_exchange import Decisions, read_decisions
from shadecast.prefix_mail import others_load
from shadecast.prefix_score import OWN_WEIGHT, Load, choose
from shadecast.prompts import Prompt
from shadecast.rendezvous import Rendezvous, session_key

_RAY_MATCH = 0.1
"""`match_rate_threshold` of Ray's prefix router; its `imbalanced_threshold` is infinite by default."""
_ENDLESS = 1 << 60
_ENDS = range(BLOCK_TOKENS, 1 << 30, BLOCK_TOKENS)
_CHOICES = 4
_BATCH_HALF = 16.0


@dataclass(slots=True)
class Rule:
    """One arm."""

    name: str
    make: Callable[[Router], Callable[[Job], int]]
    shares: bool = True
    """Whether routers tell each other of their decisions."""
    believes: bool = False
    """Whether loads that others tell are taken as they are, though they are old."""
    report_s: float = 0.25
    """Between two reports."""
    endless: bool = False
    """Its index drops nothing."""
    room: float = 1.0
    """Fraction of an engine's memory that its index reckons with: answers take some, too."""
    others: float = 0.0
    """How far a router's own changes since the last report are taken for those of each other router."""


@dataclass(slots=True)
class Router:
    """One router's book of all replicas."""

    rule: Rule
    speeds: Sequence[float]
    kv_tokens: int
    seed: int
    routers: int = 1
    loads: list[Load] = field(init=False)
    """What it takes for the present state of each replica."""
    index: PrefixIndex = field(init=False)
    rng: random.Random = field(init=False)
    choose: Callable[[Job], int] = field(init=False)
    sent: Decisions = field(default_factory=Decisions)
    """Decisions since the last report."""
    mine: list[Load] = field(init=False)
    """Its own requests and tokens."""
    base: list[Load] = field(init=False)
    """What comes on top of `weight` times its own, by the last report or the replica's own word."""
    weight: float = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.weight = 1.0 + self.rule.others * (self.routers - 1)
        self.loads, self.mine, self.base = (
            [Load(f"r{i}", speed=speed) for i, speed in enumerate(self.speeds)] for _ in range(3)
        )
        self.index = PrefixIndex(_ENDLESS if self.rule.endless else round(self.rule.room * self.kv_tokens), _ENDLESS)
        self.choose = self.rule.make(self)

    # ------------------------------------------------------------------ what happens

    def route(self, job: Job) -> int:
        """The replica for a request, which is sent there."""
        prompt = prompt_of(job)
        i = self.choose(job)
        name = self.loads[i].replica_id
        job.replica = i
        job.uncached = job.prompt_tokens - self.index.match(prompt).get(name, 0)
        self.sent.add(self.index.insert(name, prompt))
        self._count(i, 1.0, float(job.uncached))
        return i

    def told(self, i: int, requests: int) -> None:
        """A replica has accepted a request, and says how many it has: Serve's replicas do."""
        self.base[i].requests = requests - self.weight * self.mine[i].requests
        self._reckon(i)

    def first(self, job: Job) -> None:
        """Its first token has come: its prompt is not pending any more."""
        self._count(job.replica, 0.0, -float(job.uncached))

    def ended(self, job: Job) -> None:
        """Its answer is complete."""
        self._count(job.replica, -1.0, 0.0)

    def _count(self, i: int, requests: float, tokens: float) -> None:
        self.mine[i].requests += requests
        self.mine[i].pending_tokens += tokens
        self._reckon(i)

    def _reckon(self, i: int) -> None:
        load, base, mine = self.loads[i], self.base[i], self.mine[i]
        load.requests = max(base.requests + self.weight * mine.requests, 0.0)
        load.pending_tokens = max(base.pending_tokens + self.weight * mine.pending_tokens, 0.0)

    def report(self) -> list[Decision]:
        """Its decisions since the last report."""
        return read_decisions(self.sent.take())

    def hear(self, fleet: Sequence[Router], decisions: Sequence[Decision]) -> None:
        """All routers' reports: their counts, and the others' decisions."""
        tokens = {
            load.replica_id: sum(router.mine[i].pending_tokens for router in fleet if router is not self)
            for i, load in enumerate(self.loads)
        }
        if not self.rule.believes:
            tokens = others_load(tokens, 0.0, tokens)
        for i, base in enumerate(self.base):
            base.requests = sum(router.mine[i].requests for router in fleet) - self.weight * self.mine[i].requests
            base.pending_tokens = tokens[base.replica_id] - (self.weight - 1.0) * self.mine[i].pending_tokens
            self._reckon(i)
        for decision in decisions if self.rule.shares else ():
            self.index.learn(decision, _ENDS)

    def join(self) -> None:
        """One more replica takes requests from now on."""
        for loads in (self.loads, self.mine, self.base):
            loads.append(Load(f"r{len(loads)}"))
        self.choose = self.rule.make(self)

    # ------------------------------------------------------------------ parts of rules

    def least(self, among: Sequence[int], key: Callable[[Load], float]) -> int:
        """The replica of the least key; equals are drawn."""
        best = min(key(self.loads[i]) for i in among)
        return self.rng.choice([i for i in among if key(self.loads[i]) == best])


def prompt_of(job: Job) -> Prompt:
    """The job's blocks as the index takes them."""
    return Prompt(job.hashes, _ENDS, job.prompt_tokens)


def _requests(load: Load) -> float:
    return load.requests


def _round_robin(router: Router) -> Callable[[Job], int]:
    at = router.seed

    def pick(_job: Job) -> int:
        nonlocal at
        at += 1
        return at % len(router.loads)

    return pick


def _power_of_two(router: Router) -> Callable[[Job], int]:
    """Serve's default."""
    return lambda _job: router.least(router.rng.sample(range(len(router.loads)), 2), _requests)


def _least_requests(router: Router) -> Callable[[Job], int]:
    return lambda _job: router.least(range(len(router.loads)), _requests)


def _today(router: Router) -> Callable[[Job], int]:
    """Ours without prefixes: least predicted time of one more request, of four drawn."""

    def pick(_job: Job) -> int:
        drawn = [router.rng.randrange(len(router.loads)) for _ in range(_CHOICES)]
        return router.least(drawn, lambda load: load_cost(load.requests + 1.0, 256.0, _BATCH_HALF) / load.speed)

    return pick


def _ray_prefix(router: Router) -> Callable[[Job], int]:
    """Ray's PrefixCacheAffinityRouter with its defaults: the longest match, else the smallest tree.

    Of several the one with the fewest requests.
    """

    def pick(job: Job) -> int:
        everybody = range(len(router.loads))
        found = router.index.match(prompt_of(job))
        longest = max(found.values(), default=0)
        if longest < _RAY_MATCH * job.prompt_tokens:
            sizes = [router.index.tokens(load.replica_id) for load in router.loads]
            return router.least([i for i in everybody if sizes[i] == min(sizes)], _requests)
        return router.least([i for i in everybody if found.get(router.loads[i].replica_id) == longest], _requests)

    return pick


def _product(weight: float, *, cold: bool = True) -> Callable[[Router], Callable[[Job], int]]:
    """Ours, step 1, with own tokens counted `weight` times."""

    def make(router: Router) -> Callable[[Job], int]:
        ring = Rendezvous({load.replica_id: load.speed for load in router.loads}, b"bench")

        def pick(job: Job) -> int:
            place = (ring, session_key(job.hashes[0], b"bench")) if cold and job.hashes else None
            cached = router.index.match(prompt_of(job))
            return choose(router.loads, job.prompt_tokens, cached, router.rng.random, cold=place, own_weight=weight)

        return pick

    return make


WEIGHTS = (1.0, 1.5, 2.0, 3.0)
_RULES = [
    Rule("round robin", _round_robin),
    Rule("power of two (Serve)", _power_of_two),
    Rule("least requests", _least_requests),
    Rule("Ray prefix router", _ray_prefix, endless=True, others=0.5, report_s=1.0),  # what serves it best
    Rule("Shadecast without prefixes", _today),
    *(Rule(f"step 1, own x {weight:g}", _product(weight)) for weight in WEIGHTS),
    *(Rule(f"step 1, room {room:g}", _product(OWN_WEIGHT), room=room) for room in (0.5, 0.75)),
    Rule("step 1, cold prefixes anywhere", _product(OWN_WEIGHT, cold=False)),
    Rule("step 1, decisions not exchanged", _product(OWN_WEIGHT), shares=False),
    Rule("step 1, neither", _product(OWN_WEIGHT, cold=False), shares=False),
    Rule("step 1, half of the changes of others, too", _product(OWN_WEIGHT), others=0.5),
    Rule("step 1, loads believed", _product(OWN_WEIGHT), believes=True),
    Rule("step 1, reports each second", _product(OWN_WEIGHT), report_s=1.0),
    Rule("step 1, all three", _product(OWN_WEIGHT), others=0.5, believes=True, report_s=1.0),
]
RULES = {rule.name: rule for rule in _RULES}
