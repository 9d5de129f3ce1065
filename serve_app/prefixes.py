"""Where a prompt goes by what replicas have cached of it: a router's part of `shadecast.prefix`, `balance.prefix`.

Everything runs on the router's event loop, and whatever goes wrong here leaves a request to the usual choice.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest

from serve_app.user_functions import UserFunction
from shadecast.calls import Call, Phase
from shadecast.config import CHOICES, BalanceConfig
from shadecast.messages import number_of
from shadecast.popular import Popular
from shadecast.prefix import PrefixIndex
from shadecast.prefix_exchange import Decisions
from shadecast.prefix_mail import News, load_columns, others_load, read_news
from shadecast.prefix_score import Comparison, Contexts, Load, choose, drawn
from shadecast.prompts import Prompt, find_body, read_prompt
from shadecast.rendezvous import Rendezvous, session_key
from shadecast.token_pairs import TokenCopy
from shadecast.token_times import TokenTimes, Work
from shadecast.tokens import TokenCount, get

if TYPE_CHECKING:
    from serve_app.routing.routes import Routes

logger = logging.getLogger("ray.serve")

KV_TOKENS = 280_000
"""Of a replica that does not say: a model of 32 billion parameters on two H100."""
_BUSY_S, _IDLE_S, _EXCHANGES_PER_S = 0.05, 0.2, 200.0
"""Between two exchanges while there is something to tell, and else. Loads that are told each second are no better than
none at all; those of all routers together take this many."""
_NEVER = 1e-9
_KV_STAT, _USED_STAT = "kv_tokens", "kv_cache_usage_perc"
"""What `record_routing_stats` of a deployment may tell: the tokens that the replica's cache holds, and the fraction of
it that requests take, by the name that vLLM's metric of it has."""


