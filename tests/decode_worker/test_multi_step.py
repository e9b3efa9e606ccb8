"""Several decode steps in one call: the same tokens, batches and times as step by step.

Not always the same blocks: see decode_worker/repeat.py.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from cluster.planning import virtual_loop
from decode_worker.config import DecodeConfig
from decode_worker.stream import Cancel, Delta, Done, Submit
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout, LayerListener, Row, SampleSpec, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.sampling import SamplingParams
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillService
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.scripted import Gateway
from tests.emulated import layout, running, submit

EOS = 0
VOCAB = 50
MAX_CONTEXT = 120


def step_s(batch: Batch) -> float:
    return 7e-3 + 3e-4 * batch.token_count + 1e-6 * sum(row.end for row in batch.rows)


class LoggingRunner(EmulatedRunner):
    """Remembers when each step began, and its rows."""

    def __init__(self, kv_layout: KVLayout, eos_rate: float = 0.0) -> None:
        super().__init__(kv_layout, step_s, 2, vocab_size=VOCAB, eos_token_id=EOS, eos_rate=eos_rate)
        self.log: list[tuple[float, list[tuple[str, int, int]]]] = []
        self.runs: list[int] = []

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        rows = [(row.seq_id, row.end, len(row.block_ids)) for row in batch.rows]
        self.log.append((asyncio.get_running_loop().time(), rows))
        return await super().run(batch, on_layers)

    async def run_many(self, batch: Batch, max_steps: int) -> list[StepOutput]:
        outs = await super().run_many(batch, max_steps)
        self.runs.append(len(outs))
        return outs


@dataclass(frozen=True)
class Ask:
    """One client: when it asks, what, and when it gives up."""

    at_s: float
    submit: Submit
    cancel_after_s: float | None = None


@dataclass
class Outcome:
    """What a run gave. `log`: the decode worker's steps."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    receipts: dict[str, object] = field(default_factory=dict)
    log: list[tuple[float, list[tuple[str, int, int]]]] = field(default_factory=list)
    free_after: tuple[int, int] = (0, 0)
    runs: list[int] = field(default_factory=list)


def serve(asks: list[Ask], max_steps: int, num_blocks: int, max_batch: int = 64, eos_rate: float = 0.0) -> Outcome:
    outcome = Outcome()
    virtual_loop.run(_serve(asks, max_steps, num_blocks, max_batch, eos_rate, outcome))
    return outcome


async def _serve(
    asks: list[Ask], max_steps: int, num_blocks: int, max_batch: int, eos_rate: float, outcome: Outcome
) -> None:
    network: MemoryNetwork[PrefillService] = MemoryNetwork(Link(latency_s=0.00037, bandwidth_bytes_s=3e6))
    prefill = PrefillWorker(
        LoggingRunner(layout(256)), PrefillConfig(token_budget=16), worker_id="p", max_context=1 << 16
    )
    network.register("p", prefill)
    runner = LoggingRunner(layout(num_blocks), eos_rate)
    config = DecodeConfig(max_steps=max_steps, max_batch=max_batch, local_token_budget=16, schedule_ahead=False)
    worker = DecodeWorker(
        runner,
        config,
        MemoryPrefillTransport(network),
        worker_id="d",
        eos_token_ids=frozenset({EOS}),
        max_context=MAX_CONTEXT,
    )
    loop = asyncio.get_running_loop()
    async with running(prefill.run(), worker.run()):
        gateway = Gateway(worker)
        for ask in asks:
            loop.call_at(ask.at_s, gateway.send, ask.submit)
            if ask.cancel_after_s is not None:
                loop.call_at(ask.at_s + ask.cancel_after_s, gateway.send, Cancel(ask.submit.request_id))
        await asyncio.sleep(asks[-1].at_s + 60)
        await gateway.detach()
        await asyncio.sleep(1)
        worker.check_empty()
        prefill.check_empty()
    # How far those were differs: what is drawn in one go is booked in one go.
    cancelled = {ask.submit.request_id for ask in asks if ask.cancel_after_s is not None}
    for event in gateway.events:
        if isinstance(event, Delta):
            tokens = outcome.tokens.setdefault((event.request_id, event.choice), [])
            tokens += [drawn.token_id for drawn in event.tokens]
        elif isinstance(event, Done) and event.request_id not in cancelled:
            outcome.receipts[event.request_id] = event.receipt
    outcome.log = runner.log
    outcome.runs = runner.runs
    stats = worker.stats()
    outcome.free_after = stats.blocks_free, stats.blocks_cached


def draw_asks(rng: random.Random, count: int, rate_s: float, ignore_eos: float = 0.8) -> list[Ask]:
    beginnings = [[rng.randrange(1, VOCAB) for _ in range(length)] for length in (0, 0, 8, 13, 20)]
    asks: list[Ask] = []
    now = 0.0
    for number in range(count):
        now += rng.expovariate(rate_s)
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=rng.choice([1, 2, rng.randint(1, 60), rng.randint(1, 60)]),
            ignore_eos=rng.random() < ignore_eos,
            frequency_penalty=rng.choice([0.0, 0.0, 0.0, 0.0, 0.5]),
        )
        prompt = rng.choice(beginnings) + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 25))]
        asked = submit(
            prompt,
            f"r{number}",
            params=params,
            seed=rng.getrandbits(30),
            prefill_address=rng.choice(["p", "p", ""]),
            deadline_s=rng.uniform(0.01, 1.0) if rng.random() < 0.15 else None,
        )
        asks.append(Ask(now, asked, rng.uniform(0, 0.8) if rng.random() < 0.15 else None))
    return asks


