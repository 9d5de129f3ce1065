"""Streams of OpenAI servers that go on elsewhere: the rest that is asked for, and chunks that fit.

Invariant, wherever a greedy stream is cut, and however often: its reader has the text, the usage and the end that it
would have had without.
"""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadecast.continuation import may_continue, rest_of
from shadecast.tokens import TokenCount, chunks

WORDS = (" one", " two", " three", ",", " straße", ' "four"', "\n", " five")


def chat(*texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "m", "messages": messages, "stream": True, **more}


def completion(prompt="once", **more):
    return {"model": "m", "prompt": prompt, "stream": True, **more}


def engine(body, name="x", length=20, usage=True):
    """Chunks of a greedy model: each word follows from all text before it. Ends after so many words of an answer."""
    messages = body.get("messages")
    if messages is None:
        text = body["prompt"]
    else:
        text = "".join(f"<{each['role']}>{each['content']}" for each in messages)
        if not body.get("continue_final_message"):
            text += "<assistant>"
        else:
            assert body["add_generation_prompt"] is False
    prompt = len(text)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1000
    base = {"id": f"id-{name}", "created": ord(name), "model": "m"}
    if messages is not None:
        yield {**base, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    written = 0
    while True:
        seed = zlib.crc32(text.encode())
        done = seed % length == 0
        if not done:
            word = WORDS[seed % len(WORDS)]
            if text.endswith("<assistant>"):
                word = word.strip() or "so"
            text += word
            written += 1
            part = {"text": word} if messages is None else {"delta": {"content": word}}
            told = {"usage": _usage(prompt, written)} if usage else {}
            yield {**base, "choices": [{"index": 0, "finish_reason": None, **part}], **told}
        if done or written >= limit:
            part = {"text": ""} if messages is None else {"delta": {}}
            reason = "stop" if done else "length"
            yield {**base, "choices": [{"index": 0, "finish_reason": reason, **part}]}
            yield {**base, "choices": [], "usage": _usage(prompt, written)}
            return


def _usage(prompt, written):
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def text_of(items):
    choices = [choice for item in items for chunk in chunks(item) for choice in chunk["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def as_events(chunk):
    return f"data: {json.dumps(chunk)}\n\n"


FORMS = {"chunks": lambda chunk: chunk, "events": as_events, "batches": lambda chunk: [as_events(chunk)]}


def read_with_cuts(body, cuts, form):
    """What a reader has whose replicas die after so many items each; None if the rest cannot be asked for."""
    had = []
    for number, cut in enumerate([*cuts, 10_000]):
        rest = rest_of([body], {}, had)
        if rest is None:
            return None
        made = (FORMS[form](chunk) for chunk in engine(rest.args[0], "xyz"[number % 3]))
        for _, item in zip(range(cut), made, strict=False):
            had.append(rest.mend(item) if rest.mend is not None else item)
        if TokenCount_of(had).finish:
            return had
    return had


def TokenCount_of(items):
    count = TokenCount()
    for item in items:
        count.add(item)
    return count


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            chat("hello"), chat("hello", "there", "you"), chat("a", max_tokens=7), chat("a", max_completion_tokens=9),
            completion(), completion("x y"), completion(max_tokens=5), chat("é", temperature=0, seed=1),
        ]
    ),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(sorted(FORMS)),
)  # fmt: skip
def test_wherever_a_greedy_stream_is_cut_its_reader_has_what_it_would_have_had(body, cuts, form):
    whole = list(engine(body))
    had = read_with_cuts(body, cuts, form)
    if had is None:
        return  # cut behind a line's end, or at the last word that was asked for
    found = [chunk for item in had for chunk in chunks(item)]
    assert text_of(had) == text_of(whole)
    reasons = [choice.get("finish_reason") for chunk in found for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == [
        c["finish_reason"] for chunk in whole for c in chunk["choices"] if c.get("finish_reason")
    ]
    usages = [chunk["usage"] for chunk in found if "usage" in chunk]
    assert usages[-1:] in ([], [usages[-1]])
    assert usages[-1]["completion_tokens"] == whole[-1]["usage"]["completion_tokens"]
    assert [u["completion_tokens"] for u in usages] == sorted(u["completion_tokens"] for u in usages)
    assert len({chunk["id"] for chunk in found}) == 1
    roles = [choice["delta"] for chunk in found for choice in chunk["choices"] if "role" in choice.get("delta", {})]
    assert len(roles) == ("messages" in body)


def test_most_cuts_can_be_mended():
    body = chat("hello")
    found = [read_with_cuts(body, [cut], "events") for cut in range(1, len(list(engine(body))) - 2)]
    assert sum(had is not None for had in found) > 0.6 * len(found)


@pytest.mark.parametrize("body", [chat("a"), chat("a", "b", "c"), completion()])
def test_before_the_first_text_the_same_is_asked_for_again(body):
    role = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if "messages" in body else []
    for had in ([], role, [as_events(item) for item in role]):
        assert rest_of([7, body], {"x": 1}, had).args == [7, body]


def part(text):
    return [{"id": "i", "choices": [{"index": 0, "delta": {"content": text}}]}]


def test_the_text_becomes_the_beginning_of_the_answer():
    body = chat("a", max_tokens=100)
    rest = rest_of([], {"request": body}, part("one two."))
    asked = rest.kwargs["request"]
    assert asked["messages"] == [*body["messages"], {"role": "assistant", "content": "one two."}]
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    assert asked["max_tokens"] == 98, "two tokens by its text"
    assert rest_of([completion("p")], {}, [{"choices": [{"text": "q"}]}]).args[0]["prompt"] == "pq"


def test_an_answer_that_was_to_go_on_from_a_beginning_goes_on_from_both():
    body = chat("a", "so", continue_final_message=True, add_generation_prompt=False)
    asked = rest_of([body], {}, part(" it is")).args[0]
    assert asked["messages"] == [*body["messages"][:1], {"role": "assistant", "content": "so it is"}]


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2}, {"best_of": 3}, {"logprobs": True}, {"logprobs": 1}, {"logprobs": 0}, {"top_logprobs": 2},
        {"echo": True}, {"tools": [{"type": "function"}]}, {"functions": [{}]}, {"tool_choice": "auto"},
        {"stop": ["x"]}, {"stop": "x"}, {"presence_penalty": 0.5}, {"frequency_penalty": -1},
        {"repetition_penalty": 1.2}, {"min_tokens": 3}, {"response_format": {"type": "json_object"}},
        {"guided_regex": "x"}, {"structured_outputs": {"a": 1}}, {"seed": 3}, {"seed": 3, "temperature": 0.5},
        {"stream": False}, {"stream": None}, {"suffix": "x"}, {"prompt_logprobs": 1}, {"use_beam_search": True},
        {"truncate_prompt_tokens": 5}, {"modalities": ["audio"]},
        {"bad_words": ["x y"]}, {"return_token_ids": True}, {"thinking_token_budget": 100},
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [chat("a"), completion()])
def test_what_cannot_go_on_exactly_does_not(body, more):
    assert may_continue([body], {})
    assert not may_continue([{**body, **more}], {})
    assert rest_of([{**body, **more}], {}, []) is None


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "logprobs": False, "echo": False, "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": None},
        {"temperature": 0.7, "top_p": 0.9, "tools": None, "tool_choice": "none", "stop": [], "seed": None},
        {"top_logprobs": 0, "bad_words": [], "length_penalty": 1.0, "truncate_prompt_tokens": None},
        {"temperature": 0, "seed": 4, "response_format": {"type": "text"}, "max_tokens": 5, "min_tokens": 0},
    ],
)
@pytest.mark.parametrize("body", [chat("a"), completion()])
def test_what_is_as_if_it_were_not_given_hinders_nothing(body, more):
    assert may_continue([{**body, **more}], {})


