"""Every query of the dashboard and of the alerts asks for what a gateway really exposes."""

from __future__ import annotations

import re
from typing import TypeVar

import httpx
import promql_parser
import pytest
import yaml

from tests.metrics.queries import (
    ALERT_TESTS,
    DASHBOARD,
    PAGE,
    TARGET_LABELS,
    VARIABLES,
    Query,
    alert_queries,
    alert_rules,
    busy_gateway,
    dashboard_queries,
    panels,
)
from tests.metrics.scrape import Scrape, scrape

Labels = dict[str, str]
Part = TypeVar("Part", bound=promql_parser.Expr)


def series_of(page: Scrape) -> dict[str, list[Labels]]:
    found: dict[str, list[Labels]] = {}
    for family in page.families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def holds(matcher: promql_parser.Matcher, value: str) -> bool:
    match str(matcher.op):
        case "MatchOp.Equal":
            return value == matcher.value
        case "MatchOp.NotEqual":
            return value != matcher.value
        case "MatchOp.Re":
            return re.fullmatch(matcher.value, value) is not None
        case "MatchOp.NotRe":
            return re.fullmatch(matcher.value, value) is None
    raise AssertionError(f"{matcher.op} is no way to match")


def selected(selector: promql_parser.VectorSelector, exposed: dict[str, list[Labels]]) -> list[Labels]:
    """The series that it asks for. What Prometheus adds to each is not there yet."""
    matchers = [matcher for matcher in selector.matchers.matchers if matcher.name not in TARGET_LABELS]
    return [
        labels
        for labels in exposed.get(selector.name or "", ())
        if all(matcher.name in labels and holds(matcher, labels[matcher.name]) for matcher in matchers)
    ]


def parts(expr: promql_parser.Expr, kind: type[Part]) -> list[Part]:
    found: list[Part] = []
    promql_parser.walk(expr, lambda node: found.append(node) if isinstance(node, kind) else None)
    return found


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    return [*dashboard_queries(), *alert_queries()]


async def test_every_query_asks_for_series_that_are_there(queries: list[Query]) -> None:
    async with busy_gateway() as running, httpx.AsyncClient() as client:
        exposed = series_of(await scrape(client, running.root))
    assert len(queries) > 80
    for query in queries:
        expr = promql_parser.parse(query.text)
        selectors = parts(expr, promql_parser.VectorSelector)
        assert selectors, query
        for selector in selectors:
            assert selected(selector, exposed), f"{query}: nothing is {selector}"
        for aggregate in parts(expr, promql_parser.AggregateExpr):
            by = set(aggregate.modifier.labels) if aggregate.modifier is not None else set()
            for selector in parts(aggregate.expr, promql_parser.VectorSelector):
                [labels, *_] = selected(selector, exposed)
                assert by <= labels.keys() | TARGET_LABELS, f"{query}: {selector} has no {by - labels.keys()}"


def test_a_query_for_what_is_not_there_would_be_found_out() -> None:
    exposed = {"tandem:requests_total": [{"model_name": "m", "outcome": "finished"}]}

    def asks_for(text: str) -> bool:
        [selector] = parts(promql_parser.parse(text), promql_parser.VectorSelector)
        return bool(selected(selector, exposed))

    assert asks_for('sum(rate(tandem:requests_total{outcome="finished"}[5m]))')
    assert asks_for('tandem:requests_total{outcome=~"fin.*", job="x"}')
    for text in (
        "tandem:request_total",
        'tandem:requests_total{outcome="finish"}',
        'tandem:requests_total{outcome!="finished"}',
        'tandem:requests_total{reason="finished"}',
    ):
        assert not asks_for(text), text


def test_the_dashboard_can_be_imported_anywhere() -> None:
    text = DASHBOARD.read_text()
    queries = " ".join(re.findall(r'"expr": "(.*)"', text))
    assert set(re.findall(r"\$\w+", queries)) == VARIABLES.keys()
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in own) < 24
        cells |= own


def test_every_alert_has_a_runbook_and_is_tested() -> None:
    tested = {
        each["alertname"]
        for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"]
        for each in test["alert_rule_test"]
        if each.get("exp_alerts")
    }
    headings = {line.removeprefix("### ") for line in PAGE.read_text().splitlines() if line.startswith("### ")}
    names = {rule["alert"] for rule in alert_rules()}
    assert tested == names
    assert names <= headings, "what to do about it stands in the page"
    assert {name for name in headings if name.startswith("Tandem")} == names
    for rule in alert_rules():
        assert rule["annotations"]["runbook_url"] == f"docs/observability.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
