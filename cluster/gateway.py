"""The gateway: takes requests, finds workers for them, and gives their answers back as text.

    generate():  validate, tokenize ─▶ gateway queue ─▶ route ─▶ submit ─▶ deltas to text ─▶ Complete
                 (intake.py)           (admission.py)   (router.py)        (answer.py)

All that a request holds (its id, its place, its load in the ledger, its run on a worker) belongs to `generate`'s
generator and goes with it, however that ends. Plain asyncio: knows neither gRPC nor HTTP.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.admission import Admission
from cluster.answer import Answer
from cluster.deadline import within
from cluster.gateway_config import GatewayConfig
from cluster.intake import prompt_token_ids
from cluster.ledger import Ledger
from cluster.links import DecodeLinks
from cluster.messages import Chunk, ClusterStatus, Complete, GenerateRequest, ModelInfo, Usage, WorkerStatus
from cluster.registry import HeartbeatReply, KnownWorker, Registry, WorkerReport
from cluster.router import Defer, Reject, Route, RouteQuery, choose
from decode_worker.stream import Delta, Done, Failed, Submit
from engine.errors import DeadlineExceeded, InvalidArgument, Unavailable
from engine.request import Receipt
from engine.tokenizer import Tokenizer


class Gateway:
    """Serves one model. `tokenizer` None serves token ids only, and answers without text."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        model: ModelInfo,
        registry: Registry,
        links: DecodeLinks,
        config: GatewayConfig,
        rng: random.Random,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self._registry = registry
        self._links = links
        self._config = config
        self._rng = rng
        self._admission = Admission(config.max_running, config.max_waiting)
        self._ledger = Ledger()
        self._request_ids: set[str] = set()
        self._finished_count = 0
        # Set and replaced by every heartbeat, so that each waits for news from now on.
        self._heard = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Complete]:
        """Runs one request: Chunks as its tokens come, then one Complete. Closing the generator cancels everything.

        Raises InvalidArgument or NotFound for a bad request, Overloaded when too many wait, Unavailable when no worker
        can be had or one is lost, DeadlineExceeded naming the phase, and whatever else the workers report.
        """
        clock = asyncio.get_running_loop().time
        arrived_s = clock()
        token_ids = prompt_token_ids(request, self.model, self.tokenizer, self._config.max_prompt_chars)
        allowed_s = request.deadline_s or self._config.default_deadline_s
        deadline_s = None if allowed_s is None else arrived_s + allowed_s
        answer = Answer(request.params, self.tokenizer)
        done: Done | None = None
        with self._own_id(request.request_id) as request_id:
            async with self._admission.place(deadline_s):
                route = await within(deadline_s, "routing", self._route(request, len(token_ids)))
                submitted_s = clock()
                submit = self._submit(request, request_id, token_ids, route, deadline_s)
                with self._ledger.entry(route, len(token_ids), submitted_s) as entry:
                    async with self._links.submit(route.decode_address, submit) as events:
                        while done is None and not answer.was_cut:
                            phase = "prefill" if answer.first_s is None else "decode"
                            match await within(deadline_s, phase, anext(events)):
                                case Delta() as delta:
                                    entry.is_prefilled = True
                                    chunk = answer.add(delta, clock())
                                    if chunk is not None:
                                        yield chunk
                                case Done() as done:
                                    pass
                                case Failed(error=error):
                                    raise error
        # Only now, with nothing held any more: a reader may take its time over the last part.
        self._finished_count += 1
        yield _complete(answer, done, len(token_ids), route, arrived_s, submitted_s)

    def heartbeat(self, report: WorkerReport) -> HeartbeatReply:
        """Takes a worker's report; returns what is asked of the worker. Every report must come through here:
        requests that wait for a worker are woken by it. Raises what `Registry.heartbeat` does, and InvalidArgument for
        a worker with another model."""
        if report.model != self.model.name:
            raise InvalidArgument("model", report.model, f"{self.model.name!r}, which this gateway serves")
        self._registry.heartbeat(report, asyncio.get_running_loop().time())
        self._heard.set()
        self._heard = asyncio.Event()
        return HeartbeatReply(self._config.heartbeat_interval_s)

    def new_request_id(self) -> str:
        """An id that no running request has."""
        while (request_id := f"{self._rng.getrandbits(64):016x}") in self._request_ids:
            pass
        return request_id

    def status(self, now: float) -> ClusterStatus:
        """The cluster as this gateway sees it; `now` on the running loop's clock."""
        workers = [_worker_status(worker, self._registry, now) for worker in self._registry.all(now)]
        return ClusterStatus(
            model=self.model.name,
            workers=tuple(sorted(workers, key=lambda worker: (worker.role, worker.worker_id))),
            requests_running=self._admission.running_count,
            requests_waiting=self._admission.waiting_count,
            requests_finished=self._finished_count,
        )

    def check_empty(self) -> None:
        """Asserts that no request holds anything here."""
        assert not self._request_ids, f"requests still run: {sorted(self._request_ids)}"
        held = (self._admission.running_count, self._admission.waiting_count)
        assert held == (0, 0), f"(running, waiting) places are still held: {held}"
        self._ledger.check_empty()

    @contextmanager
    def _own_id(self, request_id: str) -> Iterator[str]:
        if request_id in self._request_ids:
            raise InvalidArgument("request_id", request_id, "an id that no running request has")
        request_id = request_id or self.new_request_id()
        self._request_ids.add(request_id)
        try:
            yield request_id
        finally:
            self._request_ids.remove(request_id)

    async def _route(self, request: GenerateRequest, prompt_tokens: int) -> Route:
        """Raises InvalidArgument for what no worker could take, Unavailable when none came within `route_wait_s`."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._config.route_wait_s
        query = RouteQuery(prompt_tokens, prompt_tokens + request.params.max_tokens)
        while True:
            now = loop.time()
            fresh = [*self._registry.fresh("prefill", now), *self._registry.fresh("decode", now)]
            loads = [self._ledger.load(worker) for worker in fresh]
            match choose(query, loads, now, self._rng, config=self._config.router):
                case Route() as route:
                    return route
                case Reject() as no:
                    raise InvalidArgument(no.field, no.value, no.expected)
                case Defer(reason=reason) if now >= give_up_s:
                    raise Unavailable(f"{reason}; waited {self._config.route_wait_s:g} s for one")
            try:
                async with asyncio.timeout_at(give_up_s):
                    await self._heard.wait()
            except TimeoutError:
                continue

    def _submit(
        self,
        request: GenerateRequest,
        request_id: str,
        token_ids: tuple[int, ...],
        route: Route,
        deadline_s: float | None,
    ) -> Submit:
        left_s = None if deadline_s is None else deadline_s - asyncio.get_running_loop().time()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("routing")
        seed = request.params.seed
        return Submit(
            request_id=request_id,
            token_ids=token_ids,
            params=request.params,
            seed=self._rng.getrandbits(63) if seed is None else seed,
            prefill_address=route.prefill_address,
            deadline_s=left_s,
            salt=request.salt,
        )


def _complete(
    answer: Answer, done: Done | None, prompt_tokens: int, route: Route, arrived_s: float, submitted_s: float
) -> Complete:
    """`done` is None where a stop string ended the answer here: then the worker's part of the receipt is not known."""
    receipt = replace(
        done.receipt if done is not None else Receipt(),
        gateway_queue_s=submitted_s - arrived_s,
        ttft_s=0.0 if answer.first_s is None else answer.first_s - arrived_s,
        tpot_s=answer.tpot_s,
        prefill_worker=route.prefill_id,
        decode_worker=route.decode_id,
    )
    cached_tokens = done.cached_tokens if done is not None else 0
    return Complete(answer.choices(), Usage(prompt_tokens, answer.token_count, cached_tokens), receipt)


def _worker_status(worker: KnownWorker, registry: Registry, now: float) -> WorkerStatus:
    report, stats = worker.report, worker.report.stats
    return WorkerStatus(
        worker_id=report.worker_id,
        role=report.role,
        address=report.address,
        incarnation=report.incarnation,
        heartbeat_age_s=now - worker.heard_s,
        fresh=registry.is_fresh(worker, now),
        draining=stats.draining,
        running=stats.running,
        waiting=stats.waiting,
        queued_tokens=stats.queued_tokens,
        blocks_total=stats.blocks_total,
        blocks_free=stats.blocks_free,
        blocks_cached=stats.blocks_cached,
        steps=stats.steps,
    )
