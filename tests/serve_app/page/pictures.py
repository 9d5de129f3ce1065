"""`make pictures`: what the docs show of the live page, of a real coordinator that is fed with made-up reports."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from playwright.async_api import expect

from tests.serve_app.page.browser import NO_CHROMIUM, browsing, find_chromium, shown
from tests.serve_app.page.page_scene import DIGITS, make_scene

PICTURES = Path(__file__).resolve().parents[3] / "docs/pictures"
PLAYED_S = 232
"""A hog is on the second node, one newcomer has been let in, another one fails half of its requests."""


async def take() -> dict[str, bytes]:
    """All pictures, as PNG, by the name of the file."""
    scene = make_scene(chat="chat/assistant")
    taken = {}
    async with shown(scene, PLAYED_S, going_on=False) as address, browsing() as browser:
        page = await browser.new_page(viewport={"width": 1440, "height": 736}, color_scheme="light")
        await page.goto(address)
        await expect(page.locator("#nodes .card")).to_have_count(len(scene.nodes))
        taken["nodes.png"] = await page.locator("section", has=page.locator("#nodes")).screenshot()
        await page.evaluate("scrollTo(0, 0)")
        await expect(page.locator(".chart path").first).to_be_visible()
        taken["page.png"] = await page.screenshot()
        rows = page.get_by_role("region", name=f"Deployment {DIGITS}").locator("tbody tr")
        await rows.filter(has_text="x9failing").get_by_role("button", name="Why does").click()
        await expect(page.locator("#why-sentences li").nth(1)).to_be_visible()
        taken["why.png"] = await page.locator("#why").screenshot()
    return taken


if __name__ == "__main__":
    if find_chromium() is None:
        sys.exit(f"make pictures: {NO_CHROMIUM}")
    PICTURES.mkdir(exist_ok=True)
    for file, content in asyncio.run(take()).items():
        (PICTURES / file).write_bytes(content)
        print(f"{PICTURES / file}: {len(content) / 1024:.0f} KiB")
