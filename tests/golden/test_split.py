"""Split prefill/decode over real gRPC says what a single process says: the same tokens, and where the batches have the
same shapes, the same KV and the same logits bit for bit."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest
import pytest_asyncio
import torch

from decode_worker.config import DecodeConfig
from engine.batch import Batch, Row, SampleSpec
from engine.generate import Generator, Prompt
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from engine.torch_runner import TorchRunner
from kvtransfer.frames import End, FirstToken, KVBlocks
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig
from tests import tiny_models
from tests.pair import pair

VOCAB = 97
CONTEXT = 160


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles("hf", tiny_models.save_model("llama", tmp_path_factory.mktemp("llama")))


@pytest_asyncio.fixture
async def runners(files: ModelFiles) -> AsyncIterator[list[TorchRunner]]:
    """Three runners of the same weights: single process, prefill side, decode side."""
    made = [tiny_models.make_runner(files, block_size=4, num_blocks=1024) for _ in range(3)]
    yield made
    for runner in made:
        await runner.close()


def make_prompts(count: int, seed: int) -> list[Prompt]:
    """Random prompts of 1 to 90 tokens, a third of which begin with one of three shared passages. Greedy and sampled,
    one to three choices, penalties now and then."""
    rng = random.Random(seed)
    passages = [tuple(rng.randrange(VOCAB) for _ in range(length)) for length in (16, 33, 48)]
    prompts = []
    for index in range(count):
        head = rng.choice(passages) if rng.random() < 0.35 else ()
        tokens = head + tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 42)))
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_k=rng.choice([-1, 5, 40]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=rng.randrange(1, 25),
        )
        prompts.append(Prompt(tokens, params, seed=index))
    return prompts


async def expected_answers(runner: TorchRunner, prompts: Sequence[Prompt]) -> list[dict[int, list[int]]]:
    answers = await Generator(runner, frozenset(), CONTEXT, prefix_cache=False).generate(prompts)
    return [{answer.choice: answer.token_ids for answer in choices} for choices in answers]


@pytest.mark.parametrize(
    ("budget", "prefix_cache", "decode_blocks", "local", "ahead"),
    [
        pytest.param(512, False, 1024, False, False, id="whole"),
        pytest.param(16, False, 1024, False, True, id="chunked-ahead"),
        pytest.param(16, True, 1024, False, False, id="chunked-cached"),
        pytest.param(24, True, 64, False, True, id="preempted-ahead"),
        pytest.param(24, True, 64, True, False, id="local-preempted"),
    ],
)
async def test_200_prompts_same_tokens(
    files: ModelFiles,
    runners: list[TorchRunner],
    budget: int,
    prefix_cache: bool,
    decode_blocks: int,
    local: bool,
    ahead: bool,
) -> None:
    single, prefill_side, decode_side = runners
    prompts = make_prompts(200, seed=7)
    expected = await expected_answers(single, prompts)
    if decode_blocks < 1024:
        decode_side = tiny_models.make_runner(files, block_size=4, num_blocks=decode_blocks)
    async with pair(
        prefill_side,
        decode_side,
        max_context=CONTEXT,
        prefill_config=PrefillConfig(token_budget=budget, max_batch_prompts=3, max_queued=512),
        decode_config=DecodeConfig(local_token_budget=budget, schedule_ahead=ahead),
        prefix_cache=prefix_cache,
    ) as workers:
        outcomes = await workers.answer(prompts, local=local)
    if decode_blocks < 1024:
        await decode_side.close()
        assert sum(outcome.receipt.preemptions for outcome in outcomes if outcome.receipt) > 10
    assert any(outcome.cached_tokens for outcome in outcomes) == prefix_cache
    for index, (outcome, right) in enumerate(zip(outcomes, expected, strict=True)):
        assert outcome.token_ids == right, f"prompt {index} of {len(prompts[index].token_ids)} tokens"


@pytest.mark.parametrize(("block_sizes"), [(4, 4), (8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 40])
async def test_kv_and_logits_bit_for_bit(files: ModelFiles, block_sizes: tuple[int, int], length: int) -> None:
    """The stream is read by hand into a bare runner, so that its blocks can be looked at."""
    single, prefill_side = (tiny_models.make_runner(files, block_size=block_sizes[0]) for _ in range(2))
    decode_side = tiny_models.make_runner(files, block_size=block_sizes[1])
    prompt = tuple(tiny_models.prompt_of(length))
    spec = SampleSpec(SamplingParams(temperature=0.0), 0, 0)
    single_blocks = tiny_models.scattered_blocks(single, length + 1)
    drawn = await tiny_models.prefill(single, prompt, single_blocks, 16, spec)
    decode_blocks = tiny_models.scattered_blocks(decode_side, length + 1)
    config = PrefillConfig(token_budget=16, max_frame_bytes=4096)
    async with pair(prefill_side, decode_side, max_context=CONTEXT, prefill_config=config) as workers:
        first = await receive(workers.prefill_address, prompt, decode_side, decode_blocks)
        await workers.settle()
    assert first.sampled == drawn
    assert list(prompt_kv(decode_side, decode_blocks, length)) == list(prompt_kv(single, single_blocks, length))
    step = [
        runner.logits(Batch((Row("s", (drawn[0].token_id,), length, blocks, spec),)))
        for runner, blocks in ((single, single_blocks), (decode_side, decode_blocks))
    ]
    if block_sizes[0] == block_sizes[1]:
        assert torch.equal(*step)
    else:
        # Other block sizes pad the attention batch differently: not the same shapes, so only close.
        torch.testing.assert_close(*step)
    for runner in (single, prefill_side, decode_side):
        await runner.close()


async def receive(address: str, prompt: tuple[int, ...], runner: TorchRunner, block_ids: Sequence[int]) -> FirstToken:
    """Reads one KV stream into given blocks."""
    call = PrefillCall("r", prompt, SamplingParams(temperature=0.0), 0, 0, runner.layout)
    transport, size = GrpcPrefillTransport(), runner.layout.block_size
    first: FirstToken | None = None
    async with transport.open(address, call) as frames:
        async for frame in frames:
            if isinstance(frame, KVBlocks):
                target = block_ids[frame.first_token // size : -(-frame.end_token // size)]
                payload = memoryview(frame.payload)
                runner.import_blocks(
                    target, frame.first_token % size, frame.layers, frame.block_tokens, payload, runner.layout.dtype
                )
            elif isinstance(frame, FirstToken):
                first = frame
            elif isinstance(frame, End):
                break
    await transport.close()
    assert first is not None
    return first


def prompt_kv(runner: TorchRunner, block_ids: Sequence[int], tokens: int) -> Iterator[bytes]:
    """The KV bytes of each token in each layer, whatever the block size."""
    layout = runner.layout
    for layer in range(layout.num_layers):
        for token in range(tokens):
            block = [block_ids[token // layout.block_size]]
            slots = token % layout.block_size + 1
            kv = torch.frombuffer(
                bytearray(runner.export_blocks(block, range(layer, layer + 1), slots)), dtype=torch.float32
            )
            yield kv.view(2, slots, -1)[:, -1].numpy().tobytes()
