"""Tickets for KV streams: whoever has none, or somebody else's, gets no KV, whatever port is reached."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import astuple, replace

import pytest

from cluster.registry import Registry, WorkerReport
from cluster.routing.query import Route
from cluster.security import tickets
from cluster.security.ticket_office import TicketOffice
from cluster.security.tickets import LIFETIME_S, Holder, TicketCheck
from decode_worker.stream import Submit
from engine.errors import InvalidArgument, PermissionDenied, Unavailable
from engine.sampling import SamplingParams
from engine.stats import LoopStats
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker
from tests.emulated import layout, runner

STATS = LoopStats(0, 0, 0, 8, 8, 0, 16, 0)
ROUTE = Route("prefill-0", "10.0.0.1:7000", "decode-0", "10.0.0.2:7000")
# The gateway's clock, and a worker's, have nothing in common.
GATEWAY_S, WORKER_S = 5000.0, 12.0


class Cluster:
    """A gateway's office, two decode workers' keys and a prefill worker's check."""

    def __init__(self, incarnation: int = 7) -> None:
        self.registry = Registry(3, 60)
        self.office = TicketOffice(self.registry)
        self.holder, self.other = Holder(), Holder()
        self.check = TicketCheck("prefill-0", incarnation)
        self.check.learn(self.office.public_key, GATEWAY_S, WORKER_S)
        for worker_id, role, holder in (
            ("prefill-0", "prefill", Holder()),
            ("prefill-1", "prefill", Holder()),
            ("decode-0", "decode", self.holder),
            ("decode-1", "decode", self.other),
        ):
            report = WorkerReport(worker_id, role, f"{worker_id}:1", 7, "m", STATS, public_key=holder.public_key)
            self.registry.heartbeat(report, GATEWAY_S)

    def ticket(self, submit: Submit, route: Route = ROUTE) -> bytes:
        return self.office.ticket(route, submit, GATEWAY_S)

    def admit(self, call: PrefillCall, *, holder: Holder | None = None, after_s: float = 0.0) -> None:
        proof = (holder or self.holder).prove(call.ticket, call.lease)
        self.check.check(call, proof, WORKER_S + after_s)


SUBMIT = Submit("q1#4", (1, 2, 3), SamplingParams(), seed=1, salt=b"tenant")


def call_of(submit: Submit, ticket: bytes, lease: int = 1) -> PrefillCall:
    return PrefillCall(
        submit.request_id, submit.token_ids, submit.params, 1, 0, layout(), salt=submit.salt, lease=lease, ticket=ticket
    )


def test_what_the_gateway_allows_is_admitted_and_so_is_what_is_fetched_again():
    cluster = Cluster()
    ticket = cluster.ticket(SUBMIT)
    for lease in (1, 2, 3):
        cluster.admit(call_of(SUBMIT, ticket, lease))


def test_a_call_without_a_ticket_is_refused():
    with pytest.raises(PermissionDenied, match="a ticket of the gateway is needed"):
        Cluster().admit(call_of(SUBMIT, b""))


@pytest.mark.parametrize("bad", [b"x", b"x" * 64, b"x" * 200, b"x" * 5000])
def test_bytes_that_are_no_ticket_are_refused(bad: bytes):
    with pytest.raises(PermissionDenied):
        Cluster().admit(call_of(SUBMIT, bad))


@pytest.mark.parametrize("fields", [[], 3, ["r"] * 6, ["r", "p", 7, b"key", b"digest", 9], [None] * 7])
def test_a_ticket_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, fields: object):
    cluster = Cluster()
    monkeypatch.setattr(tickets, "astuple", lambda ticket: fields)
    with pytest.raises(PermissionDenied, match="of a kind that this worker does not know"):
        cluster.admit(call_of(SUBMIT, cluster.ticket(SUBMIT)))


