"""The real Prometheus: it scrapes a gateway, evaluates every query of dashboard and alerts, and tests the alerts.

Both programs are in Debian's package `prometheus`; without them these tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest

from cluster.security.api_keys import new_key
from cluster.security.auth_config import AuthConfig
from cluster.security.clients import Clients
from tests.http_api.web import web
from tests.metrics.queries import ALERT_TESTS, ALERTS, CHAT, PAGE, alert_queries, busy_gateway, dashboard_queries

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus to run")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool to run")


@needs_promtool
@pytest.mark.parametrize("words", [("check", "rules", str(ALERTS)), ("test", "rules", str(ALERT_TESTS))])
def test_alerts_are_as_promtool_wants_them(words: tuple[str, ...]) -> None:
    result = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
async def test_the_exposition_is_as_promtool_wants_it() -> None:
    async with busy_gateway() as running, httpx.AsyncClient() as client:
        text = (await client.get(f"{running.root}/metrics")).text
    # Whoever starts promtool waits for it: elsewhere, as this loop has connections to close.
    words = ["promtool", "check", "metrics"]
    result = await asyncio.to_thread(
        subprocess.run, words, input=text, capture_output=True, text=True, timeout=60, check=False
    )
    # The colon is vLLM's way to name what is a program's own. Of everything else it has nothing to say.
    complaints = [line for line in result.stderr.splitlines() if "should not contain ':'" not in line]
    assert complaints == []


@needs_prometheus
async def test_prometheus_answers_every_query(tmp_path: Path) -> None:
    async with busy_gateway() as running, prometheus(running.server.address, tmp_path) as asks:
        async with httpx.AsyncClient(base_url=running.url) as client:
            await client.post("/chat/completions", json=CHAT)
        # A rate needs a sample from before that, and one from after it.
        await until(asks, 'increase(tandem:requests_total{outcome="finished"}[1m]) > 0')
        for query in dashboard_queries():
            assert await asks(query.text), f"{query} has no answer"
        for query in alert_queries():
            # At rest an alert is an empty answer: what it compares is to be there.
            await asks(query.text)
            for selector in selectors(query.text):
                assert await asks(selector), f"{query.name}: {selector} has no answer"


@needs_prometheus
async def test_prometheus_can_send_an_operators_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key("ops", file)
    clients = Clients(AuthConfig(keys_file=file, operators=("ops",)))
    async with web(clients=clients) as running, prometheus(running.server.address, tmp_path, key) as asks:
        assert await asks('tandem:workers{role="decode"} == 1')


@needs_promtool
def test_the_pages_own_configuration_is_one(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(scrape_configs.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path / "prometheus.yml"
    # As it is, and with what it leaves out for those without certificates.
    for content in (text, text.replace("    # scheme", "    scheme").replace("    # tls_config", "    tls_config")):
        file.write_text(content)
        words = ["promtool", "check", "config", "--syntax-only", str(file)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "tls_config" in content


def selectors(text: str) -> list[str]:
    found: list[str] = []

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            # Of what was before this Prometheus there is nothing.
            found.append(str(node).partition(" offset ")[0])

    promql_parser.walk(promql_parser.parse(text), note)
    return found


class Asks:
    """Evaluates a query now."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(self, query: str) -> list[dict[str, Any]]:
        answer = await self._client.get("/api/v1/query", params={"query": query})
        assert answer.status_code == 200, f"{query}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result


async def until(asks: Asks, query: str) -> None:
    async with asyncio.timeout(60):
        while not await asks(query):  # noqa: ASYNC110 - a server elsewhere has no event
            await asyncio.sleep(0.1)


@asynccontextmanager
async def prometheus(target: str, folder: Path, key: str = "") -> AsyncIterator[Asks]:
    """One that scrapes `target` five times a second, with `key` if there is one, and has the alerts loaded."""
    job: dict[str, object] = {"job_name": "tandem", "static_configs": [{"targets": [target]}]}
    if key:
        job["authorization"] = {"credentials": key}
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [job],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            async with asyncio.timeout(60):
                while not await is_up(client):
                    assert process.returncode is None, "prometheus has ended"
                    await asyncio.sleep(0.1)
            asks = Asks(client)
            await until(asks, "tandem:num_requests_running")
            yield asks
    finally:
        process.kill()
        await process.wait()


async def is_up(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
