"""Which replica has computed which prompts before: one router's index of prefix caches.

An engine keeps the keys and values of prompts that it has computed, in blocks, until it needs the memory. The index
remembers what was sent where and drops it as the engine would: the least recently used first, as many tokens as the
engine's memory holds. It learns from decisions alone, this router's and other routers'; exact events of the engines
gained nothing in simulation.

One dict maps a block's hash (`shadecast.prompts`) to a bit mask of replicas. A hash stands for all of a prompt up to
there, so one walk along a prompt tells how much of it each replica has. One LRU per replica; the blocks of a prompt are
used from its end to its beginning, so that an end is always dropped before what it builds on, and a replica that has a
block has all before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from shadecast.prompts import BLOCK_BYTES, BYTES_PER_TOKEN, ENDS, Prompt

_USUAL = BLOCK_BYTES // BYTES_PER_TOKEN
_START = b""
"""What a prompt's first block comes after."""
MOST_ENTRIES = 1_000_000
"""Blocks over all replicas that one router remembers."""
_SWEPT = 256
"""Blocks of replicas that are gone which one insertion clears away: a death must not stop the router's loop."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a replica was sent: the blocks of one prompt that it did not have, perhaps none, and what they build on."""

    replica_id: str
    depth: int
    """How many blocks come before them, which the replica had."""
    after: bytes
    """The last one of those."""
    hashes: Sequence[bytes]


class _Cache:
    """One replica's blocks, the least recently used first, each with the one before it in its prompt."""

    __slots__ = ("bit", "blocks", "capacity", "replica_id", "tokens")

    def __init__(self, replica_id: str, bit: int, capacity: int) -> None:
        self.replica_id, self.bit, self.capacity = replica_id, bit, capacity
        self.blocks: OrderedDict[bytes, bytes] = OrderedDict()
        self.tokens = 0


