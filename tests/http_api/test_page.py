"""The page for people who run the service, and the JSON that it reads: who may see what, and what is in it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.gateway_config import GatewayConfig
from cluster.http.overview import MAX_ROWS
from cluster.recent_requests import MAX_RECENT
from cluster.security.api_keys import new_key
from cluster.security.auth_config import AuthConfig
from cluster.security.clients import Clients
from tests.cluster.ended import ended
from tests.cluster.fake_decode import CACHED_TOKENS, WORKER_RECEIPT
from tests.cluster.serving import CONFIG, STATS, report
from tests.http_api.web import TOKENIZER, WALL_S, Web, web

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count!"}]}
OVERVIEW, REQUESTS, REQUEST = "/tandem/v1/overview", "/tandem/v1/requests", "/tandem/v1/request"
HOSTILE = "<img src=x onerror=alert(1)>"


async def ask(client: httpx.AsyncClient, running: Web, request_id: str, **headers: str) -> None:
    answer = await client.post(
        f"{running.url}/chat/completions", json=CHAT, headers={"x-request-id": request_id, **headers}
    )
    assert answer.status_code == 200


# ── the page itself ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_page_allows_its_own_script_and_nothing_else() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        answer = await client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    [style] = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    [script] = re.findall(r'<script type="module">(.*?)</script>', answer.text, re.DOTALL)
    for name, text in (("style-src", style), ("script-src", script)):
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"


async def test_the_page_loads_nothing_from_elsewhere() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        text = (await client.get("/")).text
    named = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert named <= {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert not re.search(r"@import|url\(|<link(?! rel=\"icon\" href=\"data:)|<script src|\son\w+=\"", text)
    # What could read text as HTML or as a program. (Trusted types forbid it too, in browsers that know them.)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|localStorage|cookie", text
    )


async def test_the_page_is_open_and_holds_no_data(tmp_path: Path) -> None:
    clients, _, _ = people(tmp_path)
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        running.recorder.ended(ended("secret-id", tenant="acme"))
        answer = await client.get("/")
        assert (await client.post("/")).status_code == 405
    assert answer.status_code == 200
    assert "secret-id" not in answer.text
    assert "tiny" not in answer.text


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_overview() -> None:
    stats = replace(STATS, running=3, waiting=2, blocks_free=40, blocks_cached=10, draining=True)
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        await ask(client, running, "r")
        running.gateway.heartbeat(report("d", stats=stats))
        running.gateway.heartbeat(report("e", stats=replace(STATS, local_only=True)))
        now = asyncio.get_running_loop().time()
        running.recorder.ended(ended(at_s=now))
        answer = await client.get(OVERVIEW)
        async with asyncio.timeout(20):
            # Whoever looks once a second has seen it, and that second is over.
            while not any(answer.json()["history"]["columns"]["answer_tokens"]):
                await asyncio.sleep(0.1)
                answer = await client.get(OVERVIEW)
        later = (await client.get(OVERVIEW, params={"since": answer.json()["history"]["first_second"]})).json()
    content = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (content["state"], content["router"], content["now_unix_s"]) == ("ready", "goodput", WALL_S)
    assert content["model"] == {"name": "tiny", "architecture": "", "max_context": 2048}
    assert content["requests"] == {"running": 0, "waiting": 0, "finished": 1, "rejected": 0, "over_quota": 0}
    assert content["attainment"] == {"both": 1.0, "ttft": 1.0, "tpot": 1.0, "requests": 1}
    workers = {worker["worker_id"]: worker for worker in content["workers"]}
    assert [(name, worker["role"], worker["state"]) for name, worker in workers.items()] == [
        ("d", "decode", "draining"),
        ("e", "colocated", "live"),
        ("p", "prefill", "live"),
    ]
    numbers = [workers["d"][name] for name in ("running", "waiting", "blocks_total", "blocks_free", "blocks_cached")]
    assert numbers == [3, 2, 64, 40, 10]
    assert content["kv_flows"] == [{"from": "p", "to": "d", "bytes_per_s": (3000 + WORKER_RECEIPT.kv_bytes) / 30}]
    columns = content["history"]["columns"]
    assert (sum(columns["finished"]), sum(columns["met"]), sum(columns["kv_bytes"])) == (2, 2, 3640)
    assert sum(count or 0 for count in columns["prompt_tokens"]) == len(TOKENIZER.encode_chat(CHAT["messages"]))
    assert sum(count or 0 for count in columns["answer_tokens"]) == len(TOKENIZER.encode("One, two, three.")) + 1
    assert later["history"]["first_second"] == content["history"]["first_second"] + 1


async def test_the_overview_says_when_nobody_can_serve() -> None:
    async with web(workers=()) as running, httpx.AsyncClient(base_url=running.root) as client:
        assert (await client.get(OVERVIEW)).json()["state"] == "no workers"
        await running.gateway.drain(0.0)
        assert (await client.get(OVERVIEW)).json()["state"] == "draining"


async def test_a_worker_that_is_not_heard_of_is_stale() -> None:
    config = GatewayConfig(**{**CONFIG.model_dump(), "fresh_s": 0.05, "heartbeat_interval_s": 0.02})
    async with web(config=config) as running, httpx.AsyncClient(base_url=running.root) as client:
        await asyncio.sleep(0.1)
        workers = (await client.get(OVERVIEW)).json()["workers"]
    assert [worker["state"] for worker in workers] == ["stale", "stale"]
    assert all(worker["heartbeat_age_s"] >= 0.1 for worker in workers)


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_with_all_that_is_known_of_it() -> None:
    # What nobody can meet is not refused then.
    config = GatewayConfig(**{**CONFIG.model_dump(), "router": {"policy": "least_loaded"}})
    async with web(config=config) as running, httpx.AsyncClient(base_url=running.root) as client:
        await ask(client, running, "r", **{"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "0.001"})
        answer = (await client.get(REQUESTS)).json()
        [request] = (await client.get(f"{REQUEST}?id=r")).json()["requests"]
    row = answer["requests"][0]
    assert answer["began_unix_s"] == WALL_S
    # The clock on the wall stands still in these tests, the gateway's does not.
    assert WALL_S - 60 < request["ended_unix_s"] < row.pop("ended_unix_s") <= WALL_S
    assert row == {name: request[name] for name in row}
    prompt_tokens = len(TOKENIZER.encode_chat(CHAT["messages"]))
    tokens = (request["prompt_tokens"], request["cached_tokens"])
    assert tokens == (prompt_tokens, CACHED_TOKENS)
    assert (request["number"], request["id"], request["verdict"], request["problem"]) == (1, "r", "missed", "")
    assert (request["met_ttft"], request["met_tpot"]) == (True, False)
    assert (request["ttft_objective_s"], request["tpot_objective_s"]) == (60.0, 1e-6)
    assert request["finish_reasons"] == ["stop"]
    assert 0 < request["ttft_s"] < request["took_s"]
    receipt = request["receipt"]
    assert (receipt["prefill_worker"], receipt["decode_worker"]) == ("p", "d")
    assert receipt["prefill_s"] == WORKER_RECEIPT.prefill_s
    assert receipt["kv_bytes"] == WORKER_RECEIPT.kv_bytes


async def test_a_request_that_no_worker_had() -> None:
    async with web(workers=("p",)) as running, httpx.AsyncClient(base_url=running.root) as client:
        running.recorder.ended(ended("r", reason="rejected", ttft_s=None, tpot_s=None, receipt=None, problem="no room"))
        [request] = (await client.get(f"{REQUEST}?id=r")).json()["requests"]
    assert (request["verdict"], request["problem"]) == ("rejected", "no room")
    assert (request["receipt"], request["ttft_s"]) == (None, None)


async def test_requests_are_asked_for_by_id_and_verdict() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        for number in range(2 * MAX_RECENT):
            reason = "failed" if number % 3 == 0 else "finished"
            running.recorder.ended(ended(f"r{number}", reason=reason))

        async def found(**params: object) -> list[str]:
            answer = await client.get(REQUESTS, params=params)
            assert answer.headers["cache-control"] == "no-store"
            return [request["id"] for request in answer.json()["requests"]]

        assert len(await found()) == 50
        assert len(await found(limit=MAX_ROWS)) == MAX_ROWS
        assert await found(limit=2) == ["r1999", "r1998"]
        assert await found(limit=2, verdict="failed") == ["r1998", "r1995"]
        assert await found(id="155", verdict="met") == [f"r155{digit}" for digit in (9, 8, 6, 5, 3, 2, 0)]
        assert await found(id="r999") == [], "forgotten"
        assert (await client.get(f"{REQUEST}?id=r999")).json() == {"requests": []}


@pytest.mark.parametrize("request_id", [HOSTILE, "a/b", "ä é", "a?b#c%2F", "\"'&;", "../../health", "..", "."])
async def test_ids_of_any_characters(request_id: str) -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        running.recorder.ended(ended(request_id, problem=HOSTILE))
        answer = await client.get(REQUEST, params={"id": request_id})
    assert answer.headers["content-type"] == "application/json"
    assert [request["id"] for request in answer.json()["requests"]] == [request_id]


@pytest.mark.parametrize(
    ("path", "params", "message"),
    [
        (OVERVIEW, {"since": "-1"}, "since: got '-1'"),
        (OVERVIEW, {"since": "1.5"}, "since: got '1.5'"),
        (OVERVIEW, {"since": "9" * 5000}, "since: got"),
        (OVERVIEW, {"since": "²"}, "since: got '²'"),
        (REQUESTS, {"limit": "0"}, "limit: got '0', expected a whole number in [1, 200]"),
        (REQUESTS, {"limit": "201"}, "limit: got '201'"),
        (REQUEST, {}, "id: got '', expected a request's id"),
        (REQUESTS, {"verdict": "good"}, "verdict: got 'good', expected one of met, missed"),
    ],
)
async def test_questions_that_make_no_sense(path: str, params: dict[str, str], message: str) -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        answer = await client.get(path, params=params)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


# ── who may see what ─────────────────────────────────────────────────────────────────────────────────────────────────


def people(folder: Path) -> tuple[Clients, dict[str, str], dict[str, str]]:
    """Of operators, and of acme: the headers of each."""
    operator, acme = (new_key(name, folder / "keys") for name in ("ops", "acme"))
    clients = Clients(AuthConfig(keys_file=folder / "keys", operators=("ops",)))
    return clients, {"authorization": f"Bearer {operator}"}, {"authorization": f"Bearer {acme}"}


@pytest.mark.parametrize("path", [OVERVIEW, REQUESTS, f"{REQUEST}?id=r"])
async def test_nobody_sees_anything_without_a_key(tmp_path: Path, path: str) -> None:
    clients, _, _ = people(tmp_path)
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        running.recorder.ended(ended("r", tenant="acme"))
        for headers in ({}, {"authorization": "Bearer tandem-wrong"}):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json() == {"error": answer.json()["error"]}


async def test_operators_see_all_and_tenants_what_is_their_own(tmp_path: Path) -> None:
    clients, operator, acme = people(tmp_path)
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        for request_id, tenant in (("a", "acme"), ("b", "umbrella"), ("r", "acme"), ("r", "umbrella")):
            running.recorder.ended(ended(request_id, tenant=tenant))

        async def seen(path: str, headers: dict[str, str]) -> list[tuple[str, str]]:
            found = (await client.get(path, headers=headers)).json()["requests"]
            return [(request["id"], request["tenant"]) for request in found]

        assert (await client.get(OVERVIEW, headers=operator)).status_code == 200
        assert await seen(REQUESTS, operator) == [("r", "umbrella"), ("r", "acme"), ("b", "umbrella"), ("a", "acme")]
        assert await seen(f"{REQUEST}?id=r", operator) == [("r", "umbrella"), ("r", "acme")]

        refused = await client.get(OVERVIEW, headers=acme)
        assert refused.status_code == 403
        assert "gateway.auth.operators" in refused.json()["error"]["message"]
        assert await seen(REQUESTS, acme) == [("r", "acme"), ("a", "acme")]
        assert await seen(f"{REQUEST}?id=r", acme) == [("r", "acme")]
        # As if it had never been.
        others, nobodys = [await client.get(f"{REQUEST}?id={name}", headers=acme) for name in ("b", "nobody")]
        assert (
            (others.status_code, others.content) == (nobodys.status_code, nobodys.content) == (200, b'{"requests":[]}')
        )


async def test_the_tenant_is_the_one_whose_key_asked(tmp_path: Path) -> None:
    clients, operator, acme = people(tmp_path)
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        await ask(client, running, "r", **acme)
        [request] = (await client.get(f"{REQUEST}?id=r", headers=operator)).json()["requests"]
    assert request["tenant"] == "acme"
