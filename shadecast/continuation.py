"""How a stream of an OpenAI server goes on from another replica: prompt and text so far are one prompt.

What is asked for then is the same body with the text that its reader has had: at the end of a completion's prompt, or
of a conversation as a message that is not finished (`continue_final_message`, which vLLM and SGLang know). Its chunks
are mended so that the reader sees one stream: the first one's id, no second role, usage of the whole.

It is done only where the rest is what would have come. Not for several answers, tools and grammars (their state is
lost), log probabilities, penalties that count what was written, stop words (which may lie across the seam), seeds of a
sampler, or anything but text. A greedy answer goes on as it would have, as far as the tokens of the joined text are
those that made it; a sampled one is another sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shadecast.prompts import find_body
from shadecast.tokens import TokenCount, chunks, get, texts_of

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "echo": (False,),
    "tool_choice": ("none",),
}
"""Values besides "not given" with which the rest can be asked for. Of other fields that are named below: none."""
_HINDERING = (
    *("logprobs", "prompt_logprobs", "logprob_token_ids", "suffix", "stop", "bad_words"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "structural_tag"),
    *("truncate_prompt_tokens", "prompt_embeds", "logits_processors", "watermarking", "prediction", "audio"),
    *("modalities", "thinking", "thinking_token_budget", "return_token_ids", "return_prompt_text"),
    *("tools", "functions", "function_call"),
)
OPENAI = "openai"
"""In `balance.resume`: streams of OpenAI servers. Other values name the argument that takes what was had."""
_LIMITS = ("max_tokens", "max_completion_tokens")


def may_continue(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a request is for a stream whose rest can be asked for elsewhere. Never raises."""
    try:
        return _may_continue(find_body(args, kwargs))
    except Exception:  # whatever a body holds
        return False


def _may_continue(body: Any) -> bool:
    if body is None or not get(body, "stream"):
        return False
    if any(_is_set(get(body, name)) for name in _HINDERING):
        return False
    if any(_is_set(told := get(body, name)) and told not in allowed for name, allowed in _NEUTRAL.items()):
        return False
    if get(get(body, "response_format"), "type") not in (None, "text"):
        return False
    if get(body, "seed") is not None and get(body, "temperature") != 0:
        return False
    messages = get(body, "messages")
    if messages is None:
        return isinstance(get(body, "prompt"), str)
    return _knows(body, "continue_final_message") and isinstance(messages, list) and all(map(_is_text, messages))


