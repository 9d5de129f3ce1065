"""What a request to a language model begins with: its canonical prompt, as a chain of keyed block hashes.

Two prompts that begin alike have the same first hashes. An engine that has computed the one need not compute that part
of the other again (vLLM's automatic prefix caching), so a router that remembers hashes knows where a prompt is cheap.

Requests are read as Ray's prefix router reads them: the first argument with `messages` or a `prompt` is an OpenAI chat
or completion body. The canonical prompt has role markers, tool calls and digests of images besides the text. The model
(or LoRA adapter), `cache_salt`, tools and the template are in the seed: requests that differ there share nothing.

Lengths are those of UTF-8, four bytes a token. What cannot be read ends the chain: it counts as not cached. So an
estimate of what is left to compute errs upwards.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

BYTES_PER_TOKEN = 4
"""English text in usual vocabularies; token ids are hashed as four bytes each."""
BLOCK_BYTES = 256
_FIRST_BYTES = 1 << 16
"""Up to here blocks have `BLOCK_BYTES`. They double there, and wherever the length has doubled again."""
_MOST_BYTES = 1 << 20
"""What comes after it counts as not cached: hashing it would stop the router's loop for milliseconds."""
HASH_BYTES = 8
_OTHER_PART_BYTES = 4096
"""For an image or sound: about a thousand tokens."""
_SEEDS = ("tools", "functions", "documents", "chat_template", "chat_template_kwargs")
"""Fields of a body that change the beginning of every prompt; engines write tools and documents out there."""
_OTHER_FIELDS = ("name", "tool_calls", "tool_call_id", "function_call", "reasoning_content")
"""Fields of a message besides its role and content that templates write out."""
_KINDS = (str, list, tuple)
_MARK = "\x1e"
"""Before each role, content, part and field, with a letter that says which; doubled where it stands in a text."""


