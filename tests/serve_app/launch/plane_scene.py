"""A control plane without Ray for tests of the command line: a real coordinator, which commands ask as they would."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.launch import (
    commands,
    connection,
    control_plane,
    look_commands,
    order_commands,
    registry_commands,
    report_command,
)
from shadecast.errors import AwayError
from tests.serve_app.page.page_scene import Scene, make_scene


class PlaneScene:
    """`away`: the control plane does not answer; `no_cluster`: there is no cluster."""

    def __init__(self, seconds: int) -> None:
        self.scene: Scene = make_scene()
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.away = self.no_cluster = ""

        async def play() -> None:
            for _ in range(seconds):
                await self.scene.play()

        asyncio.run(play())

    def ask(self, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
        self.asked.append((method, arguments))
        if self.away:
            raise control_plane.ControlPlaneError(self.away)
        return asyncio.run(getattr(self.scene.coordinator, method)(*arguments))

    @contextlib.contextmanager
    def connected(self, address: str) -> Iterator[None]:
        if self.no_cluster:
            raise AwayError(self.no_cluster)
        yield

    def status(self) -> dict[str, Any]:
        return asyncio.run(self.scene.coordinator.status())

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control_plane, "ask_coordinator", self.ask)
        for module in (commands, connection, look_commands, order_commands, registry_commands, report_command):
            monkeypatch.setattr(module, "connected", self.connected)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `shadecast ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["shadecast", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.run()
    return int(ended.value.code or 0)
