"""Limits on what HTTP brings in, as pure ASGI: header sizes and characters, body size, compressed bodies.

`HeaderGuard` wraps the gateway's own application. Serve's proxy reads some headers before any application does, and
answers 500 to a session id that is not UTF-8; where the proxies start with
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.http_guard:proxy_middlewares` the guard stands there too.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.middleware import Middleware

from serve_app.protocol_error import ProtocolError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEADER_BYTES = 32 * 1024
MAX_ID_BYTES = 512
ID_HEADERS = (b"x-session-id", b"x-request-id", b"serve_multiplexed_model_id", b"x-request-timeout-seconds")
"""Headers that Serve copies into every request's metadata, in its proxies and routers."""


_INFLATE_OFF_LOOP_BYTES = 1024
"""Compressed bodies above this are decompressed in a thread (zlib lets go of the interpreter's lock). deflate makes
1,032 bytes of one at most: what stays on the loop takes it for 2 ms in the worst case."""
_DEFLATE_OFF_LOOP_BYTES = 32 * 1024
"""Answers above this are compressed in a thread: 32 KiB take 0.5 ms."""
_MAX_CODINGS = 3
_MAX_MEMBERS = 1000
_GZIP_MAGIC = b"\x1f\x8b"
_ZEROS = re.compile(rb"\0*")
"""What may pad gzip data after a member: block devices and tapes leave it, and gzip's own programs skip it."""
_PIECE_BYTES = 64 * 1024


