"""Where a prompt goes: where users wait least because of it.

Until it is known what tokens cost, by a product without constants:

    score_i = (P_i + w u_i) (n_i + 1) / s_i

with P_i the tokens that were sent to replica i and are not computed yet, u_i the tokens of this prompt that it does not
have in its cache, n_i its requests and s_i its measured speed, 1 = nominal. P + u is the time to the first token, n + 1
the batch that everybody's next tokens are computed in; their product is that of LMetric (OSDI'26, arXiv 2603.15202).
A prompt's own tokens count twice (w): that keeps prefixes together.

Then in seconds (`Costs`), with K_i the context of the requests there, L the prompt's tokens, o those of an answer:

    first_i  = b (P_i + u_i)                          until its first token
    decode_i = o (a + c (n_i + 1) + d (K_i + L))      its answer, in the batch that it joins
    others_i = n_i (b u_i + o/2 (c + d L))            others wait for its prefill, and get slower
    later_i  = r b u_i b (P_i + u_i/2) / s_i          those who come meanwhile wait for its prefill, too
    score_i  = (first_i + decode_i + others_i + later_i) / s_i

All of it is time that users wait, so nothing is weighed. r, the requests a second that come later, is a constant:
within a factor of two either way it changes little (docs/decisions/0092).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shadecast.rendezvous import Rendezvous

OWN_WEIGHT = 2.0
"""w; 1, 1.5, 2 and 3 are compared in docs/decisions/0090."""
LATER_PER_S = 3.0
"""r."""
_NEAR = 1.1
"""Scores within a tenth of the best are equal: speeds are not known more exactly."""
_LOOK_AT_ALL = 32
"""With more replicas, a prompt's holder and a few others are compared."""
_DRAWS = 3
_MIN_SPEED = 1e-3


@dataclass(frozen=True, slots=True)
class Costs:
    """What tokens cost in seconds, on a replica of nominal speed, as learned from streams (`shadecast.token_times`)."""

    prefill_s: float
    """b: a prompt token."""
    step_s: float
    """a: an answer's token, alone."""
    sequence_s: float
    """c: what each other request adds to that."""
    context_s: float
    """d: what each token of their contexts adds."""
    answer_tokens: float
    """o: of a usual answer."""
    later_per_s: float = LATER_PER_S


@dataclass(slots=True)
class Load:
    """What a router knows of one replica."""

    replica_id: str
    pending_tokens: float = 0.0
    """P: sent there and not computed yet, what was cached not counted."""
    requests: float = 0.0
    """n: all that are there, waiting or decoding."""
    speed: float = 1.0
    context_tokens: float = 0.0
    """K: of their prompts."""


def prefill_score(
    pending_tokens: float, uncached_tokens: float, requests: float, speed: float, own_weight: float = OWN_WEIGHT
) -> float:
    """The score of one replica; the least is best. An engine computes at least one token of each prompt."""
    work = pending_tokens + own_weight * max(uncached_tokens, 1.0)
    return work * (requests + 1.0) / max(speed, _MIN_SPEED)


def waits_s(load: Load, prompt_tokens: int, uncached_tokens: float, costs: Costs) -> tuple[float, float, float, float]:
    """Seconds that users wait because a prompt goes there: first, decode, others, later."""
    speed, n, answer = max(load.speed, _MIN_SPEED), load.requests, costs.answer_tokens
    own_s, ahead_s = costs.prefill_s * max(uncached_tokens, 1.0), costs.prefill_s * load.pending_tokens
    added_s = costs.sequence_s + costs.context_s * prompt_tokens
    decode_s = answer * (costs.step_s + costs.sequence_s * n + costs.context_s * load.context_tokens + added_s)
    others_s = n * (own_s + answer / 2.0 * added_s)
    later_s = costs.later_per_s * own_s / speed * (ahead_s + own_s / 2.0)
    return (ahead_s + own_s) / speed, decode_s / speed, others_s / speed, later_s / speed


