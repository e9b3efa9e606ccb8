"""One prefill and one decode worker in this process, with real gRPC between them, and a caller of the decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from decode_worker.config import DecodeConfig
from decode_worker.stream import Command, Delta, Done, Failed, Submit
from decode_worker.worker import DecodeWorker
from engine.batch import Runner
from engine.generate import Prompt
from engine.request import Receipt
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_server import start_server
from prefill_worker.config import PrefillConfig
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker


@dataclass
class Outcome:
    """What came of one request: token ids per choice, and how it ended."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    error: Exception | None = None
    receipt: Receipt | None = None
    cached_tokens: int = 0


@dataclass
class Pair:
    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_address: str

    async def answer(self, prompts: Sequence[Prompt], *, local: bool = False) -> list[Outcome]:
        """Submits all prompts at once on one token stream and waits for all of them."""
        address = "" if local else self.prefill_address
        return await self.ask([Submit("", each.token_ids, each.params, each.seed, address) for each in prompts])

    async def ask(self, submits: Sequence[Submit], *, may_fail: bool = False) -> list[Outcome]:
        """The same; the requests are named by their numbers. Raises what one failed with, unless some `may_fail`."""
        outcomes = [Outcome() for _ in submits]
        stop = asyncio.Event()

        async def commands() -> AsyncIterator[Command]:
            for index, submit in enumerate(submits):
                yield replace(submit, request_id=str(index))
            await stop.wait()

        unfinished = len(submits)
        async for frame in self.decode.attach(commands()):
            for event in frame.events:
                outcome = outcomes[int(event.request_id)]
                match event:
                    case Delta(choice=choice, tokens=tokens):
                        outcome.token_ids.setdefault(choice, []).extend(token.token_id for token in tokens)
                    case Done(cached_tokens=cached, receipt=receipt):
                        outcome.cached_tokens, outcome.receipt = cached, receipt
                        unfinished -= 1
                    case Failed(error=error):
                        if not may_fail:
                            raise error
                        outcome.error = error
                        unfinished -= 1
            if not unfinished:
                stop.set()
        await self.settle()
        return outcomes

    async def settle(self) -> None:
        """Waits until the workers have given everything back, and asserts that they have."""
        for worker in (self.prefill, self.decode):
            for _ in range(200):
                if not worker.stats().running and not worker.stats().waiting:
                    break
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        self.prefill.check_empty()
        self.decode.check_empty()


@asynccontextmanager
async def pair(
    prefill_runner: Runner,
    decode_runner: Runner,
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    max_context: int,
    prefill_config: PrefillConfig | None = None,
    decode_config: DecodeConfig | None = None,
    prefix_cache: bool = True,
) -> AsyncIterator[Pair]:
    prefill = PrefillWorker(
        prefill_runner,
        prefill_config or PrefillConfig(),
        worker_id="p0",
        max_context=max_context,
        prefix_cache=prefix_cache,
    )
    transport = GrpcPrefillTransport()
    decode = DecodeWorker(
        decode_runner,
        decode_config or DecodeConfig(),
        transport,
        worker_id="d0",
        eos_token_ids=eos_token_ids,
        max_context=max_context,
        prefix_cache=prefix_cache,
    )
    server = await start_server("127.0.0.1:0", [prefill_service(prefill)])
    loops = [asyncio.create_task(prefill.run()), asyncio.create_task(decode.run())]
    try:
        yield Pair(prefill, decode, server.address)
    finally:
        for loop in loops:
            loop.cancel()
        ended = await asyncio.gather(*loops, return_exceptions=True)
        await transport.close()
        await server.stop()
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise error if isinstance(error, BaseException) else AssertionError("a worker's loop returned")