def _ends() -> list[int]:
    """Tokens up to the end of each block."""
    ends, at, size = [], 0, BLOCK_BYTES
    while at < _MOST_BYTES:
        at += size
        ends.append(at // BYTES_PER_TOKEN)
        if at >= _FIRST_BYTES and at & (at - 1) == 0:
            size *= 2
    return ends


ENDS = _ends()
"""Of a prompt without tools and other seeds."""
MOST_BLOCKS = len(ENDS)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's blocks and length. `hashes[i]` stands for everything up to the end of block i.

    `ends[i]` are the tokens up to there, rising; there may be more ends than hashes. `tokens` is the whole length.
    """

    hashes: Sequence[bytes]
    ends: Sequence[int]
    tokens: int


class _UnreadableError(Exception):
    """Part of a body is of a kind that cannot be read without using it up, or at all."""


def find_body(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument that looks like an OpenAI chat or completion body; None if there is none."""
    for each in (*args, *kwargs.values()):
        if isinstance(_get(each, "messages"), _KINDS) or isinstance(_get(each, "prompt"), _KINDS):
            return each
    return None


def read_prompt(body: Any, key: bytes, model_id: str = "") -> Prompt | None:
    """The prompt of an OpenAI body, a mapping or an object; None if it has none that can be read.

    `key` (up to 64 bytes) is the same on all routers of a cluster and unknown to clients, who could otherwise make
    prompts that look cached. `model_id` is Serve's, where the body's own `model` does not name the adapter.
    """
    get = body.get if isinstance(body, dict) else partial(_get, body)
    messages, more = get("messages"), 0
    try:
        seeds = [_json(value) if (value := get(name)) else "" for name in _SEEDS]
        if messages is None:
            data = _read_completion(get("prompt"))
        else:
            data, more = _read_messages(messages)
    except _UnreadableError:
        return None
    kind = "messages" if messages is not None else type(data).__name__
    model, salt = str(get("model") or ""), str(get("cache_salt") or "")
    seed = "".join(f"{len(each)}:{each}" for each in (kind, model_id, model, salt, *seeds))
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    state = blake2b(seed.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES, key=key[:64])
    hashes = _block_hashes(data, state)
    head = _tokens(sum(map(len, seeds)))
    ends = [head + end for end in ENDS[: len(hashes)]] if head else ENDS
    tokens = head + _tokens(len(data) + more)
    return Prompt(hashes, ends, tokens) if tokens else None


def _tokens(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


def _block_hashes(data: bytes, state: Any) -> list[bytes]:
    """A hash of everything up to the end of each whole block; `state` is that of what comes before."""
    hashes: list[bytes] = []
    append, update, copy = hashes.append, state.update, state.copy
    at, size, until, length = 0, BLOCK_BYTES, _FIRST_BYTES, min(len(data), _MOST_BYTES)
    while at + size <= length:
        stop = min(until, length)
        for begin in range(at, stop - size + 1, size):
            update(data[begin : begin + size])
            append(copy().digest())
        at, size, until = until, 2 * size, 2 * until
    return hashes


def _get(body: Any, name: str) -> Any:
    return body.get(name) if isinstance(body, Mapping) else getattr(body, name, None)


# ---------------------------------------------------------------- canonical text


def _read_messages(messages: Any) -> tuple[str, int]:
    """Text of a conversation as far as it can be read, and for how many bytes the rest counts."""
    if isinstance(messages, str):
        return _text(messages), 0
    if not isinstance(messages, (list, tuple)):
        raise _UnreadableError
    pieces: list[str] = []
    for at, message in enumerate(messages):
        try:
            _read_message(message, pieces)
        except _UnreadableError:
            return "".join(pieces), _OTHER_PART_BYTES * (len(messages) - at)
    return "".join(pieces), 0


def _read_message(message: Any, pieces: list[str]) -> None:
    if isinstance(message, str):
        pieces.append(f"{_MARK}m{_MARK}c{_text(message)}")
        return
    if isinstance(message, dict) and len(message) == 2:  # nearly all of them
        role, text = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(text, str):
            pieces.append(f"{_MARK}m{_text(role)}{_MARK}c{_text(text)}")
            return
    pieces.append(f"{_MARK}m{_text(str(_get(message, 'role') or ''))}")
    content = _get(message, "content")
    if isinstance(content, str):
        pieces.append(f"{_MARK}c{_text(content)}")
    elif isinstance(content, (list, tuple)):
        for part in content:
            _read_part(part, pieces)
    elif content is not None:
        raise _UnreadableError
    names = message.keys() - {"role", "content"} if isinstance(message, Mapping) else _OTHER_FIELDS
    for name in sorted(names):
        value = _get(message, name)
        if value is not None:
            pieces.append(f"{_MARK}f{_text(name)}={_text(_json(value))}")


def _read_part(part: Any, pieces: list[str]) -> None:
    text = part if isinstance(part, str) else _get(part, "text")
    if isinstance(text, str):
        pieces.append(f"{_MARK}p{_text(text)}")
        return
    digest = blake2b(_json(part).encode(), digest_size=16).hexdigest()
    pieces.append(f"{_MARK}d" + digest * (_OTHER_PART_BYTES // len(digest)))


def _read_completion(prompt: Any) -> str | bytes:
    """A prompt of any kind that completions take: a text, token ids, or several of either."""
    if isinstance(prompt, str):
        return _text(prompt)
    if not isinstance(prompt, (list, tuple)):
        raise _UnreadableError
    if all(isinstance(each, str) for each in prompt):
        return "".join(f"{_MARK}p{_text(each)}" for each in prompt)
    try:
        if isinstance(prompt[0], int):
            return array("I", prompt).tobytes()
        return b"".join(array("I", (len(each), *each)).tobytes() for each in prompt)
    except (TypeError, OverflowError):
        raise _UnreadableError from None


def _text(text: str) -> str:
    return text.replace(_MARK, _MARK + _MARK) if _MARK in text else text


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError):
        raise _UnreadableError from None


def _plain(value: Any) -> Any:
    """What pydantic's objects hold. Others cannot be read: iterators would be used up."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    raise TypeError(f"{type(value).__name__} cannot be read")
