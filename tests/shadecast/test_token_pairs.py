"""How a request to a language model is made short for its copy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shadecast.token_pairs import shortened

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ({}, {"max_tokens": 16}),
        ({"max_tokens": 500}, {"max_tokens": 16}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 500}, {"max_completion_tokens": 16}),
        ({"max_tokens": 9, "max_completion_tokens": 500}, {"max_tokens": 9, "max_completion_tokens": 16}),
        ({"max_tokens": None}, {"max_tokens": 16}),
        ({"n": 4, "best_of": 8}, {"max_tokens": 16, "n": 1, "best_of": None}),
        ({"n": 1}, {"max_tokens": 16, "n": 1}),
        ({"min_tokens": 100, "max_tokens": 400}, {"min_tokens": 16, "max_tokens": 16}),
        ({"min_tokens": 2}, {"min_tokens": 2, "max_tokens": 16}),
        ({"store": True}, {"max_tokens": 16, "store": False}),
        ({"stream": True, "temperature": 0.7, "seed": 3}, {"max_tokens": 16}),
    ],
)
def test_a_copy_asks_for_one_answer_of_at_most_sixteen_tokens_and_else_the_same(more, changed):
    body, other = {**CHAT, **more}, object()
    before = dict(body)
    (first, short), kwargs = shortened([other, body], {"x": 7})
    assert first is other
    assert short == {**body, **changed}
    assert kwargs == {"x": 7}
    assert body == before, "the request itself is as it was"


def test_a_body_may_be_named():
    args, kwargs = shortened([1], {"request": CHAT})
    assert (args, kwargs) == ([1], {"request": {**CHAT, "max_tokens": 16}})


class Body:
    """As pydantic's models are copied; it does not know `store`."""

    model_fields = dict.fromkeys(("messages", "max_tokens", "n"))

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def model_copy(self, update):
        return Body(**{**vars(self), **update})


def test_pydantics_bodies_are_copied_with_fields_that_they_know():
    body = Body(messages=CHAT["messages"], max_tokens=400, n=2, store=True)
    (short,), _ = shortened([body], {})
    assert vars(short) == {"messages": CHAT["messages"], "max_tokens": 16, "n": 1, "store": True}
    assert (body.max_tokens, body.n) == (400, 2)


@pytest.mark.parametrize("args", [[7], [], [SimpleNamespace(messages=[1])]])
def test_what_cannot_be_changed_is_copied_as_it_is(args):
    assert shortened(args, {}) == (args, {})
