"""The emulated runner: the right answer however a context is cut, paged, copied or moved, or a loud error."""

import asyncio
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planning import virtual_loop
from engine.batch import PENDING_TOKEN, Batch, KVLayout, Row, SampleSpec
from engine.emulated_runner import EmulatedRunner
from engine.errors import TransferFailed
from engine.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
PROMPT = [5, 3, 8, 1, 1, 9, 2, 7, 4, 6, 0]


def layout(num_blocks: int = 32, block_size: int = 4, num_layers: int = 4) -> KVLayout:
    return KVLayout("emulated", num_layers, 1, 1, "uint64", block_size, num_blocks)


def runner(block_size: int = 4, **kwargs) -> EmulatedRunner:
    return EmulatedRunner(layout(block_size=block_size), lambda batch: 0.001 * batch.token_count, 2, **kwargs)


def run(emulated: EmulatedRunner, *rows: Row, copies=(), on_layers=None) -> list[list[int]]:
    out = virtual_loop.run(emulated.run(Batch(rows, copies), on_layers))
    return [[sampled.token_id for sampled in each] for each in out.sampled]


def row(tokens, start, block_ids, params=GREEDY, seed=0, step=0, choices=(0,), seq_id="a", sample=True) -> Row:
    spec = SampleSpec(params, seed, step, choices) if sample else None
    return Row(seq_id, tokens, start, block_ids, spec)


def generate(emulated: EmulatedRunner, block_ids, count, params=GREEDY, seed=0, prompt=PROMPT, choice=0) -> list[int]:
    tokens = list(prompt)
    start = 0
    for step in range(count):
        [[token]] = run(emulated, row(tokens[start:], start, block_ids, params, seed, step, (choice,)))
        start = len(tokens)
        tokens.append(token)
    return tokens[len(prompt) :]


@given(cuts=st.lists(st.integers(1, len(PROMPT) - 1), max_size=4), block_size=st.sampled_from([1, 2, 4, 16]))
def test_chunks_and_block_size_do_not_matter(cuts: list[int], block_size: int):
    emulated = runner(block_size)
    edges = sorted({0, *cuts, len(PROMPT)})
    block_ids = list(np.random.default_rng(0).permutation(32)[: -(-len(PROMPT) // block_size)])
    for start, end in itertools.pairwise(edges):
        drawn = run(emulated, row(PROMPT[start:end], start, block_ids, sample=end == len(PROMPT)))
    assert drawn == [emulated.expected_tokens(PROMPT, GREEDY, 0, 0, 1)]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7)])
def test_decoding_gives_the_expected_tokens(params: SamplingParams):
    emulated = runner()
    assert generate(emulated, range(10), 12, params, 7, choice=2) == emulated.expected_tokens(PROMPT, params, 7, 2, 12)


def test_sampling_depends_on_seed_choice_and_step_and_greedy_on_none():
    emulated = runner()
    params = SamplingParams(temperature=1.0, n=3)
    [drawn] = run(emulated, row(PROMPT, 0, range(3), params, 5, 0, (0, 1, 2)))
    assert drawn == [emulated.expected_tokens(PROMPT, params, 5, choice, 1)[0] for choice in range(3)]
    assert len(set(drawn)) == 3
    again = [
        run(emulated, row(PROMPT, 0, range(3), params, seed, step))[0][0] for seed, step in ((5, 0), (6, 0), (5, 1))
    ]
    assert len(set(again)) == 3
    [greedy] = run(emulated, row(PROMPT, 0, range(3), GREEDY, 5, 0, (0, 1, 2)))
    assert len(set(greedy)) == 1
    assert run(emulated, row(PROMPT, 0, range(3), GREEDY, 6, 9)) == [[greedy[0]]]


def test_rows_of_one_batch_do_not_disturb_each_other():
    emulated = runner()
    prompts = [PROMPT[:size] for size in (1, 3, 4, 5, 8, 11)]
    rows = [row(prompt, 0, range(4 * i, 4 * i + 4), seq_id=str(i)) for i, prompt in enumerate(prompts)]
    first = run(emulated, *rows)
    assert first == [emulated.expected_tokens(prompt, GREEDY, 0, 0, 1) for prompt in prompts]
    steps = [row(first[i], len(prompt), range(4 * i, 4 * i + 4), seq_id=str(i)) for i, prompt in enumerate(prompts)]
    second = run(emulated, *steps)
    assert second == [emulated.expected_tokens(prompt, GREEDY, 0, 0, 2)[1:] for prompt in prompts]


