"""What routers tell each other of their decisions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.errors import MessageError
from shadecast.prefix import Decision
from shadecast.prefix_exchange import MOST_SENT, Decisions, read_decisions

BLOCKS = st.binary(min_size=8, max_size=8)
DECISIONS = st.lists(
    st.builds(
        lambda name, depth, after, hashes: Decision(name, depth, after if depth else b"", hashes),
        st.sampled_from(["a", "b#1", "c"]),
        st.integers(0, 700),
        BLOCKS,
        st.lists(BLOCKS, max_size=5),
    ),
    max_size=6,
)


@given(DECISIONS)
def test_what_is_told_arrives_once(made):
    ours = Decisions()
    for decision in made:
        ours.add(decision)
        ours.add(None)
    assert read_decisions(json.loads(json.dumps(ours.take()))) == made
    assert read_decisions(ours.take()) == []


def test_a_message_is_bounded_and_what_is_left_out_is_counted():
    ours = Decisions()
    for _ in range(100):
        ours.add(Decision("a", 0, b"", [b"12345678"] * 700))
    told = ours.take()
    assert sum(map(len, (each.hashes for each in read_decisions(told)))) == 23 * 700 <= MOST_SENT
    assert ours.left_out == 77 * 701
    assert len(json.dumps(told)) < 180_000


GOOD = {"replicas": ["a"], "at": [0], "depth": [3], "count": [1], "hashes": "MTIzNDU2Nzg=", "after": "YWJjZGVmZ2g="}


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": [1]}, {"at": [-1]}, {"at": ["0"]}, {"at": [True]}, {"at": [0, 0]}, {"at": None}, {"replicas": [7]},
        {"depth": [-1]}, {"depth": [10_000]}, {"depth": [1.5]}, {"count": [2]}, {"count": [0]}, {"count": [-1]},
        {"count": [1 << 40]}, {"hashes": "MTIz"}, {"hashes": "?"}, {"hashes": 3}, {"hashes": None},
        {"after": ""}, {"after": "MTIz"}, {"after": 1},
    ],
)  # fmt: skip
def test_what_is_no_such_message_is_refused(wrong):
    assert read_decisions(GOOD) == [Decision("a", 3, b"abcdefgh", [b"12345678"])]
    with pytest.raises(MessageError, match="prefixes"):
        read_decisions({**GOOD, **wrong})


@pytest.mark.parametrize("junk", [None, [], "x", {}])
def test_junk_is_refused(junk):
    with pytest.raises(MessageError, match="prefixes"):
        read_decisions(junk)
