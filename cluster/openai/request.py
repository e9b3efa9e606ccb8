"""What requests of OpenAI's HTTP interface have in common: fields, their reading, and what they mean to the gateway.

Fields have OpenAI's names and defaults; those that OpenAI lacks have vLLM's. null is the same as left out. What changes
no answer (`user`, `metadata`, `store`, …) is taken and passed over; what nobody knows is refused, by name. Lists are
read to the first element that is wrong: of a body of wrong ones, all would be millions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from cluster.messages import GenerateRequest, Message
from cluster.openai.structure import StructureFields
from engine.errors import InvalidArgument, TandemError
from engine.objectives import Objectives
from engine.sampling import SamplingParams

Text = Annotated[str, Field(max_length=1 << 20)]
# Longest list of anything in a request but token ids; the gateway's own bounds are lower, and say more.
MANY = 4096
# Of a field's name in an error: clients may have made it up.
MAX_FIELD_CHARS = 256
# Wrong fields of one request that are looked at: pydantic makes an object of each, and a body may hold a million.
MAX_PROBLEMS = 64
# Of the gateway's fields that headers stand for, their names.
NAMES = {"objectives.ttft_ms": "x-slo-ttft-ms", "objectives.tpot_ms": "x-slo-tpot-ms", "request_id": "x-request-id"}
Prompt: TypeAlias = str | tuple[int, ...] | tuple[Message, ...]
Parsed = TypeVar("Parsed", bound=BaseModel)


class StreamOptions(BaseModel):
    """`include_usage`: one more event before the last, with the token counts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(StructureFields):
    """The fields that chats and plain completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MANY, fail_fast=True)] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MANY)] | None = None
    seed: int | None = None

    # As in vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MANY, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None

    # Tandem's own.
    slo_class: str | None = None
    on_failure: str | None = None

    # Without effect.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        """Raises InvalidArgument where they are given for an answer that is not streamed."""
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options", "options", "none where stream is not true")

    def asks(
        self, request_id: str, prompt: Prompt, params: SamplingParams, objectives: Objectives, tenant: str
    ) -> GenerateRequest:
        """The gateway's request for one prompt."""
        return GenerateRequest(
            request_id,
            prompt,
            params,
            model=self.model,
            salt=(self.cache_salt or "").encode(),
            objectives=objectives,
            slo_class=self.slo_class or "",
            on_failure=self.on_failure or "",
            tenant=tenant,
        )

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How to draw. Raises InvalidArgument for a `logit_bias` whose keys are no token ids."""
        given = {
            name: value
            for name in (
                *("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p"),
                *("repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output"),
                "skip_special_tokens",
            )
            if (value := getattr(self, name)) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=tuple(_biases(self.logit_bias or {})),
            logprobs=logprobs,
            structure=self.structure(),
        )


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """A request's body. Raises InvalidArgument naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_problem(kind, error) from None


def checked(kind: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """The same from fields that came otherwise."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_problem(kind, error) from None


def objectives(headers: Mapping[str, str]) -> Objectives:
    """What the headers `x-slo-ttft-ms` and `x-slo-tpot-ms` ask for. Raises InvalidArgument for what is no number."""
    return Objectives(_seconds(headers, "x-slo-ttft-ms"), _seconds(headers, "x-slo-tpot-ms"))


def told(error: TandemError, names: Mapping[str, str]) -> TandemError:
    """The gateway's complaint about a request, with its field as HTTP's clients know it. `names`: where that differs by
    more than the prefix `sampling_params.`."""
    if isinstance(error, InvalidArgument):
        field = error.field.removeprefix("sampling_params.")
        error.rename(names.get(field, field))
    return error


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        return float(text) / 1e3
    except ValueError:
        raise InvalidArgument(name, text, "a number of milliseconds") from None


def _biases(biases: Mapping[str, float]) -> list[tuple[int, float]]:
    found = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise InvalidArgument("logit_bias", key, "token ids as keys")
        found.append((int(key), bias))
    return found


def _first_problem(kind: type[BaseModel], error: ValidationError) -> InvalidArgument:
    if (count := error.error_count()) > MAX_PROBLEMS:
        return InvalidArgument("body", f"{count} wrong or unknown fields", "those that the interface has")
    problem = _told_problem(error.errors(include_url=False))
    path = _path(problem)
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if len(field) > MAX_FIELD_CHARS:
        field = f"{field[:MAX_FIELD_CHARS]}..."
    if problem["type"] == "json_invalid":
        return InvalidArgument("body", "something else", f"JSON: {problem['msg']}")
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(str(path[-1])[:MAX_FIELD_CHARS], _known(kind), n=1)
        return InvalidArgument(field, "a field that nobody knows", f"{near[0]}?" if near else "none of that name")
    if problem["type"] == "missing":
        return InvalidArgument(field, None, "a value")
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return InvalidArgument(field or "body", problem["input"], message)


def _told_problem(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first one. Where a field may be of several types, each has its own, and the one that fits best is told: that
    got as far as counting, or else furthest into the value."""
    where = _path(problems[0])
    of_the_field = [problem for problem in problems if _path(problem)[: len(where)] == where]

    def fit(problem: ErrorDetails) -> tuple[bool, list[int], int]:
        indices = [part for part in problem["loc"] if isinstance(part, int)]
        return problem["type"] == "too_long", indices, len(problem["loc"])

    return max(of_the_field, key=fit)


def _path(problem: ErrorDetails) -> list[int | str]:
    """To what is wrong. Of a field with several types pydantic names the type as well, which no client knows."""
    *before, last = problem["loc"] or ("",)
    is_given = problem["type"] in ("extra_forbidden", "missing")
    path = [part for part in before if isinstance(part, int) or _is_key(part)]
    return [*path, last] if is_given or isinstance(last, int) or _is_key(last) else path


def _is_key(part: str) -> bool:
    # Models have names in capitals.
    return part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool")


def _known(kind: type[BaseModel]) -> list[str]:
    return list(kind.model_fields)
