"""The actor that serves the live page, in an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import uvicorn
from ray.exceptions import RayActorError

from serve_app.coordinator import COORDINATOR, find_coordinator
from serve_app.page.address import Address, PageError
from serve_app.page.app import make_app
from serve_app.page.rights import Rights
from serve_app.page.watch import ControlPlaneAwayError, one_line

logger = logging.getLogger(__name__)

_COORDINATOR_ANSWER_S = 3.0


class Page:
    """The page as an async actor: wrap with `ray.remote`, then call `start` (again after a failure, if you like)."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8266,
        rights: Mapping[str, str] | str = "",
        names: Sequence[str] = (),
        find: Callable[[], Any | None] = find_coordinator,
    ) -> None:
        """As `Address` and `Rights.of`. `find` looks the coordinator up; it may block, and returns None for none."""
        self._address = Address(host, port, tuple(names))
        self._rights = Rights.of(rights)
        self._find = find
        self._coordinator: Any = None
        self._running: _Running | None = None
        _start_again_after_restart()

    async def start(self) -> str:
        """Listen, and return the address, `http://host:port`; at once where it listens already. Raises PageError."""
        running = self._running = self._running or self._listen()
        ready = asyncio.ensure_future(running.server.ready.wait())
        await asyncio.wait({ready, running.serving}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if running.serving.done():
            self._running = None
            raise PageError(f"page at {running.address}: the server stopped; its log says why")
        return running.address

    async def address(self) -> tuple[str, int, tuple[str, ...]]:
        """What `Address` it was started with, for a starter that found this page running."""
        return self._address.host, self._address.port, self._address.names

    async def serve_forever(self) -> None:
        """Start, and return only when the server has ended."""
        await self.start()
        if self._running is not None:
            await asyncio.shield(self._running.serving)

    async def rights(self) -> dict[str, str]:
        """Digests of the tokens that it takes, by role, for a starter that found this page running."""
        return self._rights.plain()

    async def stop(self) -> None:
        """Stop listening, and wait until that is done."""
        running, self._running = self._running, None
        if running is not None:
            running.server.should_exit = True
            await running.serving

    def _listen(self) -> _Running:
        listener = self._address.listen()
        app = make_app(
            self._status,
            self._order,
            self._rights,
            write_down=self._write_down,
            explain=self._explain,
            address=self._address,
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        server = _Server(config)
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
        return _Running(server, serving, self._address.url(listener.getsockname()[1]))

    async def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._call("status")
        return status

    async def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call("order", order)
        return answer

    async def _explain(self, question: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call("explain", question)
        return answer

    async def _write_down(self, entry: dict[str, Any]) -> None:
        """It was refused already: what keeps the coordinator from writing that down changes nothing."""
        try:
            await self._call("write_down", entry)
        except ControlPlaneAwayError as error:
            logger.warning("page: a refused order is not in the audit log: %s", error)

    async def _call(self, method: str, *args: Any) -> Any:
        """Ask the coordinator, found anew after it did not answer. Raises ControlPlaneAwayError."""
        try:
            async with asyncio.timeout(_COORDINATOR_ANSWER_S):
                if self._coordinator is None:
                    self._coordinator = await asyncio.to_thread(self._find)
                if self._coordinator is None:
                    raise ControlPlaneAwayError(f"no actor {COORDINATOR!r} on this cluster; `shadecast up` starts one")
                return await getattr(self._coordinator, method).remote(*args)
        except AttributeError as error:
            reason = "the coordinator is of an older version: `shadecast down`, then `shadecast up`"
            raise ControlPlaneAwayError(reason) from error
        except TimeoutError as error:
            self._coordinator = None
            reason = f"the coordinator did not answer within {_COORDINATOR_ANSWER_S:g} s"
            raise ControlPlaneAwayError(reason) from error
        except RayActorError as error:
            self._coordinator = None
            raise ControlPlaneAwayError(f"the coordinator is down or restarting ({one_line(error)})") from error


def _start_again_after_restart() -> None:
    """Where Ray has restarted this actor, nobody else would call `start`: queue that call for after the constructor."""
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None and context.was_current_actor_reconstructed:
        context.current_actor.start.remote()


@dataclass(frozen=True, slots=True)
class _Running:
    server: _Server
    serving: asyncio.Task[None]
    address: str


class _Server(uvicorn.Server):
    """uvicorn inside somebody else's event loop: leaves signals alone, says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to Ray's worker."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.ready.set()
