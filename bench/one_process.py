"""The whole service in one process, over real gRPC, with its insides within reach: for benchmarks and tests that must
see both pools. Nothing here is used by the service itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.gateway_ports import call_limits, port_limits
from cluster.heartbeat import report_forever
from cluster.inference_server import inference_service
from cluster.links import DecodeLinks
from cluster.messages import ModelInfo
from cluster.registry import Registry, Role, WorkerReport
from cluster.registry_server import registry_service, send_heartbeat
from cluster.tracing.decode_spans import DecodeSpans
from cluster.tracing.gateway_spans import GatewaySpans
from cluster.tracing.prefill_spans import PrefillSpans
from cluster.tracing.sampler import Sampler
from cluster.tracing.span import Sink
from decode_worker.config import DecodeConfig
from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.server import decode_service
from decode_worker.worker import DecodeWorker
from engine.batch import Runner
from engine.tokenizer import Tokenizer
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_limits import CallLimits, PortLimits
from kvtransfer.rpc_server import RpcService, start_server
from prefill_worker.config import PrefillConfig
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker


@dataclass(frozen=True, slots=True)
class Service:
    """A running service. `address` is the gateway's."""

    gateway: Gateway
    prefill: tuple[PrefillWorker, ...]
    decode: tuple[DecodeWorker, ...]
    address: str

    def check_empty(self) -> None:
        """Asserts that no request holds anything anywhere."""
        self.gateway.check_empty()
        for prefill in self.prefill:
            prefill.check_empty()
        for decode in self.decode:
            decode.check_empty()


@asynccontextmanager
async def serving(
    model: ModelInfo,
    tokenizer: Tokenizer | None,
    prefill_runners: Sequence[Runner],
    decode_runners: Sequence[Runner],
    *,
    gateway_config: GatewayConfig | None = None,
    prefill_config: PrefillConfig | None = None,
    decode_config: DecodeConfig | None = None,
    prefix_cache: bool = True,
    limits: CallLimits | None = None,
    port: PortLimits | None = None,
    sampler: Sampler | None = None,
    sink_of: Callable[[str], Sink] | None = None,
) -> AsyncIterator[Service]:
    """Runs a gateway and one worker per runner until the context ends. A worker's crash is raised at the end. `limits`
    of clients' calls, and of the gateway's port, are the service's own where None are given. `sampler` says which
    requests are traced, `sink_of` where each process's spans go."""
    async with AsyncExitStack() as stack:
        config = gateway_config or GatewayConfig(heartbeat_interval_s=0.2, fresh_s=2.0)
        links = DecodeLinks(transport := GrpcDecodeTransport())
        stack.push_async_callback(transport.close)
        stack.push_async_callback(links.close)
        registry = Registry(config.fresh_s, config.expire_s)
        gateway = Gateway(tokenizer, model, registry, links, config, random.Random(0), sampler=sampler)
        if sink_of is not None:
            gateway.endings.observe(GatewaySpans(sink_of("gateway"), model.name))
        inference = inference_service(gateway, max_prompt_chars=config.max_prompt_chars)
        services = [inference.within(limits or call_limits(config)), registry_service(gateway.heartbeat)]
        server = await start_server("127.0.0.1:0", services, limits=port or port_limits(config))
        stack.push_async_callback(server.stop)
        join = partial(_join, stack, model.name, server.address)
        prefill: list[PrefillWorker] = []
        for index, runner in enumerate(prefill_runners):
            worker_id = f"prefill-{index}"
            worker = PrefillWorker(
                runner,
                prefill_config or PrefillConfig(),
                worker_id=worker_id,
                max_context=model.max_context,
                prefix_cache=prefix_cache,
                observer=None if sink_of is None else PrefillSpans(sink_of(worker_id)),
            )
            await join("prefill", worker, prefill_service(worker))
            prefill.append(worker)
        decode: list[DecodeWorker] = []
        for index, runner in enumerate(decode_runners):
            pulls, worker_id = GrpcPrefillTransport(), f"decode-{index}"
            stack.push_async_callback(pulls.close)
            decoder = DecodeWorker(
                runner,
                decode_config or DecodeConfig(),
                pulls,
                worker_id=worker_id,
                eos_token_ids=frozenset(model.eos_token_ids),
                max_context=model.max_context,
                prefix_cache=prefix_cache,
                observer=None if sink_of is None else DecodeSpans(sink_of(worker_id)),
            )
            await join("decode", decoder, decode_service(decoder))
            decode.append(decoder)
        # Every worker has said that it is there.
        while len(gateway.status(0.0).workers) < len(prefill) + len(decode):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield Service(gateway, tuple(prefill), tuple(decode), server.address)


async def _join(
    stack: AsyncExitStack,
    model: str,
    gateway: str,
    role: Role,
    worker: PrefillWorker | DecodeWorker,
    service: RpcService,
) -> None:
    server = await start_server("127.0.0.1:0", [service])
    stack.push_async_callback(server.stop)
    channels = Channels()
    stack.push_async_callback(channels.close)
    send = partial(send_heartbeat, channels, gateway)

    def report() -> WorkerReport:
        return WorkerReport(worker.worker_id, role, server.address, 1, model, worker.stats())

    tasks = [
        asyncio.create_task(worker.run()),
        asyncio.create_task(report_forever(report, send, changed=asyncio.Event(), rng=random.Random(1))),
    ]

    async def end() -> None:
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError(f"{worker.worker_id} ended by itself") from error

    stack.push_async_callback(end)
