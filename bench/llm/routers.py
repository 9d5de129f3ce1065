"""One router's book of its replicas, and our rules, which go by it.

A router knows what it sent and what came back. What other routers sent it hears as in a cluster: through
`shadecast.prefix_mail`, at times of its own; how many requests replicas have, from tables that are made of reports, and
from replicas that say so when they accept a request. Rivals (`bench.llm.rivals`) are spared all that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from bench.llm.engine import BLOCK_TOKENS, Engine, Job, Machine
from shadecast.pick import load_cost
from shadecast.prefix import PrefixIndex
from shadecast.prefix_exchange import Decisions
from shadecast.prefix_mail import Mail, load_columns, others_load, read_news
from shadecast.prefix_score import OWN_WEIGHT, Contexts, Costs, Load, choose, waits_s
from shadecast.prompts import Prompt
from shadecast.rendezvous import Rendezvous, session_key
from shadecast.token_times import TokenTimes, Work

ENDLESS = 1 << 60
_Pick: TypeAlias = Callable[[Job], int]
_TRUE_ANSWER_TOKENS = 200.0
_ENDS = range(BLOCK_TOKENS, 1 << 30, BLOCK_TOKENS)
_CHOICES = 4
_BATCH_HALF = 16.0
EXCHANGE_S = 0.05
REPORT_S, TABLE_S = 1.0, 0.5


@dataclass(slots=True)
class Rule:
    """One arm."""

    name: str
    make: Callable[[Router], _Pick]
    rival: bool = True
    """Whether it is somebody else's."""
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
    several: bool = False
    """Whether it differs with several routers only."""


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
    """What comes on top of its own, as it has heard."""
    contexts: Contexts = field(default_factory=Contexts)
    """Of its own requests."""
    times: TokenTimes = field(default_factory=TokenTimes)
    """What tokens take, learned from its own streams."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.loads, self.mine, self.base = (
            [Load(f"r{i}", speed=speed) for i, speed in enumerate(self.speeds)] for _ in range(3)
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
        self.contexts.add(name, job.prompt_tokens)
        self._count(i, 1.0, float(job.uncached))
        return i

    def told(self, i: int, requests: int) -> None:
        """A replica has accepted a request, and says how many it has: Serve's replicas do."""
        self.base[i].requests = requests - self.mine[i].requests
        self._reckon(i)

    def first(self, job: Job) -> None:
        """Its first token has come: its prompt is not pending any more."""
        self._count(job.replica, 0.0, -float(job.uncached))

    def ended(self, job: Job) -> None:
        """Its answer is complete."""
        if not self.rule.rival:
            at_s = job.first_s - job.at_s, job.end_s - job.at_s
            work, units = Work(job.ahead, job.others, job.context), (1.0, float(job.answer_tokens))
            self.times.learn(work, at_s, units, speed=self.loads[job.replica].speed)
        self.contexts.remove(self.loads[job.replica].replica_id, job.prompt_tokens)
        self._count(job.replica, -1.0, 0.0)

    def _count(self, i: int, requests: float, tokens: float) -> None:
        self.mine[i].requests += requests
        self.mine[i].pending_tokens += tokens
        self._reckon(i)

    def _reckon(self, i: int) -> None:
        load, base, mine = self.loads[i], self.base[i], self.mine[i]
        load.requests = max(base.requests + mine.requests, 0.0)
        load.context_tokens = self.contexts.on(load.replica_id, load.requests)
        load.pending_tokens = max(base.pending_tokens + mine.pending_tokens, 0.0)

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
            base.pending_tokens = tokens.get(base.replica_id, 0.0)
            self._reckon(i)

    def take_table(self, counts: Sequence[float]) -> None:
        """Requests on each replica, as all routers' last reports have them."""
        for i, base in enumerate(self.base):
            base.requests = counts[i] - self.mine[i].requests
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