def test_a_ticket_without_a_time_has_expired(monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster()
    monkeypatch.setattr(tickets, "astuple", lambda ticket: (*astuple(ticket)[:-1], float("nan")))
    with pytest.raises(PermissionDenied, match="has expired"):
        cluster.admit(call_of(SUBMIT, cluster.ticket(SUBMIT)))


def test_every_changed_bit_of_a_ticket_is_refused():
    cluster = Cluster()
    ticket = cluster.ticket(SUBMIT)
    for bit in range(8 * len(ticket)):
        changed = ticket[: bit // 8] + bytes([ticket[bit // 8] ^ 1 << bit % 8]) + ticket[bit // 8 + 1 :]
        with pytest.raises(PermissionDenied, match="not this worker's gateway's"):
            cluster.admit(call_of(SUBMIT, changed))


def test_another_requests_ticket_is_refused():
    cluster = Cluster()
    others = cluster.ticket(replace(SUBMIT, request_id="q2#5"))
    with pytest.raises(PermissionDenied, match="for another request"):
        cluster.admit(call_of(SUBMIT, others))


@pytest.mark.parametrize("changed", [{"token_ids": (1, 2, 4)}, {"salt": b"other"}, {"salt": b""}, {"token_ids": (1,)}])
def test_a_ticket_is_good_for_its_own_prompt_and_tenant_only(changed):
    cluster = Cluster()
    ticket = cluster.ticket(SUBMIT)
    with pytest.raises(PermissionDenied, match="for another request"):
        cluster.admit(call_of(replace(SUBMIT, **changed), ticket))


def test_a_guessed_request_id_is_refused():
    cluster = Cluster()
    ticket = cluster.ticket(SUBMIT)
    for guess in ("q1", "q1#3", "q1#5", "q2#4", ""):
        with pytest.raises(PermissionDenied, match="for another request"):
            cluster.admit(call_of(replace(SUBMIT, request_id=guess), ticket))


def test_a_replayed_call_is_refused():
    cluster = Cluster()
    call = call_of(SUBMIT, cluster.ticket(SUBMIT))
    cluster.admit(call)
    with pytest.raises(PermissionDenied, match="was made before"):
        cluster.admit(call)


def test_a_stolen_ticket_is_of_no_use():
    """Another decode worker, or anybody who listened, has the ticket but not the key; and a proof is of one lease."""
    cluster = Cluster()
    call = call_of(SUBMIT, cluster.ticket(SUBMIT))
    with pytest.raises(PermissionDenied, match="another caller's"):
        cluster.admit(call, holder=cluster.other)
    heard = cluster.holder.prove(call.ticket, call.lease)
    with pytest.raises(PermissionDenied, match="another caller's"):
        cluster.check.check(replace(call, lease=2), heard, WORKER_S)


def test_an_expired_ticket_is_refused():
    cluster = Cluster()
    cluster.admit(call_of(SUBMIT, cluster.ticket(SUBMIT)), after_s=LIFETIME_S)
    with pytest.raises(PermissionDenied, match="expired"):
        cluster.admit(call_of(SUBMIT, cluster.ticket(SUBMIT), lease=2), after_s=LIFETIME_S + 6)
    soon = replace(SUBMIT, deadline_s=2.0)
    with pytest.raises(PermissionDenied, match="expired"):
        cluster.admit(call_of(soon, cluster.ticket(soon), lease=3), after_s=2.0 + 6)


def test_another_workers_ticket_is_refused():
    cluster = Cluster()
    elsewhere = cluster.ticket(SUBMIT, replace(ROUTE, prefill_id="prefill-1"))
    with pytest.raises(PermissionDenied, match="for another worker"):
        cluster.admit(call_of(SUBMIT, elsewhere))
    successor = Cluster(incarnation=8)
    with pytest.raises(PermissionDenied, match="for another worker"):
        successor.admit(call_of(SUBMIT, successor.ticket(SUBMIT)))


def test_another_gateways_ticket_is_refused_and_a_restarted_gateways_is_taken():
    cluster, other = Cluster(), Cluster()
    with pytest.raises(PermissionDenied, match="not this worker's gateway's"):
        cluster.admit(call_of(SUBMIT, other.ticket(SUBMIT)), holder=other.holder)
    cluster.check.learn(other.office.public_key, 3.0, WORKER_S)
    ticket = other.office.ticket(ROUTE, SUBMIT, 3.0)
    cluster.admit(call_of(SUBMIT, ticket), holder=other.holder)


def test_a_worker_that_has_not_heard_from_its_gateway_serves_nobody():
    cluster = Cluster()
    cluster.check = TicketCheck("prefill-0", 7)
    with pytest.raises(Unavailable, match="not heard from its gateway"):
        cluster.admit(call_of(SUBMIT, cluster.ticket(SUBMIT)))


def test_what_is_remembered_of_calls_is_forgotten_when_their_tickets_expire():
    cluster = Cluster()
    for number in range(50):
        submit = replace(SUBMIT, deadline_s=10.0)
        cluster.admit(call_of(submit, cluster.ticket(submit), lease=number))
    assert len(cluster.check._used) == 50
    ticket = cluster.office.ticket(ROUTE, SUBMIT, GATEWAY_S + 20)
    cluster.admit(call_of(SUBMIT, ticket, lease=99), after_s=20)
    assert len(cluster.check._used) == 1


def test_a_worker_without_a_key_is_refused_by_name():
    cluster = Cluster()
    report = WorkerReport("old", "decode", "a:1", 1, "m", STATS)
    with pytest.raises(InvalidArgument, match=r"public_key: got '0 bytes', expected 32 bytes of an Ed25519 key"):
        cluster.office.check_report(report)


@asynccontextmanager
async def serving(cluster: Cluster) -> AsyncIterator[str]:
    worker = PrefillWorker(runner(), PrefillConfig(), worker_id="prefill-0", max_context=1 << 16)
    service = prefill_service(worker, lambda call, proof: cluster.check.check(call, proof, WORKER_S))
    server = await start_server("127.0.0.1:0", [service])
    try:
        yield server.address
    finally:
        await server.stop()
        worker.check_empty()


async def test_over_the_wire_a_call_that_is_not_allowed_reaches_no_worker(caplog):
    cluster = Cluster()
    caplog.set_level(logging.INFO)
    async with serving(cluster) as address:
        for holder in (cluster.other, None):
            transport = GrpcPrefillTransport(None, holder.prove if holder is not None else None)
            with pytest.raises(PermissionDenied):
                async with transport.open(address, call_of(SUBMIT, cluster.ticket(SUBMIT))) as frames:
                    await anext(frames)
            await transport.close()


def test_errors_name_no_secret():
    cluster = Cluster()
    ticket = cluster.ticket(SUBMIT)
    with pytest.raises(PermissionDenied) as caught:
        cluster.admit(call_of(SUBMIT, ticket), holder=cluster.other)
    assert len(str(caught.value)) < 80
    assert str(ticket)[2:12] not in str(caught.value)
