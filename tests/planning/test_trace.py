"""Traces: read with errors that name the place, stretched, spread, and turned into prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.planning.trace import PREFIX_BLOCK_TOKENS, Trace, TracePrompts, TraceRequest, read_trace
from engine.errors import ConfigError

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"
# From the data's own manifest: (blocks, unique blocks, share of tokens that a cache would have).
SHARING = {"mooncake_conversation": (146_464, 96_534, 0.347), "mooncake_synthetic": (56_739, 36_216, 0.370)}
ROWS = {"azure2023_code": 5_740, "azure2023_conv": 10_108, "servegen_deepseek_r1.sampled": 3_146}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def shared_file(name: str) -> Path:
    path = TRACES / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no such file: {path.name}")
    return path


def test_a_trace_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"arrival_s": 0, "prompt_tokens": 600, "output_tokens": 3, "prefix_hashes": [5, 9]},
        "",
        {"arrival_s": 1.5, "prompt_tokens": 7, "output_tokens": 1},
    )
    trace = read_trace(path)
    assert trace.requests == (TraceRequest(0.0, 600, 3, (5, 9)), TraceRequest(1.5, 7, 1))
    assert read_trace(path, 1).requests == trace.requests[:1]
    assert trace.rate_rps == pytest.approx(1 / 1.5)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", r":2: is not JSON"),
        ("[1]", r":2: got a list, expected a JSON object"),
        ({"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 1}, r":2: prompt_tokens: got 0"),
        ({"arrival_s": 1, "prompt_tokens": 4}, r":2: output_tokens: got None"),
        ({"arrival_s": -1, "prompt_tokens": 4, "output_tokens": 1}, r":2: arrival_s: got -1"),
        ({"prompt_tokens": 4, "output_tokens": 1}, r":2: arrival_s: got None"),
        ({"arrival_s": 1, "prompt_tokens": 513, "output_tokens": 1, "prefix_hashes": [1]}, r":2: prefix_hashes: .*2:"),
        ({"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 1, "prefix_hashes": ["a"]}, r":2: prefix_hashes: got"),
        ({"arrival_s": None, "prompt_tokens": 5, "output_tokens": 1}, r"arrival_s: is null for some"),
        ({"arrival_s": 0.5, "prompt_tokens": 5, "output_tokens": 1}, r"request 2 comes at 0.5"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, row: object, problem: str) -> None:
    path = write(tmp_path / "t.jsonl", {"arrival_s": 1.0, "prompt_tokens": 4, "output_tokens": 1}, row)
    with pytest.raises(ConfigError, match=problem):
        read_trace(path)


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read"):
        read_trace(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(write(tmp_path / "empty.jsonl", ""))


def test_scaling_divides_every_gap_and_keeps_the_rest() -> None:
    trace = Trace((TraceRequest(0.0, 5, 1), TraceRequest(3.0, 6, 2), TraceRequest(4.0, 7, 3)))
    scaled = trace.scaled(2.0)
    assert scaled.arrivals_s == (0.0, 1.5, 2.0)
    assert scaled.rate_rps == pytest.approx(2 * trace.rate_rps)
    assert [request.prompt_tokens for request in scaled.requests] == [5, 6, 7]
    with pytest.raises(ConfigError, match="rate_scale"):
        trace.scaled(0.0)


def test_spreading_undoes_a_coarse_clock_and_leaves_a_fine_one() -> None:
    coarse = Trace(tuple(TraceRequest(time, 5, 1) for time in (0.0, 0.0, 0.0, 3.0, 6.0, 6.0)))
    assert coarse.spread().arrivals_s == (0.0, 1.0, 2.0, 3.0, 6.0, 7.5)
    fine = Trace(tuple(TraceRequest(time, 5, 1) for time in (0.0, 0.1, 2.0)))
    assert fine.spread() == fine


def test_a_trace_of_lengths_wants_arrivals() -> None:
    trace = Trace((TraceRequest(None, 5, 1), TraceRequest(None, 6, 1)))
    assert not trace.has_arrivals
    with pytest.raises(ConfigError, match="arrival_s is null"):
        trace.scaled(2.0)
    assert trace.arriving([1.0, 2.0]).arrivals_s == (1.0, 2.0)


def test_turns_of_a_repeated_trace_share_nothing() -> None:
    trace = Trace((TraceRequest(0.0, 512, 1, (0,)), TraceRequest(2.0, 1024, 1, (0, 4))))
    twice = trace.repeated(2)
    assert twice.arrivals_s == (0.0, 2.0, 4.0, 6.0)
    assert twice.rate_rps == trace.rate_rps
    assert [request.prefix_hashes for request in twice.requests] == [(0,), (0, 4), (5,), (5, 9)]
    assert trace.repeated(1) is trace


def test_prompts_agree_exactly_as_far_as_their_hashes() -> None:
    hashes = ((0, 1, 2), (0, 1, 3), (4, 1, 2), ())
    lengths = (1300, 1400, 1536, 900)
    requests = (TraceRequest(0.0, length, 1, names) for length, names in zip(lengths, hashes, strict=True))
    prompts = TracePrompts(Trace(tuple(requests)))
    made = [prompts.token_ids(index) for index in range(4)]
    assert [len(prompt) for prompt in made] == list(lengths)
    assert max(max(prompt) for prompt in made) < prompts.vocab_size
    assert common(made[0], made[1]) == 2 * PREFIX_BLOCK_TOKENS
    assert [common(made[0], other) for other in made[2:]] == [0, 0]
    assert common(made[2], made[3]) == 0
    assert prompts.token_ids(1) == made[1]


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Leading tokens that are the same."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)


@pytest.mark.parametrize("name", SHARING)
def test_prompts_of_the_recorded_traces_share_what_their_manifest_says(name: str) -> None:
    trace = read_trace(shared_file(name))
    prompts = TracePrompts(trace)
    seen: set[tuple[int, ...]] = set()
    blocks = hit_tokens = 0
    for index, request in enumerate(trace.requests):
        token_ids = prompts.token_ids(index)
        # One id fills a block, so the chain of first ids names a block and all before it.
        chain = token_ids[::PREFIX_BLOCK_TOKENS]
        blocks += len(chain)
        known = 0
        for end in range(1, len(chain) + 1):
            # The chain's own last id is enough: the trace gives every chain a hash of its own.
            if chain[end - 1 : end] not in seen:
                break
            known = min(end * PREFIX_BLOCK_TOKENS, request.prompt_tokens)
        hit_tokens += known
        seen.update(chain[end : end + 1] for end in range(len(chain)))
    expected_blocks, expected_unique, expected_share = SHARING[name]
    assert (blocks, len(seen)) == (expected_blocks, expected_unique)
    assert hit_tokens / sum(request.prompt_tokens for request in trace.requests) == pytest.approx(
        expected_share, abs=5e-4
    )


@pytest.mark.parametrize("name", ROWS)
def test_recorded_traces_are_read_whole(name: str) -> None:
    trace = read_trace(shared_file(name))
    assert len(trace) == ROWS[name]
    assert trace.has_arrivals
