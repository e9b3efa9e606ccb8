"""A page of metrics, read as Prometheus reads it."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics.families import PREFIX


@dataclass(frozen=True, slots=True)
class Scrape:
    """Names are without the prefix."""

    families: tuple[Metric, ...]

    def maybe(self, name: str, **labels: str) -> float | None:
        """The one value of these labels, beside others that are not named; None where there is none."""
        found = [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, f"{name} {labels} is {len(found)} series"
        return found[0] if found else None

    def value(self, name: str, **labels: str) -> float:
        found = self.maybe(name, **labels)
        assert found is not None, f"there is no {name} {labels}"
        return found


def read(text: str) -> Scrape:
    return Scrape(tuple(text_string_to_metric_families(text)))


async def scrape(client: httpx.AsyncClient, root: str) -> Scrape:
    answer = await client.get(f"{root}/metrics")
    assert answer.status_code == 200, answer.text
    return read(answer.text)
