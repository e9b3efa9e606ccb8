"""The load of a chaos run, as its clients see it: every answer is compared with the one of a run without faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.client import Client, GenerateChunk

from cluster.calls import service_errors
from cluster.loadtest.prompts import RandomWords
from engine.errors import TandemError

# Two tokens as likely as this to each other may change places when sums are made in another order.
TIE = 1e-3


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt and its greedy answer, undisturbed. `gaps`: how much likelier, in log-probability, each token was than
    the next one."""

    prompt: str
    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]

    def agrees(self, token_ids: Sequence[int], *, is_whole: bool) -> bool:
        """Whether an answer is this one, up to a tie: what follows a tie may differ."""
        for token_id, expected, gap in zip(token_ids, self.token_ids, self.gaps, strict=False):
            if token_id != expected:
                return gap < TIE
        return len(token_ids) == len(self.token_ids) if is_whole else len(token_ids) <= len(self.token_ids)


@dataclass(slots=True)
class Asked:
    """One request. Times are seconds of the loop's clock: when it was sent, and when each of its tokens came."""

    reference: Reference
    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    retries: int = 0
    error: str = ""

    @property
    def is_right(self) -> bool:
        return self.reference.agrees(self.token_ids, is_whole=not self.error)


async def references(client: Client, count: int, tokens: int, answer_tokens: int, seed: int) -> list[Reference]:
    """Asks every prompt once, one after the other."""
    rng, words = random.Random(seed), RandomWords()
    found = []
    for _ in range(count):
        prompt = words.prompt(tokens, (), rng)[0]
        assert isinstance(prompt, str), "words make text"
        answer = await client.complete(
            prompt, temperature=0.0, max_tokens=answer_tokens, min_tokens=answer_tokens, logprobs=2
        )
        choice = answer.choices[0]
        gaps = tuple(drawn.top[0].logprob - drawn.top[1].logprob for drawn in choice.logprobs)
        found.append(Reference(prompt, tuple(choice.token_ids), gaps))
    return found


async def keep_asking(
    client: Client,
    url: str,
    asked: list[Asked],
    known: Sequence[Reference],
    rng: random.Random,
    is_over: asyncio.Event,
) -> None:
    """One stream: asks one prompt after the other until `is_over`."""
    while not is_over.is_set():
        request = Asked(rng.choice(known), asyncio.get_running_loop().time())
        await ask(client, url, request)
        asked.append(request)


async def ask(client: Client, url: str, request: Asked) -> None:
    """Runs one request to its end, whatever that is."""
    loop, count = asyncio.get_running_loop(), len(request.reference.token_ids)
    try:
        async with service_errors(url):
            parts = client.generate(request.reference.prompt, temperature=0.0, max_tokens=count, min_tokens=count)
            async for part in parts:
                if isinstance(part, GenerateChunk):
                    request.token_ids += part.token_ids
                    request.token_s += [loop.time()] * len(part.token_ids)
                else:
                    request.retries = part.receipt.retries
    except TandemError as error:
        request.error = f"{type(error).__name__}: {error}"
