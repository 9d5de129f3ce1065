"""The prefix index: exact against a plain model, bounded, and it forgets."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shadecast.prefix import Decision, PrefixIndex
from shadecast.prompts import Prompt

SIZE = 64
CAPACITY = 12 * SIZE
NAMES = ("a", "b", "c", "d")
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


def prompt(path, tail=0):
    """A prompt of one block for each number; those that begin alike share their first blocks."""
    hashes = [repr(path[: i + 1]).encode() for i in range(len(path))]
    return Prompt(hashes, range(SIZE, SIZE * (len(path) + 1), SIZE), SIZE * len(path) + tail)


class Model(RuleBasedStateMachine):
    """Each replica's LRU, written down plainly; with room for all, the index must agree with it exactly.

    1. A replica is never said to have what it was not sent since it was last forgotten.
    2. What is matched of a prompt's beginning is what is matched of the prompt, cut there.
    3. No replica has more than fits, and the sum is the length.
    """

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex(CAPACITY)
        self.caches: dict[str, OrderedDict] = {}
        self.sent: list = []

    @rule(name=st.sampled_from(NAMES), path=PATHS)
    def insert(self, name, path):
        cache = self.caches.setdefault(name, OrderedDict())
        kept = path[: CAPACITY // SIZE]
        missing = [i for i in range(len(kept)) if kept[: i + 1] not in cache]
        for i in range(len(kept), 0, -1):
            cache[path[:i]] = None
            cache.move_to_end(path[:i])
        while len(cache) * SIZE > CAPACITY:
            cache.popitem(last=False)
        first, hashes = min([*missing, len(kept)]), prompt(kept).hashes
        told = Decision(name, first, hashes[first - 1] if first else b"", hashes[first:])
        assert self.index.insert(name, prompt(path)) == told
        self.sent.append(path)

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name):
        self.index.forget(name)
        self.caches.pop(name, None)

    @rule(path=PATHS, cut=st.integers(1, 14))
    def match(self, path, cut):
        whole, beginning = self.index.match(prompt(path)), self.index.match(prompt(path[:cut]))
        assert beginning == {name: min(tokens, SIZE * len(path[:cut])) for name, tokens in whole.items()}

    @invariant()
    def agrees(self):
        for path in self.sent[-6:]:
            expected = {}
            for name, cache in self.caches.items():
                depth = next((i for i in range(len(path)) if path[: i + 1] not in cache), len(path))
                if depth:
                    expected[name] = depth * SIZE
            assert self.index.match(prompt(path)) == expected
        for name in NAMES:
            assert self.index.tokens(name) == SIZE * len(self.caches.get(name, ())) <= CAPACITY
        assert len(self.index) == sum(map(len, self.caches.values()))


class Bounded(RuleBasedStateMachine):
    """With a bound over all, what is found was sent, beginnings hold, and the bound does."""

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex(CAPACITY, most_entries=20)
        self.sent: dict[str, set] = {}

    @rule(name=st.sampled_from(NAMES), path=PATHS)
    def insert(self, name, path):
        self.index.insert(name, prompt(path))
        self.sent.setdefault(name, set()).update(path[: i + 1] for i in range(len(path)))

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name):
        self.index.forget(name)
        self.sent.pop(name, None)

    @rule(name=st.sampled_from(NAMES), path=PATHS, depth=st.integers(0, 13))
    def learn(self, name, path, depth):
        blocks = prompt(path)
        depth = min(depth, len(path))
        decision = Decision(name, depth, blocks.hashes[depth - 1] if depth else b"", blocks.hashes[depth:])
        self.index.learn(decision, range(SIZE, 100 * SIZE, SIZE))
        self.sent.setdefault(name, set()).update(path[: i + 1] for i in range(depth, len(path)))

    @rule(name=st.sampled_from(NAMES), blocks=st.integers(0, 16))
    def resize(self, name, blocks):
        self.index.resize(name, blocks * SIZE)
        assert self.index.tokens(name) <= blocks * SIZE

    @rule(path=PATHS, cut=st.integers(1, 14))
    def match(self, path, cut):
        whole = self.index.match(prompt(path))
        for name, tokens in whole.items():
            assert {path[: i + 1] for i in range(tokens // SIZE)} <= self.sent[name]
        assert self.index.match(prompt(path[:cut])) == {k: min(v, SIZE * len(path[:cut])) for k, v in whole.items()}

    @invariant()
    def bounded(self):
        assert len(self.index) <= 20


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBounded = Bounded.TestCase
TestBounded.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_large_replica_that_dies_does_not_stop_the_loop_and_its_bit_is_not_given_away_too_soon():
    index = PrefixIndex(10_000 * SIZE)
    paths = [(0, i) for i in range(2000)]
    for path in paths:
        index.insert("dead", prompt(path))
    index.forget("dead")
    assert len(index) > 1000, "cleared away a little at a time"
    assert index.match(prompt(paths[0])) == {}
    index.insert("new", prompt((1,)))
    assert all(index.match(prompt(path)) == {} for path in paths), "the newcomer has nothing of the dead one's"
    for _ in range(10):
        index.insert("new", prompt((1,)))
    assert len(index) == 1
    index.insert("newer", prompt(paths[0]))
    assert index.match(prompt(paths[0])) == {"newer": 2 * SIZE}


def test_a_replica_that_comes_back_under_its_name_has_nothing():
    index = PrefixIndex(CAPACITY)
    index.insert("a", prompt((0, 1)))
    index.forget("a")
    index.insert("a", prompt((1,)))
    assert index.match(prompt((0, 1))) == {}
    assert index.match(prompt((1, 0))) == {"a": SIZE}


def test_hundreds_of_replicas_have_a_bit_each():
    index = PrefixIndex(CAPACITY)
    for i in range(300):
        index.insert(f"r{i}", prompt((0,) * (1 + i % 3)))
    found = index.match(prompt((0, 0, 0)))
    assert found == {f"r{i}": (1 + i % 3) * SIZE for i in range(300)}


@pytest.mark.parametrize("kv_tokens", [0, -5, SIZE - 1])
def test_a_replica_without_memory_has_nothing(kv_tokens):
    index = PrefixIndex(kv_tokens)
    assert index.insert("a", prompt((0, 1))) is None
    assert index.match(prompt((0, 1))) == {}


def test_the_bound_takes_from_whoever_has_most():
    index = PrefixIndex(100 * SIZE, most_entries=10)
    index.insert("small", prompt((1, 1)))
    for i in range(12):
        index.insert("large", prompt((0, i)))
    assert index.match(prompt((1, 1))) == {"small": 2 * SIZE}
    assert len(index) == 10


def test_a_router_learns_from_what_another_one_decided():
    ours, theirs = PrefixIndex(CAPACITY), PrefixIndex(CAPACITY)
    ends = range(SIZE, 100 * SIZE, SIZE)
    for path in ((0, 1), (0, 1, 2), (0, 1, 2), (0, 3)):
        decision = ours.insert("a", prompt(path))
        theirs.learn(decision, ends)
    for path in ((0, 1, 2), (0, 3), (1,)):
        assert theirs.match(prompt(path)) == ours.match(prompt(path))


def test_blocks_whose_beginning_a_router_does_not_know_are_not_found_until_it_does():
    index = PrefixIndex(CAPACITY)
    first, second = prompt((0, 1)).hashes
    index.learn(Decision("a", 1, first, [second]), range(SIZE, 100 * SIZE, SIZE))
    assert index.match(prompt((0, 1))) == {}
    index.insert("a", prompt((0,)))
    assert index.match(prompt((0, 1))) == {"a": 2 * SIZE}


def test_what_another_router_uses_is_not_the_next_to_be_dropped():
    ours, theirs = PrefixIndex(4 * SIZE), PrefixIndex(4 * SIZE)
    ends = range(SIZE, 100 * SIZE, SIZE)
    theirs.learn(ours.insert("a", prompt((0, 1))), ends)
    theirs.learn(ours.insert("a", prompt((1, 1))), ends)
    theirs.learn(ours.insert("a", prompt((0, 1))), ends)  # nothing of it is new
    theirs.insert("a", prompt((2,)))
    assert theirs.match(prompt((0, 1))) == {"a": 2 * SIZE}
    assert theirs.match(prompt((1, 1))) == {"a": SIZE}, "the end of the older one went"
