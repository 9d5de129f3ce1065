"""The page of a scene, in a Chromium without a window, where one is installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from playwright.async_api import Browser, async_playwright, expect

from serve_app.page.app import make_app
from serve_app.page.rights import Rights, digest
from tests.serve_app.page.page_scene import Scene

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "SHADECAST_CHROMIUM"
NO_CHROMIUM = (
    f"no Chromium on PATH ({', '.join(NAMES)}) and {VARIABLE} does not name one: install it (Debian: package chromium; "
    f"elsewhere `playwright install chromium`)"
)
TOKEN = "correct-horse-battery"
expect.set_options(timeout=30_000)  # others may have the processor first


def find_chromium() -> str | None:
    """The browser to use; None where there is none."""
    given = os.environ.get(VARIABLE)
    if given and not Path(given).is_file():
        raise ValueError(f"{VARIABLE}={given}: there is no such file")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """A browser. It draws in software: whoever has a GPU is faster."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--disable-gpu"])
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def shown(scene: Scene, seconds: int, *, going_on: bool = True) -> AsyncIterator[str]:
    """The address of the page of a scene that has been played, and watched, for so long; it goes on in real time."""

    async def order(wanted: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = await scene.coordinator.order(wanted)
        return found

    app = make_app(
        scene.coordinator.status,
        order,
        Rights(operate=digest(TOKEN)),
        explain=scene.coordinator.explain,
        now_s=scene.clock_s,
    )
    for _ in range(seconds):
        await scene.play()
        await app.state.watch.latest()

    async def play_on() -> None:
        while going_on:
            await asyncio.sleep(1.0)
            await scene.play()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        playing = asyncio.create_task(play_on())
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            playing.cancel()
            server.should_exit = True
            await asyncio.gather(playing, serving, return_exceptions=True)