def score_of(load: Load, prompt_tokens: int, cached_tokens: int, costs: Costs | None, own_weight: float) -> float:
    """The score of one replica for a prompt: in seconds where costs are known."""
    uncached = prompt_tokens - cached_tokens
    if costs is not None:
        return sum(waits_s(load, prompt_tokens, uncached, costs))
    return prefill_score(load.pending_tokens, uncached, load.requests, load.speed, own_weight)


class Contexts:
    """Prompts of one router's requests, by replica; those of others are taken for as long on average."""

    __slots__ = ("_of", "_requests", "_tokens")

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, float]] = {}
        self._requests, self._tokens = 0, 0.0

    def add(self, replica_id: str, prompt_tokens: float) -> None:
        """A request is there."""
        self._change(replica_id, 1, prompt_tokens)

    def remove(self, replica_id: str, prompt_tokens: float) -> None:
        """It is not there any more."""
        self._change(replica_id, -1, -prompt_tokens)

    def _change(self, replica_id: str, requests: int, tokens: float) -> None:
        count, held = self._of.get(replica_id, (0, 0.0))
        self._of[replica_id] = count + requests, held + tokens
        if count + requests <= 0:
            del self._of[replica_id]
        self._requests, self._tokens = self._requests + requests, self._tokens + tokens

    def on(self, replica_id: str, requests: float) -> float:
        """Tokens of the prompts of all requests there, of which there are so many."""
        count, held = self._of.get(replica_id, (0, 0.0))
        others = max(requests - count, 0.0)
        return held + (others * self._tokens / self._requests if self._requests > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a prompt's choice has compared."""

    prompt_tokens: int
    loads: Sequence[Load]
    cached: Mapping[str, int]
    costs: Costs | None = None

    def cached_tokens(self, load: Load) -> int:
        """Of the prompt, in that replica's cache."""
        return self.cached.get(load.replica_id, 0)

    def score(self, load: Load) -> float:
        """As `choose` has it."""
        return score_of(load, self.prompt_tokens, self.cached_tokens(load), self.costs, OWN_WEIGHT)


def drawn(pool: Sequence[int], holder: int, random: Callable[[], float]) -> Sequence[int]:
    """Those of a pool to compare: all of a few; of many the longest match's `holder`, if not -1, and some others."""
    count = len(pool)
    if count <= _LOOK_AT_ALL:
        return pool
    first = [holder] if holder >= 0 else []
    return first + [pool[int(random() * count)] for _ in range(_DRAWS + (not first))]


def choose(
    loads: Sequence[Load],
    prompt_tokens: int,
    cached: Mapping[str, int],
    random: Callable[[], float],
    *,
    cold: tuple[Rendezvous, int] | None = None,
    costs: Costs | None = None,
    own_weight: float = OWN_WEIGHT,
) -> int:
    """Index of the replica for a prompt, -1 if there is none. `random` gives floats in [0, 1).

    `costs` are what tokens cost, where that is known; `cached` are the tokens of it that replicas have
    (`PrefixIndex.match`). A prompt that nobody has goes, among those whose score is within a tenth of the best, to its
    place on the ring of `cold`, by the key of its first block: other routers, which do not know of this choice yet,
    send what begins alike to the same replica.
    """
    everybody = range(len(loads))
    many = len(loads) > _LOOK_AT_ALL and bool(cached)
    holder = max(everybody, key=lambda i: cached.get(loads[i].replica_id, 0)) if many else -1
    compared = drawn(everybody, holder, random)
    scores = {
        i: score_of(loads[i], prompt_tokens, cached.get(loads[i].replica_id, 0), costs, own_weight) for i in compared
    }
    if not scores:
        return -1
    best = min(scores.values())
    if cold is not None and not cached:
        ring, key = cold
        near = {loads[i].replica_id: i for i, score in scores.items() if score <= _NEAR * best}
        place = ring.place_among(key, near)
        if place is not None:
            return near[place]
    ties = [i for i, score in scores.items() if score == best]
    return ties[int(random() * len(ties))] if len(ties) > 1 else ties[0]
