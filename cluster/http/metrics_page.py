"""`GET /metrics`, for whoever may ask for the cluster's status."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from cluster.metrics.exposition import Metrics
from cluster.security.caller import Caller
from engine.errors import PermissionDenied


class MetricsPage:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def get(self, request: Request, caller: Caller) -> Response:
        if not caller.is_operator:
            raise PermissionDenied("the cluster's metrics are for operators (gateway.auth.operators)")
        text, content_type = await self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})
