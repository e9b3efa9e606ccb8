"""The token stream between one gateway and one decode worker: commands up, one frame per step down.

A gateway keeps one stream to each decode worker it uses. When the stream ends, for whatever reason, every request that
came by it is cancelled: a gateway's death or a lost link costs no KV.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from engine.batch import Sampled
from engine.errors import InvalidArgument, TandemError
from engine.request import FinishReason, Receipt
from engine.request_checks import check_params, check_seconds, check_token_ids
from engine.sampling import SamplingParams
from engine.trace_context import TraceContext


@dataclass(frozen=True, slots=True)
class ChoiceSoFar:
    """What one choice of a request had drawn elsewhere, after its `token_ids`, and whether it needs no more."""

    token_ids: tuple[int, ...] = field(default=(), repr=False)
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """Runs one request. `prefill_address` names the prefill worker to pull from; "" prefills on the decode worker.

    A request that another worker has begun goes on where that one was lost: `token_ids` then end with what it drew,
    after `prompt_tokens` of prompt (0: all are prompt). Where it has several choices, `resumed` says so for each, and
    `token_ids` is the prompt. Its events tell of new tokens only.

    `deadline_s`: seconds from now, None for none. `salt` separates tenants in the prefix cache. `ttft_due_s`: seconds
    from now until the first token should be at the gateway, `tpot_s`: the longest mean time per token after it; None
    where there is no such objective. Objectives order work, they never end it. `ticket` is the gateway's leave to have
    the prompt computed there, passed on as it is. `trace`: the gateway's span of this attempt, None for none.

    What a client said stays out of logs, and so out of `repr`.
    """

    request_id: str
    token_ids: tuple[int, ...] = field(repr=False)
    params: SamplingParams
    seed: int
    prefill_address: str = ""
    deadline_s: float | None = None
    salt: bytes = field(default=b"", repr=False)
    ttft_due_s: float | None = None
    tpot_s: float | None = None
    prompt_tokens: int = 0
    resumed: tuple[ChoiceSoFar, ...] = ()
    ticket: bytes = b""
    trace: TraceContext | None = None

    @property
    def prompt_count(self) -> int:
        """Tokens of the prompt proper."""
        return self.prompt_tokens or len(self.token_ids)

    @property
    def own_id(self) -> str:
        """What the client knows the request by: without the number that a gateway adds for each attempt."""
        return self.request_id.rpartition("#")[0] or self.request_id

    @property
    def so_far(self) -> tuple[ChoiceSoFar, ...]:
        """Of every choice."""
        return self.resumed or (ChoiceSoFar(),) * self.params.n

    def check(self, vocab_size: int, *, can_guide: bool) -> None:
        """Raises InvalidArgument for what makes no request, or none that this worker can serve."""
        # First of all: `n` says how much is made of it below.
        check_params(self.params, vocab_size, can_guide=can_guide)
        check_seconds(deadline_s=self.deadline_s, ttft_due_s=self.ttft_due_s, tpot_s=self.tpot_s)
        if not self.token_ids:
            raise InvalidArgument("prompt", "no tokens", "at least one token")
        check_token_ids("prompt", self.token_ids, vocab_size)
        if not 0 <= self.prompt_tokens <= len(self.token_ids):
            raise InvalidArgument(
                "prompt_tokens", self.prompt_tokens, f"at most {len(self.token_ids)}, the tokens given"
            )
        if self.resumed and len(self.resumed) != self.params.n:
            raise InvalidArgument("resumed", len(self.resumed), f"{self.params.n} choices, or none")
        for choice in self.resumed:
            check_token_ids("resumed", choice.token_ids, vocab_size)
        going_on = [choice for choice in self.so_far if not choice.is_finished]
        drawn = len(self.token_ids) - self.prompt_count + max((len(each.token_ids) for each in going_on), default=0)
        if not going_on or drawn >= self.params.max_tokens:
            raise InvalidArgument("resumed", f"{drawn} tokens", "an answer that has tokens to come")


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drops a request and frees all it holds; Done then says how far it got. Unknown ids are ignored: the request may
    just have finished."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A Submit of which a field cannot be read: the request is to fail with `error`."""

    request_id: str
    error: TandemError


Command = Submit | Cancel
# What the worker's end of a stream reads.
Received = Command | Unreadable


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice, in order. `finish_reason` is set on its last delta.

    A stop token (end of sequence or one of `stop_token_ids`) is the last of `tokens`; `matched_token_id` names it, and
    its text is not part of the answer.
    """

    request_id: str
    choice: int
    tokens: tuple[Sampled, ...]
    finish_reason: FinishReason | None = None
    matched_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """All choices of a request have finished, or it was cancelled, and its blocks go back. `cached_tokens`: prompt
    tokens whose KV came from a prefix cache on either side. In `receipt` only what the workers know is filled in."""

    request_id: str
    cached_tokens: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends with an error instead of Done. `error` is a TandemError, and crosses the wire as one."""

    request_id: str
    error: Exception


Event = Delta | Done | Failed


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """Everything that one step gave the sequences of one gateway. `step` counts this worker's forward passes."""

    step: int
    events: tuple[Event, ...]


class DecodeSession(Protocol):
    """The gateway's end of a token stream."""

    async def send(self, command: Command) -> None:
        """Raises Unavailable when the stream is gone."""
        ...

    def frames(self) -> AsyncIterator[TokenFrame]:
        """Frames until the stream ends: normally, or with Unavailable when the worker is gone."""
        ...


class DecodeService(Protocol):
    """The worker's end: reads commands until they end, yields frames; closing the generator cancels what is left."""

    def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]: ...


class DecodeTransport(Protocol):
    """How a gateway reaches decode workers."""

    def attach(self, address: str) -> AbstractAsyncContextManager[DecodeSession]: ...

    async def close(self) -> None: ...
