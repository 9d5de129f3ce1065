"""Other people's rules, each as it is published (sources: docs/benchmarks/llm_simulation.md), with more than they have.

What they take from engines' metrics they read here from the engines, with no delay; an index that is made of cache
events is the engines' own memory; several routers of theirs know each other's decisions at once. Only Serve's two
routers see what Serve shows them: requests of their own, and of others what replicas say when they accept one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import TypeAlias

from bench.llm.engine import BLOCK_TOKENS, Engine, Job
from bench.llm.routers import Router, Rule
from shadecast.rendezvous import mix, session_key

_RAY_MATCH = 0.1
"""`match_rate_threshold`."""
_RAY_IMBALANCE = 10.0
"""`imbalanced_threshold` as it was once by default; now it is infinite."""
_SGLANG_ABSOLUTE, _SGLANG_RELATIVE, _SGLANG_MATCH = 64.0, 1.5, 0.3
_AIBRIX_IMBALANCE = 8.0
_BOUND = 1.25
_LLM_D_PREFIX, _LLM_D_QUEUE, _LLM_D_KV = 3.0, 2.0, 2.0
_GATES, _GATE_COSTS_S, _TTFT_PART = (0.99, 0.80), 5.0, 0.8

_Pick: TypeAlias = Callable[[Job], int]


def _everybody(router: Router) -> range:
    return range(len(router.loads))


def _round_robin(router: Router) -> _Pick:
    at = router.seed

    def pick(_job: Job) -> int:
        nonlocal at
        at += 1
        return at % len(router.loads)

    return pick


def _power_of_two(router: Router) -> _Pick:
    """Serve's default."""
    return lambda _job: router.least(router.rng.sample(_everybody(router), 2), router.requests)


def _least_requests(router: Router) -> _Pick:
    return lambda _job: router.least(_everybody(router), lambda i: router.engines[i].requests)


def _session_hash(bound: float) -> Callable[[Router], _Pick]:
    """A session's place on a ring; with a `bound` the next place while that has so many times the mean."""

    def make(router: Router) -> _Pick:
        seeds = [session_key(load.replica_id, b"ring") for load in router.loads]

        def pick(job: Job) -> int:
            key = session_key(f"{job.session}", b"ring")
            ring = sorted(_everybody(router), key=lambda i: mix(key ^ seeds[i]))
            most = bound * (sum(engine.requests for engine in router.engines) + 1.0) / len(ring)
            return next((i for i in ring if router.engines[i].requests + 1.0 <= most), ring[0])

        return pick

    return make


def _ray_prefix(threshold: float) -> Callable[[Router], _Pick]:
    """Ray's PrefixCacheAffinityRouter: the longest match, else the smallest tree; of several the fewest requests."""

    def make(router: Router) -> _Pick:
        two = _power_of_two(router)

        def pick(job: Job) -> int:
            everybody = _everybody(router)
            counts = [router.requests(i) for i in everybody]
            if max(counts) - min(counts) > threshold:
                return two(job)
            longest = max(router.cached.values(), default=0)
            if longest < _RAY_MATCH * job.prompt_tokens:
                return router.least(_smallest_trees(router), router.requests)
            return router.least(_matching(router, longest), router.requests)

        return pick

    return make


def _smallest_trees(router: Router) -> Sequence[int]:
    sizes = [router.index.tokens(load.replica_id) for load in router.loads]
    return [i for i, size in enumerate(sizes) if size == min(sizes)]


def _matching(router: Router, tokens: int) -> Sequence[int]:
    return [i for i, load in enumerate(router.loads) if router.cached.get(load.replica_id, 0) == tokens]


def _sglang(router: Router) -> _Pick:
    """cache_aware with the limits of its command line."""

    def pick(job: Job) -> int:
        counts = [engine.requests for engine in router.engines]
        if max(counts) - min(counts) > _SGLANG_ABSOLUTE and max(counts) > _SGLANG_RELATIVE * min(counts):
            return router.least(_everybody(router), lambda i: counts[i])
        longest = max(router.cached.values(), default=0)
        if longest > _SGLANG_MATCH * job.prompt_tokens:
            return router.rng.choice(_matching(router, longest))
        return router.rng.choice(_smallest_trees(router))

    return pick


def _aibrix(router: Router) -> _Pick:
    """prefix-cache: the longest match among those that are not far above the mean."""

    def pick(_job: Job) -> int:
        counts = [engine.requests for engine in router.engines]
        if max(counts) - min(counts) > _AIBRIX_IMBALANCE:
            eligible = [i for i, count in enumerate(counts) if count == min(counts)]
        else:
            eligible = [i for i, count in enumerate(counts) if count <= fmean(counts) + pstdev(counts)]
        matched = {i: router.cached.get(router.loads[i].replica_id, 0) for i in eligible}
        longest = max(matched.values(), default=0)
        if not longest:
            return router.least(_everybody(router), lambda i: counts[i])
        return router.least([i for i in eligible if matched[i] == longest], lambda i: counts[i])

    return pick


def _stack_prefix(router: Router) -> _Pick:
    """vLLM production-stack, prefixaware: the longest match, whatever the load."""
    return lambda _job: router.rng.choice(_matching(router, max(router.cached.values(), default=0)))


