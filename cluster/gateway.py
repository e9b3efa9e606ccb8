"""The gateway: takes requests, finds workers for them, and gives their answers back as text.

    generate():  validate, tokenize ─▶ gateway queue ─▶ route, or refuse ─▶ submit ─▶ deltas to text ─▶ Complete
                 (intake.py)           (admission.py)   (dispatcher.py)               (answer.py)

All that a request holds (its id, its place, its booking, its run on a worker) belongs to `generate`'s generator and
goes with it, however that ends. How it ended is told (endings.py). Plain asyncio: knows neither gRPC nor HTTP.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

from cluster.admission import Admission, Place
from cluster.answer import Answer
from cluster.breakers import Breakers
from cluster.cluster_status import cluster_status
from cluster.dispatcher import Dispatcher
from cluster.endings import Endings
from cluster.failures import Failures
from cluster.gateway_config import GatewayConfig
from cluster.gateway_seams import RoleController, Tickets
from cluster.intake import fitted, is_conversation, prompt_token_ids, text_chars
from cluster.ledger import Ledger
from cluster.links import SHUTTING_DOWN, DecodeLinks, Mailbox
from cluster.messages import Chunk, ClusterStatus, Complete, GenerateRequest, ModelInfo
from cluster.outcomes import Outcomes
from cluster.prefix_index import PrefixIndex
from cluster.registry import HeartbeatReply, Registry, WorkerReport
from cluster.request_ids import RequestIds
from cluster.routing.booking import Booking
from cluster.routing.costs import CostLike, RoleCosts, worker_costs
from cluster.routing.make_router import make_router
from cluster.routing.view import ClusterView
from cluster.run import Run
from cluster.security.quotas import Quotas
from cluster.security.tenant_salts import TenantSalts
from cluster.text_queue import TextQueue
from cluster.token_flow import TokenFlow
from cluster.tracing.sampler import Sampler
from decode_worker.stream import Delta, Done, Event, Failed, Submit
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded, TandemError, Unavailable
from engine.tokenizer import Tokenizer

# How long a client may wait for its usage and receipt once its answer is whole. A worker says it at once.
LAST_WORD_S = 0.5


class Gateway:
    """Serves one model. `tokenizer` None serves token ids only, and answers without text.

    `cost` predicts the workers' times, one cost model for all or one per role; None goes by the rates they report.
    `controller` says which role each worker is to have; None leaves them as they are. `tickets` allow KV streams; None
    where prefill workers do not ask. `salts` keep the prefixes of tenants apart; None leaves requests their own.
    `sampler` says which requests are traced; None: they carry their clients' traces on, and no more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        model: ModelInfo,
        registry: Registry,
        links: DecodeLinks,
        config: GatewayConfig,
        rng: random.Random,
        cost: CostLike | RoleCosts | None = None,
        controller: RoleController | None = None,
        tickets: Tickets | None = None,
        salts: TenantSalts | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.texts = TextQueue(config.max_prompt_chars)
        self.outcomes = Outcomes(config.outcome_window_s)
        self.flow = TokenFlow()
        self.controller = controller
        self.quotas = Quotas(config.quota, config.tenants)
        self._salts = salts
        self._sampler = sampler
        self._registry = registry
        self._links = links
        self._config = config
        self._tickets = tickets
        self._rng = rng
        self._admission = Admission(config.max_running, config.max_waiting)
        self.view = ClusterView(
            worker_costs(cost, config.router),
            config.fresh_s,
            config.expire_s,
            config.router.typical_answer_tokens,
            PrefixIndex(config.router.prefix_entries),
        )
        self.router = make_router(config.router)
        failures = config.failures
        self._breakers = Breakers(self.view, rng, failures.shun_s, failures.max_shun_s, lambda: self._dispatcher.news())
        self._failures = Failures(failures, self.view, self._breakers, links, rng)
        self._ledger = Ledger(self.view, self.router, self._breakers)
        self.endings = Endings(self.outcomes, self._ledger, controller)
        self._dispatcher = Dispatcher(self.view, self.router, self._ledger, rng, config.router.lead_s)
        self._request_ids = RequestIds(rng)
        self._is_draining = False

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Complete]:
        """Runs one request: Chunks as its tokens come, then one Complete. Closing the generator cancels everything.

        Raises InvalidArgument or NotFound for a bad request, Overloaded when too many wait or its objectives are out of
        reach, Unavailable when no worker can be had, DeadlineExceeded naming the phase, and whatever else the workers
        report, or the loss of one, where no other may go on (failures.py).
        """
        if self._is_draining:
            raise Unavailable(SHUTTING_DOWN)
        # Its text may take a while: who drains is to wait for it.
        with self._request_ids.to_come():
            run = await self._start(request)
        try:
            own_id = self._request_ids.own(request.tenant, request.request_id, is_shared=request.shares_id)
            with own_id as run.request_id:
                async with self._admission.place(run.deadline_s, self._give_up_s(run)) as place:
                    run.admitted_s = asyncio.get_running_loop().time()
                    while not run.is_over:
                        # What a worker has had is worth more waiting than what can be told to come again.
                        wait_s = self._config.route_wait_s if run.booking is None else self._config.failures.wait_s
                        booking = await self._dispatcher.place(run.query(), run.deadline_s, wait_s)
                        failure: TandemError | None = None
                        try:
                            async with aclosing(self._attempt(run, booking, place)) as chunks:
                                async for chunk in chunks:
                                    yield chunk
                        except TandemError as error:
                            failure = error
                        finally:
                            run.attempt_ends(asyncio.get_running_loop().time(), failure)
                            self._end(booking)
                        if failure is not None:
                            await self._failures.recover(run, booking, failure)
        except BaseException as error:
            self.endings.broke_off(run, error)
            raise
        finally:
            run.charge.settle(run.used_tokens, asyncio.get_running_loop().time())
        # Only now, with nothing held any more: a reader may take its time over the last part.
        self.endings.finished(run)
        yield run.complete()

    def heartbeat(self, report: WorkerReport) -> HeartbeatReply:
        """Takes a worker's report; returns what is asked of the worker. Every report must come through here:
        requests that wait for a worker are woken by it. Raises what `Registry.heartbeat` does, and InvalidArgument for
        a worker with another model."""
        if report.model != self.model.name:
            raise InvalidArgument("model", report.model, f"{self.model.name!r}, which this gateway serves")
        if self._tickets is not None:
            self._tickets.check_report(report)
        now = asyncio.get_running_loop().time()
        self._registry.heartbeat(report, now, is_lost=self._breakers.suspects(report.worker_id))
        knows_cache = self.view.report(report, now)
        role = self.controller.wanted_role(report.worker_id) if self.controller is not None else ""
        if role and role != report.role:
            self.view.drains(report.worker_id)
        self._dispatcher.news()
        on_its_way = self.on_its_way(report.worker_id) if report.stats.draining else 0
        ticket_key = self._tickets.public_key if self._tickets is not None else b""
        interval_s = self._config.heartbeat_interval_s
        return HeartbeatReply(interval_s, role, not knows_cache, on_its_way, ticket_key=ticket_key, now_s=now)

    async def drain(self, limit_s: float) -> None:
        """Refuses new requests from now on, as Unavailable, and waits until those that are here have ended. After
        `limit_s` they end so too."""
        self._is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._request_ids.until_none()
        self._dispatcher.close(Unavailable(SHUTTING_DOWN))
        await self._links.close()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because it is about to end."""
        return self._is_draining

    def on_its_way(self, worker_id: str) -> int:
        """Requests that were sent to a worker and are not over there."""
        return self._ledger.on_its_way(worker_id)

    def new_request_id(self, tenant: str = "") -> str:
        """An id that no running request of the tenant has."""
        return self._request_ids.new(tenant)

    def status(self, now: float) -> ClusterStatus:
        """The cluster as this gateway sees it; `now` on the running loop's clock."""
        over_quota = self.quotas.refused_count
        parts = (self.model.name, self._registry, self._admission, self.outcomes, self.router.name)
        return cluster_status(*parts, over_quota, self.flow, now)

    def check_empty(self) -> None:
        """Asserts that no request holds anything here."""
        self._request_ids.check_empty()
        held = (self._admission.running_count, self._admission.waiting_count)
        assert held == (0, 0), f"(running, waiting) places are still held: {held}"
        self._dispatcher.check_empty()
        self._ledger.check_empty()
        self.quotas.check_empty()

    # ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _start(self, request: GenerateRequest) -> Run:
        """Raises InvalidArgument or NotFound: what is no request in good order does not count as one. Overloaded where
        too many long texts have come, which counts as a rejection, or where it is over its tenant's quota, which is no
        miss of the cluster's, and no demand that it could meet."""
        now = asyncio.get_running_loop().time()
        intake = partial(prompt_token_ids, request, self.model, self.tokenizer, self._config.max_prompt_chars)
        chars = text_chars(request.prompt, request.tools)
        try:
            # To check a structure may take as long as to tokenize a long text.
            token_ids = await self.texts.run(chars, intake, is_long=request.params.structure is not None)
        except Overloaded as error:
            self.endings.refused(request, now, error)
            raise
        is_chat = is_conversation(request.prompt)
        # Its text has been of use, and may be long.
        room_tokens = self.view.room_tokens(len(token_ids), self.model.max_context) - len(token_ids)
        quota_tokens = self.quotas.fill_tokens(request.tenant, len(token_ids)) / request.params.n
        request = replace(fitted(request, int(min(room_tokens, quota_tokens))), prompt=(), tools=())
        objectives = self._config.objectives_of(request.objectives, request.slo_class)
        on_failure = self._config.on_failure_of(request.on_failure)
        allowed_s = request.deadline_s or self._config.default_deadline_s or math.inf
        deadline_s = now + min(allowed_s, self._config.max_stream_s)
        if self._salts is not None:
            request = replace(request, salt=self._salts.salt(request.tenant, request.salt))
        params = request.params
        answer = Answer(params, self.tokenizer, self.flow)
        # Last, as nothing may fail between here and where it is settled.
        charge = self.quotas.charge(request.tenant, len(token_ids), params.n * params.max_tokens, now)
        if self.controller is not None:
            self.controller.arrived(len(token_ids), params.n * params.max_tokens, objectives)
        trace = request.trace if self._sampler is None else self._sampler.begin(request.trace)
        parts = (objectives, on_failure, now, deadline_s, answer, charge)
        return Run(request, token_ids, *parts, trace=trace, is_chat=is_chat)

    def _give_up_s(self, run: Run) -> float:
        """Until when a place is of use. The baselines serve a request whose objective has passed as any other."""
        if run.objectives.ttft_s is None or not self.router.refuses:
            return math.inf
        return run.arrived_s + run.objectives.ttft_s

    async def _attempt(self, run: Run, booking: Booking, place: Place) -> AsyncGenerator[Chunk, None]:
        """Hands a run to a worker, for what is missing of its answer. Raises what the worker, or its loss, ends it
        with."""
        run.booking = booking
        if run.seed is None:
            run.seed = self._rng.getrandbits(63)
        submit = run.submit(booking, asyncio.get_running_loop().time())
        notice = partial(self._notice, run, booking, place)
        link = self._links.submit(booking.route.decode_address, submit, notice, partial(self._ticket, booking))
        async with link as mailbox:
            async with _deadline(run, mailbox):
                while not run.is_over:
                    event = await anext(mailbox)
                    chunk = self._take(run, event, mailbox.came_s)
                    if chunk is not None:
                        yield chunk
            if run.done is None:
                run.done = await _last_word(mailbox)

    def _ticket(self, booking: Booking, submit: Submit) -> bytes:
        if self._tickets is None or booking.route.is_local:
            return b""
        return self._tickets.ticket(booking.route, submit, asyncio.get_running_loop().time())

    def _notice(self, run: Run, booking: Booking, place: Place, event: Event) -> None:
        """What the cluster's books need of an event, when it comes: its client may read it much later, or never.
        Raises Unavailable for one that is not to be believed."""
        now = asyncio.get_running_loop().time()
        if isinstance(event, Delta):
            run.believe(event, self.model.vocab_size)
        match event:
            case Delta(tokens=tokens) if tokens:
                if booking.first_s is None:
                    self._ledger.first_token(booking, now)
                    if not run.is_resumed:
                        self.flow.first_token(len(run.token_ids), now - run.arrived_s)
                    self._dispatcher.news()
                self._ledger.drew(booking, len(tokens), now)
            case Done():
                # Before whoever waits is asked for: how long answers are goes into every decision.
                self._ledger.answered(booking)
                self._end(booking)
                place.give_back()
            case Failed(error=error):
                self._failures.blame(booking, error)
                self._end(booking)

    @staticmethod
    def _take(run: Run, event: Event, now: float) -> Chunk | None:
        match event:
            case Delta() as delta:
                return run.answer.add(delta, now)
            case Failed(error=error):
                raise error
            case Done():
                run.done = event
        return None

    def _end(self, booking: Booking) -> None:
        self._ledger.end(booking, asyncio.get_running_loop().time())
        self._dispatcher.news()


async def _last_word(mailbox: Mailbox) -> Done | None:
    """Has the worker stop what has ended only here, by a stop string, and waits a moment for what it has to say."""
    mailbox.cancel()
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORD_S):
            async for event in mailbox:
                if isinstance(event, Done):
                    return event
    return None


@asynccontextmanager
async def _deadline(run: Run, mailbox: Mailbox) -> AsyncIterator[None]:
    """Ends the reading of an answer at its request's deadline: one timer for all of its parts."""
    timer = None
    if run.deadline_s is not None:
        timer = asyncio.get_running_loop().call_at(run.deadline_s, mailbox.expire)
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded("prefill" if run.answer.first_s is None else "decode") from None
    finally:
        if timer is not None:
            timer.cancel()
