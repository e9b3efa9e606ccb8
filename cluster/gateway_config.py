"""Configuration of the gateway and its router."""

from __future__ import annotations

from typing import Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.security.auth_config import AuthConfig, QuotaConfig
from cluster.security.caller import MAX_TENANT_CHARS, is_tenant_name
from engine.errors import ConfigError, InvalidArgument
from engine.objectives import Objectives

OnFailure = Literal["recompute", "retry", "fail"]
Policy = Literal["goodput", "round_robin", "random", "least_loaded", "power_of_two", "prefix_affinity"]


def require_policy(name: str, where: str) -> None:
    """Raises ConfigError that names `where` for a policy that there is not."""
    if name not in get_args(Policy):
        raise ConfigError(f"{where}: got {name!r}, expected one of {', '.join(get_args(Policy))}")


class RouterConfig(BaseModel):
    """The policy, what it assumes where nothing has been measured, and what it may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy = Field(default="goodput", description="How workers are chosen, and whether requests are refused.")
    allow_local: bool = Field(
        default=True,
        description="Decode workers may compute prompts: where the goodput policy prefers it, else for want of others.",
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
        description="Length of a usual answer, until answers have been seen.",
    )
    default_link_bytes_per_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Assumed of a link between workers that nobody has measured; null: transfers cost nothing.",
    )
    prefill_chunk_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of a prefill worker's step; null: where larger ones gain nothing."
    )
    local_chunk_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of prompts in a decode worker's step; null: as above."
    )
    candidates: int = Field(
        default=2, ge=1, description="Least loaded workers of each order that are compared, and as many with a prefix."
    )
    min_probability: float = Field(
        default=0.05, ge=0, lt=1, description="A request less likely than this to meet its objectives is refused."
    )
    min_worth: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Requests in time that one must gain, less those that it costs others, not to be refused.",
    )
    lead_s: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="How long before a worker becomes free a request is sent to it; those beyond wait at the gateway.",
    )
    patience_s: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="How long a request without a TTFT objective may be kept waiting for the sake of others.",
    )
    prefix_entries: int = Field(
        default=1 << 20, ge=0, description="Most (block, worker) pairs that are remembered of the prefix caches."
    )

    @property
    def has_local(self) -> bool:
        """Whether decode workers compute prompts though there are prefill workers."""
        return self.allow_local and self.policy == "goodput"


class ObjectivesConfig(BaseModel):
    """What a request is to achieve; null: any time will do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Longest time to the first token, in milliseconds."
    )
    tpot_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Longest mean time per token after it, in milliseconds."
    )

    def in_seconds(self) -> Objectives:
        return Objectives(
            None if self.ttft_ms is None else self.ttft_ms / 1e3, None if self.tpot_ms is None else self.tpot_ms / 1e3
        )


class FailureConfig(BaseModel):
    """What becomes of a request when a worker fails it, and of the worker. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_failure: OnFailure = Field(
        default="recompute",
        description="Of requests that name nothing. recompute: another worker goes on after the tokens that were sent; "
        "retry: only while none was; fail: the client is told.",
    )
    max_attempts: int = Field(default=5, ge=1, description="How often one request is handed to workers at most.")
    wait_s: float = Field(
        default=60.0,
        ge=0,
        allow_inf_nan=False,
        description="How long a request that a worker has had waits for another, where there is none. Others wait for "
        "gateway.route_wait_s.",
    )
    backoff_s: float = Field(
        default=0.05,
        ge=0,
        allow_inf_nan=False,
        description="Longest wait before the first retry; twice as long before each further one, drawn at random.",
    )
    max_backoff_s: float = Field(default=2.0, ge=0, allow_inf_nan=False, description="Longest wait before any retry.")
    retries_per_s: float = Field(
        default=50.0, gt=0, allow_inf_nan=False, description="Of all requests together; beyond that they wait in turn."
    )
    retry_burst: int = Field(default=256, ge=1, description="Retries that may come at once, all requests together.")
    shun_s: float = Field(
        default=0.5,
        ge=0,
        allow_inf_nan=False,
        description="How long a worker that failed gets no new request; twice as long after each further failure.",
    )
    max_shun_s: float = Field(default=8.0, ge=0, allow_inf_nan=False, description="Longest such time.")


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
        description="Longest prompt text. Long ones are tokenized beside other requests: about 1 s per million.",
    )
    default_deadline_s: float | None = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="Deadline of requests that name none; null: the longest there is.",
    )
    max_stream_s: float = Field(
        default=3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest life of a request, and of each stream for it, whatever deadline it names.",
    )
    slow_reader_s: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="How long a client may keep its answer waiting in all, beyond 1 s per KiB of it.",
    )
    route_wait_s: float = Field(
        default=10.0,
        ge=0,
        allow_inf_nan=False,
        description="How long a new request waits for a worker when there is none.",
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
    outcome_window_s: float = Field(
        default=60.0, gt=0, allow_inf_nan=False, description="How far back the attainment looks."
    )
    objectives: ObjectivesConfig = Field(
        default=ObjectivesConfig(), description="Of requests that name none, and whose class says nothing."
    )
    classes: dict[str, ObjectivesConfig] = Field(
        default={}, description="Objectives by the name that requests give as slo_class."
    )
    failures: FailureConfig = FailureConfig()
    router: RouterConfig = RouterConfig()
    auth: AuthConfig = AuthConfig()
    quota: QuotaConfig = QuotaConfig()
    tenants: dict[str, QuotaConfig] = Field(
        default={}, description="Quotas by tenant, each in place of gateway.quota, which every other tenant has."
    )

    def on_failure_of(self, own: str) -> OnFailure:
        """A request's own policy, or the default. Raises InvalidArgument for one that there is not."""
        if not own:
            return self.failures.on_failure
        for known in get_args(OnFailure):
            if own == known:
                return cast(OnFailure, known)
        raise InvalidArgument("on_failure", own, f"one of {', '.join(get_args(OnFailure))}")

    def objectives_of(self, own: Objectives, slo_class: str) -> Objectives:
        """A request's own objectives, then its class's, then the default. Raises InvalidArgument for a class that
        nobody knows, and for objectives that cannot be met."""
        own.validate()
        of_class = ObjectivesConfig()
        if slo_class:
            known = self.classes.get(slo_class)
            if known is None:
                names = ", ".join(sorted(self.classes)) or "none is configured"
                raise InvalidArgument("slo_class", slo_class, f"one of the gateway's classes: {names}")
            of_class = known
        return own.over(of_class.in_seconds()).over(self.objectives.in_seconds())

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        if not self.heartbeat_interval_s < self.fresh_s <= self.expire_s:
            raise ValueError("heartbeat_interval_s must be less than fresh_s, and fresh_s at most expire_s")
        return self

    @model_validator(mode="after")
    def _tenants_are_told_apart(self) -> Self:
        named = [*self.tenants, *self.auth.operators]
        if named and not self.auth.is_required:
            raise ValueError("tenants and auth.operators go with auth.keys_file or auth.jwt.keys_file")
        if wrong := [name for name in named if not is_tenant_name(name)]:
            raise ValueError(
                f"tenants: got {wrong[0]!r}, expected a word of 1 to {MAX_TENANT_CHARS} characters without #"
            )
        return self