def test_a_shared_prefix_and_a_copied_tail_serve_two_sequences():
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2), sample=False))
    first = row((1,), 11, (0, 1, 2), step=1, seq_id="a")
    second = row((2,), 11, (0, 1, 9), step=1, seq_id="b")
    drawn = run(emulated, first, second, copies=((2, 9),))
    assert drawn == [emulated.expected_tokens([*PROMPT, token], GREEDY, 0, 0, 1) for token in (1, 2)]


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (2, 4), (4, 16), (16, 1)])
@pytest.mark.parametrize("from_token", [0, 8])
def test_moved_kv_gives_the_same_answer_between_any_block_sizes(sizes: tuple[int, int], from_token: int):
    source, target = runner(sizes[0]), runner(sizes[1])
    if from_token % sizes[0] or from_token % sizes[1]:
        pytest.skip("a shared prefix ends on a boundary of both sides")
    table = list(range(20, 32))
    source_blocks = list(range(3, 3 + -(-len(PROMPT) // sizes[0])))
    run(source, row(PROMPT, 0, source_blocks, sample=False))
    run(target, row(PROMPT[:from_token], 0, table, sample=False)) if from_token else None
    for layers in (range(0, 1), range(1, 4)):
        for start in range(from_token, len(PROMPT), sizes[0]):
            tokens = min(sizes[0], len(PROMPT) - start)
            payload = source.export_blocks(source_blocks[start // sizes[0] :][:1], layers, tokens)
            first_block, slot = divmod(start, sizes[1])
            target.import_blocks(table[first_block:], slot, layers, tokens, memoryview(payload), "uint64")
    [drawn] = run(target, row((42,), len(PROMPT), table))
    assert drawn == target.expected_tokens([*PROMPT, 42], GREEDY, 0, 0, 1)


def test_several_blocks_travel_in_one_payload():
    source, target = runner(), runner()
    run(source, row(PROMPT, 0, (7, 1, 5), sample=False))
    payload = source.export_blocks((7, 1), range(4), 4)
    assert np.frombuffer(payload, np.uint64).shape == (4 * 2 * 2 * 4,)
    target.import_blocks((2, 3), 0, range(4), 4, memoryview(payload), "uint64")
    tail = source.export_blocks((5,), range(4), 3)
    target.import_blocks((4,), 0, range(4), 3, memoryview(tail), "uint64")
    [drawn] = run(target, row((42,), 11, (2, 3, 4)))
    assert drawn == target.expected_tokens([*PROMPT, 42], GREEDY, 0, 0, 1)


def test_payloads_of_a_wrong_size_are_refused():
    emulated = runner()
    payload = memoryview(emulated.export_blocks((0,), range(4), 4))
    for bad, dtype in ((payload[:-8], "uint64"), (payload[:0], "uint64"), (payload, "float32")):
        with pytest.raises(TransferFailed, match="are not KV hashes"):
            emulated.import_blocks((0,), 0, range(4), 4, bad, dtype)
    with pytest.raises(TransferFailed, match="4 tokens from slot 1 do not fit into 1 blocks"):
        emulated.import_blocks((0,), 1, range(4), 4, payload, "uint64")


def wrong_answers(emulated: EmulatedRunner, block_ids=(0, 1, 2)) -> bool:
    """Whether the next token is wrong, or the runner itself says that the layers disagree."""
    try:
        [drawn] = run(emulated, row((42,), 11, block_ids))
    except AssertionError as error:
        return "disagrees with layer 0" in str(error)
    return drawn != emulated.expected_tokens([*PROMPT, 42], GREEDY, 0, 0, 1)


@pytest.mark.parametrize("layers", [range(0, 4), range(2, 3)])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_block_overwritten_anywhere_in_the_context_shows(victim: int, layers: range):
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2), sample=False))
    run(emulated, row([9] * 8, 0, (10, 11), sample=False))
    assert not wrong_answers(emulated)
    payload = memoryview(emulated.export_blocks((11,), layers, 1))
    emulated.import_blocks((victim,), 1, layers, 1, payload, "uint64")
    assert wrong_answers(emulated)


def test_blocks_in_a_wrong_order_or_never_written_show():
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2), sample=False))
    assert wrong_answers(emulated, (1, 0, 2))
    assert wrong_answers(emulated, (0, 20, 2))
    assert wrong_answers(emulated, (0, 1, 20))


