"""The golden reference: one process, one runner, no scheduler, no transfer. What the cluster must say, this says.

Prompts run one after another in chunks, then all decode together, one token each per step, until each has finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.batch import Batch, Row, Runner, Sampled, SampleSpec
from engine.block_pool import BlockPool
from engine.chunking import next_chunk
from engine.errors import InvalidArgument
from engine.request import FinishReason
from engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to answer. `seed` decides all draws of sampled tokens."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0


@dataclass(slots=True)
class Answer:
    """One choice of one prompt: what was drawn, and why it ended. A stop token is the last of `tokens`."""

    prompt: Prompt
    choice: int
    tokens: list[Sampled] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class Generator:
    """Generates on one runner. The pool's prefix cache lives as long as the generator."""

    def __init__(
        self,
        runner: Runner,
        eos_token_ids: frozenset[int],
        max_context: int,
        *,
        token_budget: int = 512,
        prefix_cache: bool = True,
    ) -> None:
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._max_context = max_context
        self._token_budget = token_budget
        self._pool = BlockPool(runner.layout.num_blocks, runner.layout.block_size, prefix_cache)

    async def generate(self, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        """Answers per prompt and choice, in order. Raises InvalidArgument for a prompt that the pool can never hold,
        and for a structure that an answer cannot be held to."""
        answers: list[list[Answer]] = []
        for wave in self._waves(prompts):
            answers += await self._generate_wave(wave)
        return answers

    def _waves(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Cuts the prompts into runs whose KV fits into the pool even when every choice runs to its limit."""
        wave: list[Prompt] = []
        free = self._pool.num_blocks
        for prompt in prompts:
            tokens = min(len(prompt.token_ids) + prompt.params.max_tokens, self._max_context)
            need = self._pool.blocks_for(tokens) * prompt.params.n
            if need > self._pool.num_blocks:
                limit = self._pool.num_blocks * self._pool.block_size
                raise InvalidArgument("prompt + max_tokens", f"{tokens} tokens", f"at most {limit} in all choices")
            if need > free:
                yield wave
                wave, free = [], self._pool.num_blocks
            wave.append(prompt)
            free -= need
        if wave:
            yield wave

    async def _generate_wave(self, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        answers = [await self._prefill(index, prompt) for index, prompt in enumerate(prompts)]
        running = [(f"{p}/{a.choice}", a) for p, choices in enumerate(answers) for a in choices if not a.finish_reason]
        while running:
            await self._decode(running)
            for owner, answer in running:
                if answer.finish_reason:
                    self._pool.free(owner)
            running = [(owner, answer) for owner, answer in running if not answer.finish_reason]
        self._pool.check()
        return answers

    async def _prefill(self, index: int, prompt: Prompt) -> list[Answer]:
        answers = [Answer(prompt, choice) for choice in range(prompt.params.n)]
        tokens, lead = prompt.token_ids, f"{index}/0"
        computed = self._pool.new(lead, tokens)
        self._reserve(lead, len(tokens) - computed)
        sampled: tuple[Sampled, ...] = ()
        spec = SampleSpec(prompt.params, prompt.seed, 0, tuple(range(prompt.params.n)), tokens)
        while computed < len(tokens):
            end = computed + next_chunk(computed, len(tokens), self._token_budget, self._pool.block_size)
            row = Row(
                lead, tokens[computed:end], computed, self._pool.table(lead), spec if end == len(tokens) else None
            )
            sampled = (await self._runner.run(Batch((row,)))).sampled[0]
            self._pool.seal(lead, tokens, end)
            computed = end
        _check(spec, sampled)
        for answer, drawn in zip(answers, sampled, strict=True):
            self._add(answer, drawn)
            if answer.choice and not answer.finish_reason:
                self._pool.fork(lead, f"{index}/{answer.choice}")
        if answers[0].finish_reason:
            self._pool.free(lead)
        return answers

    async def _decode(self, running: Sequence[tuple[str, Answer]]) -> None:
        copies: list[tuple[int, int]] = []
        rows: list[Row] = []
        for owner, answer in running:
            copies += self._reserve(owner, 1)
            prompt, output = answer.prompt, answer.token_ids
            spec = SampleSpec(
                prompt.params, prompt.seed, len(output), (answer.choice,), prompt.token_ids, tuple(output)
            )
            start = len(prompt.token_ids) + len(output) - 1
            rows.append(Row(owner, (output[-1],), start, self._pool.table(owner), spec))
        out = await self._runner.run(Batch(tuple(rows), tuple(copies)))
        for (owner, answer), row, sampled in zip(running, rows, out.sampled, strict=True):
            self._pool.seal(owner, (*answer.prompt.token_ids, *answer.token_ids), row.end)
            assert row.sample is not None, "each row draws"
            _check(row.sample, sampled)
            self._add(answer, sampled[0])

    def _reserve(self, owner: str, count: int) -> tuple[tuple[int, int], ...]:
        appended = self._pool.append(owner, count)
        assert appended is not None, f"{owner} needs {count} tokens more than its wave was planned for"
        return appended.copies

    def _add(self, answer: Answer, drawn: Sampled) -> None:
        params = answer.prompt.params
        answer.tokens.append(drawn)
        is_eos = drawn.token_id in self._eos_token_ids and not params.ignore_eos
        length = len(answer.prompt.token_ids) + len(answer.tokens)
        if is_eos or drawn.token_id in params.stop_token_ids:
            answer.finish_reason = FinishReason.STOP
        elif len(answer.tokens) >= params.max_tokens or length >= self._max_context:
            answer.finish_reason = FinishReason.LENGTH


def _check(spec: SampleSpec, drawn: Sequence[Sampled]) -> None:
    if (problem := spec.problem(drawn)) is not None:
        raise problem
