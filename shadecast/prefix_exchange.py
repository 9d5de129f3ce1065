"""Routers tell each other what they sent where, with their reports: eight bytes for each new block and each prompt.

A router that knows only its own decisions finds a conversation on one of several replicas by luck. A prompt of which
nothing is new is told, too: its blocks were used, and must not be the next to be dropped. What does not fit into a
message is left out, the newest first: others then compute something again, and nothing goes wrong.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import Any

from shadecast.errors import MessageError
from shadecast.messages import as_list
from shadecast.prefix import Decision
from shadecast.prompts import HASH_BYTES, MOST_BLOCKS

_NONE = bytes(HASH_BYTES)
"""In place of the block before a prompt's first."""
MOST_SENT = 16_384
"""Blocks in one message, each prompt one more, 175 kB: eighty-odd new prompts of 12 k tokens."""


class Decisions:
    """What one router has decided since its last report."""

    __slots__ = ("_blocks", "_made", "left_out")

    def __init__(self) -> None:
        self._made: list[Decision] = []
        self._blocks = 0
        self.left_out = 0
        """Blocks that did not fit, since the start."""

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._made)

    def add(self, decision: Decision | None) -> None:
        """What `PrefixIndex.insert` says, None included."""
        if decision is None:
            return
        count = 1 + len(decision.hashes)
        if self._blocks + count > MOST_SENT:
            self.left_out += count
            return
        self._made.append(decision)
        self._blocks += count

    def take(self) -> dict[str, Any]:
        """The message; those that follow go into the next one."""
        made, self._made, self._blocks = self._made, [], 0
        at = {replica_id: i for i, replica_id in enumerate(dict.fromkeys(each.replica_id for each in made))}
        return {
            "replicas": list(at),
            "at": [at[decision.replica_id] for decision in made],
            "depth": [decision.depth for decision in made],
            "count": [len(decision.hashes) for decision in made],
            "after": _packed(decision.after or _NONE for decision in made),
            "hashes": _packed(block for decision in made for block in decision.hashes),
        }


def read_decisions(received: Any) -> list[Decision]:
    """Another router's decisions; raises MessageError if they are none."""
    if not isinstance(received, dict):
        raise MessageError(f"prefixes: a mapping is expected, not {type(received).__name__}")
    replicas, at, depth, count = (
        as_list(received.get(name), f"prefixes.{name}") for name in ("replicas", "at", "depth", "count")
    )
    after, hashes = (_unpacked(received.get(name), f"prefixes.{name}") for name in ("after", "hashes"))
    if len({len(at), len(depth), len(count)}) > 1:
        raise MessageError(f"prefixes: columns of {len(at)}, {len(depth)} and {len(count)} values")
    _whole_numbers("at", at, len(replicas) - 1)
    _whole_numbers("depth", depth, MOST_BLOCKS)
    _whole_numbers("count", count, MOST_SENT)
    if sum(count) != len(hashes) or len(count) != len(after) or len(hashes) + len(after) > MOST_SENT:
        raise MessageError(f"prefixes: {sum(count)} blocks of {len(count)} prompts, but {len(hashes)} and {len(after)}")
    if not all(isinstance(replica_id, str) for replica_id in replicas):
        raise MessageError("prefixes.replicas: names are expected")
    found, begin = [], 0
    for i, first, before, blocks in zip(at, depth, after, count, strict=True):
        found.append(Decision(replicas[i], first, before if first else b"", hashes[begin : begin + blocks]))
        begin += blocks
    return found


def _packed(blocks: Iterable[bytes]) -> str:
    return b64encode(b"".join(blocks)).decode()


def _unpacked(text: Any, what: str) -> list[bytes]:
    try:
        packed = b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise MessageError(f"{what}: text in base64 is expected") from None
    if len(packed) % HASH_BYTES:
        raise MessageError(f"{what}: {len(packed)} bytes are not whole hashes")
    return [packed[k : k + HASH_BYTES] for k in range(0, len(packed), HASH_BYTES)]


def _whole_numbers(name: str, values: Sequence[Any], most: int) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise MessageError(f"prefixes.{name} = {value!r}: a whole number from 0 to {most} is expected")
