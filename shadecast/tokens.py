"""Tokens of a stream as OpenAI servers give it: what its usage says, else what its text is worth.

An item may be a chunk (a mapping or an object with `choices`), an event of text ("data: {...}"), or a list of those, as
`ray.serve.llm` sends all of some 50 ms at once. Items are no measure of such a stream, tokens are. `usage` of chunks is
exact (vLLM's `continuous_usage_stats` has it in each); without it four bytes of text count as a token, as in prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shadecast.prompts import BYTES_PER_TOKEN

_DATA, _DONE = "data:", "[DONE]"
_TEXTS = ("content", "refusal")
_FAILED = ("error", "abort")
"""Reasons for an end that are failures of the server."""


class TokenCount:
    """Of one stream, or whole answer. Feed each item that its reader gets."""

    __slots__ = ("_bytes", "_bytes_told", "_told", "failed", "finish", "tokens")

    def __init__(self) -> None:
        self.tokens = 0.0
        """So far; never falls."""
        self.finish = ""
        """The reason with which it has ended; empty while it has not said so."""
        self.failed = False
        """The server has sent an error in place of a chunk, or has given up."""
        self._bytes = self._bytes_told = self._told = 0

    @property
    def exact(self) -> int:
        """Tokens so far where the last usage has told all of them; 0 else."""
        return self._told if self._bytes == self._bytes_told else 0

    def add(self, item: Any) -> float | None:
        """Tokens that came with an item; None if there is no chunk in it. Never raises."""
        before = self.tokens
        try:
            found = chunks(item)
            for chunk in found:
                self._add(chunk)
        except Exception:  # whatever it is, it is no chunk
            return None
        self.tokens = max(before, self._told + (self._bytes - self._bytes_told) / BYTES_PER_TOKEN)
        return self.tokens - before if found else None

    def _add(self, chunk: Any) -> None:
        if get(chunk, "error") is not None:
            self.failed = True
        for choice in get(chunk, "choices") or ():
            for text in texts_of(choice):
                self._bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            if (reason := get(choice, "finish_reason")) is not None:
                self.finish = str(reason)
                self.failed = self.failed or self.finish in _FAILED
        usage = get(chunk, "usage")
        told = get(usage, "completion_tokens") if usage is not None else None
        if isinstance(told, int) and told > self._told:
            self._told, self._bytes_told = told, self._bytes


def chunks(item: Any) -> list[Any]:
    """All chunks, errors and whole answers in what a stream has given at once; none where it is of another kind."""
    if isinstance(item, (list, tuple)):
        return [chunk for each in item for chunk in chunks(each)]
    if isinstance(item, (str, bytes, bytearray)):
        text = item if isinstance(item, str) else item.decode("utf-8", "replace")
        events = [line[len(_DATA) :].strip() for line in text.split("\n") if line.startswith(_DATA)]
        return [chunk for event in events if event and event != _DONE for chunk in chunks(json.loads(event))]
    is_chunk = isinstance(get(item, "choices"), (list, tuple)) or get(item, "error") is not None
    return [item] if is_chunk else []


def texts_of(choice: Any) -> list[str]:
    """All that the model has written in a choice: text, reasoning, and arguments of tools."""
    part = get(choice, "delta") or get(choice, "message")
    if part is None:
        written = [get(choice, "text")]
    else:
        written = [get(part, name) for name in _TEXTS]
        written.append(get(part, "reasoning_content") or get(part, "reasoning"))
        if (tools := get(part, "tool_calls")) is not None:
            written += [get(get(call, "function"), "arguments") for call in tools]
    return [each for each in written if isinstance(each, str)]


def get(value: Any, name: str) -> Any:
    """A field of a mapping or an object; None where there is none."""
    if isinstance(value, dict):  # nearly all of them
        return value.get(name)
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