class Prefixes:
    """Prompts of one router's calls: read once, placed by `shadecast.prefix_score`, and pending until computed."""

    def __init__(self, routes: Routes, deployment: str, count: Callable[[str, float], None]) -> None:
        """`count` adds to one of the ledger's totals."""
        self._count = count
        self.on = False
        """Whether prompts are looked at, at all."""
        self._routes, self._deployment = routes, deployment
        self._setting, self._kv_tokens = "off", 0
        self._key = os.urandom(16)
        """Until the cluster's is known: what clients do not know."""
        self._read_with: UserFunction | None = None
        self._index = PrefixIndex(KV_TOKENS)
        self._alive: object = None
        """The membership that the index knows."""
        self._ring: Rendezvous | None = None
        self._last: tuple[PendingRequest, Prompt | None, Mapping[str, int]] | None = None
        """The request that was looked at last, so that no choice reads its prompt twice."""
        self._compared: tuple[PendingRequest, Comparison] | None = None
        """The last request that was chosen for by its prompt, and between what."""
        self._placed: dict[Call | TokenCopy, tuple[str, int]] = {}
        """Where each call's prompt is not computed yet, or a copy's, and how many tokens of it."""
        self._pending: dict[str, float] = {}
        """Those tokens by replica."""
        self._held: dict[Any, tuple[str, Prompt]] = {}
        """Calls with a prompt, and the replica that has them."""
        self._contexts = Contexts()
        """Of those."""
        self._popular, self._times = Popular(), TokenTimes()
        self._reasons = False
        """Whether answers have been seen to end with a reason."""
        self._sent = Decisions()
        self._news = News()
        """What the other routers have said last."""
        self._others: dict[str, float] = {}
        """Their pending tokens by replica, as good as they are known."""
        self._key_is_shared = False
        self._said = False

    # ------------------------------------------------------------------ settings

    def configure(self, config: BalanceConfig, *, observing: bool = False) -> None:
        """Go by other settings from now on, and forget what was known if they differ. Who observes reads nothing."""
        self.on = config.prefix != "off" and not observing
        if (config.prefix, config.kv_tokens) == (self._setting, self._kv_tokens):
            return
        self._setting, self._kv_tokens = config.prefix, config.kv_tokens
        own = config.prefix not in ("off", "auto")
        otherwise = "requests are routed without regard to prompts"
        self._read_with = UserFunction("balance.prefix", config.prefix, otherwise) if own else None
        self._forget()

    def use_secret(self, secret: bytes | None) -> None:
        """Hash by the cluster's secret from now on, as all routers do; None: it will not be known."""
        self._key_is_shared = self._key_is_shared or bool(secret)
        if secret and secret != self._key:
            self._key = secret
            self._forget()

    def _forget(self) -> None:
        self._index, self._popular = PrefixIndex(self._kv_tokens or KV_TOKENS), Popular()
        self._alive = self._ring = self._last = self._compared = None
        self._placed.clear()
        self._pending.clear()
        self._held.clear()
        self._contexts = Contexts()
        self._sent, self._news, self._others = Decisions(), News(self._news.number), {}

    # ------------------------------------------------------------------ choosing

    def reads(self, pending: PendingRequest) -> bool:
        """Whether a request has a prompt that is gone by: then its session is only a hint."""
        return self.on and self._look(pending)[0] is not None

    def pick(self, pending: PendingRequest, pool: Sequence[int] | None = None) -> int:
        """Index of the replica for a request, of `pool` if given; the usual pick where prompts do not say."""
        routes = self._routes
        try:
            i = self._choose(pending, pool) if self.on else -1
        except Exception as error:
            self._fails(error)
            i = -1
        return i if i >= 0 else routes.picks.pick(routes.random, CHOICES, -1, pool)

    def _choose(self, pending: PendingRequest, pool: Sequence[int] | None) -> int:
        """Only among those that take traffic and have a place; -1 if there is none, or no prompt."""
        prompt, cached = self._look(pending)
        if prompt is None:
            return -1
        routes, picks, random = self._routes, self._routes.picks, self._routes.random
        alone = routes.level == "power_of_two"  # without the control plane: by this router's own calls
        if pool is None:
            pool = routes.allowed() if alone else picks.pool
        shares = picks.share
        compared = [
            i
            for i in drawn(pool, self._holder(cached, pool), random)
            if picks.takes(i) and (shares[i] >= 1.0 or alone or random() < shares[i])
        ]
        loads = [self._load(i) for i in compared]
        costs = self._times.costs()
        for load in loads if costs is not None else ():
            load.context_tokens = self._contexts.on(load.replica_id, load.requests)
        self._compared = pending, Comparison(prompt.tokens, loads, cached, costs)
        cold = None
        if not cached:
            whose = pending.metadata.session_id or (prompt.hashes[0] if prompt.hashes else b"")
            if whose:
                self._ring = ring = self._ring or Rendezvous(dict.fromkeys(picks.ids, 1.0), self._key)
                cold = ring, session_key(whose, self._key)
        at = choose(loads, prompt.tokens, cached, random, cold=cold, costs=costs)
        return compared[at] if at >= 0 else -1

    def compared(self, pending: PendingRequest) -> Comparison | None:
        """What the choice for a request has just compared; None if its prompt did not choose."""
        return self._compared[1] if self._compared is not None and self._compared[0] is pending else None

    def _load(self, i: int) -> Load:
        """What is known of a replica now; without the control plane by this router's own calls."""
        picks, replica_id = self._routes.picks, self._routes.picks.ids[i]
        if self._routes.level == "power_of_two":
            return Load(replica_id, self._pending.get(replica_id, 0.0), float(picks.in_flight[i]))
        return Load(replica_id, self._tokens_on(replica_id), picks.queue(i), picks.speed(i))

    def _tokens_on(self, replica_id: str) -> float:
        return self._pending.get(replica_id, 0.0) + self._others.get(replica_id, 0.0)

    def _load_of(self, call: Any) -> Load:
        """Of the replica of a call; nothing where that is gone."""
        i = self._routes.picks.index.get(call.replica_id, -1)
        return self._load(i) if i >= 0 else Load(call.replica_id)

    def _holder(self, cached: Mapping[str, int], pool: Sequence[int]) -> int:
        """Of many replicas, one with the longest match that has a place; -1 without any."""
        picks, among = self._routes.picks, frozenset[int]()
        held: Collection[tuple[int, int]] = ()
        if cached and drawn(pool, -1, self._routes.random) is not pool:
            among = frozenset(pool)
            held = [(tokens, i) for name, tokens in cached.items() if (i := picks.index.get(name, -1)) in among]
        return max(((tokens, i) for tokens, i in held if picks.takes(i)), default=(0, -1))[1]

    def _look(self, pending: PendingRequest) -> tuple[Prompt | None, Mapping[str, int]]:
        """A request's prompt, and how much of it each replica has."""
        if self._last is None or self._last[0] is not pending:
            prompt, cached = None, {}
            try:
                self._look_at_members()
                prompt = self._read(pending)
                cached = self._index.match(prompt) if prompt is not None else {}
            except Exception as error:  # whatever a request holds
                self._fails(error)
                prompt = None
            self._last = pending, prompt, cached
        return self._last[1], self._last[2]

    def _read(self, pending: PendingRequest) -> Prompt | None:
        if self._read_with is None:
            body = find_body(pending.args, pending.kwargs)
        else:
            body = self._read_with(pending.args, pending.kwargs)
            if isinstance(body, (str, list, tuple)):
                body = {"prompt": body}
        return read_prompt(body, self._key, pending.metadata.multiplexed_model_id) if body is not None else None

    def _look_at_members(self) -> None:
        """Forget replicas that are gone, and take newcomers' word of their memory."""
        alive = self._routes.alive
        if alive is self._alive:
            return
        names = {replica_id for replica_id, _, _ in alive}
        self._index.keep(names)
        for replica in self._routes.replicas if not self._kv_tokens else ():
            if (told := self._stat(replica, _KV_STAT) or 0) > 0:
                self._index.resize(replica.replica_id.unique_id, int(told))
        self._alive, self._ring = alive, None

    def _fails(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            logger.exception(
                f"shadecast: {self._deployment}: balance.prefix failed: {error!r}: such requests are routed without "
                "regard to prompts; further failures are not logged",
                exc_info=error,
            )

    # ------------------------------------------------------------------ what becomes of calls

    def counted(self, call: Any) -> None:
        """A call is chosen for a replica, which will have its prompt, or has left one. Never raises."""
        try:
            self.computed(call)
            left = self._held.pop(call, None)
            if left is not None:
                self._contexts.remove(left[0], left[1].tokens)
            self._place(call)
        except Exception as error:
            self._fails(error)

    def _place(self, call: Any) -> None:
        if call.phase is not Phase.CHOSEN or call.pending is None:
            return
        prompt, cached = self._look(call.pending)
        self._last = None
        if prompt is not None:
            call.prompt_tokens, call.ahead_tokens = prompt.tokens, self._await(call, call.replica_id, prompt, cached)
            besides = max(self._load_of(call).requests - 1.0, 0.0)  # it has just been counted
            call.context_tokens = self._contexts.on(call.replica_id, besides)
            self._held[call] = call.replica_id, prompt
            self._contexts.add(call.replica_id, prompt.tokens)
            self._popular.add(prompt)
            self._count("prompt_tokens", prompt.tokens)
            self._count("cached_tokens", min(cached.get(call.replica_id, 0), prompt.tokens))

    def _await(self, whose: Any, name: str, prompt: Prompt, cached: Mapping[str, int]) -> float:
        """A prompt goes to a replica and is pending there; tokens that are to be computed until it is."""
        left = max(prompt.tokens - cached.get(name, 0), 1)
        ahead = self._tokens_on(name) + left
        self._placed[whose] = name, left
        self._pending[name] = self._pending.get(name, 0.0) + left
        self._sent.add(self._index.insert(name, prompt))
        return ahead

    def computed(self, call: Any) -> None:
        """A call's first item is there, or it is over: nothing of its prompt waits any more."""
        placed = self._placed.pop(call, None)
        if placed is not None:
            left = self._pending[placed[0]] - placed[1]
            if left > 0.0:
                self._pending[placed[0]] = left
            else:
                del self._pending[placed[0]]

    def worth(self, call: Any) -> float:
        """How much more often than usual a call is to be copied to replicas on trial; 1 on average. Never raises."""
        try:
            if call not in self._held:
                return 1.0
            prompt = self._held[call][1]
            cached = self._index.match(prompt)
            had = min(cached.get(name, 0) for name, _ in self._routes.mirrored)
            fraction = min(sum(part for _, part in self._routes.mirrored), 1.0)
            return max(self._popular.chance(self._popular.gain(prompt, had), fraction), _NEVER) / fraction
        except Exception as error:
            self._fails(error)
            return 1.0

    def copy(self, call: Any, candidate_id: str) -> TokenCopy | None:
        """A copy of the call goes to a replica on trial, which has its prompt, too; None if it is no stream with one.

        Never raises.
        """
        try:
            if call not in self._held:
                return None
            prompt, pending = self._held[call][1], call.pending
            if not call.metadata.is_streaming:
                self._sent.add(self._index.insert(candidate_id, prompt))
                return None
            copy = TokenCopy(self._times, (call.ahead_tokens, 0.0), needs_reason=self._reasons)
            ahead = self._await(copy, candidate_id, prompt, self._index.match(prompt))
            body = find_body(pending.args, pending.kwargs)
            copy.ahead_tokens, copy.comparable = (call.ahead_tokens, ahead), get(body, "n") in (None, 1)
            copy.begun = functools.partial(self.computed, copy)
        except Exception as error:
            self._fails(error)
            return None
        return copy

    def ended(self, call: Any) -> None:
        """A stream with a prompt went well: what its tokens took is learned. Never raises."""
        count = call.reading.count if call.reading is not None else None
        if count is None:
            return
        self._reasons = self._reasons or bool(count.finish)
        work = Work(call.ahead_tokens, call.others, call.context_tokens)
        speed = self._load_of(call).speed
        self._times.learn(work, call.reading.times_s, call.reading.units_at, count.tokens, speed)

    def count_of(self, call: Any) -> TokenCount | None:
        """What counts the tokens of a call's stream; None where it has no prompt."""
        return TokenCount() if call in self._held else None

    def memory(self) -> dict[str, tuple[float, float]]:
        """Of each replica, the fraction of its memory for keys and values that calls from here take, and its own word.

        In hundredths; what nobody says is below 0. Never raises.
        """
        if not self.on:
            return {}
        taken: dict[str, float] = {}
        for call, (name, prompt) in self._held.items():
            count = call.reading.count if call.reading is not None else None
            taken[name] = taken.get(name, 0.0) + prompt.tokens + (count.tokens if count is not None else 0.0)
        found = {}
        for replica in self._routes.replicas:
            name, told = replica.replica_id.unique_id, self._stat(replica, _USED_STAT)
            own = taken.get(name, 0.0) / max(self._index.capacity(name), 1)
            found[name] = round(own, 2), round(told, 2) if told is not None and told >= 0.0 else -1.0
        return found

    @staticmethod
    def _stat(replica: Any, name: str) -> float | None:
        """A finite number that the deployment tells of a replica."""
        stats = getattr(replica, "routing_stats", None)
        told = number_of(stats.get(name)) if isinstance(stats, Mapping) else math.nan
        return told if math.isfinite(told) else None

    # ------------------------------------------------------------------ other routers

    @property
    def between_s(self) -> float:
        """Most time between two exchanges: while prompts are looked at, others must hear of them soon."""
        table = self._routes.table
        if not self.on or table is None or table.routers <= 1:
            return math.inf
        return max(_BUSY_S if self._sent or self._pending else _IDLE_S, table.routers / _EXCHANGES_PER_S)

    def post(self, router_id: str) -> dict[str, Any] | None:
        """What the other routers should know, and what this one has had of them; None while it is switched off."""
        if not (self.on and self._key_is_shared):
            return None
        posted = {"router_id": router_id, "after": self._news.number, **load_columns(self._pending)}
        return {**posted, "decisions": self._sent.take()} if self._sent else posted

    def hear(self, received: Any) -> None:
        """What the others have said; None where the coordinator has nothing. Never raises."""
        if received is None or not self.on:
            return
        try:
            self._look_at_members()
            self._news = news = read_news(received)
            alive = {replica_id for replica_id, _, _ in self._routes.alive}
            for decision in news.decisions:
                if decision.replica_id in alive:
                    self._index.learn(decision)
            self._others = others_load(news.tokens, news.age_s, alive)
        except Exception as error:
            self._fails(error)
