"""What clients send to the gateway and see of it: plain frozen values that know neither gRPC nor HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.batch import Sampled
from engine.objectives import NO_OBJECTIVES, Objectives
from engine.request import FinishReason, Receipt
from engine.sampling import SamplingParams
from engine.tools import Tool, ToolCall
from engine.trace_context import TraceContext


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `role` is what the model's chat template knows: mostly system, user, assistant, tool.
    `tool_calls` are what the assistant asked for, `tool_call_id` says which of them a tool's turn answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def chars(self) -> int:
        """Characters of it that are to be tokenized, but for those that the template adds."""
        calls = sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
        return len(self.role) + len(self.content) + calls

    def described(self) -> dict[str, Any]:
        """As chat templates want it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [call.described() for call in self.tool_calls]
        if self.tool_call_id:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`prompt` is text, token ids or a chat. `request_id` is unique among its tenant's running requests; "" asks the
    gateway for one. `model` "" means the one that is served. `salt` separates prefixes of one tenant. `deadline_s`:
    seconds from arrival, None for the gateway's default. `objectives` are the request's own; what they leave open is
    taken from the gateway's class `slo_class`, then from its configuration. `on_failure`: what becomes of it when a
    worker is lost ("recompute", "retry", "fail"), "" for the gateway's default. `tenant`: whose request it is, "" where
    nobody is told apart. `fills_context`: the answer may be as long as the model's context allows, whatever
    `params.max_tokens` says. `tools`: what a chat's answer may call. `trace`: the client's span, None where it has
    none. `shares_id`: others that run may have its id, and it goes by one that begins so then."""

    request_id: str
    prompt: str | tuple[int, ...] | tuple[Message, ...] = field(repr=False)
    params: SamplingParams
    model: str = ""
    salt: bytes = field(default=b"", repr=False)
    deadline_s: float | None = None
    objectives: Objectives = NO_OBJECTIVES
    slo_class: str = ""
    on_failure: str = ""
    tenant: str = ""
    fills_context: bool = False
    tools: tuple[Tool, ...] = ()
    trace: TraceContext | None = None
    shares_id: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of choice `index`. `text` may be empty while a character or a stop string is still undecided."""

    index: int
    text: str
    tokens: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer. `tokens` go up to and including the stop token, or the one that completed the stop string.
    At most one of `matched_stop_str` and `matched_token_id` is set, and only when `finish_reason` is stop."""

    index: int
    text: str
    tokens: tuple[Sampled, ...]
    finish_reason: FinishReason
    matched_stop_str: str | None = None
    matched_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `completion_tokens` sums over all choices; `cached_tokens` are part of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Complete:
    """The last of a request's answers: every choice whole, in order of index."""

    choices: tuple[Choice, ...]
    usage: Usage
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served, and its limits. `max_context` counts prompt and answer together, in tokens."""

    name: str
    vocab_size: int
    max_context: int
    architecture: str = ""
    dtype: str = ""
    eos_token_ids: tuple[int, ...] = ()
    has_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker as the gateway last heard of it. `fresh`: heard of recently enough to be given work. What follows
    that is of engine/stats.py."""

    worker_id: str
    role: str
    address: str
    incarnation: int
    heartbeat_age_s: float
    fresh: bool
    draining: bool
    running: int
    waiting: int
    queued_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    steps: int
    cost_error_median: float = 0.0
    cost_error_p90: float = 0.0
    prefill_scale: float = 1.0
    decode_scale: float = 1.0
    kv_faults: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    kv_bytes: int = 0
    kv_streams_broken: int = 0
    kv_orphan_bytes: int = 0
    lease_expiries: int = 0
    queued_s: float = 0.0
    context_tokens: int = 0
    decode_step_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    local_only: bool = False


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as the gateway sees it at one moment; workers in order of role and id. `attainment`: shares of the
    last `attainment_window` requests that met both objectives, the one, the other; rejected ones met none. What was
    refused for its tenant's quota is counted apart, and in none of these. Tokens are those of all requests since the
    gateway's start."""

    model: str
    workers: tuple[WorkerStatus, ...]
    requests_running: int
    requests_waiting: int
    requests_finished: int
    requests_rejected: int = 0
    router: str = ""
    attainment: float = 0.0
    attainment_ttft: float = 0.0
    attainment_tpot: float = 0.0
    attainment_window: int = 0
    requests_over_quota: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
