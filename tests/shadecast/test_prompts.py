"""What a request begins with: canonical prompts and their chains of block hashes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadecast.prompts import BLOCK_BYTES, find_body, read_prompt

KEY = b"only the routers know"
LONG = "All work and no play makes Jack a dull boy. " * 40
ROLES = st.sampled_from(["system", "user", "assistant"])
TEXTS = st.one_of(st.text(max_size=40), st.integers(1, 900).map(lambda n: LONG[:n]), st.just("\x1em\x1ec\x1e"))
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES, "content": st.one_of(TEXTS, st.lists(TEXTS.map(lambda t: {"type": "text", "text": t}), max_size=3))}
)
CHATS = st.lists(MESSAGES, min_size=1, max_size=6)


@dataclass
class Body:
    """As pydantic's bodies are read: by attribute."""

    messages: Any = None
    prompt: Any = None
    model: str = ""
    cache_salt: str | None = None
    tools: Any = None


@dataclass
class Part:
    """An object that cannot be written out."""

    field: list[int] = field(default_factory=list)


def _chat(messages, **more):
    return read_prompt({"messages": messages, **more}, KEY)


def _common(a, b):
    same = [x == y for x, y in zip(a.hashes, b.hashes, strict=False)]
    return same.index(False) if False in same else len(same)


@given(CHATS, CHATS)
@settings(max_examples=80, deadline=None)
def test_a_conversation_that_goes_on_keeps_all_its_blocks(first, more):
    before, after = _chat(first), _chat(first + more)
    assert before is not None
    assert after is not None
    assert list(after.hashes[: len(before.hashes)]) == list(before.hashes)
    assert after.tokens >= before.tokens
    assert len(after.ends) >= len(after.hashes)
    assert all(a < b for a, b in zip(after.ends, after.ends[1 : len(after.hashes)], strict=False))
    assert not after.hashes or after.ends[len(after.hashes) - 1] <= after.tokens


@given(CHATS, CHATS)
@settings(max_examples=200, deadline=None)
def test_different_conversations_never_have_all_blocks_alike(a, b):
    """Roles, parts and a text with our own marks cannot be taken for each other."""
    end = [{"role": "user", "content": "x" * BLOCK_BYTES}]  # so that all of `a` and `b` is in whole blocks
    assert (_chat(a + end).hashes[-1] == _chat(b + end).hashes[-1]) == (a == b)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "m2"},
        {"cache_salt": "tenant"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"chat_template": "{{ messages }}"},
        {"model": "m", "cache_salt": "1"},
    ],
)
def test_another_model_salt_tool_or_template_shares_nothing(other):
    plain = [{"role": "user", "content": LONG}]
    base = {"model": "m1", "cache_salt": "", **other}
    assert _common(_chat(plain, model="m1"), _chat(plain, **base)) == 0


def test_another_adapter_or_key_shares_nothing_and_the_same_ones_share_all():
    body = {"messages": [{"role": "user", "content": LONG}]}
    plain, again = read_prompt(body, KEY), read_prompt(body, KEY)
    assert plain == again
    assert _common(plain, read_prompt(body, KEY, model_id="lora")) == 0
    assert _common(plain, read_prompt(body, b"another")) == 0
    assert len(plain.hashes) == len(set(plain.hashes)) == len(LONG) // BLOCK_BYTES


def test_seeds_cannot_be_shifted_into_each_other():
    body = {"messages": [{"role": "user", "content": LONG}]}
    assert _common(_chat(**body, model="ab", cache_salt="c"), _chat(**body, model="a", cache_salt="bc")) == 0


def test_a_change_in_the_middle_keeps_what_is_before_and_nothing_after():
    changed = LONG[:700] + "!" + LONG[701:]
    marks = len("\x1em" + "user" + "\x1ec")
    found = _common(_chat([{"role": "user", "content": LONG}]), _chat([{"role": "user", "content": changed}]))
    assert found == (700 + marks) // BLOCK_BYTES == 2


