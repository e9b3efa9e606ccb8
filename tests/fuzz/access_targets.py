"""Who is calling: tickets, keys and tokens, versions, and the errors that tell callers what was wrong."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import msgpack

from cluster.security.auth_config import AuthConfig, JwtConfig
from cluster.security.clients import Clients
from cluster.security.tickets import SIGNATURE_BYTES, Holder, Issuer, Ticket, TicketCheck, digest_of
from engine.errors import InvalidArgument, Overloaded, PermissionDenied, TandemError, Unauthenticated, VersionMismatch
from engine.trace_context import MAX_STATE_CHARS, TraceContext, trace_of
from kvtransfer.rpc import error_from_bytes, error_from_parts, error_to_bytes
from kvtransfer.rpc_version import KEY, SPOKEN
from tests.fuzz.kv_targets import CALL
from tests.fuzz.target import Target, joined, pieces
from tests.security.credentials import ED25519, key_file, pem, token

# gRPC takes no more of trailers in all.
ERROR_BYTES_MAX = 8 << 10
SIGNED = b"1"


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_error(data: bytes) -> None:
    error = error_from_bytes(data)
    for each in (error, error_from_parts(data[0] if data else 0, "text", data)):
        assert each is None or len(error_to_bytes(each)) <= ERROR_BYTES_MAX, "an error grew on its way"


def _errors() -> Sequence[bytes]:
    errors: tuple[TandemError, ...] = (InvalidArgument("n", 0, "one"), Overloaded("full", 1.5), PermissionDenied("no"))
    return [error_to_bytes(error) for error in errors]


# ── tickets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HOLDER = Holder()
CONTENT: bytes = msgpack.packb(
    astuple(Ticket("r", "p", 1, HOLDER.public_key, digest_of(CALL.token_ids, CALL.salt), 100.0))
)


class _Signer(Issuer):
    """Signs whatever it is given: or nothing behind that check would ever be tried."""

    def sign(self, content: bytes) -> bytes:
        return self._key.sign(b"tandem ticket 1" + content) + content


SIGNER = _Signer()


def check_ticket(data: bytes) -> None:
    """The pieces: whether the ticket is signed, itself, the proof (empty: a right one), the request's id."""
    signed, content, proof, request_id = pieces(data, 4)
    check = TicketCheck("p", 1)
    check.learn(SIGNER.public_key, 0.0, 0.0)
    packed = SIGNER.sign(content) if signed == SIGNED else content
    call = replace(CALL, ticket=packed, request_id=request_id.decode("utf-8", "replace"))
    check.check(call, proof or HOLDER.prove(packed, call.lease), 0.0)
    *theirs, until_s = msgpack.unpackb(packed[SIGNATURE_BYTES:])
    assert theirs == msgpack.unpackb(CONTENT)[:-1], f"a ticket was taken that nobody was given: {theirs}"
    assert until_s >= -5.0, f"it had expired by {-until_s} s"


def _tickets() -> Sequence[bytes]:
    return [joined(SIGNED, CONTENT, b"", b"r"), joined(b"", SIGNER.sign(CONTENT), b"", b"r")]


# ── keys and tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


def let_in(data: bytes) -> None:
    """The pieces are names and values of metadata by turns; a value that says so is a token that gets signed."""
    clients, _ = _gateway()
    parts = pieces(data)
    metadata = [
        (name.decode("latin-1"), _signed(value) if value.startswith(b"sign ") else value)
        for name, value in zip(parts[::2], parts[1::2], strict=False)
    ]
    caller = clients.caller(metadata)
    assert caller.tenant, "a caller who is known has a name"


def _signed(value: bytes) -> bytes:
    header, _, claims = value.removeprefix(b"sign ").partition(b"|")
    content = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims))
    return b"Bearer " + content + b"." + base64.urlsafe_b64encode(ED25519.sign(content)).rstrip(b"=")


@cache
def _gateway() -> tuple[Clients, str]:
    """One that knows one key and one provider of tokens; and the key."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, keys = key_file(folder, "acme")
        (folder / "pem").write_text(pem(ED25519))
        clients = Clients(AuthConfig(keys_file=file, jwt=JwtConfig(keys_file=folder / "pem")))
    return clients, keys["acme"]


def _credentials() -> Sequence[bytes]:
    _, key = _gateway()
    token_ = token(ED25519, "EdDSA", exp=9_999_999_999)
    return [
        joined(b"x-api-key", key.encode()),
        joined(b"authorization", b"Bearer " + token_.encode(), b"user-agent", b"x"),
        joined(b"authorization", b'sign {"alg":"EdDSA","typ":"JWT"}|{"sub":"acme","exp":9999999999}'),
    ]


def agree(data: bytes) -> None:
    agreed = SPOKEN.agree([(KEY, piece.decode("latin-1")) for piece in pieces(data)], "them", "us")
    assert SPOKEN.first <= agreed <= SPOKEN.last, f"version {agreed} is not spoken here"


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TRACE = TraceContext(1 << 100, 1 << 50, True, "a=1,b=2")


def read_trace_headers(data: bytes) -> None:
    """The pieces: `traceparent`, `tracestate`."""
    parent, state = (piece.decode("latin-1") for piece in pieces(data, 2))
    trace = trace_of([("traceparent", parent), ("tracestate", state)])
    if trace is None:
        return
    assert len(trace.state) <= MAX_STATE_CHARS, "more was taken than is passed on"
    assert trace_of(trace.headers) == trace, "what is passed on is not what came"
    assert trace.child("x").span_id, "an id of zeros is none"


def _trace_headers() -> Sequence[bytes]:
    return [joined(TRACE.traceparent.encode(), TRACE.state.encode()), joined(TRACE.traceparent.encode())]


TARGETS = (
    Target("trace headers", read_trace_headers, _trace_headers, ()),
    Target("error", read_error, _errors, ()),
    Target("ticket", check_ticket, _tickets, (PermissionDenied,)),
    Target("credentials", let_in, _credentials, (Unauthenticated,)),
    Target("version", agree, lambda: [joined(b"1-1"), joined(b"1-3")], (VersionMismatch,)),
)
