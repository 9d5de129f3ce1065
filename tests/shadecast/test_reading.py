"""How a stream comes to its reader: arithmetic on times that the tests choose.

Invariants, whatever the reader does: items and seconds told as pace only grow, each is told once, and they never exceed
the items after the first and the time since the first; a reader that is late to ask adds nothing.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.reading import MARK, Reading
from shadecast.tokens import TokenCount


class Reader:
    """A reader and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.reading = Reading(self.now_s)

    def asks(self) -> None:
        self.asked_s = self.reading.asked_s = self.now_s

    def gets(self, after_s: float = 0.0, item: object = 1) -> None:
        """It has asked; the item is there so much later."""
        self.now_s += after_s
        self.reading.got(item, self.asked_s, self.now_s)

    def takes(self, after_s: float, item: object = 1) -> None:
        self.asks()
        self.gets(after_s, item)

    def pace(self) -> tuple[int, float]:
        return self.reading.pace(self.now_s)


def test_items_after_the_first_are_counted_with_the_time_that_they_were_waited_for():
    reader = Reader()
    reader.takes(3.0)
    assert reader.pace() == (0, 0.0), "the first item says how long the request queued"
    for _ in range(5):
        reader.takes(0.02)
    assert reader.pace() == (5, pytest.approx(0.1))
    assert reader.pace() == (0, 0.0), "told once"


def test_a_stream_that_stalls_counts_while_it_stalls_and_its_time_only_once():
    reader = Reader()
    reader.takes(0.1)
    reader.takes(0.02)
    reader.asks()
    reader.now_s += 2.0
    assert reader.pace() == (1, pytest.approx(2.02))
    reader.gets(1.0)
    assert reader.pace() == (1, pytest.approx(1.0))


def test_a_slow_reader_does_not_make_the_replica_look_slow():
    reader = Reader()
    reader.takes(0.1)
    for _ in range(5):
        reader.now_s += 1.0  # it is busy; the item lies there
        reader.takes(0.0)
    assert reader.pace() == (0, 0.0)


@pytest.mark.parametrize(
    ("late_s", "waits_s", "counts"),
    [(0.0, 0.0, True), (0.002, 0.0, True), (0.003, 0.0, False), (1.0, 0.1, False), (1.0, 0.2, True), (9.0, 0.9, False)],
)
def test_a_reader_that_waits_for_a_tenth_of_the_time_shows_when_the_item_was_there(late_s, waits_s, counts):
    reader = Reader()
    reader.takes(0.5)
    reader.pace()
    reader.now_s += late_s
    reader.takes(waits_s)
    assert reader.pace() == ((1, pytest.approx(late_s + waits_s)) if counts else (0, 0.0))


def test_the_time_to_the_first_item_is_known_if_its_reader_was_waiting():
    prompt, late = Reader(), Reader()
    assert math.isnan(prompt.reading.first_item_s), "there is none yet"
    prompt.takes(0.5)
    prompt.takes(0.1)
    assert prompt.reading.first_item_s == pytest.approx(0.5)
    assert prompt.reading.times_s == [pytest.approx(0.5), pytest.approx(0.6)]
    late.now_s += 2.0
    late.takes(0.0)
    assert math.isnan(late.reading.first_item_s)


def test_who_does_not_wait_has_not_waited():
    reader = Reader()
    assert reader.reading.waited_s(reader.now_s + 5.0) == 0.0
    reader.asks()
    assert reader.reading.waited_s(reader.now_s + 5.0) == 5.0
    assert reader.reading.waited_s(reader.now_s - 5.0) == 0.0, "a clock that steps back"
    reader.gets(1.0)
    assert reader.reading.waited_s(reader.now_s + 5.0) == 0.0


def test_the_last_item_never_was_before_the_first():
    reader = Reader()
    assert reader.reading.last_item_s == -math.inf
    reader.takes(1.5)
    assert reader.reading.last_item_s == reader.now_s


def test_times_and_items_are_kept_of_the_first_items_only_and_items_only_if_they_are_wanted():
    reader, wanted = Reader(), Reader()
    wanted.reading.answers = []
    for i in range(MARK + 8):
        reader.takes(0.01, i)
        wanted.takes(0.01, i)
    assert reader.reading.items == MARK + 8
    assert len(reader.reading.times_s) == MARK
    assert reader.reading.answers is None
    assert wanted.reading.answers == list(range(MARK))


@given(
    st.lists(
        st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.booleans(), st.floats(0.0, 1.0)), min_size=1, max_size=30
    )
)
def test_pace_only_grows_and_never_exceeds_what_there_was(steps):
    reader = Reader()
    items, stream_s = 0, 0.0
    first_s = math.nan
    for busy_s, waits_s, looks, at in steps:
        reader.now_s += busy_s
        reader.asks()
        if looks:
            new = reader.reading.pace(reader.now_s + at * waits_s)
            items, stream_s = items + new[0], stream_s + new[1]
            assert min(new) >= 0
        reader.gets(waits_s)
        first_s = reader.now_s if math.isnan(first_s) else first_s
        new = reader.pace()
        items, stream_s = items + new[0], stream_s + new[1]
        assert new[0] >= 0
        assert new[1] >= -1e-9
        assert items <= reader.reading.items - 1
        assert stream_s <= reader.now_s - first_s + 1e-9
    assert reader.pace() == (0, 0.0)
    assert len(reader.reading.times_s) == min(reader.reading.items, MARK)


def chunk(tokens):
    """A chunk of a model's answer with so many tokens."""
    return {"choices": [{"delta": {"content": "word" * tokens}}]}


def test_of_a_models_answer_the_tokens_count_however_many_come_at_once():
    reader = Reader()
    reader.reading.count = TokenCount()
    reader.takes(3.0, chunk(1))
    assert reader.pace() == (0.0, 0.0)
    reader.takes(0.05, [chunk(2), chunk(3)])
    reader.takes(0.1, chunk(7))
    assert reader.pace() == (12.0, pytest.approx(0.15))
    reading = reader.reading
    assert (reading.items, reading.units, reading.per_item) == (3, 13.0, pytest.approx(13 / 3))


def test_a_stream_whose_first_item_is_no_chunk_counts_by_its_items():
    reader = Reader()
    reader.reading.count = TokenCount()
    reader.takes(1.0, "a word")
    reader.takes(0.5, chunk(9))
    assert reader.pace() == (1.0, pytest.approx(0.5))
    assert (reader.reading.count, reader.reading.units, reader.reading.per_item) == (None, 2.0, 1.0)
