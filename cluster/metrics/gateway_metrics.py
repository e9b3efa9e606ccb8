"""What is shown of the gateway itself: its queue, its tokens, its attainment, and what the controller has done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.metrics_core import Metric

from cluster.controller_loop import ActionKind
from cluster.messages import ClusterStatus
from cluster.metrics.families import Counter, Gauge, Histogram
from cluster.registry import Role
from cluster.token_flow import TokenFlow

RUNNING = Gauge("num_requests_running", "Requests that have a place to run.")
WAITING = Gauge("num_requests_waiting", "Requests that wait for a place at the gateway.")
ATTAINMENT = Gauge(
    "attainment_ratio",
    "Share of the requests that ended within gateway.outcome_window_s and met both objectives, that for the first "
    "token, that for each token after it. Not there while none has ended.",
    labels=("objective",),
)
WINDOW = Gauge("attainment_window_requests", "How many requests that is of.")
OVER_QUOTA = Counter("requests_over_quota", "Calls that were refused for their tenants' quotas; in no other metric.")
PROMPT_TOKENS = Counter("prompt_tokens", "Prompt tokens of requests whose first token has come.")
GENERATION_TOKENS = Counter("generation_tokens", "Tokens of answers, as they come.")
ACTIONS = Counter(
    "controller_actions",
    "What the controller has decided: to flip a worker to the role, to add one to it, to remove one of it.",
    labels=("action", "role"),
)
TTFT = Histogram("time_to_first_token_seconds", "From a request's arrival to its first token, when that comes.")
ITL = Histogram(
    "inter_token_latency_seconds",
    "Between two arrivals of tokens of one choice; those that come together arrive once.",
)

DECLARED = (RUNNING, WAITING, ATTAINMENT, WINDOW, OVER_QUOTA, PROMPT_TOKENS, GENERATION_TOKENS, ACTIONS, TTFT, ITL)


def gateway_families(
    status: ClusterStatus, flow: TokenFlow, actions: Mapping[tuple[ActionKind, Role], int]
) -> Iterator[Metric]:
    model = status.model
    yield RUNNING.family(model, [((), status.requests_running)])
    yield WAITING.family(model, [((), status.requests_waiting)])
    shares = (("both", status.attainment), ("ttft", status.attainment_ttft), ("tpot", status.attainment_tpot))
    # 0 of 0 would be an alarm, and a reason to scale.
    yield ATTAINMENT.family(model, [((name,), share) for name, share in shares if status.attainment_window])
    yield WINDOW.family(model, [((), status.attainment_window)])
    yield OVER_QUOTA.family(model, [((), status.requests_over_quota)])
    yield PROMPT_TOKENS.family(model, [((), flow.prompt_tokens)])
    yield GENERATION_TOKENS.family(model, [((), flow.generation_tokens)])
    every = [(kind, role) for kind in get_args(ActionKind) for role in get_args(Role)]
    yield ACTIONS.family(model, [(each, actions.get(each, 0)) for each in every])
    yield TTFT.family(model, {(): flow.ttfts})
    yield ITL.family(model, {(): flow.gaps})