def _stack_load(router: Router) -> _Pick:
    """vLLM production-stack, loadaware: the matched share less how far the load is above the mean."""

    def pick(job: Job) -> int:
        counts = [engine.requests for engine in router.engines]
        mean = fmean(counts)

        def key(i: int) -> float:
            matched = router.cached.get(router.loads[i].replica_id, 0) / job.prompt_tokens
            return (counts[i] - mean) / max(mean, 1.0) - matched

        return router.least(_everybody(router), key)

    return pick


def _left(engine: Engine, job: Job) -> int:
    """Tokens of a prompt that an engine would compute."""
    return max(job.prompt_tokens - engine.cached_tokens(job.hashes), 1)


def _dynamo(router: Router) -> _Pick:
    """Dynamo's KV router with credit and scale 1: prefill blocks, and those in use with the new request's."""

    def pick(job: Job) -> int:
        own = -(-job.prompt_tokens // BLOCK_TOKENS)

        def key(i: int) -> float:
            engine = router.engines[i]
            return (engine.pending_tokens + _left(engine, job)) / BLOCK_TOKENS + engine.blocks_in_use + own

        return router.least(_everybody(router), key)

    return pick


def _dynamo_lmetric(router: Router) -> _Pick:
    """Dynamo's `lmetric`: prefill times blocks in use."""

    def pick(job: Job) -> int:
        def key(i: int) -> float:
            engine = router.engines[i]
            return (engine.pending_tokens + _left(engine, job)) * (engine.blocks_in_use + 1.0)

        return router.least(_everybody(router), key)

    return pick


def _lmetric(router: Router) -> _Pick:
    """LMetric (OSDI'26): prefill times batch."""

    def pick(job: Job) -> int:
        def key(i: int) -> float:
            engine = router.engines[i]
            return (engine.pending_tokens + _left(engine, job)) * (engine.requests + 1.0)

        return router.least(_everybody(router), key)

    return pick


def _llm_d_weights(router: Router) -> _Pick:
    """llm-d's default chart: matched share, queue and memory, 3:2:2; its index is as large as the GPU's memory."""

    def pick(job: Job) -> int:
        queues = [engine.waiting for engine in router.engines]
        low, width = min(queues), max(max(queues) - min(queues), 1)

        def key(i: int) -> float:
            engine = router.engines[i]
            matched = router.cached.get(router.loads[i].replica_id, 0) / job.prompt_tokens
            used = min(engine.used_tokens / engine.machine.gpu_tokens, 1.0)
            queue = 1.0 - (queues[i] - low) / width
            return -(_LLM_D_PREFIX * matched + _LLM_D_QUEUE * queue + _LLM_D_KV * (1.0 - used))

        return router.least(_everybody(router), key)

    return pick


def _llm_d_predicted(router: Router) -> _Pick:
    """llm-d's predicted latency with a perfect predictor of a replica of nominal speed; no objective is given."""

    def pick(job: Job) -> int:
        engines, m = router.engines, router.machine
        left = [_left(engine, job) for engine in engines]
        ttft = [(engine.pending_tokens + own) / m.prefill_per_s for engine, own in zip(engines, left, strict=True)]
        tpot = [
            m.base_s + m.sequence_s * (engine.decoding + 1) + m.token_s * (engine.context_tokens + job.prompt_tokens)
            for engine in engines
        ]
        eligible: Sequence[int] = _everybody(router)
        for gate in _GATES:
            holders = [i for i in eligible if 1.0 - left[i] / job.prompt_tokens >= gate]
            if holders and min(ttft[i] for i in holders) - min(ttft) <= _GATE_COSTS_S:
                eligible = holders
                break

        def score(i: int) -> float:
            return _TTFT_PART * _part(ttft, eligible, i) + (1.0 - _TTFT_PART) * _part(tpot, eligible, i)

        return router.least(eligible, score)

    return pick


def _part(values: Sequence[float], among: Sequence[int], i: int) -> float:
    """Where a value stands between the least and the most."""
    low, high = min(values[k] for k in among), max(values[k] for k in among)
    return (values[i] - low) / (high - low) if high > low else 0.0


RIVALS = (
    Rule("round robin", _round_robin),
    Rule("power of two (Serve)", _power_of_two),
    Rule("least requests", _least_requests),
    Rule("session hash", _session_hash(1e9)),
    Rule("session hash, bounded 1.25", _session_hash(_BOUND)),
    Rule("Ray prefix router", _ray_prefix(float("inf")), one_tree=True, endless=True),
    Rule("Ray prefix router, threshold 10", _ray_prefix(_RAY_IMBALANCE), one_tree=True, endless=True),
    Rule("SGLang cache_aware", _sglang, one_tree=True, endless=True),
    Rule("AIBrix prefix-cache", _aibrix, one_tree=True, endless=True),
    Rule("production-stack prefixaware", _stack_prefix, one_tree=True, endless=True),
    Rule("production-stack loadaware", _stack_load, one_tree=True, endless=True),
    Rule("Dynamo KV", _dynamo, one_tree=True),
    Rule("Dynamo lmetric", _dynamo_lmetric, one_tree=True),
    Rule("LMetric", _lmetric, one_tree=True),
    Rule("llm-d 3:2:2", _llm_d_weights, one_tree=True, gpu_index=True),
    Rule("llm-d predicted, ideal", _llm_d_predicted, one_tree=True),
)
