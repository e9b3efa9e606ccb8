"""Who may call, what is answered on other paths, and what becomes of a bug."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
from pathlib import Path

import httpx
import pytest

from cluster.gateway_config import GatewayConfig
from cluster.http.server import start_http
from cluster.openai.errors import error_answer
from cluster.security.api_keys import new_key
from cluster.security.auth_config import AuthConfig, QuotaConfig
from cluster.security.certs import make_certs
from cluster.security.clients import Clients
from engine.errors import ConfigError, ModelFileError, TandemError, TransferFailed
from kvtransfer.rpc_tls import Tls
from tests.cluster.serving import CONFIG
from tests.http_api.web import TOKENIZER, eventually, web

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count!"}]}


def keys(folder: Path) -> tuple[Clients, str]:
    key = new_key("acme", folder / "keys")
    return Clients(AuthConfig(keys_file=folder / "keys")), key


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"])
async def test_only_who_has_a_key(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    clients, key = keys(tmp_path)
    method = "GET" if path == "/v1/models" else "POST"
    async with web(clients=clients) as running, httpx.AsyncClient() as client:
        for headers in ({}, {"authorization": "Bearer tandem-wrong"}, {"authorization": f"Basic {key}"}):
            answer = await client.request(method, running.root + path, headers=headers, content=b"no JSON")
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = await client.request(method, running.root + path, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code in (200, 400)
    assert "refused a call" in caplog.text
    assert key not in caplog.text


async def test_the_tenant_of_a_key_is_its_requests(tmp_path: Path) -> None:
    clients, key = keys(tmp_path)
    config = GatewayConfig(
        **{
            **CONFIG.model_dump(),
            "auth": {"keys_file": tmp_path / "keys"},
            "tenants": {"acme": QuotaConfig(max_concurrent=1)},
        }
    )
    headers = {"authorization": f"Bearer {key}"}
    async with web(config=config, clients=clients) as running, httpx.AsyncClient(headers=headers) as client:
        asked = [client.post(f"{running.url}/chat/completions", json=CHAT) for _ in range(2)]
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200, 429]


async def test_health_needs_no_key(tmp_path: Path) -> None:
    clients, _ = keys(tmp_path)
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).status_code == 200
    async with web(workers=()) as running, httpx.AsyncClient(base_url=running.root) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503


async def test_what_asks_nobody_is_what_security_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^\| HTTP \(`http_port`\).*", text, re.MULTILINE)
    told = set(re.findall(r"`(/[^`]*)`", row.partition("ask nobody")[0])) | {"/"}
    clients, _ = keys(tmp_path)
    open_to_all = set()
    async with web(clients=clients) as running, httpx.AsyncClient(base_url=running.root) as client:
        described = (await client.get("/openapi.json")).json()["paths"]
        for path in {*described, "/", "/openapi.json"}:
            if (await client.get(path)).status_code == 200:
                open_to_all.add(path)
    assert told == open_to_all


async def test_a_gateway_that_is_about_to_end_is_not_ready() -> None:
    async with web("a" * 300) as running, httpx.AsyncClient(base_url=running.root, timeout=20) as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 60}))
        await eventually(lambda: running.fake.running)
        drain = asyncio.create_task(running.gateway.drain(10.0))
        await asyncio.sleep(0)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        assert (await asked).status_code == 200, "what runs may end"
        await drain


async def test_paths_and_methods_that_are_not_served() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        missing, wrong = await client.get("/v1/images"), await client.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["message"] == "GET /v1/images: Not Found"
    assert "POST" in wrong.headers["allow"]


async def test_tokens_and_back() -> None:
    async with web() as running, httpx.AsyncClient(base_url=running.root) as client:
        text = (await client.post("/tokenize", json={"model": "tiny", "prompt": "Ab"})).json()
        chat = (await client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        back = (await client.post("/detokenize", json={"tokens": text["tokens"]})).json()
        both = await client.post("/tokenize", json={"prompt": "a", "messages": CHAT["messages"]})
        unknown = await client.post("/detokenize", json={"tokens": [999_999]})
        another = await client.post("/tokenize", json={"model": "huge", "prompt": "a"})
    assert text == {"count": 2, "max_model_len": 2048, "tokens": TOKENIZER.encode("Ab")}
    assert chat["tokens"] == TOKENIZER.encode_chat([{"role": "user", "content": "Count!"}])
    assert back == {"prompt": "Ab"}
    assert [answer.status_code for answer in (both, unknown, another)] == [400, 400, 404]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[]", "body: got []"),
        (b'{"model": "tiny"}', "messages: got None, expected a value"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "expected JSON"),
        (b'{"messages": 5}', "messages: got 5"),
        (b'{"messages": [' + b"[" * 5000, "expected JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": 1e400}', "seed"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature"),
    ],
)
async def test_bodies_that_are_no_requests(body: bytes, message: str) -> None:
    async with web() as running, httpx.AsyncClient() as client:
        answer = await client.post(f"{running.url}/chat/completions", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


async def test_a_bug_is_logged_and_told_as_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with web() as running, httpx.AsyncClient() as client:
        monkeypatch.setattr(running.gateway, "new_request_id", lambda tenant: 1 // 0)
        with caplog.at_level(logging.ERROR):
            answer = await client.post(f"{running.url}/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error"
    assert "ZeroDivisionError" in caplog.text


async def test_each_prompt_of_a_completion_counts_as_a_call() -> None:
    config = CONFIG.model_copy(update={"quota": QuotaConfig(requests_per_s=0.01, burst=4)})
    async with web(config=config) as running, httpx.AsyncClient(base_url=running.url) as client:
        counts = (3, 2, 1, 1)
        answers = [await client.post("completions", json={"prompt": ["a"] * count}) for count in counts]
        answers.append(await client.post("completions", json={"prompt": ["a"] * 5}))
    assert [answer.status_code for answer in answers] == [200, 429, 429, 429, 429]
    assert len(running.fake.submits) == 3


@pytest.mark.parametrize(
    "error", [TransferFailed("10.0.0.3:50061 sent half of it"), ModelFileError("/models/x.gguf", "truncated")]
)
def test_what_goes_wrong_inside_is_not_told(error: TandemError) -> None:
    answer = error_answer(error)
    assert (answer.status, answer.body["error"]["message"], answer.body["error"]["code"]) == (
        500,
        "internal error",
        None,
    )


async def test_certificates_and_new_ones(tmp_path: Path) -> None:
    make_certs(tmp_path / "certs", ["localhost", "127.0.0.1"], days=1)
    folder = tmp_path / "certs" / "clients"
    tls = Tls(folder)
    async with web(tls=tls) as running:
        url = f"https://{running.server.address}"
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"{url}/health")).status_code == 200
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError):
                await stranger.get(f"{url}/health")
        # Of another CA, which only who has it trusts: in force without a restart.
        make_certs(tmp_path / "new", ["localhost", "127.0.0.1"], days=1)
        for file in (tmp_path / "new" / "clients").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        renewed = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        for _ in range(50):
            await asyncio.sleep(0.1)
            async with httpx.AsyncClient(verify=renewed) as client:
                with contextlib.suppress(httpx.ConnectError):
                    assert (await client.get(f"{url}/health")).status_code == 200
                    break
        else:
            raise AssertionError("the new certificate is never shown")


async def test_a_port_that_is_taken_or_wrong() -> None:
    async with web() as running:
        with pytest.raises(
            ConfigError, match=rf"^cannot listen on {running.server.address}: port \d+: Address already"
        ):
            await start_http(running.server.address, lambda scope, receive, send: None)


async def test_json_is_utf_8() -> None:
    async with web("é€") as running, httpx.AsyncClient() as client:
        answer = await client.post(f"{running.url}/chat/completions", json=CHAT)
    assert "é€".encode() in answer.content
    assert json.loads(answer.content)["choices"][0]["message"]["content"] == "é€"
