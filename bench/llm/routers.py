"""One router's book of its replicas, and our rules, which go by it.

A router knows what it sent and what came back. What other routers sent it hears as in a cluster: through
`shadecast.prefix_mail`, at times of its own; how many requests replicas have, from tables that are made of reports, and
from replicas that say so when they accept a request. Rivals (`bench.llm.rivals`) are spared all that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.llm.engine import BLOCK_TOKENS, Engine, Job, Machine
from shadecast.pick import load_cost
from shadecast.prefix import PrefixIndex
from shadecast.prefix_exchange import Decisions
from shadecast.prefix_mail import Mail, load_columns, others_load, read_news
from shadecast.prefix_score import OWN_WEIGHT, Load, choose
from shadecast.prompts import Prompt
from shadecast.rendezvous import Rendezvous, session_key
from shadecast.token_times import TokenTimes, Work

ENDLESS = 1 << 60
_ENDS = range(BLOCK_TOKENS, 1 << 30, BLOCK_TOKENS)
_CHOICES = 4
_BATCH_HALF = 16.0
EXCHANGE_S = 0.2
REPORT_S, TABLE_S = 1.0, 0.5


@dataclass(slots=True)
class Rule:
    """One arm."""

    name: str
    make: Callable[[Router], Callable[[Job], int]]
    about: str = ""
    rival: bool = True
    """Whether it is somebody else's."""
    omniscient: bool = True
    """Whether its routers know the engines' state and each other's decisions at once."""
    one_tree: bool = False
    """Whether all routers have one index, of which each knows at once."""
    shares: bool = True
    """Whether routers tell each other of their decisions."""
    believes: bool = False
    """Whether loads that others tell are taken as they are, though they are old."""
    exchange_s: float = EXCHANGE_S
    """Between two exchanges of a router with the others."""
    endless: bool = False
    """Its index drops nothing."""
    gpu_index: bool = False
    """Its index is as large as the GPU's memory, whatever is kept on the host."""
    room: float = 1.0
    """Fraction of an engine's memory that its index reckons with: answers take some, too."""
    others: float = 0.0
    """How far a router's own changes since it heard of the others are taken for those of each other router."""
    knows_speed: bool = True
    """Whether it has measured how fast replicas are."""


@dataclass(slots=True)
class Router:
    """One router's book of all replicas."""

    rule: Rule
    speeds: Sequence[float]
    machine: Machine
    seed: int
    engines: Sequence[Engine] = ()
    """The truth; only rivals look at it."""
    routers: int = 1
    tree: PrefixIndex | None = None
    """The one that all routers have."""
    loads: list[Load] = field(init=False)
    """What it takes for the present state of each replica."""
    index: PrefixIndex = field(init=False)
    rng: random.Random = field(init=False)
    choose: Callable[[Job], int] = field(init=False)
    cached: Mapping[str, int] = field(init=False, default_factory=dict)
    """Tokens of the present prompt that replicas have."""
    sent: Decisions = field(default_factory=Decisions)
    """Decisions since the last exchange."""
    number: int = 0
    """Of the last decisions of others that it has had."""
    mine: list[Load] = field(init=False)
    """Its own requests and tokens."""
    base: list[Load] = field(init=False)
    """What comes on top of `weight` times its own, as it has heard."""
    weight: float = field(init=False)
    context: float = 0.0
    """Prompt tokens of its own requests."""
    count: float = 0.0
    times: TokenTimes = field(default_factory=TokenTimes)
    """What tokens take, learned from its own streams."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.weight = 1.0 + self.rule.others * (self.routers - 1)
        speeds = self.speeds if self.rule.knows_speed else (1.0,) * len(self.speeds)
        self.loads, self.mine, self.base = (
            [Load(f"r{i}", speed=speed) for i, speed in enumerate(speeds)] for _ in range(3)
        )
        self.index = self.tree if self.tree is not None else new_index(self.rule, self.machine)
        self.choose = self.rule.make(self)

    # ------------------------------------------------------------------ what happens

    def route(self, job: Job) -> int:
        """The replica for a request, which is sent there."""
        prompt = prompt_of(job)
        self.cached = self.index.match(prompt)
        i = self.choose(job)
        name = self.loads[i].replica_id
        job.replica = i
        job.uncached = max(job.prompt_tokens - self.cached.get(name, 0), 1)
        load = self.loads[i]
        job.ahead, job.others = load.pending_tokens + job.uncached, load.requests
        job.context = load.context_tokens
        self.sent.add(self.index.insert(name, prompt))
        self._count(i, 1.0, float(job.uncached), job.prompt_tokens)
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
        if not self.rule.rival:
            at_s = job.first_s - job.at_s, job.end_s - job.at_s
            self.times.learn(Work(job.ahead, job.others, job.context), at_s, (1.0, float(job.answer_tokens)))
        self._count(job.replica, -1.0, 0.0, -job.prompt_tokens)

    def _count(self, i: int, requests: float, tokens: float, context: int = 0) -> None:
        self.mine[i].context_tokens += context
        self.context += context
        self.count += requests
        self.mine[i].requests += requests
        self.mine[i].pending_tokens += tokens
        self._reckon(i)

    def _reckon(self, i: int) -> None:
        load, base, mine = self.loads[i], self.base[i], self.mine[i]
        load.requests = max(base.requests + self.weight * mine.requests, 0.0)
        mean = self.context / self.count if self.count else 0.0
        load.context_tokens = mine.context_tokens + max(load.requests - mine.requests, 0.0) * mean
        load.pending_tokens = max(base.pending_tokens + self.weight * mine.pending_tokens, 0.0)

    def exchange(self, mail: Mail, now_s: float) -> None:
        """Tell the others, and hear of them."""
        name = f"router {self.seed}"
        pending = {load.replica_id: max(load.pending_tokens, 0.0) for load in self.mine}
        posted = {"router_id": name, "after": self.number, **load_columns(pending)}
        router_id, after = mail.post({**posted, "decisions": self.sent.take()} if self.sent else posted, now_s)
        news = read_news(mail.take(router_id, after, now_s))
        self.number = news.number
        for decision in news.decisions if self.rule.shares else ():
            self.index.learn(decision, _ENDS)
        tokens = news.tokens if self.rule.believes else others_load(news.tokens, news.age_s, pending)
        for i, base in enumerate(self.base):
            others = tokens.get(base.replica_id, 0.0)
            base.pending_tokens = others - (self.weight - 1.0) * self.mine[i].pending_tokens
            self._reckon(i)

    def take_table(self, counts: Sequence[float]) -> None:
        """Requests on each replica, as all routers' last reports have them."""
        for i, base in enumerate(self.base):
            base.requests = counts[i] - self.weight * self.mine[i].requests
            self._reckon(i)

    def join(self) -> None:
        """One more replica takes requests from now on."""
        for loads in (self.loads, self.mine, self.base):
            loads.append(Load(f"r{len(loads)}"))
        self.choose = self.rule.make(self)

    # ------------------------------------------------------------------ parts of rules

    def least(self, among: Sequence[int], key: Callable[[int], float]) -> int:
        """The replica of the least key; equals are drawn."""
        keys = [key(i) for i in among]
        best = min(keys)
        return self.rng.choice([i for i, each in zip(among, keys, strict=True) if each == best])

    def requests(self, i: int) -> float:
        """As this router knows them."""
        return self.loads[i].requests


