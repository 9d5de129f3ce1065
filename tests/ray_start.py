"""Starting Ray from the test process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil

from serve_app.launch.local import LocalCluster

T = TypeVar("T")
_NOT_UP = ("Timed out waiting for file", "The current node timed out during startup")


def start(how: Callable[[], T]) -> T:
    """`how()`, once more if a server of it did not come up.

    Ray forks to start its servers. If a thread that an earlier module's handles left is inside gRPC at that instant
    ("skipping fork() handlers"), the child may hang before it becomes the server; Ray then waits in vain for its port,
    or for the node to register.
    """
    before = {child.pid for child in psutil.Process().children()}
    try:
        return how()
    except Exception as error:
        if not any(text in str(error) for text in _NOT_UP):
            raise
        for child in psutil.Process().children():
            if child.pid not in before:
                child.kill()
                child.wait(10)
        return how()


@contextlib.contextmanager
def started(local: LocalCluster) -> Iterator[LocalCluster]:
    """A local cluster that is up, shut down at the end."""
    start(local.__enter__)
    try:
        yield local
    finally:
        local.__exit__(None, None, None)
