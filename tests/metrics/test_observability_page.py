"""docs/observability.md says of every metric what the exposition says, and of none that is not there."""

from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client.metrics_core import Metric

from tests.metrics.queries import PAGE, busy_gateway
from tests.metrics.scrape import scrape

TEXT = PAGE.read_text()
ROW = re.compile(r"^\| `(tandem:\w+)` \| (\w+) \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)
# By how a name ends, its `_total` aside.
UNITS = {
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_ratio": "ratio",
    "_perc": "ratio",
    "_tokens": "tokens",
    "_per_second": "tokens/s",
}


@pytest.fixture
async def families() -> dict[str, Metric]:
    """By name, as the table has it."""
    async with busy_gateway() as running, httpx.AsyncClient() as client:
        page = await scrape(client, running.root)
    return {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in page.families
        if family.name.startswith("tandem:")
    }


async def test_the_tables_are_what_is_exposed(families: dict[str, Metric]) -> None:
    rows = {name: rest for name, *rest in ROW.findall(TEXT)}
    assert rows.keys() == families.keys()
    for name, (kind, _, labels, meaning) in rows.items():
        family = families[name]
        assert (kind, meaning) == (family.type, family.documentation), name
        exposed = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
        assert set(re.findall(r"`(\w+)`", labels)) == exposed, name


def test_units_are_those_that_the_names_end_with() -> None:
    for name, _, unit, _, _ in ROW.findall(TEXT):
        told = [right for ending, right in UNITS.items() if name.removesuffix("_total").endswith(ending)]
        # tokens/s ends with seconds' own ending as well as with that of a rate.
        assert unit == told[-1] if told else unit, name


async def test_every_label_and_its_values_are_named(families: dict[str, Metric]) -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE))
    values: dict[str, set[str]] = {}
    for family in families.values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    assert values.keys() - {"model_name", "le"} == told.keys()
    for label, seen in values.items():
        if label not in ("model_name", "le", "worker"):
            assert seen <= set(re.findall(r"`(\w+)`", told[label])), label


async def test_how_many_series_there_are(families: dict[str, Metric]) -> None:
    samples = [sample for family in families.values() for sample in family.samples]
    of_a_worker = [sample for sample in samples if sample.labels.get("worker") == "d"]
    assert f"{len(of_a_worker)} of each worker" in TEXT
    others = [sample for sample in samples if "worker" not in sample.labels]
    assert f"some {round(len(others), -2)} series of a gateway" in TEXT
