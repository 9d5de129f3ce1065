"""The one error of the request path: an HTTP status and a reason for the client."""

from __future__ import annotations

from collections.abc import Mapping


class ProtocolError(Exception):
    """Ends a request with `status` and the body `{"error": reason}`.

    The reason is Unicode, whatever a client's or a model's text in it holds: of half a surrogate pair its escape.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason.encode(errors="backslashreplace").decode()
        self.headers = dict(headers or {})


class InvalidInput(ValueError):  # noqa: N818 - named for what a model says with it
    """A model raises this for input that it cannot take: the client gets a 400 with the text as reason.

    Any other exception is a failure of the replica (500) and counts against it when requests are routed.
    """