def test_layers_or_halves_that_change_places_show():
    for layers_from, layers_to in ((range(0, 2), range(2, 4)), (range(1, 2), range(0, 1))):
        emulated = runner()
        run(emulated, row(PROMPT, 0, (0, 1, 2), sample=False))
        payload = memoryview(emulated.export_blocks((1,), layers_from, 4))
        emulated.import_blocks((1,), 0, layers_to, 4, payload, "uint64")
        assert wrong_answers(emulated)
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2), sample=False))
    halves = np.frombuffer(emulated.export_blocks((1,), range(4), 4), np.uint64).reshape(4, 1, 2, 4)
    swapped = memoryview(np.ascontiguousarray(halves[:, :, ::-1]).tobytes())
    emulated.import_blocks((1,), 0, range(4), 4, swapped, "uint64")
    assert wrong_answers(emulated)


def test_a_row_that_skips_a_position_shows():
    emulated = runner()
    run(emulated, row(PROMPT[:10], 0, (0, 1, 2), sample=False))
    assert wrong_answers(emulated)


def test_time_passes_in_slices_and_layers_are_told_in_order():
    emulated = EmulatedRunner(layout(num_layers=5), lambda batch: 0.3, 2)

    async def main():
        loop = asyncio.get_running_loop()
        told = []
        await emulated.run(
            Batch((row(PROMPT, 0, range(3)),)), lambda *layers: told.append((layers, round(loop.time(), 6)))
        )
        return told

    assert virtual_loop.run(main()) == [((0, 2), 0.1), ((2, 4), 0.2), ((4, 5), 0.3)]


def test_layers_are_written_when_they_are_told_not_before():
    emulated = runner()
    before = emulated.export_blocks((0,), range(2, 4), 4)
    seen = []
    run(
        emulated,
        row(PROMPT, 0, range(3)),
        on_layers=lambda *_: seen.append(emulated.export_blocks((0,), range(2, 4), 4)),
    )
    assert seen[0] == before
    assert seen[1] != before


@pytest.mark.parametrize(
    ("rows", "copies", "text"),
    [
        ([row((1,), 0, (0,), seq_id="a"), row((1,), 1, (0,), seq_id="b")], (), "a and b both write block 0"),
        ([row((1,), 0, (0,), seq_id="a"), row((1,), 4, (0, 1), seq_id="b")], (), "b reads block 0, a writes it"),
        ([row((1,), 4, (0,))], (), r"a: 5 tokens in \(0,\)"),
        ([row((1,), 4, (3, 3))], (), "a: a block twice"),
        ([row((), 0, (0,))], (), "a: a row without tokens"),
        ([row((1,), 0, (0,))], ((1, 2), (3, 2)), "write a block twice"),
        ([row((1,), 0, (0,))], ((1, 2), (2, 3)), "depend on their order"),
    ],
)
def test_batches_that_break_ownership_are_refused(rows, copies, text: str):
    with pytest.raises(AssertionError, match=text):
        run(runner(), *rows, copies=copies)


def test_two_rows_of_one_sequence_run_one_after_the_other():
    emulated = runner()
    [_, drawn] = run(emulated, row(PROMPT[:6], 0, range(3), sample=False), row(PROMPT[6:], 6, range(3)))
    assert drawn == emulated.expected_tokens(PROMPT, GREEDY, 0, 0, 1)


def test_blocks_of_a_running_batch_are_not_imported_into():
    emulated = runner()
    payload = memoryview(emulated.export_blocks((5,), range(4), 4))

    def receive(*_):
        emulated.import_blocks((2,), 0, range(4), 4, payload, "uint64")

    with pytest.raises(AssertionError, match=r"KV is received into blocks \[2\], which a batch under way uses"):
        run(emulated, row(PROMPT, 0, (0, 1, 2)), on_layers=receive)


def test_blocks_of_a_waiting_batch_are_not_imported_into():
    emulated = runner()
    payload = memoryview(emulated.export_blocks((5,), range(4), 4))

    async def main():
        first = asyncio.create_task(emulated.run(Batch((row(PROMPT, 0, (0, 1, 2)),))))
        second = asyncio.create_task(emulated.run(Batch((row(PROMPT, 0, (7, 8, 9)),))))
        await asyncio.sleep(0.001)
        for block_id in (2, 8):
            with pytest.raises(AssertionError, match="which a batch under way uses"):
                emulated.import_blocks((block_id,), 0, range(4), 4, payload, "uint64")
        await first
        emulated.import_blocks((2,), 0, range(4), 4, payload, "uint64")
        await second
        emulated.import_blocks((8,), 0, range(4), 4, payload, "uint64")

    virtual_loop.run(main())


def pending(start: int, follows: int, step: int, seq_id: str = "a") -> Row:
    return Row(seq_id, (PENDING_TOKEN,), start, (0, 1, 2, 3), SampleSpec(GREEDY, 0, step), follows)


