"""Answers held to a structure are the same from one process, from a prefill and a decode worker, and from a worker that
goes on where another one was lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import jsonschema
import pytest
import pytest_asyncio

from decode_worker.config import DecodeConfig
from decode_worker.stream import Submit
from engine.errors import InvalidArgument
from engine.generate import Generator, Prompt
from engine.guidance import Guides
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from engine.structure import Structure
from engine.torch_runner import TorchRunner
from tests import tiny_models
from tests.engine.ascii_tokenizer import END, ascii_tokenizer
from tests.pair import pair

TOKENIZER = ascii_tokenizer()
CONTEXT = 160
ENDS = frozenset({END})
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
STRUCTURES = (
    Structure("json_schema", json.dumps(SCHEMA)),
    Structure("regex", "[A-C]{2,8}-[0-9]{1,3}"),
    Structure("choice", '["one", "two", "twenty"]'),
    None,
)
PROMPTS = [
    Prompt(
        tuple((7 * index + step) % 90 for step in range(5 + 3 * index)),
        SamplingParams(temperature=temperature, max_tokens=60, structure=structure, n=n),
        seed=index,
    )
    for temperature in (0.0, 1.0)
    for index, structure in enumerate(STRUCTURES)
    for n in (1, 3)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return ModelFiles("hf", tiny_models.save_model("llama", tmp_path_factory.mktemp("llama")))


@pytest_asyncio.fixture
async def runners(files: ModelFiles) -> AsyncIterator[list[TorchRunner]]:
    """Of the same weights, each with a guide of its own: single process, prefill side, decode side."""
    made = [tiny_models.make_runner(files, num_blocks=1024, guide=Guides(TOKENIZER, END + 1, (END,))) for _ in range(3)]
    yield made
    for runner in made:
        await runner.close()


async def expected(runner: TorchRunner) -> list[list[list[int]]]:
    answers = await Generator(runner, ENDS, CONTEXT, prefix_cache=False).generate(PROMPTS)
    return [[answer.token_ids for answer in choices] for choices in answers]


async def test_the_split_says_the_same(runners: list[TorchRunner]) -> None:
    single, prefill_side, decode_side = runners
    right = await expected(single)
    whole = 0
    for prompt, choices in zip(PROMPTS, right, strict=True):
        for token_ids in choices:
            if prompt.params.structure == STRUCTURES[0] and token_ids[-1] == END:
                jsonschema.validate(json.loads(TOKENIZER.decode(token_ids)), SCHEMA)
                whole += 1
    assert whole, "some answers come to their end"
    for local in (False, True):
        for ahead in (False, True):
            config = DecodeConfig(schedule_ahead=ahead)
            async with pair(
                prefill_side, decode_side, eos_token_ids=ENDS, max_context=CONTEXT, decode_config=config
            ) as workers:
                outcomes = await workers.answer(PROMPTS, local=local)
            assert [[outcome.token_ids[n] for n in range(len(outcome.token_ids))] for outcome in outcomes] == right


async def test_another_worker_goes_on_with_it(runners: list[TorchRunner]) -> None:
    single, prefill_side, decode_side = runners
    right = await expected(single)
    submits, rest = [], []
    async with pair(prefill_side, decode_side, eos_token_ids=ENDS, max_context=CONTEXT) as workers:
        for prompt, choices in zip(PROMPTS, right, strict=True):
            if prompt.params.n > 1:
                continue
            for given in {1, 2, len(choices[0]) // 2, len(choices[0]) - 1} - {0}:
                token_ids = (*prompt.token_ids, *choices[0][:given])
                address = workers.prefill_address if given % 2 else ""
                count = len(prompt.token_ids)
                submits.append(Submit("", token_ids, prompt.params, prompt.seed, address, prompt_tokens=count))
                rest.append(choices[0][given:])
        outcomes = await workers.ask(submits)
    assert [outcome.token_ids[0] for outcome in outcomes] == rest


async def test_an_answer_that_cannot_be_held_to_its_structure_fails_alone(runners: list[TorchRunner]) -> None:
    """It does not look complete, wherever the structure is lost: by the first token or by the second, or where another
    worker goes on."""
    single, prefill_side, decode_side = runners
    right = [answers[0] for answers in await expected(single)]
    structures = (
        Structure("regex", "é"),
        Structure("regex", "aé"),
        Structure("grammar", 'start: <|nope|> "a"'),
        Structure("json_schema", "{"),
    )
    for ahead in (False, True):
        config = DecodeConfig(schedule_ahead=ahead)
        async with pair(
            prefill_side, decode_side, eos_token_ids=ENDS, max_context=CONTEXT, decode_config=config
        ) as workers:
            good = [Submit("", each.token_ids, each.params, each.seed) for each in PROMPTS]
            bad = [
                Submit(
                    "", (*range(6), *so_far), SamplingParams(n=n, structure=structure), 1, address, prompt_tokens=count
                )
                for structure in structures
                for address in ("", workers.prefill_address)
                for n, so_far, count in ((1, (), 0), (3, (), 0), (1, TOKENIZER.encode("a"), 6))
            ]
            outcomes = await workers.ask([*good, *bad], may_fail=True)
            assert [outcome.token_ids[0] for outcome in outcomes[: len(good)]] == right
            for submit, outcome in zip(bad, outcomes[len(good) :], strict=True):
                assert isinstance(outcome.error, InvalidArgument), submit
                assert outcome.error.field == "sampling_params.structure"
                assert all(END not in token_ids for token_ids in outcome.token_ids.values())


async def test_a_worker_without_a_tokenizer_refuses(files: ModelFiles) -> None:
    runner = tiny_models.make_runner(files)
    try:
        async with pair(runner, runner, eos_token_ids=ENDS, max_context=CONTEXT) as workers:
            with pytest.raises(
                InvalidArgument, match="structure: got 'json_schema', expected none: this worker has no"
            ):
                await workers.answer(PROMPTS[:1])
    finally:
        await runner.close()
