"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A loopback port that nothing listens on, of a range from which neither the system nor Ray gives any.

    One that the system gives, by binding port 0, it may give once more, to a socket of Ray's, before the server that
    the port is meant for gets to listen there.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of 100 ports between 20000 and 30000 is free")