class PrefixIndex:
    """What each replica has in its cache, as far as one router knows."""

    __slots__ = ("_caches", "_capacity", "_entries", "_free", "_gone", "_holders", "_live", "_most", "_sizes", "_slots")

    def __init__(self, kv_tokens: int, most_entries: int = MOST_ENTRIES) -> None:
        """`kv_tokens` is what a replica's memory holds, unless `resize` says otherwise."""
        self._capacity, self._most = max(kv_tokens, 0), max(most_entries, 0)
        self._holders: dict[bytes, int] = {}
        """Block -> bit mask of the replicas that have it, and of those gone that are not cleared away yet."""
        self._sizes: dict[bytes, int] = {}
        """Tokens of blocks that have not the usual number of them."""
        self._caches: dict[str, _Cache] = {}
        self._slots: list[_Cache | None] = []
        """By the number of the bit."""
        self._free: list[int] = []
        """Bits that no block has any more."""
        self._gone: list[_Cache] = []
        """Of replicas that were forgotten; their bits are not used again before they are empty."""
        self._live = 0
        """The bits of the replicas that are not gone."""
        self._entries = 0

    def __len__(self) -> int:
        """Blocks remembered over all replicas, each as often as replicas have it."""
        return self._entries

    def tokens(self, replica_id: str) -> int:
        """Tokens that a replica has in its cache."""
        cache = self._caches.get(replica_id)
        return cache.tokens if cache is not None else 0

    def capacity(self, replica_id: str) -> int:
        """Tokens that a replica's memory holds."""
        cache = self._caches.get(replica_id)
        return cache.capacity if cache is not None else self._capacity

    def resize(self, replica_id: str, kv_tokens: int) -> None:
        """A replica's memory holds so many tokens."""
        cache = self._caches.get(replica_id) or self._join(replica_id)
        cache.capacity = max(kv_tokens, 0)
        self._shrink(cache)

    def match(self, prompt: Prompt) -> dict[str, int]:
        """Tokens of the prompt's beginning that each replica has; those that have none are not named."""
        found: dict[str, int] = {}
        get, ends, mask, hashes = self._holders.get, prompt.ends, self._live, prompt.hashes
        for depth, block in enumerate(hashes):
            now = get(block, 0) & mask
            if now != mask:
                if depth:
                    self._name(mask ^ now, ends[depth - 1], found)
                mask = now
                if not now:
                    return found
        if hashes:
            self._name(mask, ends[len(hashes) - 1], found)
        return found

    def insert(self, replica_id: str, prompt: Prompt) -> Decision | None:
        """A replica was sent this prompt. What other routers need to know of it; None if nothing of it fits."""
        cache = self._caches.get(replica_id) or self._join(replica_id)
        hashes, ends = prompt.hashes, prompt.ends
        count = bisect_right(ends, cache.capacity, 0, len(hashes))
        if not count:
            return None
        first = self._use(cache, hashes[:count], ends, 0, _START)
        return Decision(replica_id, first, hashes[first - 1] if first else _START, hashes[first:count])

    def learn(self, decision: Decision, ends: Sequence[int] = ENDS) -> None:
        """Another router has sent a prompt with these blocks; `ends` are those of prompts without tools."""
        cache = self._caches.get(decision.replica_id) or self._join(decision.replica_id)
        depth, most = decision.depth, min(decision.depth + len(decision.hashes), len(ends))
        before = ends[depth - 1] if depth else 0
        fit = bisect_right(ends, before + cache.capacity, depth, most) - depth if most > depth else 0
        self._use(cache, decision.hashes[:fit], ends, depth, decision.after)

    def _use(self, cache: _Cache, hashes: Sequence[bytes], ends: Sequence[int], depth: int, after: bytes) -> int:
        """A replica computes, or uses, the blocks from `depth` on; the depth of the first that it did not have."""
        blocks, holders, bit = cache.blocks, self._holders, cache.bit
        known, first = len(blocks), depth + len(hashes)
        for i in range(first - 1, depth - 1, -1):
            block = hashes[i - depth]
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = hashes[i - depth - 1] if i > depth else after
                holders[block] = holders.get(block, 0) | bit
                size = ends[i] - ends[i - 1] if i else ends[0]
                if size != _USUAL:
                    self._sizes[block] = size
                cache.tokens += size
                first = i
        while after in blocks:  # what these build on is used, too
            blocks.move_to_end(after)
            after = blocks[after]
        self._entries += len(blocks) - known
        if self._gone:
            self._sweep(_SWEPT)
        self._shrink(cache)
        self._bound()
        return first

    def forget(self, replica_id: str) -> None:
        """A replica is gone, or has lost its cache."""
        cache = self._caches.pop(replica_id, None)
        if cache is not None:
            self._live &= ~cache.bit
            self._slots[cache.bit.bit_length() - 1] = None
            self._gone.append(cache)
            self._sweep(_SWEPT)

    def keep(self, replica_ids: Collection[str]) -> None:
        """Only these replicas are left."""
        for replica_id in self._caches.keys() - replica_ids:
            self.forget(replica_id)

    def _join(self, replica_id: str) -> _Cache:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._slots)
            self._slots.append(None)
        cache = self._caches[replica_id] = self._slots[slot] = _Cache(replica_id, 1 << slot, self._capacity)
        self._live |= cache.bit
        return cache

    def _name(self, mask: int, tokens: int, found: dict[str, int]) -> None:
        for slot in _bits(mask):
            cache = self._slots[slot]
            if cache is not None:
                found[cache.replica_id] = tokens

    def _shrink(self, cache: _Cache) -> None:
        while cache.tokens > cache.capacity:
            self._drop(cache)

    def _drop(self, cache: _Cache) -> None:
        """The replica has its least recently used block no more."""
        block, _ = cache.blocks.popitem(last=False)
        cache.tokens -= self._sizes.get(block, _USUAL)
        self._entries -= 1
        left = self._holders[block] & ~cache.bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
            self._sizes.pop(block, None)

    def _sweep(self, most: int) -> None:
        """Clear away what replicas that are gone had; an empty one's bit is free."""
        for _ in range(most):
            if not self._gone:
                return
            cache = self._gone[-1]
            if cache.blocks:
                self._drop(cache)
            if not cache.blocks:
                self._free.append(cache.bit.bit_length() - 1)
                self._gone.pop()

    def _bound(self) -> None:
        """No more than so many over all: first of those that are gone, then of whoever has most."""
        while self._entries > self._most:
            if self._gone:
                self._sweep(self._entries - self._most)
                continue
            largest = max(self._caches.values(), key=lambda cache: len(cache.blocks))
            for _ in range(self._entries - self._most):
                self._drop(largest)
                if not largest.blocks:
                    break


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
