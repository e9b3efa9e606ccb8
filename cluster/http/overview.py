"""What the page reads, as JSON: the state of the cluster and its last minutes, and the requests that ended last.

The cluster is for operators; requests are too, and for the tenant whose they are. Where nobody is told apart, everybody
is an operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from cluster.gateway import Gateway
from cluster.http.overview_fields import history_fields, recent_fields, request_fields, worker_fields
from cluster.http.responses import json_response
from cluster.recent_requests import VERDICTS
from cluster.recorder import Recorder
from cluster.security.caller import Caller
from engine.errors import InvalidArgument, PermissionDenied

# Of what others might keep, or take for something else than it is.
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
MAX_ROWS = 200
MAX_NUMBER = 1 << 53


class Overview:
    """`is_ready` and `wall_clock` as for `http_app`."""

    def __init__(
        self, gateway: Gateway, recorder: Recorder, is_ready: Callable[[], bool], wall_clock: Callable[[], float]
    ) -> None:
        self._gateway = gateway
        self._recorder = recorder
        self._is_ready = is_ready
        self._wall_clock = wall_clock
        self._began_unix_s = wall_clock()

    async def cluster(self, request: Request, caller: Caller) -> Response:
        """`since` is the last second that the caller has: of the history only what came after it is told."""
        if not caller.is_operator:
            raise PermissionDenied("the cluster's overview is for operators (gateway.auth.operators)")
        since = _number(request, "since", -1, 0, MAX_NUMBER)
        now = asyncio.get_running_loop().time()
        status, model, history = self._gateway.status(now), self._gateway.model, self._recorder.history
        content = {
            "began_unix_s": self._began_unix_s,
            "now_unix_s": self._wall_clock(),
            "state": "draining" if self._gateway.is_draining else "ready" if self._is_ready() else "no workers",
            "model": {"name": model.name, "architecture": model.architecture, "max_context": model.max_context},
            "router": status.router,
            "requests": {
                "running": status.requests_running,
                "waiting": status.requests_waiting,
                "finished": status.requests_finished,
                "rejected": status.requests_rejected,
                "over_quota": status.requests_over_quota,
            },
            "attainment": {
                "both": status.attainment,
                "ttft": status.attainment_ttft,
                "tpot": status.attainment_tpot,
                "requests": status.attainment_window,
            },
            "workers": [worker_fields(worker) for worker in status.workers],
            "kv_flows": [
                {"from": flow.prefill_worker, "to": flow.decode_worker, "bytes_per_s": flow.bytes_per_s}
                for flow in history.flows(now)
            ],
            "history": history_fields(history.since(since, now)),
        }
        return json_response(content, headers=HEADERS)

    async def requests(self, request: Request, caller: Caller) -> Response:
        """Newest first: at most `limit`, of those whose id contains `id`, that ended with `verdict`."""
        verdict = request.query_params.get("verdict", "")
        if verdict not in ("", *VERDICTS):
            raise InvalidArgument("verdict", verdict, f"one of {', '.join(VERDICTS)}")
        found = self._recorder.recent.newest(
            _number(request, "limit", 50, 1, MAX_ROWS),
            tenant=_tenant(caller),
            part=request.query_params.get("id", ""),
            verdict=verdict,
        )
        to_unix_s = self._to_unix_s()
        rows = [recent_fields(recent, to_unix_s) for recent in found]
        # Their numbers are those of one process.
        return json_response({"began_unix_s": self._began_unix_s, "requests": rows}, headers=HEADERS)

    async def request(self, request: Request, caller: Caller) -> Response:
        """All that is known of requests with this `id`, newest first: another one may have had it before. Who asks for
        another's request is told what everybody is told who asks for one that never was."""
        # No part of the path: an id may be `..`, or have slashes, which browsers and proxies take for steps.
        request_id = request.query_params.get("id", "")
        if not request_id:
            raise InvalidArgument("id", request_id, "a request's id")
        found = self._recorder.recent.with_id(request_id, tenant=_tenant(caller))
        to_unix_s = self._to_unix_s()
        requests = [request_fields(recent, to_unix_s) for recent in found]
        return json_response({"requests": requests}, headers=HEADERS)

    def _to_unix_s(self) -> float:
        """From the loop's clock to seconds since 1970."""
        return self._wall_clock() - asyncio.get_running_loop().time()


def _tenant(caller: Caller) -> str | None:
    """Whose requests a caller may see; None: everybody's."""
    return None if caller.is_operator else caller.tenant


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    # As long as any number in bounds: longer ones are not even read.
    if not (given.isascii() and given.isdecimal() and len(given) <= len(str(most)) and least <= int(given) <= most):
        raise InvalidArgument(name, given, f"a whole number in [{least}, {most}]")
    return int(given)
