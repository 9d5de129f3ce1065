"""The cluster that a command talks to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Annotated

import typer

from shadecast.errors import AwayError, ConfigError

_REACHED_S = 3.0
_LONGEST_REASON = 500

AddressOption = Annotated[str, typer.Option(help="Ray cluster; default: RAY_ADDRESS, the local cluster, or auto.")]


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Meanwhile this process is connected to a cluster. Raises AwayError where there is none that takes it."""
    import ray  # noqa: PLC0415 - help and completion must not wait for it

    from serve_app.launch.local import find_address  # noqa: PLC0415 - loads Ray

    target = find_address(address)
    try:
        _reach(target)
        ray.init(address=target, namespace="shadecast", log_to_driver=False, logging_level="ERROR")
    except ValueError as error:
        raise ConfigError(
            f"--address, or RAY_ADDRESS, {target!r}: must be HOST:PORT, ray://HOST:PORT or auto"
        ) from error
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, OSError):  # other versions, a wrong token: the end of a traceback within the text
            reason = " ".join(str(cause).split()).rpartition("ray.exceptions.")[2][:_LONGEST_REASON]
            raise AwayError(f"the Ray cluster at {target!r} cannot be used: {reason}") from error
        start = "start one (`make serve`, or `ray start --head`), or give --address HOST:PORT"
        raise AwayError(f"no Ray cluster at {target!r}: {start}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at `host:port`: Ray itself tries for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
