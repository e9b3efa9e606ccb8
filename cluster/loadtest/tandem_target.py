"""A running Tandem as a target, through its own client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tandem.client import GenerateChunk
from tandem.client import Prompt as ClientPrompt

from cluster.calls import plain, service_errors
from cluster.client_access import OPEN_ACCESS, Access
from cluster.loadtest.request import LoadRequest, chat_of, token_ids_of
from cluster.loadtest.target import Finished, TargetFacts, Tokens
from engine.objectives import Objectives

FACTS_TIMEOUT_S = 30.0


class TandemTarget:
    """`cache_salt` keeps this run's prompts apart from everything that the service has cached. Without
    `sends_objectives` the service's configuration decides what a request is to achieve."""

    def __init__(
        self,
        name: str,
        address: str,
        *,
        access: Access = OPEN_ACCESS,
        cache_salt: str = "",
        sends_objectives: bool = True,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> None:
        self.name, self.url, self.acts_on_objectives = name, address, sends_objectives
        self._salt, self._ignore_eos, self._temperature = cache_salt, ignore_eos, temperature
        self._access = access
        self._client = access.client(address)

    async def facts(self) -> TargetFacts:
        quick = self._access.client(self.url, timeout_s=FACTS_TIMEOUT_S)
        async with service_errors(self.url), quick as client:
            model = await client.get_model()
        return TargetFacts(model.model, model.vocab_size, model.max_context)

    async def stream(
        self, request: LoadRequest, objectives: Objectives, timeout_s: float
    ) -> AsyncGenerator[Tokens | Finished, None]:
        sent = objectives if self.acts_on_objectives else Objectives()
        parts = self._client.generate(
            _prompt(request),
            cache_salt=self._salt,
            ttft_ms=_milliseconds(sent.ttft_s),
            tpot_ms=_milliseconds(sent.tpot_s),
            timeout_s=timeout_s,
            temperature=self._temperature,
            max_tokens=request.output_tokens,
            ignore_eos=self._ignore_eos,
        )
        async with service_errors(self.url), aclosing(parts):
            async for part in parts:
                if not isinstance(part, GenerateChunk):
                    usage = part.usage
                    receipt = plain(part.receipt)
                    yield Finished(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, receipt)
                elif part.token_ids:
                    yield Tokens(len(part.token_ids))

    async def close(self) -> None:
        await self._client.close()


def _prompt(request: LoadRequest) -> ClientPrompt:
    if isinstance(request.prompt, str):
        return request.prompt
    return chat_of(request.prompt) or token_ids_of(request.prompt)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
