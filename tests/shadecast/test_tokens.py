"""Tokens of streams, from the forms in which OpenAI servers send them.

Invariants, whatever comes: the count never falls, what `add` says adds up to it, and nothing raises.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadecast.tokens import TokenCount


def chat(text, usage=None, finish=None):
    """A chunk of a conversation."""
    chunk = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    return chunk if usage is None else chunk | {"usage": {"prompt_tokens": 7, "completion_tokens": usage}}


def completion(text):
    return {"object": "text_completion", "choices": [{"text": text, "finish_reason": None}]}


def sse(chunk):
    """As it travels by HTTP, and from the replicas of `ray.serve.llm`."""
    return f"data: {json.dumps(chunk)}\n\n"


def pydantic_like(chunk):
    """An object with the chunk's fields."""
    return json.loads(json.dumps(chunk), object_hook=lambda fields: SimpleNamespace(**fields))


@pytest.mark.parametrize("form", [dict, pydantic_like, sse, lambda chunk: sse(chunk).encode(), lambda chunk: [chunk]])
@pytest.mark.parametrize(
    ("chunk", "tokens"),
    [
        (chat("12345678"), 2.0),
        (completion("12345678"), 2.0),
        (chat("12345678", usage=5), 5.0),
        (chat(""), 0.0),
        (chat(None), 0.0),
        ({"choices": [], "usage": {"completion_tokens": 9}}, 9.0),
        ({"choices": [{"delta": {"reasoning_content": "1234"}}]}, 1.0),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "12345678"}}]}}]}, 2.0),
        ({"choices": [{"message": {"content": "1234"}}], "usage": {"completion_tokens": 3}}, 3.0),
        (chat("你好"), 1.5),
    ],
)
def test_a_chunk_counts_by_its_usage_else_by_its_text_in_whichever_form_it_comes(form, chunk, tokens):
    count = TokenCount()
    assert count.add(form(chunk)) == tokens
    assert count.tokens == tokens


def test_all_chunks_of_an_item_count():
    """As `ray.serve.llm` sends them: all of 50 ms."""
    count = TokenCount()
    assert count.add([sse(chat("1234")), sse(chat("5678")), sse(chat("9012"))]) == 3.0
    assert count.add([sse(chat("1234")) + sse(chat("5678", finish="stop")), "data: [DONE]\n\n"]) == 2.0
    assert (count.tokens, count.finish, count.failed) == (5.0, "stop", False)


def test_usage_in_each_chunk_is_exact_and_what_comes_after_it_is_estimated():
    count = TokenCount()
    assert [count.add(chat("1234567890", usage=n)) for n in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert count.add(chat("1234")) == 1.0
    assert count.add(chat("1234", usage=6)) == 2.0


def test_usage_at_the_end_alone_corrects_upwards_and_takes_nothing_back():
    for usage, tokens in ((5, 5.0), (1, 2.0)):
        count = TokenCount()
        count.add(chat("12345678"))
        count.add({"choices": [], "usage": {"completion_tokens": usage}})
        assert count.tokens == tokens


@pytest.mark.parametrize(
    "item", ["data: [DONE]\n\n", "a word", 7, None, b"\xff", [], {}, {"text": "x"}, "data: {", object()]
)
def test_what_is_no_chunk_is_said_to_be_none(item):
    count = TokenCount()
    assert count.add(item) is None
    assert count.tokens == 0.0


@pytest.mark.parametrize("error", [{"error": {"message": "no"}}, SimpleNamespace(error=SimpleNamespace(code=500))])
def test_an_error_in_place_of_a_chunk_is_seen(error):
    count = TokenCount()
    assert count.add([error]) == 0.0
    assert count.failed


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("choices", "delta", "content", "usage", "completion_tokens", "tool_calls", "text", "error")
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(_json | _json.map(sse)))
def test_nothing_that_comes_raises_or_is_taken_back(items):
    count, added = TokenCount(), 0.0
    for item in items:
        before = count.tokens
        added += count.add(item) or 0.0
        assert count.tokens >= before
    assert added <= count.tokens + 1e-9
