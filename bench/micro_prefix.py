"""What a prompt costs the router: reading and hashing it, matching it over 16 replicas, remembering where it went."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from shadecast.prefix import MOST_ENTRIES, PrefixIndex
from shadecast.prompts import Prompt, read_prompt

REPLICAS = 16
_KEY = b"0123456789abcdef"
_KV_TOKENS = 280_000
_TURNS = 8
_PROMPTS = 64
_SETTLED = 40
"""Prompts for each replica before anything is timed: its memory is full, and every insertion drops something."""


def measure(repeats: int, entries: int = MOST_ENTRIES) -> Iterator[tuple[str, str, int, str, float]]:
    """Rows (name, arm, replicas, metric, value)."""
    for tokens in (1_000, 12_000):
        index, rng = PrefixIndex(_KV_TOKENS), random.Random(tokens)
        for number in range(_SETTLED * REPLICAS):
            prompt = _read(_body(rng, tokens, number))
            index.insert(f"r{number % REPLICAS}", prompt)
        bodies = [_body(rng, tokens, number) for number in range(_PROMPTS)]
        prompts = [_read(body) for body in bodies]

        def whole(body: Any, index: PrefixIndex = index) -> None:
            prompt = _read(body)
            index.match(prompt)
            index.insert("r3", prompt)

        arm = f"prompt_{tokens}_tokens"
        timed: tuple[tuple[str, Callable[[Any], object], list[Any]], ...] = (
            ("prefix_hash", _read, bodies),
            ("prefix_match", index.match, prompts),
            ("prefix_insert", partial(index.insert, "r5"), prompts),
            ("prefix_all", whole, bodies),
        )
        for name, call, given in timed:
            yield name, arm, REPLICAS, "median_us", _median_us(call, given, repeats)
    yield "prefix_memory", "index", REPLICAS, "mb_per_million", _memory_mb(entries)


def _body(rng: random.Random, tokens: int, number: int) -> dict[str, Any]:
    """A conversation of which half is one of four beginnings, and half is its own."""
    size = 4 * tokens // _TURNS
    beginning = random.Random(number % 4)
    texts = [_text(beginning if turn < _TURNS // 2 else rng, size) for turn in range(_TURNS)]
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in texts]}


def _text(rng: random.Random, size: int) -> str:
    return f"{rng.getrandbits(4 * size):0{size}x}"


def _read(body: Any) -> Prompt:
    prompt = read_prompt(body, _KEY)
    assert prompt is not None
    return prompt


def _median_us(call: Callable[[Any], object], given: list[Any], repeats: int) -> float:
    times = []
    for _ in range(max(repeats // 10, 5)):
        for each in given:
            started_s = time.perf_counter()
            call(each)
            times.append(time.perf_counter() - started_s)
    return median(times) * 1e6


def _memory_mb(entries: int) -> float:
    """Of an index in which each block is at one replica: the most that so many blocks take."""
    rng = random.Random(1)
    tracemalloc.start()
    try:
        index = PrefixIndex(1 << 60, entries)
        before = tracemalloc.get_traced_memory()[0]
        while len(index) < entries:
            hashes = [rng.randbytes(8) for _ in range(100)]
            index.insert(f"r{rng.randrange(REPLICAS)}", Prompt(hashes, range(64, 6401, 64), 6400))
        return (tracemalloc.get_traced_memory()[0] - before) / entries
    finally:
        tracemalloc.stop()
