"""`/metrics`: who may read it, in which formats, and that it counts what was asked."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from cluster.gateway_config import GatewayConfig
from cluster.security.api_keys import new_key
from cluster.security.auth_config import AuthConfig
from cluster.security.clients import Clients
from cluster.text_queue import SHORT_CHARS, WAITING_MAX
from tests.cluster.serving import CONFIG, STATS, report
from tests.http_api.web import web
from tests.metrics.scrape import scrape

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count!"}], "max_tokens": 8}
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8"


async def test_what_is_asked_is_counted() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.url) as client:
        before = await scrape(client, running.root)
        assert before.value("requests_total", outcome="finished") == 0
        assert before.maybe("attainment_ratio", objective="both") is None, "0 of 0 is no share"
        answer = await client.post("/chat/completions", json=CHAT)
        usage = answer.json()["usage"]
        after = await scrape(client, running.root)
    assert after.value("requests_total", outcome="finished") == 1
    assert after.value("request_success_total", finished_reason="length") == 1
    assert after.value("prompt_tokens_total") == usage["prompt_tokens"]
    assert after.value("generation_tokens_total") == usage["completion_tokens"] == 8
    assert after.value("time_to_first_token_seconds_count") == 1
    assert after.value("inter_token_latency_seconds_count") == 7
    assert after.value("attainment_ratio", objective="both") == 1.0
    assert after.value("workers", role="decode") == 1
    assert after.value("worker_kv_blocks", worker="d", state="free") == 64


async def test_objectives_that_are_missed_are_no_goodput() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.url) as client:
        await client.post("/chat/completions", json=CHAT, headers={"x-slo-ttft-ms": "0.001"})
        page = await scrape(client, running.root)
    outcomes = {outcome: page.value("requests_total", outcome=outcome) for outcome in ("finished", "rejected")}
    assert sum(outcomes.values()) == 1
    assert page.value("requests_attained_total", objective="both") == 0
    assert page.value("attainment_ratio", objective="both") == 0


async def test_who_is_turned_away_as_too_many_long_texts_wait_is_rejected() -> None:
    config = GatewayConfig(**{**CONFIG.model_dump(), "max_prompt_chars": SHORT_CHARS + 100})
    go_on = threading.Event()
    async with web(config=config) as running, httpx.AsyncClient(base_url=running.url) as client:
        texts = [
            asyncio.create_task(running.gateway.texts.run(config.max_prompt_chars, go_on.wait))
            for _ in range(WAITING_MAX)
        ]
        try:
            body = {"model": "tiny", "prompt": "a" * config.max_prompt_chars}
            refused = await client.post("/completions", json=body, headers={"x-request-id": "r"})
        finally:
            go_on.set()
            await asyncio.gather(*texts)
        page = await scrape(client, running.root)
        overview = (await client.get(f"{running.root}/tandem/v1/overview")).json()
        [row] = (await client.get(f"{running.root}/tandem/v1/requests")).json()["requests"]
    assert refused.status_code == 429
    assert page.value("requests_total", outcome="rejected") == 1
    assert page.value("attainment_ratio", objective="both") == 0
    assert page.value("requests_over_quota_total") == 0
    assert overview["requests"]["rejected"] == 1
    assert (row["id"], row["verdict"]) == ("r", "rejected")


async def test_a_workers_counts_are_the_same_whichever_gateway_is_asked() -> None:
    """One that has seen the worker's predecessor too, and one that has started since."""
    again = report("d", incarnation=2, stats=replace(STATS, steps=5))
    async with web(workers=()) as running, httpx.AsyncClient() as client:
        running.gateway.heartbeat(report("d", stats=replace(STATS, steps=100, draining=True)))
        assert (await scrape(client, running.root)).value("worker_steps_total", worker="d") == 100
        running.gateway.heartbeat(again)
        seen = [(await scrape(client, running.root)).value("worker_steps_total", worker="d")]
    async with web(workers=()) as running, httpx.AsyncClient() as client:
        running.gateway.heartbeat(again)
        seen.append((await scrape(client, running.root)).value("worker_steps_total", worker="d"))
    assert seen == [5, 5]


async def test_a_client_that_wants_openmetrics_gets_it() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        for accept in ("", "text/plain;version=0.0.4", "*/*", "application/json", "application/openmetrics-textual"):
            plain = await client.get("/metrics", headers={"accept": accept})
            assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        for accept in (
            "application/openmetrics-text",
            f"text/plain;q=0.1,{OPEN};q=0.9",
            "application/openmetrics-text; version=x",
        ):
            answer = await client.get("/metrics", headers={"accept": accept})
            assert answer.headers["content-type"] == OPEN
        assert answer.text.endswith("# EOF\n")
    in_both = [
        {sample.name for family in parse(text) for sample in family.samples}
        for parse, text in ((parse_open, answer.text), (parse_plain, plain.text))
    ]
    assert in_both[0] == in_both[1]
    assert "tandem:prompt_tokens_total" in in_both[0]


async def test_only_operators_may_read_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    acme, ops = new_key("acme", file), new_key("ops", file)
    clients = Clients(AuthConfig(keys_file=file, operators=("ops",)))
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        assert (await client.get("/metrics")).status_code == 401
        refused = await client.get("/metrics", headers={"authorization": f"Bearer {acme}"})
        assert refused.status_code == 403
        assert "gateway.auth.operators" in refused.json()["error"]["message"]
        asked = await client.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {acme}"})
        assert asked.status_code == 200
        page = await client.get("/metrics", headers={"authorization": f"Bearer {ops}"})
    assert page.status_code == 200
    assert "acme" not in page.text, "tenants are told apart nowhere"
