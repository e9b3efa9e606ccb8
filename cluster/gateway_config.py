"""Configuration of the gateway and its router."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RouterConfig(BaseModel):
    """What the router assumes where nothing has been measured, and what it may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allow_local: bool = Field(
        default=True, description="Prefill on the decode worker when no prefill worker can be had."
    )
    default_prefill_tokens_per_s: float = Field(
        default=1000.0, gt=0, allow_inf_nan=False, description="Assumed of a worker that has not computed a prompt yet."
    )
    default_decode_step_s: float = Field(
        default=0.05, gt=0, allow_inf_nan=False, description="Assumed of a worker that has not decoded yet, in seconds."
    )
    typical_answer_tokens: int = Field(
        default=128,
        ge=1,
        description="Length of a usual answer: how long a running request is thought to hold its blocks.",
    )


class GatewayConfig(BaseModel):
    """Limits of one gateway. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_running: int = Field(default=256, ge=1, description="Most requests handed to workers at once.")
    max_waiting: int = Field(
        default=1024, ge=0, description="Most requests waiting for their turn; one more is refused."
    )
    max_prompt_chars: int = Field(
        default=1_000_000,
        ge=1,
        description="Longest prompt text. Tokenizing blocks all other requests: about 1 s per million.",
    )
    default_deadline_s: float | None = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="Deadline of requests that name none; null for no deadline.",
    )
    route_wait_s: float = Field(
        default=10.0, ge=0, allow_inf_nan=False, description="How long a request waits for a worker when there is none."
    )
    heartbeat_interval_s: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How often workers are asked to report."
    )
    fresh_s: float = Field(
        default=3.0, gt=0, allow_inf_nan=False, description="A worker not heard of for this long gets no work."
    )
    expire_s: float = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="A worker not heard of for this long is forgotten."
    )
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        if not self.heartbeat_interval_s < self.fresh_s <= self.expire_s:
            raise ValueError("heartbeat_interval_s must be less than fresh_s, and fresh_s at most expire_s")
        return self
