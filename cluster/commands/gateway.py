"""`tandem gateway`: the gateway alone. Whoever starts the workers, they report to it."""

from __future__ import annotations

import asyncio

from rich.console import Console

from cluster.collector import set_aside_what_is_loaded
from cluster.config import TandemConfig
from cluster.gateway_process import running_gateway
from cluster.progress import Progress
from engine.model_source import resolve


async def keep_gateway(config: TandemConfig) -> None:
    """Never returns; cancelling it lets running requests end, for `cluster.drain_s`."""
    progress = Progress(Console(highlight=False))
    async with progress.step("model files") as say:
        files = await asyncio.to_thread(resolve, config.engine.model, say)
    async with running_gateway(config, files, config.cluster.grpc_host or "127.0.0.1") as running:
        set_aside_what_is_loaded()
        print(f"gateway for {running.gateway.model.name} at {running.address}")
        if running.http_address:
            scheme = "http" if config.security.client_certs is None else "https"
            print(f"OpenAI's interface at {scheme}://{running.http_address}/v1")
            print(f"a page that shows what it does at {scheme}://{running.http_address}/")
        print(f"workers report to {running.registry_address}", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            progress.line("shutting down")
