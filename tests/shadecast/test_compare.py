"""Answers compared: exactly, within a tolerance, of every shape that models give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.compare import answers_equal

ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(ANSWERS)
def test_every_answer_equals_itself(answer):
    assert answers_equal(answer, answer)
    assert answers_equal(answer, answer, 1e-3)


@pytest.mark.parametrize(
    ("first", "second", "exactly", "closely"),
    [
        (1.0, 1.0005, False, True),
        (1.0, 1.01, False, False),
        ({"a": [1, 2.0]}, {"a": [1, 2.0001]}, False, True),
        ({"a": 1}, {"b": 1}, False, False),
        ([1, 2], [1, 2, 3], False, False),
        ("cat", "dog", False, False),
        (np.ones((2, 3)), np.ones((3, 2)), False, False),
        (np.ones(3), np.ones(3) + 1e-4, False, True),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True, True),
        (np.array([np.inf]), np.array([-np.inf]), False, False),
        (np.array(["a", "b"]), np.array(["a", "b"]), True, True),
        (np.array(["a", "b"]), np.array(["a", "c"]), False, False),
        (5, "5", False, False),
        (None, 0, False, False),
        (True, 1, True, True),
    ],
)
def test_answers_that_differ(first, second, exactly, closely):
    assert answers_equal(first, second) is exactly
    assert answers_equal(second, first) is exactly
    assert answers_equal(first, second, 1e-3) is closely
