"""`/metrics`: the gateway's, its workers' and its process's metrics as text.

a request ends ─▶ RequestMetrics ─┐
status of the cluster ────────────┼─▶ families ─▶ text, in a thread: of a thousand workers it takes a while
the process ──────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import exposition
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from cluster.controller_loop import ActionKind, ControllerLoop
from cluster.gateway import Gateway
from cluster.messages import ClusterStatus
from cluster.metrics.gateway_metrics import gateway_families
from cluster.metrics.request_metrics import RequestMetrics
from cluster.metrics.worker_metrics import worker_families
from cluster.registry import Role

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Metrics:
    """Counts what `gateway` does from now on. `controller` None: there is none."""

    def __init__(self, gateway: Gateway, controller: ControllerLoop | None = None) -> None:
        self._gateway = gateway
        self._controller = controller
        self._requests = RequestMetrics(gateway.model.max_context)
        self._one_at_a_time = asyncio.Lock()
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        gateway.endings.observe(self._requests)

    async def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, by the request's header `accept`: OpenMetrics where that names it."""
        async with self._one_at_a_time:
            status = self._gateway.status(asyncio.get_running_loop().time())
            actions = dict(self._controller.action_counts) if self._controller is not None else {}
            page = _Page(lambda: self._families(status, actions))
            if _takes_openmetrics(accept):
                # By default it writes colons in the names of samples, where they are allowed, as underscores.
                return await asyncio.to_thread(openmetrics.generate_latest, page, openmetrics.ALLOWUTF8), OPEN
            return await asyncio.to_thread(exposition.generate_latest, page), PLAIN

    def _families(self, status: ClusterStatus, actions: Mapping[tuple[ActionKind, Role], int]) -> Iterator[Metric]:
        yield from gateway_families(status, self._gateway.flow, actions)
        yield from self._requests.families(status.model)
        yield from worker_families(status.model, status.workers)
        yield from self._process.collect()


class _Page(Collector):
    """What one scrape sees."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def _takes_openmetrics(accept: str) -> bool:
    return any(part.split(";")[0].strip() == "application/openmetrics-text" for part in accept.split(","))