def _today(router: Router) -> _Pick:
    """Ours without prefixes: least predicted time of one more request, of four drawn."""

    def pick(_job: Job) -> int:
        drawn = [router.rng.randrange(len(router.loads)) for _ in range(_CHOICES)]
        loads = router.loads
        return router.least(drawn, lambda i: load_cost(loads[i].requests + 1.0, 256.0, _BATCH_HALF) / loads[i].speed)

    return pick


def _place(router: Router) -> Callable[[Job], tuple[Rendezvous, int] | None]:
    ring = Rendezvous({load.replica_id: load.speed for load in router.loads}, b"bench")
    return lambda job: (ring, session_key(job.hashes[0], b"bench")) if job.hashes else None


def _product(weight: float) -> Callable[[Router], _Pick]:
    """Step 1, with own tokens counted `weight` times."""

    def make(router: Router) -> _Pick:
        place, random = _place(router), router.rng.random
        return lambda job: choose(
            router.loads, job.prompt_tokens, router.cached, random, cold=place(job), own_weight=weight
        )

    return make


def _seconds(change: Callable[[Costs], Costs] = lambda costs: costs, *, cold: bool = True) -> Callable[[Router], _Pick]:
    """Step 2: step 1 until costs are learned; arms `change` what was learned."""

    def make(router: Router) -> _Pick:
        place, random = _place(router), router.rng.random

        def pick(job: Job) -> int:
            learned = router.times.costs()
            return choose(
                router.loads, job.prompt_tokens, router.cached, random, cold=place(job) if cold else None,
                costs=change(learned) if learned is not None else None,
            )  # fmt: skip

        return pick

    return make


def _true_costs(router: Router) -> _Pick:
    """Step 2 with the engines' own constants."""
    m = router.machine
    costs = Costs(1.0 / m.prefill_per_s, m.base_s, m.sequence_s, m.token_s, _TRUE_ANSWER_TOKENS)
    return _seconds(lambda _: costs)(router)


def _without(part: int) -> Callable[[Router], _Pick]:
    """Step 2 without one of first, decode, others, later."""

    def make(router: Router) -> _Pick:
        whole = _seconds()(router)

        def pick(job: Job) -> int:
            costs = router.times.costs()
            if costs is None:
                return whole(job)

            def key(i: int) -> float:
                load = router.loads[i]
                left = job.prompt_tokens - router.cached.get(load.replica_id, 0)
                parts = waits_s(load, job.prompt_tokens, left, costs)
                return sum(parts) - parts[part]

            return router.least(range(len(router.loads)), key)

        return pick

    return make


def ours(name: str, make: Callable[[Router], _Pick], **settings: Any) -> Rule:
    """An arm of ours."""
    return Rule(name, make, rival=False, **settings)


NOW = "Shadecast"
"""What is wired."""
OURS = (
    ours("Shadecast without prefixes", _today),
    *(ours(f"step 1, own x {weight:g}", _product(weight)) for weight in (1.0, 1.5, 2.0, 3.0)),
    ours(NOW, _seconds()),
    *(ours(f"without {name}", _without(part)) for part, name in enumerate(("first", "decode", "others", "later"))),
    ours("without context", _seconds(lambda costs: replace(costs, context_s=0.0))),
    ours("true costs", _true_costs),
    ours("prefill x 2", _seconds(lambda costs: replace(costs, prefill_s=2.0 * costs.prefill_s))),
    ours("prefill x 0.5", _seconds(lambda costs: replace(costs, prefill_s=0.5 * costs.prefill_s))),
    ours("later x 2", _seconds(lambda costs: replace(costs, later_per_s=2.0 * costs.later_per_s))),
    ours("later x 0.5", _seconds(lambda costs: replace(costs, later_per_s=0.5 * costs.later_per_s))),
    ours("cold prefixes anywhere", _seconds(cold=False)),
    ours("step 1, decisions not exchanged", _product(OWN_WEIGHT), shares=False, several=True),
    ours("decisions not exchanged", _seconds(), shares=False, several=True),
    ours("loads believed", _seconds(), believes=True, several=True),
    ours("exchange each 0.2 s", _seconds(), exchange_s=0.2, several=True),
    ours("exchange each second", _seconds(), exchange_s=1.0, several=True),
)