def new_index(rule: Rule, machine: Machine) -> PrefixIndex:
    """An index as large as the rule has it."""
    kv_tokens = machine.gpu_tokens if rule.gpu_index else machine.cache_tokens
    return PrefixIndex(ENDLESS if rule.endless else round(rule.room * kv_tokens), ENDLESS)


def prompt_of(job: Job) -> Prompt:
    """The job's blocks as the index takes them."""
    return Prompt(job.hashes, _ENDS, job.prompt_tokens)


def _today(router: Router) -> Callable[[Job], int]:
    """Ours without prefixes: least predicted time of one more request, of four drawn."""

    def pick(_job: Job) -> int:
        drawn = [router.rng.randrange(len(router.loads)) for _ in range(_CHOICES)]
        loads = router.loads
        return router.least(drawn, lambda i: load_cost(loads[i].requests + 1.0, 256.0, _BATCH_HALF) / loads[i].speed)

    return pick


def seconds(*, cold: bool = True) -> Callable[[Router], Callable[[Job], int]]:
    """Ours, step 2: step 1 until costs are learned."""

    def make(router: Router) -> Callable[[Job], int]:
        ring = Rendezvous({load.replica_id: load.speed for load in router.loads}, b"bench")

        def pick(job: Job) -> int:
            place = (ring, session_key(job.hashes[0], b"bench")) if cold and job.hashes else None
            return choose(
                router.loads, job.prompt_tokens, router.cached, router.rng.random, cold=place,
                costs=router.times.costs(),
            )  # fmt: skip

        return pick

    return make


def _product(weight: float, *, cold: bool = True) -> Callable[[Router], Callable[[Job], int]]:
    """Ours, step 1, with own tokens counted `weight` times."""

    def make(router: Router) -> Callable[[Job], int]:
        ring = Rendezvous({load.replica_id: load.speed for load in router.loads}, b"bench")

        def pick(job: Job) -> int:
            place = (ring, session_key(job.hashes[0], b"bench")) if cold and job.hashes else None
            return choose(
                router.loads, job.prompt_tokens, router.cached, router.rng.random, cold=place, own_weight=weight
            )

        return pick

    return make


def ours(name: str, make: Callable[[Router], Callable[[Job], int]], **settings: object) -> Rule:
    """An arm of ours."""
    return Rule(name, make, rival=False, omniscient=False, **settings)  # type: ignore[arg-type]


WEIGHTS = (1.0, 1.5, 2.0, 3.0)
OURS = (
    ours("Shadecast without prefixes", _today),
    *(ours(f"step 1, own x {weight:g}", _product(weight)) for weight in WEIGHTS),
    ours("step 2", seconds()),
    ours("step 2, cold prefixes anywhere", seconds(cold=False)),
    *(ours(f"step 1, room {room:g}", _product(OWN_WEIGHT), room=room) for room in (0.5, 0.75)),
    ours("step 1, cold prefixes anywhere", _product(OWN_WEIGHT, cold=False)),
    ours("step 1, decisions not exchanged", _product(OWN_WEIGHT), shares=False),
    ours("step 1, neither", _product(OWN_WEIGHT, cold=False), shares=False),
    ours("step 1, loads believed", _product(OWN_WEIGHT), believes=True),
    ours("step 1, reports each second", _product(OWN_WEIGHT), exchange_s=1.0),
)
