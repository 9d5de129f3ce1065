"""Who may look at the live page and who may order, by token; and how often a client may try.

The page holds digests of tokens, not tokens: they travel to its process, and lie in the cluster's own store, as such.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shadecast.budget import Budget

MOST_CLIENTS = 1024
"""That are remembered; who was not heard of for longest is forgotten."""
WRONG_TOKENS, WRONG_TOKENS_PER_S = 10.0, 0.1
"""A client may give so many wrong tokens at once, and so many a second after that."""
ORDERS, ORDERS_PER_S = 30.0, 1.0


class Role(StrEnum):
    """What a token is for; whoever may operate may look, too."""

    LOOK = "look"
    OPERATE = "operate"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever gave a token that is known. `fingerprint` names the token without giving it away."""

    role: Role
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Rights:
    """Digests of the tokens, by role. Without one for `operate` nobody orders, without one for `look` all may look."""

    operate: str = ""
    look: str = ""

    @classmethod
    def of(cls, given: Mapping[str, str] | str) -> Rights:
        """From digests by role, or, as version 0.2 started pages, from the one token that there was."""
        if isinstance(given, str):
            return cls(operate=digest(given) if given else "")
        return cls(given.get(Role.OPERATE, ""), given.get(Role.LOOK, ""))

    def plain(self) -> dict[str, str]:
        """As plain values, for `of`."""
        return {Role.OPERATE.value: self.operate, Role.LOOK.value: self.look}

    def caller(self, token: str) -> Caller | None:
        """Whose token it is; None: nobody's. The time it takes does not depend on where tokens differ."""
        found = digest(token)
        same = {
            role: hmac.compare_digest(found, known or "-")
            for role, known in ((Role.OPERATE, self.operate), (Role.LOOK, self.look))
        }
        return next((Caller(role, found[:8]) for role, is_same in same.items() if is_same), None)


def digest(token: str) -> str:
    """SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def bearer(header: str) -> str:
    """The token of an `Authorization` header; empty if it has none."""
    scheme, _, given = header.partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


class Limits:
    """Wrong tokens and orders of each client, counted; `now_s` is monotonic."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, tuple[Budget, Budget]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def wrong_tokens(self, host: str) -> Budget:
        """What is left of a client's wrong tokens."""
        return self._of(host)[0]

    def orders(self, host: str) -> Budget:
        """What is left of a client's orders."""
        return self._of(host)[1]

    def _of(self, host: str) -> tuple[Budget, Budget]:
        client = client_of(host)
        found = self._clients.get(client)
        if found is None:
            found = (
                Budget(0.0, WRONG_TOKENS, WRONG_TOKENS, WRONG_TOKENS_PER_S),
                Budget(0.0, ORDERS, ORDERS, ORDERS_PER_S),
            )
            self._clients[client] = found
            if len(self._clients) > MOST_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(client)
        return found


def client_of(host: str) -> str:
    """Who is counted as one: an IPv4 address, or an IPv6 network of 64 bits, which one machine may have to itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def retry_after_s(per_s: float) -> str:
    """For `Retry-After`: when one more is earned."""
    return str(math.ceil(1.0 / per_s))
