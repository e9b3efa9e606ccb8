"""The page in a real browser, in front of a gateway whose workers are not: every state that it has, and its keys."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster.gateway_config import GatewayConfig
from cluster.history import MAX_PAIRS, History
from cluster.security.api_keys import new_key
from cluster.security.auth_config import AuthConfig
from cluster.security.clients import Clients
from engine.objectives import Objectives
from engine.request import Receipt
from tests.browser.chromium import PHONE, WIDE, accessible, chromium, narrow_enough, opened, require_chromium, shot
from tests.cluster.ended import ended
from tests.cluster.serving import CONFIG, STATS, report
from tests.http_api.web import WALL_S, Web, eventually, web

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

HOSTILE = "<img src=x onerror=window.hacked=1>\"'&amp;"
WORKERS = ("p0", "p1", "d0", "d1", "d2")
BUSY = GatewayConfig(**{**CONFIG.model_dump(), "max_running": 8, "router": {"policy": "random"}})
RECEIPT = Receipt(
    gateway_queue_s=0.05,
    prefill_queue_s=0.2,
    prefill_s=0.5,
    kv_exposed_s=0.05,
    decode_queue_s=0.1,
    decode_s=1.0,
    ttft_s=0.78,
    tpot_s=0.05,
    kv_bytes=18_000_000,
    kv_bytes_before_first_token=17_000_000,
    retries=1,
    prefill_worker="p0",
    decode_worker="d1",
    predicted_ttft_s=0.7,
    predicted_tpot_s=0.04,
    retry_s=0.1,
)
# Where each phase's bar begins and how long it is, as shares of its track.
BARS = """() => Object.fromEntries([...document.querySelectorAll("#inspector .phases tr:has(.phase)")].map((row) => {
    const [bar, track] = [".phase", ".track"].map((part) => row.querySelector(part).getBoundingClientRect());
    return [row.firstChild.textContent, [(bar.left - track.left) / track.width, bar.width / track.width]];
}))"""
# What Chromium itself says of any answer that is none.
STATUS = "Failed to load resource"
pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    require_chromium()
    async with chromium() as started:
        yield started


@asynccontextmanager
async def load(running: Web) -> AsyncIterator[None]:
    """Clients that never stop asking, workers that say other things all the time, and transfers between all of them."""
    rng = random.Random(1)

    async def client(http: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "prompt": "Count!", "max_tokens": 12}
        while True:
            await http.post(f"{running.url}/completions", json=body)

    async def workers() -> None:
        while True:
            for name in WORKERS:
                blocks = {"blocks_free": rng.randrange(20, 50), "blocks_cached": rng.randrange(20)}
                stats = replace(STATS, running=rng.randrange(9), waiting=rng.randrange(5), **blocks)
                running.gateway.heartbeat(report(name, stats=replace(stats, draining=name == "d2")))
            now, pair = asyncio.get_running_loop().time(), {"prefill_worker": rng.choice(WORKERS[:2])}
            receipt = replace(RECEIPT, **pair, decode_worker=rng.choice(WORKERS[2:]))
            running.recorder.ended(
                ended(f"job-{rng.randrange(10**6)}", now, ttft_s=rng.random() * 1.2, receipt=receipt)
            )
            await asyncio.sleep(0.2)

    async with httpx.AsyncClient(timeout=60) as http:
        tasks = [asyncio.create_task(client(http)) for _ in range(4)] + [asyncio.create_task(workers())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_nothing_has_happened_yet(browser: Browser) -> None:
    async with web(workers=()) as running, opened(browser, running.root + "/") as page:
        await page.get_by_text("▲ no workers").wait_for()
        await page.get_by_text("No worker has reported").wait_for()
        await page.get_by_text("Nothing has ended yet").wait_for()
        await shot(page, "empty")
        await accessible(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
async def test_under_load(browser: Browser, width: int, scheme: str) -> None:
    async with (
        web(config=BUSY, workers=WORKERS) as running,
        load(running),
        opened(browser, running.root + "/", width=width, scheme=scheme) as page,
    ):
        await page.get_by_text("● ready").wait_for()
        tokens = page.locator("#tiles > div", has_text="Tokens out").locator("dd").first
        for _ in range(3):
            before = await tokens.inner_text()
            await page.wait_for_function(
                "([node, before]) => node.innerText !== before", arg=[await tokens.element_handle(), before]
            )
        assert await page.locator("tr.draining").inner_text() != ""
        assert await page.locator("#flows path.flow").count() >= 4
        assert await page.locator("#charts path.series").count() > 0
        rows = page.locator("#recent-rows tr")
        newest = await rows.first.inner_text()
        await page.wait_for_function(
            "(text) => document.querySelector('#recent-rows tr').innerText !== text", arg=newest
        )
        await shot(page, f"load-{width}-{scheme}")
        await page.locator("#recent-rows a", has_text="job-").first.click()
        await page.get_by_text("Where the time went").wait_for()
        await shot(page, f"inspector-{width}-{scheme}", is_whole=False)
        await narrow_enough(page, width)
        await page.get_by_role("button", name="Pause").evaluate("(button) => button.click()")
        await accessible(page)
        await page.get_by_role("button", name="Close").click()
        await accessible(page)


async def test_what_requests_hold_is_shown_as_text(browser: Browser) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        request = ended(
            HOSTILE, reason="failed", tenant=HOSTILE, problem=HOSTILE, receipt=replace(RECEIPT, decode_worker=HOSTILE)
        )
        running.recorder.ended(
            replace(request, outcome=replace(request.outcome, ended_s=asyncio.get_running_loop().time()))
        )
        await page.locator("#recent-rows a").click()
        await page.get_by_text("Where the time went").wait_for()
        assert await page.locator("#inspector-title").inner_text() == HOSTILE
        assert await page.locator("#inspector .problem").inner_text() == HOSTILE
        for part in (".id", ".tenant", ".problem"):
            assert await page.locator(f"#recent-rows {part}").inner_text() == HOSTILE
        # As the end of an arrow too.
        await page.wait_for_function("() => document.querySelector('#flows-rows tr') !== null")
        assert await page.locator("#flows-rows td").nth(1).text_content() == HOSTILE
        assert await page.locator("img").count() == 0
        assert await page.evaluate("window.hacked") is None


async def test_a_receipt_is_drawn_to_scale(browser: Browser) -> None:
    objectives = Objectives(ttft_s=0.5, tpot_s=0.1)
    request = ended("r", ttft_s=0.78, receipt=RECEIPT)
    request = replace(request, outcome=replace(request.outcome, objectives=objectives))
    async with web() as running, opened(browser, running.root + "/#request=r") as page:
        await page.get_by_text("Not among the last 1,000 requests").wait_for()
        # It is still under way, and shown as soon as it has ended.
        running.recorder.ended(request)
        await page.get_by_text("Where the time went").wait_for()
        text = await page.locator("#inspector").inner_text()
        for words in (
            "p0 → d1",
            "18.0 MB, 94.4 % before the first token",
            "objective 500 ms, missed",
            "Failed attempts",
        ):
            assert words in text
        bars = await page.evaluate(BARS)
        # It took two seconds, which are all of the scale.
        expected = {
            "Gateway queue": (0.0, 0.05),
            "Failed attempts": (0.05, 0.1),
            "Prefill queue": (0.15, 0.2),
            "Prefill": (0.35, 0.5),
            "KV exposed": (0.85, 0.05),
            "Decode queue": (0.9, 0.1),
            "Decode": (1.0, 1.0),
        }
        for name, (start_s, time_s) in expected.items():
            assert bars[name] == pytest.approx([start_s / 2, time_s / 2], abs=0.005), name
        lines = await page.evaluate(
            "[...document.querySelectorAll('#inspector tr:first-child .at')].map((line) => line.style.left)"
        )
        assert [float(left.rstrip("%")) for left in lines] == pytest.approx([39, 35, 25])
        await page.keyboard.press("Escape")
        assert await page.evaluate("location.hash") == ""


async def test_by_keyboard_alone(browser: Browser) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        running.recorder.ended(ended("r", asyncio.get_running_loop().time()))
        await page.locator("#recent-rows a").wait_for()
        # Flows are of whole seconds.
        await page.locator("#flows-details summary").wait_for()
        focused = "document.activeElement.id || document.activeElement.textContent || document.activeElement.value"
        # Radio buttons are drawn by what stands beside them.
        outline = """(({activeElement: at}) =>
            getComputedStyle(at.type === "radio" ? at.nextElementSibling : at).outlineStyle)(document)"""
        walk, seen = [], []
        for _ in range(8):
            await page.keyboard.press("Tab")
            walk.append(await page.evaluate(focused))
            seen.append(await page.evaluate(outline))
        assert walk == ["Skip to the requests", "pause", "As a table", "300", "moment", "filter", "verdict", "r"]
        assert "none" not in seen, "whoever walks sees where they are"
        await page.locator("#moment").focus()
        await page.keyboard.press("ArrowLeft")
        assert await page.locator("#moment-text").inner_text() == "1 s ago"
        assert "Queues running" in (await page.locator("#moment").get_attribute("aria-valuetext") or "")
        await page.locator("#recent-rows a").focus()
        await page.keyboard.press("Enter")
        await page.get_by_text("Where the time went").wait_for()
        assert await page.evaluate("document.activeElement.closest('dialog') !== null"), "focus is in what was opened"
        await page.keyboard.press("Escape")
        await page.locator("#inspector").wait_for(state="hidden")
        assert await page.evaluate("document.activeElement.textContent") == "r", "and back where it was"


async def test_a_moment_is_read_by_pointer(browser: Browser) -> None:
    async with web() as running:
        # Five minutes that have been, and no present yet.
        past, now = History(), asyncio.get_running_loop().time()
        for ago_s in range(290, 0, -1):
            past.ended(ended("r", now - ago_s, reason="finished" if ago_s > 150 else "failed"))
        running.recorder.history = past
        async with opened(browser, running.root + "/") as page:
            await read_by_pointer(page)


async def read_by_pointer(page: Page) -> None:
    in_time = page.locator("#charts figure", has_text="Goodput").locator(".legend b").first
    await page.wait_for_function("() => document.querySelector('#charts .series[d^=M]') !== null")
    assert await in_time.inner_text() == "0"
    chart = page.locator("#charts svg[role=img]").first
    box = await chart.bounding_box()
    assert box is not None
    await chart.hover(position={"x": box["width"] / 4, "y": 50})
    await page.get_by_text("min", exact=False).and_(page.locator("#moment-text")).wait_for()
    assert await in_time.inner_text() == "1.00", "all charts are read at the moment under the pointer"
    await page.mouse.move(0, 0)
    assert await page.locator("#moment-text").inner_text() == "now"


async def test_what_is_asked_for_is_shown(browser: Browser) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        for number in range(4):
            running.recorder.ended(ended(f"chat-{number}", reason="failed" if number % 2 else "finished"))
        rows = page.locator("#recent-rows .id")
        await rows.nth(3).wait_for()
        await page.get_by_label("Part of an id").fill("-1")
        await page.wait_for_function("() => document.querySelectorAll('#recent-rows tr').length === 1")
        assert await rows.all_inner_texts() == ["chat-1"]
        await page.get_by_label("Part of an id").fill("")
        await page.get_by_label("Result").select_option("met")
        await page.wait_for_function("() => document.querySelectorAll('#recent-rows tr').length === 2")
        assert await rows.all_inner_texts() == ["chat-2", "chat-0"]
        await page.get_by_label("Result").select_option("expired")
        await page.get_by_text("None of those that are kept is like this").wait_for()


async def test_paused_it_asks_for_nothing(browser: Browser) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        await page.get_by_text("● ready").wait_for()
        await page.get_by_role("button", name="Pause").click()
        await page.get_by_text("paused at").wait_for()
        # What was asked before may still come.
        await page.wait_for_load_state("networkidle")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.wait_for_timeout(2500)
        assert asked == []
        await page.get_by_role("button", name="Go on").click()
        await page.get_by_text("● ready").wait_for()


async def test_a_gateway_that_is_lost_and_comes_back(browser: Browser) -> None:
    gone = ("net::ERR_INTERNET_DISCONNECTED",)
    async with web() as running, opened(browser, running.root + "/", allowed=gone) as page:
        await page.get_by_text("● ready").wait_for()
        await page.context.set_offline(True)
        await page.get_by_text("✕ no connection since").wait_for()
        await page.get_by_text("the gateway cannot be reached").wait_for()
        assert await page.locator("#pools-title").is_visible(), "what was known stays"
        await shot(page, "lost")
        await page.context.set_offline(False)
        await page.get_by_text("● ready").wait_for()
        assert not await page.locator("#notice").is_visible()


async def test_a_gateway_that_starts_again_has_requests_of_its_own(browser: Browser) -> None:
    gone = ("net::ERR_",)
    async with web() as running, AsyncExitStack() as stack:
        for number in range(3):
            running.recorder.ended(ended(f"old-{number}"))
        page = await stack.enter_async_context(opened(browser, running.root + "/", allowed=gone))
        await page.locator("#recent-rows .id").nth(2).wait_for()
        port, kept = running.server.port, stack.pop_all()
    async with kept, web(port=port, wall_s=WALL_S + 60) as running:
        for number in range(3):
            running.recorder.ended(ended(f"new-{number}"))
        await page.get_by_text("new-0").wait_for()
        assert await page.locator("#recent-rows .id").all_inner_texts() == ["new-2", "new-1", "new-0"]


async def test_a_question_for_one_request_that_fails_is_told_where_it_was_asked(browser: Browser) -> None:
    asked = "**/tandem/v1/request?*"
    async with web() as running, opened(browser, running.root + "/", allowed=(STATUS,)) as page:
        await page.route(asked, lambda route: route.fulfill(status=500, json={"error": {"message": "a bug"}}))
        running.recorder.ended(ended("r"))
        await page.locator("#recent-rows a").click()
        await page.locator("#inspector").get_by_text("a bug").wait_for()
        running.recorder.ended(ended("s"))
        await page.locator("#recent-rows .id").nth(1).wait_for()
        assert await page.locator("#state").inner_text() == "● ready"
        await page.unroute(asked)
        await page.get_by_text("Where the time went").wait_for()


@pytest.mark.parametrize("request_id", ["..", ".", "a/../b", "a+b %2F?&#"])
async def test_a_request_with_any_id_is_opened(browser: Browser, request_id: str) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        running.recorder.ended(ended(request_id))
        await page.locator("#recent-rows a").click()
        await page.get_by_text("Where the time went").wait_for()
        assert await page.locator("#inspector-title").inner_text() == request_id


async def test_of_more_pairs_than_are_told_apart_the_others_are_a_sum(browser: Browser) -> None:
    async with web() as running, opened(browser, running.root + "/") as page:
        now = asyncio.get_running_loop().time()
        for number in range(2 * MAX_PAIRS):
            pair = {"prefill_worker": f"p{number}", "decode_worker": "d", "kv_bytes": 30 * (1000 + number)}
            running.recorder.ended(ended(at_s=now, receipt=replace(RECEIPT, **pair)))
        others = sum(range(1000 + MAX_PAIRS, 1000 + 2 * MAX_PAIRS)) / 1e3
        await page.get_by_text("Drawn are the 40 largest").wait_for()
        rows = page.locator("#flows-rows tr")
        await page.wait_for_function(f"document.querySelectorAll('#flows-rows tr').length === {MAX_PAIRS + 1}")
        assert await rows.last.locator("td").all_text_contents() == ["all others", "", f"{others:.0f} kB/s"]


async def test_who_calls(browser: Browser, tmp_path: Path) -> None:
    operator, acme = (new_key(name, tmp_path / "keys") for name in ("ops", "acme"))
    clients = Clients(AuthConfig(keys_file=tmp_path / "keys", operators=("ops",)))
    async with web(clients=clients) as running, opened(browser, running.root + "/", allowed=(STATUS,)) as page:
        running.recorder.ended(ended("a", tenant="acme"))
        running.recorder.ended(ended("b", tenant="umbrella"))
        field, button = page.get_by_label("API key or token"), page.get_by_role("button", name="Show")
        await field.wait_for()
        assert not await page.locator("#recent").is_visible()
        await accessible(page)
        await shot(page, "locked")
        await field.fill("tandem-wrong")
        await button.click()
        await page.get_by_text("the key or token is not valid").wait_for()

        await field.fill(acme)
        await button.click()
        await page.get_by_text("The cluster is shown to operators").wait_for()
        assert await page.locator("#recent-rows .id").all_inner_texts() == ["a"]
        assert not await page.locator("#tiles").is_visible()
        await accessible(page)
        await shot(page, "tenant")

        await page.get_by_role("button", name="Forget the key").click()
        await field.fill(operator)
        await button.click()
        await page.get_by_text("● ready").wait_for()
        assert await page.locator("#recent-rows .id").all_inner_texts() == ["b", "a"]
        await page.reload()
        await page.get_by_text("● ready").wait_for()
        kept = await page.evaluate(
            "[document.cookie, localStorage.length, Object.values(sessionStorage), location.href]"
        )
        assert kept == ["", 0, [operator], running.root + "/"]
        await page.get_by_role("button", name="Forget the key").click()
        await field.wait_for()
        assert await page.evaluate("sessionStorage.length") == 0
        await eventually(lambda: not running.gateway.status(0.0).requests_running)


async def test_a_link_to_a_request_outlasts_the_question_for_a_key(browser: Browser, tmp_path: Path) -> None:
    key = new_key("ops", tmp_path / "keys")
    clients = Clients(AuthConfig(keys_file=tmp_path / "keys", operators=("ops",)))
    async with (
        web(clients=clients) as running,
        opened(browser, running.root + "/#request=r", allowed=(STATUS,)) as page,
    ):
        running.recorder.ended(ended("r", tenant="acme"))
        await page.get_by_label("API key or token").fill(key)
        await page.keyboard.press("Enter")
        await page.get_by_text("Where the time went").wait_for()
        # In it, on its edge, and beside it.
        for x, y, is_open in ((640, 450, True), (None, None, True), (20, 880, False)):
            box = await page.locator("#inspector").bounding_box()
            assert box is not None
            await page.mouse.click(x or box["x"] + 4, y or box["y"] + 4)
            assert await page.locator("#inspector").is_visible() == is_open
        assert await page.evaluate("location.hash") == ""