def test_objects_and_mappings_are_read_alike():
    messages = [{"role": "user", "content": LONG}]
    assert read_prompt(Body(messages=messages, model="m"), KEY) == _chat(messages, model="m")
    assert read_prompt(Body(prompt=LONG), KEY) == read_prompt({"prompt": LONG}, KEY)


def test_images_are_told_apart_and_count_as_a_thousand_tokens():
    def with_image(url):
        return _chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, LONG]}])

    assert with_image("data:a") == with_image("data:a")
    assert _common(with_image("data:a"), with_image("data:b")) == 0
    assert 1000 < with_image("data:a").tokens - _chat([{"role": "user", "content": [LONG]}]).tokens < 1100


def test_tool_calls_and_tools_are_part_of_the_prompt():
    def called(name):
        return _chat([{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name}}]}, LONG])

    assert _common(called("f"), called("g")) == 0
    with_tools = _chat([{"role": "user", "content": LONG}], tools=[{"description": "d" * 4000}])
    without = _chat([{"role": "user", "content": LONG}])
    assert 1000 <= with_tools.tokens - without.tokens <= 1010
    assert with_tools.ends[0] - without.ends[0] >= 1000, "whoever has the first block has the tools before it"


def test_what_would_be_used_up_by_reading_is_not_read_and_counts_as_not_cached():
    def parts():
        yield {"type": "text", "text": "x"}

    content = parts()
    found = _chat([{"role": "system", "content": LONG}, {"role": "user", "content": content}])
    assert next(content) == {"type": "text", "text": "x"}
    assert found.hashes == _chat([{"role": "system", "content": LONG}, {"role": "user", "content": "x"}]).hashes
    assert found.tokens > found.ends[len(found.hashes) - 1] + 1000
    assert _chat([{"role": "user", "content": [Part()]}]).hashes == []


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("x" * 4000, 1000),
        (list(range(1000)), 1000),
        ([list(range(499)), list(range(499))], 1000),
        (["x" * 1998] * 2, 1000),
    ],
)
def test_completions_are_read_whatever_the_kind_of_their_prompt(prompt, tokens):
    found = read_prompt({"prompt": prompt}, KEY)
    assert found.tokens == tokens
    assert len(found.hashes) == tokens * 4 // BLOCK_BYTES


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": None}, {"prompt": ""}, {"prompt": 7}, {"prompt": [-1]}, {"prompt": [1, "a"]}, {"prompt": []},
     {"messages": 3}, {"messages": []}, {"messages": iter(())}, {"prompt": [[1], None]}, {"prompt": [1 << 40]},
     {"messages": [{"role": "user", "content": "x"}], "tools": [Part()]}],
)  # fmt: skip
def test_what_is_no_prompt_has_none(body):
    assert read_prompt(body, KEY) is None


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=5)
FIELDS = st.sampled_from(["role", "content", "text", "x"])
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3), max_leaves=12
)


@given(JUNK, st.sampled_from(["messages", "prompt"]))
@settings(max_examples=200, deadline=None)
def test_reading_never_raises(junk, name):
    read_prompt({name: junk}, KEY)


def test_blocks_double_so_that_a_long_prompt_has_few_and_its_end_is_not_hashed():
    found = read_prompt({"prompt": "x" * 3_000_000}, KEY)
    assert len(found.hashes) == 256 + 4 * 128
    assert found.ends[len(found.hashes) - 1] == (1 << 20) // 4
    assert found.tokens == 750_000
    half = read_prompt({"prompt": "x" * 150_000}, KEY)
    assert list(found.hashes[: len(half.hashes)]) == half.hashes


def test_a_body_is_the_first_argument_that_looks_like_one():
    class Handle:
        def __getattr__(self, name):
            return self  # as Serve's deployment handles do

    chat, completion = Body(messages=[]), {"prompt": "x"}
    assert find_body((7, "text", Handle(), chat, completion), {}) is chat
    assert find_body((), {"x": None, "request": completion}) is completion
    assert find_body(({"inputs": 1}, b"{}"), {"prompt": "x"}) is None