def test_a_batch_waits_for_the_one_before_and_follows_its_draws():
    emulated = runner()

    async def main():
        loop = asyncio.get_running_loop()
        told = []
        batches = [
            Batch((row([9] * 5, 0, (10, 11), seq_id="other"), row(PROMPT, 0, (0, 1, 2)))),
            Batch((pending(11, 1, 1),)),
            Batch((pending(12, 0, 2),)),
        ]
        first, second = (
            asyncio.create_task(emulated.run(batch, lambda *layers: told.append((layers, round(loop.time(), 6)))))
            for batch in batches[:2]
        )
        outs = [await first]
        third = asyncio.create_task(emulated.run(batches[2]))
        outs += [await second, await third]
        assert [out.sampled[-1][0].token_id for out in outs] == emulated.expected_tokens(PROMPT, GREEDY, 0, 0, 3)
        return told

    # 16 tokens take 16 ms and one takes 1 ms, each in two groups of layers.
    assert virtual_loop.run(main()) == [((0, 2), 0.008), ((2, 4), 0.016), ((0, 2), 0.0165), ((2, 4), 0.017)]


@pytest.mark.parametrize(
    ("follower", "text"),
    [
        (pending(11, 1, 1), "a follows draw 1, the batch before made 1"),
        (pending(11, 0, 1, "b"), "b at 11 follows a draw of a at 11"),
        (pending(12, 0, 1), "a at 12 follows a draw of a at 11"),
        (replace(pending(11, 0, 1), follows=None), "a: a token that nobody has drawn"),
        (replace(pending(11, 0, 1), token_ids=(5,)), r"a: \(5,\) and a draw besides"),
    ],
)
def test_rows_that_follow_another_draw_than_their_own_are_refused(follower: Row, text: str):
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2)))
    with pytest.raises(AssertionError, match=text):
        run(emulated, follower)


def test_a_draw_is_followed_by_the_next_batch_only():
    emulated = runner()
    run(emulated, row(PROMPT, 0, (0, 1, 2)))
    run(emulated, row([9] * 5, 0, (10, 11), seq_id="other", sample=False))
    with pytest.raises(AssertionError, match="a follows draw 0, the batch before made 0"):
        run(emulated, pending(11, 0, 1))


def test_three_batches_at_once_are_refused():
    emulated = runner()

    async def main():
        batch = Batch((row(PROMPT, 0, (0, 1, 2)),))
        await asyncio.gather(*(emulated.run(batch) for _ in range(3)))

    with pytest.raises(AssertionError, match="a third batch was started while two are under way"):
        virtual_loop.run(main())


def test_end_of_sequence_comes_at_its_rate_and_never_unasked():
    ends, never = runner(eos_token_id=3, eos_rate=0.25, vocab_size=50), runner(eos_token_id=3, vocab_size=50)
    drawn = ends.expected_tokens(PROMPT, GREEDY, 0, 0, 2000)
    assert 400 < drawn.count(3) < 600
    assert never.expected_tokens(PROMPT, GREEDY, 0, 0, 2000).count(3) == 0
    params = SamplingParams(temperature=0.0, min_tokens=1900, max_tokens=2000)
    assert ends.expected_tokens(PROMPT, params, 0, 0, 2000).index(3) >= 1900
    assert set(never.expected_tokens(PROMPT, GREEDY, 0, 0, 2000)) == set(range(50)) - {3}


def test_logprobs_have_the_asked_shape():
    emulated = runner()
    for logprobs in (0, 3):
        spec = SampleSpec(SamplingParams(temperature=0.0, logprobs=logprobs), 0, 0)
        out = virtual_loop.run(emulated.run(Batch((Row("a", PROMPT, 0, range(3), spec),))))
        [[sampled]] = out.sampled
        assert len(sampled.top) == logprobs
        assert not logprobs or sampled.top[0] == (sampled.token_id, sampled.logprob)


def test_a_decode_step_is_cheap():
    emulated = EmulatedRunner(layout(2048, 16), lambda batch: 0.0, 4)
    tables = [range(16 * i, 16 * i + 16) for i in range(64)]
    batch = Batch(tuple(row((1,), 200, table, seq_id=str(i)) for i, table in enumerate(tables)))

    async def main():
        for i, table in enumerate(tables):
            await emulated.run(Batch((row([1] * 201, 0, table, seq_id=str(i)),)))
        best_s = 1.0
        for _ in range(20):
            began = time.perf_counter()
            await emulated.run(batch)
            best_s = min(best_s, time.perf_counter() - began)
        return best_s

    # Some 0.5 ms on a laptop; the bound is for a busy machine.
    assert virtual_loop.run(main()) < 0.003
