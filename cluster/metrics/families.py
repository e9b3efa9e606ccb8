"""How a metric is declared: its name without the prefix, its type, its labels, and what it means.

What it means stands here once: it is the HELP line of the exposition and the row of docs/observability.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cluster.tally import Tally

PREFIX = "tandem:"
# The values of its labels, and its value.
Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Gauge:
    name: str
    meaning: str
    labels: tuple[str, ...] = ()

    def family(self, model: str, samples: Samples) -> Metric:
        family = GaugeMetricFamily(PREFIX + self.name, self.meaning, labels=("model_name", *self.labels))
        for labels, value in samples:
            family.add_metric((model, *labels), value)
        return family


@dataclass(frozen=True, slots=True)
class Counter:
    """`name` without its `_total`."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()

    def family(self, model: str, samples: Samples) -> Metric:
        family = CounterMetricFamily(PREFIX + self.name, self.meaning, labels=("model_name", *self.labels))
        for labels, value in samples:
            family.add_metric((model, *labels), value)
        return family


@dataclass(frozen=True, slots=True)
class Histogram:
    name: str
    meaning: str
    labels: tuple[str, ...] = ()

    def family(self, model: str, tallies: Mapping[tuple[str, ...], Tally]) -> Metric:
        family = HistogramMetricFamily(PREFIX + self.name, self.meaning, labels=("model_name", *self.labels))
        for labels, tally in tallies.items():
            buckets = [(_bound(bound), float(count)) for bound, count in tally.cumulative()]
            family.add_metric((model, *labels), buckets, tally.sum)
        return family


Declared = Gauge | Counter | Histogram


def _bound(bound: float) -> str:
    return "+Inf" if bound == math.inf else repr(float(bound))
