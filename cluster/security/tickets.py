"""Tickets for KV streams: reaching a prefill worker's port is not enough to have it compute, or to read KV from it.

    worker ── its public key ──▶ gateway ── its own public key, its clock ──▶ worker            by heartbeats
    gateway ── Submit with a ticket ──▶ decode worker ── Prefill: ticket and proof ──▶ prefill worker

A ticket is signed by the gateway (Ed25519) for one request, its prompt, one prefill worker's present life and one
decode worker's key, for some minutes. The proof is that decode worker's signature over the ticket and the call's lease,
so a ticket that somebody else has got hold of is of no use, nor is a call that was recorded: no lease comes twice.

Keys live as long as their processes, in memory. Times are of the gateway's clock, which its answers carry.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from engine.errors import PermissionDenied, Unavailable
from kvtransfer.transport import PrefillCall

# How long one may wait on a decode worker before it is used; a request that waited longer is placed anew.
LIFETIME_S = 600.0
# A worker's idea of the gateway's clock is late by what an answer takes.
SLACK_S = 5.0
KEY_BYTES = 32
SIGNATURE_BYTES = 64
TICKET_BYTES_MAX = 4096
_TICKET = b"tandem ticket 1"
_FIELD_TYPES = [str, str, int, bytes, bytes, float]
_PROOF = b"tandem proof 1"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the gateway allows: `holder`, a decode worker's public key, may have the prompt that `digest` is of computed
    for `request_id` by the named life of a prefill worker, until `expires_s`."""

    request_id: str
    prefill_worker: str
    incarnation: int
    holder: bytes
    digest: bytes
    expires_s: float


class Issuer:
    """The gateway's end. `public_key` is for the workers."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public_key = self._key.public_key().public_bytes_raw()

    def issue(self, ticket: Ticket) -> bytes:
        content: bytes = msgpack.packb(astuple(ticket))
        return self._key.sign(_TICKET + content) + content


class Holder:
    """A decode worker's end. `public_key` is for the gateway."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public_key = self._key.public_key().public_bytes_raw()

    def prove(self, ticket: bytes, lease: int) -> bytes:
        """That this worker, and no other, makes the call with this ticket and lease."""
        return self._key.sign(_proof_content(ticket, lease))


class TicketCheck:
    """A prefill worker's end: `learn` from the gateway's answers, `check` every call."""

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self._worker = (worker_id, incarnation)
        self._gateway: Ed25519PublicKey | None = None
        self._gateway_bytes = b""
        self._ahead_s = 0.0
        # Leases that were used, until their tickets expire; in about that order.
        self._used: OrderedDict[tuple[bytes, int], float] = OrderedDict()

    def learn(self, public_key: bytes, gateway_now_s: float, now: float) -> None:
        """Takes the gateway's key, and its clock while this worker's says `now`. Another key replaces the last."""
        self._ahead_s = gateway_now_s - now
        if public_key != self._gateway_bytes and len(public_key) == KEY_BYTES:
            self._gateway, self._gateway_bytes = Ed25519PublicKey.from_public_bytes(public_key), public_key
            # They were of tickets that are good for nothing now.
            self._used.clear()

    def check(self, call: PrefillCall, proof: bytes, now: float) -> None:
        """Raises PermissionDenied for a call that the gateway has not allowed, and Unavailable where this worker does
        not know its gateway yet."""
        if self._gateway is None:
            raise Unavailable("this worker has not heard from its gateway yet")
        ticket = _read(call.ticket, self._gateway)
        gateway_now_s = now + self._ahead_s
        if (ticket.prefill_worker, ticket.incarnation) != self._worker:
            raise PermissionDenied("the ticket is for another worker")
        # Not the other way round: a time that is no number has passed.
        if not gateway_now_s <= ticket.expires_s + SLACK_S:
            raise PermissionDenied("the ticket has expired")
        if ticket.request_id != call.request_id or ticket.digest != digest_of(call.token_ids, call.salt):
            raise PermissionDenied("the ticket is for another request")
        _verify(ticket.holder, proof, _proof_content(call.ticket, call.lease), "the ticket is another caller's")
        self._forget(gateway_now_s)
        use = (ticket.holder, call.lease)
        if use in self._used:
            raise PermissionDenied("the call was made before")
        self._used[use] = ticket.expires_s + SLACK_S

    def _forget(self, gateway_now_s: float) -> None:
        while self._used:
            use, until_s = next(iter(self._used.items()))
            if gateway_now_s <= until_s:
                return
            del self._used[use]


def digest_of(token_ids: Sequence[int], salt: bytes) -> bytes:
    """Names a prompt, 32 bytes."""
    sha = hashlib.sha256(len(salt).to_bytes(4, "little") + salt)
    sha.update(array("I", token_ids))
    return sha.digest()


def _read(packed: bytes, gateway: Ed25519PublicKey) -> Ticket:
    if not SIGNATURE_BYTES < len(packed) <= TICKET_BYTES_MAX:
        raise PermissionDenied("a ticket of the gateway is needed" if not packed else "this is no ticket")
    signature, content = packed[:SIGNATURE_BYTES], packed[SIGNATURE_BYTES:]
    try:
        gateway.verify(signature, _TICKET + content)
    except InvalidSignature:
        raise PermissionDenied("the ticket is not this worker's gateway's") from None
    # Only what the gateway has written is ever parsed; it may be of another release.
    with suppress(ValueError, TypeError, msgpack.UnpackException):
        fields = msgpack.unpackb(content)
        if [type(value) for value in fields] == _FIELD_TYPES:
            return Ticket(*fields)
    raise PermissionDenied("the ticket is of a kind that this worker does not know")


def _verify(key: bytes, signature: bytes, content: bytes, problem: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except (InvalidSignature, ValueError):
        raise PermissionDenied(problem) from None


def _proof_content(ticket: bytes, lease: int) -> bytes:
    return _PROOF + hashlib.sha256(ticket).digest() + lease.to_bytes(8, "little")
