"""The page of a real service with real workers and a real model, while clients ask: what an operator sees."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.browser.chromium import SHOTS, chromium, opened, require_chromium, shot
from tests.e2e.service import serving
from tests.golden.default_model import require_default_model

CONFIG = """
engine: {threads: 1, kv_cache_bytes: 67108864}
gateway: {heartbeat_interval_s: 0.3, router: {policy: least_loaded}, objectives: {ttft_ms: 4000, tpot_ms: 400}}
cluster: {grpc_port: 0, drain_s: 2, prefill: 2, decode: 2}
"""
WORDS = ("alpha", "river", "stone", "cloud", "green", "seven")

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]


@asynccontextmanager
async def load(url: str, clients: int = 4) -> AsyncIterator[None]:
    async def client(number: int, http: httpx.AsyncClient) -> None:
        rng = random.Random(number)
        for count in range(10**9):
            body = {
                "model": "smollm2-135m-instruct",
                "prompt": " ".join(rng.choices(WORDS, k=rng.choice((10, 40, 120)))),
                "max_tokens": rng.choice((4, 16, 32)),
            }
            await http.post(f"{url}/completions", json=body, headers={"x-request-id": f"load-{number}-{count}"})

    async with httpx.AsyncClient(timeout=300) as http:
        tasks = [asyncio.create_task(client(number, http)) for number in range(clients)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_live_values_and_a_receipt(tmp_path: Path) -> None:
    require_chromium()
    require_default_model()
    with serving(tmp_path, "--address", "none", config=CONFIG) as served:
        root = served.openai_url.removesuffix("/v1") + "/"
        async with chromium() as browser, load(served.openai_url), opened(browser, root) as page:
            await page.get_by_text("● ready").wait_for()
            timing = await page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
            shown_ms = await page.evaluate("performance.now()")
            measured = (
                f"the page: {timing['transferSize'] / 1e3:.0f} kB, loaded in {timing['loadEventEnd']:.0f} ms, "
                f"first values after {shown_ms:.0f} ms at most\n"
            )
            SHOTS.mkdir(parents=True, exist_ok=True)
            (SHOTS / "measured.txt").write_text(measured)

            await page.locator("#recent-rows a").nth(3).wait_for(timeout=120_000)
            await page.wait_for_function("document.querySelectorAll('#flows path.flow').length > 0", timeout=60_000)
            for tile in ("Tokens out", "KV moved", "In time"):
                value = page.locator("#tiles > div", has_text=tile).locator("dd").first
                before = await value.inner_text()
                # Their means change with every request that ends.
                await page.wait_for_function(
                    "([name, before]) => [...document.querySelectorAll('#tiles > div')].some((tile) => "
                    "tile.firstChild.textContent === name && tile.children[1].textContent !== before)",
                    arg=[tile, before],
                    timeout=120_000,
                )
            workers = await page.locator("#workers tbody th.name").all_inner_texts()
            assert workers == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
            await shot(page, "service")
            await page.locator("#recent-rows a").first.click()
            await page.get_by_text("Where the time went").wait_for()
            text = await page.locator("#inspector").inner_text()
            for words in ("Gateway queue", "Prefill", "Decode", "first token", "objective 4.00 s", "400 ms, "):
                assert words in text
            await shot(page, "service-inspector", is_whole=False)
        assert served.stop() == 0
