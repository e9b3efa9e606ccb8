"""`POST /v1/completions`: the request, of one prompt or several."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.messages import GenerateRequest
from cluster.openai.request import NAMES, SamplingFields
from engine.errors import InvalidArgument
from engine.objectives import Objectives

# Of one call. Each is a request of its own to the gateway.
MAX_PROMPTS = 64
# OpenAI's, where a request names none.
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[int], Field(fail_fast=True)]


class CompletionRequest(SamplingFields):
    """Choices are numbered prompt by prompt: choice `i` of prompt `p` has the index p · n + i."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def names(self) -> dict[str, str]:
        """Of the gateway's fields, what this request calls them."""
        return {**NAMES, "structure": self.structure_field(), "text": "prompt", "token_ids": "prompt"}

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Raises InvalidArgument where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        found = [each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)]
        if found:
            return found
        if not self.prompt:
            raise InvalidArgument("prompt", self.prompt, "text, token ids, or a list of either")
        return [tuple(each for each in self.prompt if isinstance(each, int))]

    def generate_requests(self, request_id: str, objectives: Objectives, tenant: str) -> list[GenerateRequest]:
        """One for each prompt, in order. Raises InvalidArgument for what cannot be had, or is too much."""
        self._check()
        longest = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params = self.sampling(longest, self.logprobs)
        prompts = self.prompts()
        return [
            self.asks(request_id if len(prompts) == 1 else f"{request_id}-{index}", prompt, params, objectives, tenant)
            for index, prompt in enumerate(prompts)
        ]

    def _check(self) -> None:
        self.check_stream_options()
        if self.suffix:
            raise InvalidArgument("suffix", self.suffix, "none: the model only continues texts")
        if self.best_of not in (None, self.n or 1):
            raise InvalidArgument("best_of", self.best_of, "the same as n")
        if self.echo and self.logprobs is not None:
            raise InvalidArgument("echo", True, "false with logprobs: prompts have none here")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts()):
            raise InvalidArgument("echo", True, "false where prompts are token ids")
