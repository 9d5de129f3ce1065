"""Where the page listens, and by which names it may be asked."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from shadecast.errors import ShadecastError

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
"""Hosts that stand for all addresses of the machine, and how the machine itself reaches the page then."""
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class PageError(ShadecastError):
    """The page cannot listen at the address given, or be asked by the name given."""


@dataclass(frozen=True, slots=True)
class Address:
    """What the page is started with."""

    host: str = "127.0.0.1"
    port: int = 8266
    """0: any free one."""
    names: tuple[str, ...] = ()
    """By which clients may ask, beside the names that the page knows itself (`is_own`)."""

    def changed(self, host: str | None, port: int | None, names: Iterable[str]) -> Address:
        """With what is given in place of what was; names are added. Raises PageError."""
        more = tuple(checked_name(name) for name in names)
        host = self.host if host is None else host.strip().removeprefix("[").removesuffix("]")
        if not host:
            raise PageError("--page-host is empty: give an address of this machine, or 0.0.0.0 for all of them")
        port = self.port if port is None else port
        return Address(host, port, tuple(dict.fromkeys((*self.names, *more))))

    def url(self, port: int) -> str:
        """How to reach it on this machine, `port` being the one that was taken."""
        host = _EVERYWHERE.get(self.host) or (f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or _is_loopback(self.host)

    def listen(self) -> socket.socket:
        """A listening socket; `::` takes IPv4, too. Raises PageError, one line with host, port and what to do."""
        where = f"page at {self.host}:{self.port}"
        if not 0 <= self.port <= 65535:
            raise PageError(f"{where}: the port must be from 0 (any free one) to 65535")
        try:
            family, *_, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            both = self.host == "::" and socket.has_dualstack_ipv6()
            return socket.create_server(place, family=family, dualstack_ipv6=both)
        except (OSError, UnicodeError) as error:
            match getattr(error, "errno", None):
                case errno.EADDRINUSE:
                    advice = "the port is taken: stop the program that listens there, or give another --page-port"
                case errno.EACCES:
                    advice = "this user may not listen there: give a --page-port from 1024 on"
                case _:
                    reason = getattr(error, "strerror", None) or error
                    advice = f"{reason}: give an address of this machine as --page-host, or 0.0.0.0 for all of them"
            raise PageError(f"{where}: {advice}") from error

    def check(self, running: Address | None) -> None:
        """Raises PageError if a page could not listen there now; `running` is the one that it will replace."""
        replaced = running is not None and running.port == self.port
        (replace(self, port=0) if replaced else self).listen().close()

    def is_own(self, name: str, arrived_at: str) -> bool:
        """Whether a request may ask by this name: loopback, the address that it arrived at, this machine, `names`."""
        own = ("localhost", socket.gethostname().lower(), self.host.lower(), *self.names)
        return name in own or _is_loopback(name) or (name != "" and _plain(name) == _plain(arrived_at))


def host_name(header: str) -> str:
    """The name in a Host header in lower case, without port, brackets and the last dot; empty if there is none."""
    try:
        return (urlsplit(f"//{header}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def is_ip_address(name: str) -> bool:
    """Whether it is an address and no name: no DNS server can make it mean another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_name(name: str) -> bool:
    """Whether it can be a host's name or address: letters, digits, hyphens and dots, or an IP address."""
    return is_ip_address(name) or _NAME.fullmatch(name) is not None


def checked_name(given: str) -> str:
    """A name for `Address.names` as `host_name` gives it. Raises PageError."""
    name = given.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    if not is_name(name):
        raise PageError(
            f"--page-allow-host {given!r}: must be one host name or IP address, without scheme, port or wildcard, "
            "such as ray-head.example.org"
        )
    return name


def _is_loopback(name: str) -> bool:
    return is_ip_address(name) and ipaddress.ip_address(name).is_loopback


def _plain(address: str) -> str:
    """An address in one form: IPv4 that arrived at an IPv6 socket as IPv4, without a zone."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
