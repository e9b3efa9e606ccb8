"""The KV stream's one seam: how a decode worker reaches a prefill worker.

Both transports (gRPC, in-memory) keep the same contract, held by `tests/kvtransfer/test_transport_contract.py`:

- frames arrive in the order in which the server yielded them, unchanged; one that was changed arrives as Damaged;
- the reader pulls: a reader that stops reading stops the server's generator after a bounded number of frames;
- leaving `open` for whatever reason (return, error, cancellation) closes the server's generator, promptly;
- the server's TandemError arrives as the same class; a peer that is gone is Unavailable;
- a call whose deadline passes raises DeadlineExceeded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from engine.batch import KVLayout
from engine.sampling import SamplingParams
from engine.trace_context import TraceContext
from kvtransfer.frames import Arrival, Frame, KVRange

# Parts of a prompt's KV that one call may ask for.
MAX_WANTED = 256


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """Asks a prefill worker to run one prompt. The stream lives exactly as long as the KV on the prefill side.

    `have_tokens`: the caller already holds the KV of tokens [0, have_tokens); it is never sent. A multiple of the
    caller's block size, less than the prompt's length. `deadline_s`: seconds from now, None for no deadline.
    `salt` separates tenants in the prefix cache. `ttft_due_s`: seconds from now until the first token should be there,
    by the request's objective; it orders the queue and ends nothing. `prompt_tokens` of `token_ids` are the prompt
    proper (0: all), the rest was drawn before: the draw goes on after it. Every frame names `lease`, which no other
    call of this caller has. `wanted`: only this KV is to be sent, in whole blocks of the server; () for all from
    `have_tokens` on. `ticket` is the gateway's leave for it. `trace`: the caller's span, None for none.
    """

    request_id: str
    token_ids: tuple[int, ...] = field(repr=False)
    params: SamplingParams
    seed: int
    have_tokens: int
    layout: KVLayout
    deadline_s: float | None = None
    salt: bytes = field(default=b"", repr=False)
    ttft_due_s: float | None = None
    prompt_tokens: int = 0
    lease: int = 0
    wanted: tuple[KVRange, ...] = ()
    ticket: bytes = b""
    trace: TraceContext | None = None

    @property
    def prompt_count(self) -> int:
        """Tokens of the prompt proper."""
        return self.prompt_tokens or len(self.token_ids)

    @property
    def wants_kv(self) -> bool:
        """False where the first token is the last: its KV would be of use to nobody, and none is sent."""
        return len(self.token_ids) - self.prompt_count + 1 < self.params.max_tokens


class PrefillService(Protocol):
    """The server's side: what a prefill worker offers, and what a transport serves."""

    def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        """An async generator; closing it releases everything that the call holds."""
        ...


class PrefillTransport(Protocol):
    """The caller's side."""

    def open(self, address: str, call: PrefillCall) -> AbstractAsyncContextManager[AsyncIterator[Arrival]]:
        """Starts the call and yields its frames; leaving the context cancels it."""
        ...

    async def close(self) -> None: ...
