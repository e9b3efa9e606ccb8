"""A headless Chromium whose pages must not complain: of an error, of what their policy forbids, of what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

ROOT = Path(__file__).parents[2]
# Both are git's to ignore, and `make test-web`'s to fill.
SHOTS = ROOT / "build" / "page"
AXE = ROOT / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
WIDE, PHONE = 1280, 360


def require_chromium() -> str:
    """Its path. Skips the test where it, or what drives it, is not there."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium here; on Debian: sudo apt install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed; make test-web installs it")
    return path


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    path = require_chromium()
    # Here, for the tests that are skipped do without it.
    from playwright.async_api import async_playwright

    # Its sandbox is not for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(
    browser: Browser, url: str, *, width: int = WIDE, scheme: str = "light", allowed: tuple[str, ...] = ()
) -> AsyncIterator[Page]:
    """The page at `url`. On leaving, nothing may have been complained of but what holds one of `allowed`, and nothing
    asked for elsewhere."""
    options: dict[str, Any] = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    context = await browser.new_context(**options, reduced_motion="reduce")
    page = await context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    try:
        await page.goto(url)
        yield page
        await narrow_enough(page, width)
    finally:
        await context.close()
    complaints = [text for text in complaints if not any(words in text for words in allowed)]
    assert not complaints, complaints
    root = url.partition("#")[0]
    elsewhere = [each for each in asked if not each.startswith((root, "data:"))]
    assert not elsewhere, elsewhere


async def narrow_enough(page: Page, width: int) -> None:
    """Nobody has to scroll sideways."""
    assert await page.evaluate("document.documentElement.scrollWidth") <= width


async def shot(page: Page, name: str, *, is_whole: bool = True) -> None:
    """For people to look at: the whole page, or what of it is in the window."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=SHOTS / f"{name}.png", full_page=is_whole)


async def accessible(page: Page) -> None:
    """What axe finds, by the rules of WCAG 2.2 AA and its own good practices, must be nothing."""
    if not AXE.exists():
        pytest.skip(f"{AXE.relative_to(ROOT)} is not there; make test-web fetches it where there is npm")
    # Not as a script of the page, whose policy would have none of it.
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    told = [
        f"{each['id']}: {each['help']}: {[node['target'] for node in each['nodes']][:5]}"
        for each in found["violations"]
    ]
    assert not told, told