@dataclass(slots=True)
class Rest:
    """The request for the rest of a stream, and what makes its items fit."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    mend: Callable[[Any], Any] | None = None


def again(setting: str, args: Sequence[Any], kwargs: Mapping[str, Any], had: Sequence[Any] | None) -> Rest | None:
    """What asks once more for an answer, or by `balance.resume` for the rest of a stream; None if it cannot be had."""
    if had is None:
        return Rest(args, kwargs)
    return rest_of(args, kwargs, had) if setting == OPENAI else Rest(args, {**kwargs, setting: list(had)})


def rest_of(args: Sequence[Any], kwargs: Mapping[str, Any], had: Sequence[Any]) -> Rest | None:
    """What asks for the rest of a stream of which its reader has had these items; None if that cannot be asked for."""
    try:
        return _rest_of(args, kwargs, had) if may_continue(args, kwargs) else None
    except Exception:  # whatever a server has given: the stream stays
        return None


def _rest_of(args: Sequence[Any], kwargs: Mapping[str, Any], had: Sequence[Any]) -> Rest | None:
    body, so_far = find_body(args, kwargs), _Had.read(had)
    if so_far is None:
        return None
    changes = _limits(body, so_far) if so_far.text else {}
    if changes is None:
        return None
    if so_far.text and get(body, "messages") is None:
        changes["prompt"] = get(body, "prompt") + so_far.text
    elif so_far.text:
        changes |= {"messages": _with_text(body, so_far.text)}
        changes |= {"add_generation_prompt": False, "continue_final_message": True}
        content = changes["messages"][-1]["content"]
        if content != content.strip():  # templates cut that off
            return None
    asked = {**body, **changes} if isinstance(body, Mapping) else body.model_copy(update=changes)
    return Rest(
        [asked if each is body else each for each in args],
        {name: asked if each is body else each for name, each in kwargs.items()},
        _Mender(so_far) if had else None,
    )


def _knows(body: Any, name: str) -> bool:
    """Whether a body takes that field; a mapping takes any."""
    fields = getattr(type(body), "model_fields", ()) if hasattr(body, "model_copy") else ()
    return isinstance(body, Mapping) or name in fields


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {})


def _is_text(message: Any) -> bool:
    """Whether a message has text only."""
    return isinstance(get(message, "content"), str) and get(message, "tool_calls") in (None, [])


def _with_text(body: Any, text: str) -> list[Any]:
    messages = list(get(body, "messages"))
    if get(body, "continue_final_message") and messages:
        last = messages.pop()
        before = get(last, "content")
        return [*messages, {"role": get(last, "role"), "content": before + text}]
    return [*messages, {"role": "assistant", "content": text}]


def _limits(body: Any, had: _Had) -> dict[str, Any] | None:
    """Limits of the rest; None if there is none left."""
    limits = {name: told for name in _LIMITS if isinstance(told := get(body, name), int)}
    left = {name: told - had.tokens for name, told in limits.items()}
    return None if any(value < 1 for value in left.values()) else left


@dataclass(slots=True)
class _Had:
    """What a reader has had of one answer."""

    text: str = ""
    tokens: int = 0
    """Exact where usage was told with the text, else rather too many: no answer is longer than was asked for."""
    prompt_tokens: int = 0
    """Of the first request, as its usage says; 0 where it does not."""
    identity: dict[str, Any] = field(default_factory=dict)
    """`id` and `created` of all chunks."""
    begun: bool = False
    """The role has been given."""

    @classmethod
    def read(cls, items: Sequence[Any]) -> _Had | None:
        """None if it is not the beginning of a text."""
        had, count, written = cls(), TokenCount(), 0
        for item in items:
            count.add(item)
            found = chunks(item)
            if not found and not _is_empty(item):
                return None
            for chunk in found:
                for choice in get(chunk, "choices") or ():
                    part = get(choice, "delta")
                    plain = get(choice, "text") if part is None else get(part, "content")
                    texts = [text for text in texts_of(choice) if text]
                    if get(choice, "index") not in (None, 0) or texts not in ([], [plain]):
                        return None  # another answer, reasoning, or a tool's arguments
                    had.text += plain or ""
                    written += bool(plain)
                    had.begun = had.begun or get(part, "role") is not None
                had.identity = had.identity or {
                    name: value for name in ("id", "created") if (value := get(chunk, name)) is not None
                }
                told = get(get(chunk, "usage"), "prompt_tokens")
                had.prompt_tokens = had.prompt_tokens or (told if isinstance(told, int) else 0)
        had.tokens = count.exact or max(math.ceil(count.tokens), written)
        return None if count.finish or count.failed else had


def _is_empty(item: Any) -> bool:
    """Whether an item without a chunk may be left out of account."""
    return item in ("", b"", [], ())


class _Mender:
    """Makes the chunks of the rest those of the whole."""

    __slots__ = ("_had",)

    def __init__(self, had: _Had) -> None:
        self._had = had

    def __call__(self, item: Any) -> Any:
        """The item as the first attempt would have given it; what cannot be read stays as it is."""
        try:
            return self._mended(item)
        except Exception:
            return item

    def _mended(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self._mended(each) for each in item]
        if isinstance(item, (str, bytes, bytearray)):
            text = item if isinstance(item, str) else item.decode("utf-8")
            mended = "\n".join(self._event(line) for line in text.split("\n"))
            return mended if isinstance(item, str) else type(item)(mended.encode())
        if isinstance(item, Mapping):
            return self._chunk(item) if chunks(item) else item
        if hasattr(item, "model_copy") and hasattr(item, "model_dump"):
            return type(item)(**self._chunk(item.model_dump()))
        return item

    def _event(self, line: str) -> str:
        if not line.startswith("data:") or "{" not in line:
            return line
        return "data: " + json.dumps(self._chunk(json.loads(line[len("data:") :])), ensure_ascii=False)

    def _chunk(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        had = self._had
        mended = {**chunk, **{name: value for name, value in had.identity.items() if name in chunk}}
        if had.begun and chunk.get("choices"):
            mended["choices"] = [_without_role(choice) for choice in chunk["choices"]]
        usage = chunk.get("usage")
        if isinstance(usage, Mapping):
            written = (usage.get("completion_tokens") or 0) + had.tokens
            prompt = had.prompt_tokens or max((usage.get("prompt_tokens") or 0) - had.tokens, 0)
            whole = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
            mended["usage"] = {**usage, **whole}
        return mended


def _without_role(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    delta = choice.get("delta")
    if not isinstance(delta, Mapping) or "role" not in delta:
        return choice
    return {**choice, "delta": {name: value for name, value in delta.items() if name != "role"}}
