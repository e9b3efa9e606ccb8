"""The queries of the dashboard and of the alerts, and a busy gateway to ask them of."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.http_api.web import Web, web

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
PAGE = ROOT / "docs" / "observability.md"
ALERT_TESTS = Path(__file__).with_name("alerts_test.yaml")
VARIABLES = {"$__rate_interval": "1m", "$model": ".*", "$job": ".*"}
# What Prometheus itself adds to every series.
TARGET_LABELS = {"job", "instance"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Count!"}], "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class Query:
    """`name`: the panel's, or the alert's."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def dashboard_queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel.get("targets", ()):
            text = target["expr"]
            for variable, value in VARIABLES.items():
                text = text.replace(variable, value)
            yield Query(panel["title"], text)


def alert_rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def alert_queries() -> Iterator[Query]:
    for rule in alert_rules():
        yield Query(rule["alert"], rule["expr"])


@asynccontextmanager
async def busy_gateway() -> AsyncIterator[Web]:
    """One that has answered, and whose workers have reported."""
    async with web() as running, httpx.AsyncClient(base_url=running.url) as client:
        for _ in range(3):
            answer = await client.post("/chat/completions", json=CHAT)
            assert answer.status_code == 200, answer.text
        yield running
