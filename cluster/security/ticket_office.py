"""The gateway's tickets: who gets one is what the router has decided, what they name is what workers have reported."""

from __future__ import annotations

from cluster.registry import Registry, WorkerReport
from cluster.routing.query import Route
from cluster.security.tickets import KEY_BYTES, LIFETIME_S, Issuer, Ticket, digest_of
from decode_worker.stream import Submit
from engine.errors import InvalidArgument, Unavailable


class TicketOffice:
    """Implements cluster.gateway_seams.Tickets."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._issuer = Issuer()
        self.public_key = self._issuer.public_key

    def check_report(self, report: WorkerReport) -> None:
        if len(report.public_key) != KEY_BYTES:
            expected = f"{KEY_BYTES} bytes of an Ed25519 key: a worker of this gateway's version"
            raise InvalidArgument("public_key", f"{len(report.public_key)} bytes", expected)

    def ticket(self, route: Route, submit: Submit, now: float) -> bytes:
        prefill, decode = self._report(route.prefill_id), self._report(route.decode_id)
        ticket = Ticket(
            request_id=submit.request_id,
            prefill_worker=prefill.worker_id,
            incarnation=prefill.incarnation,
            holder=decode.public_key,
            digest=digest_of(submit.token_ids, submit.salt),
            expires_s=now + min(LIFETIME_S, LIFETIME_S if submit.deadline_s is None else submit.deadline_s),
        )
        return self._issuer.issue(ticket)

    def _report(self, worker_id: str) -> WorkerReport:
        report = self._registry.report_of(worker_id)
        if report is None:
            raise Unavailable(f"worker {worker_id} is gone")
        return report
