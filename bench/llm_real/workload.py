"""Conversations that share their beginnings: the same by seed for every arm, answers included.

What the model says is not used: the next turn quotes an answer that the seed has drawn, so that every arm sends the
same bytes. An engine recomputes those few tokens; the rest of a conversation is in the cache of whoever had it before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_LETTERS = "abcdefghijklmnopqrstuvwxyz    ."


@dataclass(frozen=True, slots=True)
class Traffic:
    """Kind and rate of the conversations of one scenario."""

    per_s: float
    """Conversations that begin in a second, at random times."""
    turns: int
    answer_tokens: int
    think_s: float
    """Mean of an exponential pause between an answer and the next turn."""
    prefixes: int = 20
    prefix_bytes: tuple[int, int] = (900, 1500)
    """Of the instructions that conversations share; a byte is a token."""
    turn_bytes: tuple[int, int] = (100, 300)
    skew: float = 0.8
    """The k-th prefix is as popular as k to minus this."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question, and what is quoted as its answer afterwards."""

    question: str
    answer: str
    pause_s: float
    """Before it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A shared beginning and turns."""

    at_s: float
    prefix: int
    instruction: str
    turns: Sequence[Turn]

    def messages(self, turn: int) -> list[dict[str, str]]:
        """What is sent at a turn, counted from 0."""
        sent = [{"role": "system", "content": self.instruction}]
        for number, each in enumerate(self.turns[: turn + 1]):
            sent.append({"role": "user", "content": each.question})
            if number < turn:
                sent.append({"role": "assistant", "content": each.answer})
        return sent


def conversations(traffic: Traffic, seed: int, seconds: float, begin_s: float = 0.0) -> list[Conversation]:
    """All that begin from `begin_s` for so many seconds."""
    rng = random.Random(f"{seed}/prefixes")
    instructions = [_text(rng, rng.randint(*traffic.prefix_bytes)) for _ in range(traffic.prefixes)]
    popular = list(accumulate((k + 1.0) ** -traffic.skew for k in range(traffic.prefixes)))
    rng, found, at_s = random.Random(f"{seed}/conversations/{begin_s:g}"), [], begin_s
    while (at_s := at_s + rng.expovariate(traffic.per_s)) < begin_s + seconds:
        prefix = rng.choices(range(traffic.prefixes), cum_weights=popular)[0]
        turns = [
            Turn(
                _text(rng, rng.randint(*traffic.turn_bytes)),
                _text(rng, traffic.answer_tokens),
                rng.expovariate(1.0 / traffic.think_s) if number else 0.0,
            )
            for number in range(traffic.turns)
        ]
        found.append(Conversation(at_s, prefix, instructions[prefix], turns))
    return found


def _text(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(_LETTERS, k=size))