def draw(seed: int) -> tuple[list[Ask], int, int]:
    rng = random.Random(seed)
    asks = draw_asks(rng, 25, rng.choice([3.0, 15.0, 60.0]), rng.choice([0.8, 1.0, 1.0]))
    return asks, rng.choice([34, 45, 64, 256]), rng.choice([2, 64, 64])


def check(seed: int) -> None:
    asks, num_blocks, max_batch = draw(seed)
    single, multi = (serve(asks, steps, num_blocks, max_batch, eos_rate=0.02) for steps in (1, 64))
    assert multi.log == single.log, "steps begin at other times, or with other rows"
    assert multi.receipts == single.receipts
    assert multi.free_after == single.free_after
    assert not single.runs
    for name, tokens in multi.tokens.items():
        # Whoever was cut off has got what the runs before gave; whoever was not has all of it.
        assert tokens == single.tokens[name][: len(tokens)]
        assert name[0] not in multi.receipts or tokens == single.tokens[name]


@pytest.mark.parametrize("seed", range(100, 108))
def test_it_is_the_same_as_step_by_step(seed: int) -> None:
    check(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(200, 500))
def test_it_is_the_same_as_step_by_step_in_the_long_run(seed: int) -> None:
    check(seed)


def test_steps_that_nobody_disturbs_are_one_run() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    outcome = serve([Ask(0.0, submit(9, params=params, prefill_address="p"))], 64, 64)
    assert outcome.runs == [59], "the first token came with the prompt"
    assert outcome.tokens["r", 0] == LoggingRunner(layout(64)).expected_tokens(range(9), params, 0, 0, 60)


def test_a_run_is_as_long_as_the_config_allows() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    assert serve([Ask(0.0, submit(9, params=params))], 16, 64).runs == [16, 16, 16, 11]


def test_a_newcomer_ends_the_run_after_the_step_under_way() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    asks = [Ask(0.0, submit(9, params=params)), Ask(0.1003, submit([5], "new", params=params))]
    single, multi = (serve(asks, steps, 64) for steps in (1, 64))
    assert multi.log == single.log
    assert multi.runs[0] == sum(1 for began_s, rows in single.log if began_s < 0.1003 and rows[0][1] > 9)


@pytest.mark.parametrize(
    "changed",
    [{"ignore_eos": False}, {"stop_token_ids": (7,)}, {"stop": ("x",)}, {"presence_penalty": 0.5}],
    ids=["eos", "stop token", "stop string", "penalty"],
)
def test_whoever_may_end_by_what_it_draws_is_run_step_by_step(changed: dict[str, object]) -> None:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **changed})  # type: ignore[arg-type]
    other = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    outcome = serve([Ask(0.0, submit(9, params=params)), Ask(0.001, submit([5], "other", params=other))], 64, 64)
    assert all(not any(":r#" in row[0] for row in rows) for _, rows in outcome.log[-3:]), "the other one goes on alone"
    assert len(outcome.runs) == 1


def test_it_excludes_scheduling_ahead() -> None:
    with pytest.raises(ValueError, match="max_steps: got 8, expected 1 with schedule_ahead"):
        DecodeConfig(schedule_ahead=True, max_steps=8)
    assert DecodeConfig(max_steps=8).schedule_ahead == "auto", "which is off where steps are repeated"


def test_the_runner_tells_how_many_steps_a_run_will_have_had() -> None:
    async def main() -> None:
        runner = LoggingRunner(layout(64))
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        row = Row("s", (7,), 0, tuple(range(10)), SampleSpec(params, 0, 0))
        run = asyncio.create_task(runner.run_many(Batch((row,)), 40))
        await asyncio.sleep(2.5 * step_s(Batch((row,))))
        assert runner.cut_short() == 3
        assert runner.cut_short() == 3, "asked again"
        outs = await run
        assert [out.sampled[0][0].token_id for out in outs] == runner.expected_tokens((7,), params, 0, 0, 3)
        assert runner.cut_short() == 3, "after the end"
        assert [rows[0][1:] for _, rows in runner.log] == [(1, 1), (2, 1), (3, 1)], "no block beyond the step"

    virtual_loop.run(main())


def test_the_runner_refuses_what_may_end_by_what_it_draws() -> None:
    async def main() -> None:
        row = Row("s", (7,), 0, (0,), SampleSpec(SamplingParams(), 0, 0))
        with pytest.raises(AssertionError, match="s may end by what it draws, and nobody looks"):
            await LoggingRunner(layout(64)).run_many(Batch((row,)), 2)

    virtual_loop.run(main())
