"""A gateway over a fake decode service, and the values that its tests share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.links import DecodeLinks
from cluster.messages import Chunk, Complete, GenerateRequest, ModelInfo
from cluster.registry import Registry, WorkerReport
from cluster.security.tenant_salts import TenantSalts
from engine.sampling import SamplingParams
from engine.stats import LoopStats
from tests.cluster.fake_decode import STEP_S, FakeDecode
from tests.engine.tiny_tokenizers import build, byte_level_metadata

TOKENIZER = build(byte_level_metadata())
MODEL = ModelInfo("tiny", TOKENIZER.vocab_size, max_context=2048, eos_token_ids=(0,))
CONFIG = GatewayConfig(
    max_running=2,
    max_waiting=2,
    default_deadline_s=50.0,
    route_wait_s=5.0,
    fresh_s=1000.0,
    expire_s=1000.0,
    router=RouterConfig(default_prefill_tokens_per_s=100.0),
)
STATS = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=64, blocks_free=64, blocks_cached=0, block_size=16, steps=0
)
REQUEST = GenerateRequest("r", "hello", SamplingParams(max_tokens=40))
ANSWER = TOKENIZER.encode("One, two, three.")
LENGTH = len(ANSWER)
TO_THE_END = replace(REQUEST, params=SamplingParams(max_tokens=LENGTH))


def report(name: str, **changes: object) -> WorkerReport:
    role = "prefill" if name.startswith("p") else "decode"
    return replace(WorkerReport(name, role, f"{name}:1", 1, "tiny", STATS), **changes)


@asynccontextmanager
async def serving(
    fake: FakeDecode,
    workers: tuple[str, ...] = ("p", "d"),
    config: GatewayConfig = CONFIG,
    salts: TenantSalts | None = None,
    rng: random.Random | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway over `fake`; on leaving, nothing may be held anywhere."""
    links = DecodeLinks(fake)
    registry = Registry(config.fresh_s, config.expire_s)
    gateway = Gateway(TOKENIZER, MODEL, registry, links, config, rng or random.Random(1), salts=salts)
    for name in workers:
        gateway.heartbeat(report(name))
    yield gateway
    await asyncio.sleep(5 * STEP_S)
    gateway.check_empty()
    assert fake.running == set(), "a worker still runs what nobody wants"
    await links.close()


async def collect(gateway: Gateway, request: GenerateRequest = REQUEST) -> tuple[list[Chunk], Complete]:
    parts = [part async for part in gateway.generate(request)]
    complete = parts.pop()
    assert isinstance(complete, Complete)
    assert all(isinstance(part, Chunk) for part in parts)
    return [part for part in parts if isinstance(part, Chunk)], complete


def start(gateway: Gateway, request_id: str, **changes: object) -> asyncio.Task[tuple[list[Chunk], Complete]]:
    return asyncio.create_task(collect(gateway, replace(REQUEST, request_id=request_id, **changes)))
