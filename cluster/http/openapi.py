"""The OpenAPI 3.1 document of the HTTP interface.

Bodies come from the models that read requests, their bounds from engine/sampling.py, and errors from the one list of
them, so that what is said here is what is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.http.model_facts import DetokenizeRequest, TokenizeRequest
from cluster.intake import MAX_REQUEST_ID_CHARS
from cluster.messages import ModelInfo
from cluster.openai import answer_models as answers
from cluster.openai.chat_request import ChatRequest
from cluster.openai.completion_request import CompletionRequest
from engine.sampling import COUNTS, NUMBERS, Range

Json: TypeAlias = dict[str, Any]
REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
MODELS: tuple[type[BaseModel], ...] = (
    *REQUESTS,
    *(answers.ChatCompletion, answers.ChatCompletionChunk, answers.Completion, answers.CompletionChunk),
    *(answers.Model, answers.ModelList, answers.TokenizeAnswer, answers.DetokenizeAnswer),
    *(answers.State, answers.ErrorBody),
)
# By the `accept` of whoever asks.
METRICS_TYPES = ("text/plain", "application/openmetrics-text")
TOKEN_FIELDS = ("prompt", "tokens", "stop_token_ids")
# Fields of requests that have the bounds of another.
BOUNDED_AS = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}
REFUSALS = {
    400: "A field is wrong; the error names it.",
    401: "No API key or token that counts.",
    403: "Not for this caller.",
    404: "Another model than the one that is served.",
    413: "The body is too large.",
    429: "Too much waits, a quota is used up, or the objectives are out of reach.",
    503: "No workers, or the last one was lost.",
    504: "The gateway's deadline passed.",
}
RETRY_HEADERS = {
    "Retry-After": {"description": "Seconds after which to come again.", "schema": {"type": "integer"}},
    "Retry-After-Ms": {"description": "The same in milliseconds.", "schema": {"type": "integer"}},
}
REFUSAL_HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    429: RETRY_HEADERS,
    503: RETRY_HEADERS,
}
MILLISECONDS = {"type": "number", "exclusiveMinimum": 0}
REQUEST_ID = {"schema": {"type": "string", "maxLength": MAX_REQUEST_ID_CHARS}}
PARAMETERS = {
    "ttft": ("x-slo-ttft-ms", "Objective: longest time to the first token, in milliseconds.", MILLISECONDS),
    "tpot": ("x-slo-tpot-ms", "Objective: longest mean time per token after it, in ms.", MILLISECONDS),
    "request_id": ("x-request-id", "The request's id; without it the gateway makes one.", REQUEST_ID["schema"]),
    "traceparent": ("traceparent", "The client's trace, as W3C has it, which goes on here.", {"type": "string"}),
    "tracestate": ("tracestate", "What goes along with it.", {"type": "string"}),
}
CREDENTIALS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key or a JSON Web Token."},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def openapi_document(model: ModelInfo, *, asks_who_calls: bool) -> Json:
    """As JSON, of a gateway that serves `model`. `asks_who_calls`: whether calls need a credential; they may carry one
    anyway."""
    credentials: list[Json] = [{name: []} for name in CREDENTIALS]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version("tandem-serving"), "license": {"name": "Apache-2.0"}},
        "security": credentials if asks_who_calls else [*credentials, {}],
        "paths": _paths(model.name),
        "components": {
            "schemas": _schemas(model),
            "securitySchemes": CREDENTIALS,
            "parameters": {
                key: {"name": name, "in": "header", "description": text, "schema": schema}
                for key, (name, text, schema) in PARAMETERS.items()
            },
            "responses": {f"Error{status}": _refusal(status) for status in REFUSALS},
        },
    }


def _paths(model_name: str) -> Json:
    name = {"name": "model", "in": "path", "required": True, "schema": {"enum": [model_name]}}
    return {
        "/v1/chat/completions": {
            "post": _generation("A chat's next turn.", ChatRequest, answers.ChatCompletion, answers.ChatCompletionChunk)
        },
        "/v1/completions": {
            "post": _generation("Texts that go on.", CompletionRequest, answers.Completion, answers.CompletionChunk)
        },
        "/v1/models": {"get": _operation("The one model that is served.", answers.ModelList, (401, 429))},
        "/v1/models/{model}": {
            "get": {**_operation("One model.", answers.Model, (401, 404, 429)), "parameters": [name]}
        },
        "/tokenize": {"post": _posted("A text or a chat as tokens.", TokenizeRequest, answers.TokenizeAnswer)},
        "/detokenize": {"post": _posted("Tokens as text.", DetokenizeRequest, answers.DetokenizeAnswer)},
        "/metrics": {"get": _metrics()},
        "/health": {"get": _open("Whether the gateway's loop turns.", answers.State)},
        "/ready": {
            "get": _open("Whether a request that comes now has workers to go to.", answers.State, is_ready_probe=True)
        },
        "/openapi.json": {"get": _open("This document.", None)},
    }


def _generation(summary: str, request: type[BaseModel], whole: type[BaseModel], chunk: type[BaseModel]) -> Json:
    operation = _posted(summary, request, whole, tuple(REFUSALS))
    operation["parameters"] = [{"$ref": f"#/components/parameters/{key}"} for key in PARAMETERS]
    answer = operation["responses"]["200"]
    answer["headers"] = {"X-Request-Id": REQUEST_ID}
    answer["content"]["text/event-stream"] = {"schema": _events(chunk)}
    return operation


def _events(chunk: type[BaseModel]) -> Json:
    """Each event of a stream, as its fields."""
    said = {"anyOf": [_ref(chunk), _ref(answers.ErrorBody)]}
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    text = "With `stream`: server-sent events. The data of the last one is `[DONE]`; an error may come before it."
    data = {"anyOf": [{"const": "[DONE]"}, content]}
    return {"type": "object", "description": text, "properties": {"data": data}, "required": ["data"]}


def _posted(
    summary: str,
    request: type[BaseModel],
    answer: type[BaseModel],
    refusals: Sequence[int] = (400, 401, 404, 413, 429),
) -> Json:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    return {**_operation(summary, answer, refusals), "requestBody": body}


def _operation(summary: str, answer: type[BaseModel], refusals: Sequence[int]) -> Json:
    found: Json = {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in refusals}
    return {"summary": summary, "responses": {"200": _answer("An answer.", _ref(answer)), **found}}


def _metrics() -> Json:
    operation = _operation("Counters and gauges for Prometheus, for operators.", answers.State, (401, 403, 429))
    operation["responses"]["200"]["content"] = {name: {"schema": {"type": "string"}} for name in METRICS_TYPES}
    return operation


def _open(summary: str, answer: type[BaseModel] | None, *, is_ready_probe: bool = False) -> Json:
    """What nobody needs a credential for."""
    schema = {"type": "object"} if answer is None else _ref(answer)
    responses = {"200": _answer("Yes." if answer is not None else "The document.", schema)}
    if is_ready_probe:
        responses["503"] = _answer("No.", schema)
    return {"summary": summary, "security": [], "responses": responses}


def _answer(text: str, schema: Json) -> Json:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _refusal(status: int) -> Json:
    refusal = _answer(REFUSALS[status], _ref(answers.ErrorBody))
    return {**refusal, "headers": {"X-Request-Id": REQUEST_ID, **REFUSAL_HEADERS.get(status, {})}}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas(model: ModelInfo) -> Json:
    _, found = models_json_schema(
        [(each, "validation") for each in MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = found["$defs"]
    for request in REQUESTS:
        fields = schemas[request.__name__]["properties"]
        # Left out it is the same model.
        fields["model"] |= {"enum": ["", model.name]}
        for name, field in fields.items():
            if name in TOKEN_FIELDS:
                _bound(field, Range(0, model.vocab_size - 1))
            elif (allowed := {**NUMBERS, **COUNTS}.get(BOUNDED_AS.get(name, name))) is not None:
                _bound(field, allowed)
    return schemas


def _bound(field: Json, allowed: Range) -> None:
    """Every number that the field may be, or hold."""
    if field.get("type") in ("number", "integer"):
        field |= {"exclusiveMinimum" if allowed.is_open else "minimum": allowed.low, "maximum": allowed.high}
    for branch in (*field.get("anyOf", ()), *([field["items"]] if "items" in field else ())):
        _bound(branch, allowed)
