"""Which requests are traced."""

import random

import pytest
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from cluster.tracing.sampler import Sampler
from engine.trace_context import read_trace

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.25, 1.0])
def test_a_share_of_those_whose_clients_say_nothing_and_the_same_as_others_would_take(ratio: float) -> None:
    sampler, others = Sampler(ratio, random.Random(1)), TraceIdRatioBased(ratio)
    begun = [sampler.begin(None) for _ in range(20_000)]
    for trace in begun:
        assert trace.is_sampled == others.should_sample(None, trace.trace_id, "").decision.is_sampled()
        assert trace.parent_id == 0
    assert sum(trace.is_sampled for trace in begun) == pytest.approx(ratio * len(begun), rel=0.1, abs=20)
    assert len({trace.trace_id for trace in begun} | {trace.span_id for trace in begun}) == 2 * len(begun)


@pytest.mark.parametrize(("ratio", "flag"), [(0.0, "01"), (1.0, "00")])
def test_what_the_client_says_counts(ratio: float, flag: str) -> None:
    client = read_trace(CLIENT + flag, "a=1")
    assert client is not None
    trace = Sampler(ratio, random.Random(1)).begin(client)
    assert (trace.trace_id, trace.is_sampled, trace.state) == (client.trace_id, flag == "01", "a=1")
    assert trace.parent_id == client.span_id != trace.span_id
    assert Sampler(ratio, random.Random(2)).begin(client).span_id != trace.span_id, "one client's span, many requests"