class HeaderGuard:
    """Refuses requests whose headers are too large (431) or hold ids that Serve could not carry (400)."""

    def __init__(self, app: App, id_headers: tuple[bytes, ...] = ID_HEADERS) -> None:
        self._app = app
        self._ids = frozenset(name.lower().replace(b"_", b"-") for name in id_headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        refusal = self._refusal(scope["headers"]) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await send_error(refusal, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> ProtocolError | None:
        total = sum(len(name) + len(value) for name, value in headers)
        if total > MAX_HEADER_BYTES:
            return ProtocolError(431, f"the headers have {total} bytes; at most {MAX_HEADER_BYTES} are taken")
        for name, value in headers:
            if name.lower().replace(b"_", b"-") in self._ids:
                shown = name.decode("latin-1")
                if len(value) > MAX_ID_BYTES:
                    return ProtocolError(400, f"header {shown}: {len(value)} bytes; at most {MAX_ID_BYTES} are taken")
                if not (value.isascii() and value.decode("ascii").isprintable()):
                    return ProtocolError(400, f"header {shown}: must be printable ASCII")
        return None


class RequestIds:
    """Gives a request without `x-request-id` one and returns it; one that came with the request is its sender's.

    Serve's own proxy does the same, so under Serve this adds nothing.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or any(name == b"x-request-id" for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        made = (b"x-request-id", str(uuid.uuid4()).encode())

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), made]}
            await send(message)

        await self._app({**scope, "headers": [*scope["headers"], made]}, receive, send_with_id)


def proxy_middlewares() -> list[Middleware]:
    """For Serve's `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    return [Middleware(HeaderGuard)]


async def send_error(error: ProtocolError, send: Send) -> None:
    """Sends `error` as the protocol's JSON, over bare ASGI."""
    body = json.dumps({"error": error.reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class BodyReader:
    """Reads request bodies within a limit for each and a limit for all that are held at one time."""

    def __init__(self, max_body_bytes: int, max_total_bytes: int, idle_s: float, timeout_s: float) -> None:
        """`idle_s` bounds the wait for the next bytes of a body, `timeout_s` for all of it."""
        self.max_body_bytes = max_body_bytes
        self.held_bytes = 0
        """Of all bodies under way, counted from the byte's arrival until its request ends."""
        self._max_total_bytes = max_total_bytes
        self._idle_s = idle_s
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="inflate")

    @asynccontextmanager
    async def read(self, receive: Receive, length: str | None, encoding: str) -> AsyncIterator[bytes]:
        """The body, decompressed. `length` and `encoding` are the Content-Length and Content-Encoding headers.

        Raises ProtocolError: 400 for a wrong length or damaged compression, 408 when it comes too slowly, 413 when it
        is too large, 415 for an unknown compression, 503 when too much is held already.
        """
        codings = [each.strip().lower() for each in encoding.split(",")]
        codings = [each for each in codings if each not in ("", "identity")]
        if len(codings) > _MAX_CODINGS or not {"gzip", "x-gzip", "deflate"}.issuperset(codings):
            raise ProtocolError(
                415, f"Content-Encoding {encoding[:40]!r}: gzip, deflate or none", {"Accept-Encoding": "gzip, deflate"}
            )
        self._check_length(length)
        held = _Held(self)
        try:
            body = await self._receive(receive, held)
            for coding in reversed(codings):  # the last that was applied is named last
                body = await self._inflate(body, coding, held)
            yield body
        finally:
            self.held_bytes -= held.size

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Counts the `size` bytes of a body that is here already, for as long as the block runs.

        Raises ProtocolError as `read` does: 413 when it is too large, 503 when too much is held already.
        """
        if size > self.max_body_bytes:
            raise self._too_large()
        self.take(size)
        try:
            yield
        finally:
            self.held_bytes -= size

    async def compress(self, body: bytes, coding: str) -> bytes:
        """`body` in the given coding, "gzip" or "deflate"; large ones in a thread."""
        if len(body) <= _DEFLATE_OFF_LOOP_BYTES:
            return _compress(body, coding)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _compress, body, coding)

    def take(self, size: int) -> None:
        """Counts `size` bytes; raises ProtocolError (503) when that is more than may be held at one time."""
        if self.held_bytes + size > self._max_total_bytes:
            raise ProtocolError(503, "too many request bodies are under way; try again soon", {"Retry-After": "1"})
        self.held_bytes += size

    def _check_length(self, length: str | None) -> None:
        if length is None:
            return
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ProtocolError(400, "Content-Length must be a whole number")
        if int(length) > self.max_body_bytes:
            raise self._too_large()

    async def _receive(self, receive: Receive, held: _Held) -> bytes:
        parts: list[bytes] = []
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout(min(self._idle_s, self._timeout_s)) as scope:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ProtocolError(400, "the client left before the body was complete")
                    parts.append(message.get("body", b""))
                    held.take(len(parts[-1]))
                    if held.size > self.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
                    scope.reschedule(min(loop.time() + self._idle_s, end_s))
        except TimeoutError:
            raise ProtocolError(408, f"the body did not arrive in time: {held.size} bytes came") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _inflate(self, raw: bytes, coding: str, held: _Held) -> bytes:
        """Decompresses gzip, zlib or bare deflate data, never making more than the limit and one byte."""
        if len(raw) <= _INFLATE_OFF_LOOP_BYTES:
            body = _decompress(raw, coding, self.max_body_bytes)
        else:
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self._threads, _decompress, raw, coding, self.max_body_bytes)
        if len(body) > self.max_body_bytes:
            raise self._too_large(" when decompressed")
        held.take(len(body))
        return body

    def _too_large(self, when: str = "") -> ProtocolError:
        return ProtocolError(413, f"the body is larger than {self.max_body_bytes} bytes{when}; that is the limit")


class _Held:
    """What one request has taken of the reader's total."""

    __slots__ = ("_reader", "size")

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self.size = 0

    def take(self, size: int) -> None:
        self._reader.take(size)
        self.size += size


def compression_asked(accepted: str) -> str:
    """The compression to answer with: the one that Accept-Encoding names alone, as Triton's client does who wants it.

    A list is what every browser and HTTP library sends unasked; compressing those answers would only take time.
    """
    named = accepted.strip().lower()
    return named if named in ("gzip", "deflate") else ""


def _compress(body: bytes, coding: str) -> bytes:
    stream = zlib.compressobj(1, wbits=zlib.MAX_WBITS | (16 if coding == "gzip" else 0))
    return stream.compress(body) + stream.flush()


def _decompress(raw: bytes, coding: str, limit: int) -> bytes:
    """At most `limit` + 1 bytes of `raw` decompressed; raises ProtocolError (400) where it is damaged or cut off."""
    wbits = zlib.MAX_WBITS | 32  # gzip or zlib, told apart by their first bytes
    if coding == "deflate" and not _is_zlib(raw):
        wbits = -zlib.MAX_WBITS  # some clients send deflate data without zlib's frame
    is_gzip = raw.startswith(_GZIP_MAGIC)
    parts: list[bytes] = []
    view, at, size = memoryview(raw), 0, 0
    for _ in range(_MAX_MEMBERS):  # gzip data may have several
        stream = zlib.decompressobj(wbits)
        while not stream.eof:
            piece = view[at : at + _PIECE_BYTES]  # zlib copies what it leaves: of a small piece only
            if not piece:
                raise ProtocolError(400, "the compressed body is cut off")
            try:
                parts.append(stream.decompress(piece, limit + 1 - size))
            except zlib.error:
                raise ProtocolError(400, "the body is not valid gzip or deflate data") from None
            at += len(piece) - len(stream.unused_data)
            size += len(parts[-1])
            if size > limit:
                return b"".join(parts)
        if is_gzip:
            at = _ZEROS.match(raw, at).end()  # type: ignore[union-attr]
        if at == len(raw):
            return b"".join(parts)
        if not (is_gzip and raw.startswith(_GZIP_MAGIC, at)):
            raise ProtocolError(400, "bytes follow the end of the compressed body")
    raise ProtocolError(400, f"the compressed body has more than {_MAX_MEMBERS} members")


def _is_zlib(raw: bytes) -> bool:
    """Whether these bytes begin as zlib or gzip data (RFC 1950: the first two are a multiple of 31)."""
    framed = len(raw) >= 2 and raw[0] & 0x0F == 8 and int.from_bytes(raw[:2], "big") % 31 == 0
    return framed or raw.startswith(_GZIP_MAGIC) or not raw