@pytest.mark.parametrize(
    "request_",
    [
        7, None, {}, completion(["a", "b"]), completion([1, 2]), {"messages": "x", "stream": True},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "stream": True},
        {"messages": [{"role": "tool", "content": None, "tool_calls": [{}]}], "stream": True},
        SimpleNamespace(messages=[{"role": "user", "content": "x"}], stream=True),
    ],
)  # fmt: skip
def test_what_is_no_plain_text_does_not_go_on(request_):
    assert not may_continue([request_], {})


@pytest.mark.parametrize(
    "had",
    [
        [{"choices": [{"index": 1, "delta": {"content": "x"}}]}],
        [{"choices": [{"delta": {"reasoning_content": "hm"}}]}],
        [{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}],
        [{"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}],
        [{"error": {"message": "no"}}],
        [{"choices": [{"delta": {"content": "line \n"}}]}],
        [{"choices": [{"delta": {"content": " line"}}]}],
        [{"choices": [{"delta": {"content": "x" * 40}}]}],
        ["a word"],
    ],
)
def test_an_answer_that_is_no_plain_text_or_is_complete_does_not_go_on(had):
    assert rest_of([chat("a", max_tokens=10)], {}, had) is None


class Body:
    model_fields = dict.fromkeys(
        ("messages", "stream", "continue_final_message", "add_generation_prompt", "max_tokens")
    )

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def model_copy(self, update):
        return type(self)(**{**vars(self), **update})


class Older(Body):
    """Of a server that cannot."""

    model_fields = dict.fromkeys(("messages", "stream"))


def test_bodies_of_pydantic_go_on_if_their_server_can():
    fields = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    asked = rest_of([Body(**fields)], {}, part("one")).args[0]
    assert asked.messages[-1] == {"role": "assistant", "content": "one"}
    assert not may_continue([Older(**fields)], {})
