"""The HTTP interface in front of a gateway over a fake decode service, in this process, on real sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cluster.door import Door
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.http.app import http_app
from cluster.http.server import HttpServer, start_http
from cluster.links import DecodeLinks
from cluster.metrics.exposition import Metrics
from cluster.recorder import Recorder, recording
from cluster.registry import Registry
from cluster.security.clients import Clients
from kvtransfer.rpc_tls import Tls
from tests.cluster.fake_decode import STEP_S, FakeDecode
from tests.cluster.serving import CONFIG, MODEL, report
from tests.engine.tiny_tokenizers import build, byte_level_metadata

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
TOKENIZER = build(byte_level_metadata(), TEMPLATE)
EOS = 0
WALL_S = 1_700_000_000.0
MAX_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Web:
    """`url`: what clients of OpenAI's interface are given."""

    gateway: Gateway
    fake: FakeDecode
    server: HttpServer
    recorder: Recorder

    @property
    def url(self) -> str:
        return f"http://{self.server.address}/v1"

    @property
    def root(self) -> str:
        return f"http://{self.server.address}"

    async def until_idle(self) -> None:
        """Nothing of any request is left, here or on a worker."""
        await eventually(lambda: not self.fake.running and not self.gateway.status(0.0).requests_running)
        self.gateway.check_empty()


async def eventually(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(STEP_S)


@asynccontextmanager
async def web(
    answer: str = "One, two, three.",
    config: GatewayConfig = CONFIG,
    clients: Clients | None = None,
    *,
    workers: tuple[str, ...] = ("p", "d"),
    slow_reader_s: float = 30.0,
    tls: Tls | None = None,
    port: int = 0,
    wall_s: float = WALL_S,
) -> AsyncIterator[Web]:
    """On leaving, nothing may be held anywhere. `wall_s`: the time on the wall, which stands still."""
    fake = FakeDecode([*TOKENIZER.encode(answer), EOS], eos=EOS)
    links = DecodeLinks(fake)
    registry = Registry(config.fresh_s, config.expire_s)
    model = replace(MODEL, has_chat_template=True)
    gateway = Gateway(TOKENIZER, model, registry, links, config, random.Random(1))
    for name in workers:
        gateway.heartbeat(report(name))
    async with recording(gateway) as recorder:
        app = http_app(
            gateway,
            Door(gateway, clients),
            Metrics(gateway),
            recorder,
            max_prompt_chars=config.max_prompt_chars,
            max_body_bytes=MAX_BODY_BYTES,
            is_ready=lambda: bool(workers),
            wall_clock=lambda: wall_s,
        )
        server = await start_http(f"127.0.0.1:{port}", app, slow_reader_s=slow_reader_s, tls=tls)
        running = Web(gateway, fake, server, recorder)
        try:
            yield running
            await running.until_idle()
        finally:
            await server.stop()
            await links.close()
