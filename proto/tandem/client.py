"""A client for a Tandem service. Needs grpcio and protobuf, and nothing else of Tandem.

    import asyncio
    from tandem.client import Client, GenerateChunk

    async def main() -> None:
        async with Client("127.0.0.1:50051") as client:
            async for part in client.generate("The capital of France is", max_tokens=16, temperature=0):
                if isinstance(part, GenerateChunk):
                    print(part.text, end="", flush=True)
                else:
                    print("\\n", part.choices[0].finish_reason, part.usage.completion_tokens)

            chat = [{"role": "user", "content": "Say hello in French."}]
            print((await client.complete(chat, seed=1)).choices[0].text)

    asyncio.run(main())

Every method raises grpc.aio.AioRpcError; its `code()` says what kind of error it is and its `details()` name the field,
the value and what would be right.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypedDict, Unpack

import grpc.aio

from tandem.v1.inference_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateChunk,
    GenerateComplete,
    GenerateRequest,
    GenerateResponse,
    GetModelRequest,
    GetModelResponse,
    GetStatusRequest,
    GetStatusResponse,
    Message,
    Messages,
    Objectives,
    SamplingParams,
    TokenIds,
    TokenizeRequest,
    TokenizeResponse,
)

__all__ = ["Client", "GenerateChunk", "GenerateComplete", "Prompt", "Sampling"]

# Text, token ids, or a chat: mappings with "role" and "content".
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
# A whole answer with its log-probabilities may be larger than gRPC's default of 4 MiB.
MAX_MESSAGE_BYTES = 64 << 20


class Sampling(TypedDict, total=False):
    """How to draw tokens; what is left out has the server's default. See SamplingParams in inference.proto."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    logprobs: int
    # What the answer is held to: "kind" (json_schema, regex, choice or grammar) and "text".
    structure: Mapping[str, str]


class Client:
    """A connection to one service. Use it as an async context manager, in one event loop, by as many tasks as needed.

    `api_key`, an API key or a JSON Web Token, says who calls; "" where the service does not ask. `timeout_s` is the
    deadline of calls that name none; None for no deadline. `ca` is the PEM of the certificates that sign the service's
    own: with it the connection is encrypted. Raises ValueError, which does not show the key, for a key that cannot be
    one, or that would go over a network in clear.
    """

    def __init__(
        self, address: str, *, api_key: str = "", timeout_s: float | None = None, ca: bytes | None = None
    ) -> None:
        check_key(api_key, address, is_encrypted=ca is not None)
        limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=limits)
        else:
            self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=limits)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else None
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls that are still under way."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        model: str = "",
        cache_salt: str = "",
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        slo_class: str = "",
        on_failure: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[GenerateChunk | GenerateComplete, None]:
        """Runs one request: chunks as tokens come, then one GenerateComplete. Closing the generator early
        (`contextlib.aclosing`) cancels the request and frees all that it holds. `ttft_ms` and `tpot_ms` are what the
        request is to achieve: where they cannot be met, it may be refused with RESOURCE_EXHAUSTED. `slo_class` names
        objectives of the gateway's configuration instead. `on_failure`: what becomes of it when a worker is lost
        ("recompute", "retry", "fail"; empty for the gateway's default)."""
        method = self._channel.unary_stream(
            "/tandem.v1.Inference/Generate",
            request_serializer=GenerateRequest.SerializeToString,
            response_deserializer=GenerateResponse.FromString,
        )
        request = GenerateRequest(
            request_id=request_id,
            model=model,
            cache_salt=cache_salt,
            objectives=Objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
            slo_class=slo_class,
            on_failure=on_failure,
            sampling_params=SamplingParams(**sampling),
            text=prompt if isinstance(prompt, str) else None,
            token_ids=_token_ids(prompt),
            messages=_messages(prompt),
        )
        call = method(request, timeout=self._timeout(timeout_s), metadata=self._metadata)
        try:
            async for response in call:
                yield response.chunk if response.WhichOneof("response") == "chunk" else response.complete
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        model: str = "",
        cache_salt: str = "",
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        slo_class: str = "",
        on_failure: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> GenerateComplete:
        """Runs one request and gives its whole answer at once."""
        last: GenerateChunk | GenerateComplete | None = None
        parts = self.generate(
            prompt,
            request_id=request_id,
            model=model,
            cache_salt=cache_salt,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            slo_class=slo_class,
            on_failure=on_failure,
            timeout_s=timeout_s,
            **sampling,
        )
        async with aclosing(parts):
            async for part in parts:
                last = part
        assert isinstance(last, GenerateComplete), "the server ended a stream without its last message"
        return last

    async def get_model(self) -> GetModelResponse:
        """What is served, and its limits."""
        method = self._channel.unary_unary(
            "/tandem.v1.Inference/GetModel",
            request_serializer=GetModelRequest.SerializeToString,
            response_deserializer=GetModelResponse.FromString,
        )
        return await method(GetModelRequest(), timeout=self._timeout_s, metadata=self._metadata)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids that `generate` would make of `prompt`."""
        method = self._channel.unary_unary(
            "/tandem.v1.Inference/Tokenize",
            request_serializer=TokenizeRequest.SerializeToString,
            response_deserializer=TokenizeResponse.FromString,
        )
        text = prompt if isinstance(prompt, str) else None
        messages = None if isinstance(prompt, str) else _chat(prompt)
        request = TokenizeRequest(text=text, messages=messages)
        return list((await method(request, timeout=self._timeout_s, metadata=self._metadata)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        method = self._channel.unary_unary(
            "/tandem.v1.Inference/Detokenize",
            request_serializer=DetokenizeRequest.SerializeToString,
            response_deserializer=DetokenizeResponse.FromString,
        )
        request = DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await method(request, timeout=self._timeout_s, metadata=self._metadata)).text

    async def status(self) -> GetStatusResponse:
        """The cluster as its gateway sees it now."""
        method = self._channel.unary_unary(
            "/tandem.v1.Inference/GetStatus",
            request_serializer=GetStatusRequest.SerializeToString,
            response_deserializer=GetStatusResponse.FromString,
        )
        return await method(GetStatusRequest(), timeout=self._timeout_s, metadata=self._metadata)

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


def check_key(api_key: str, address: str, *, is_encrypted: bool = False) -> None:
    """Raises ValueError, which does not show the key, for one that cannot be, or would go to `address` in clear."""
    if not api_key:
        return
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ValueError("this is no API key or token: it holds spaces, ends of lines or other odd characters")
    host = address.rpartition(":")[0].strip("[]")
    try:
        stays_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        stays_here = address.startswith("unix:")
    if not (stays_here or is_encrypted):
        raise ValueError(f"the key would go to {address} in clear, and others could read it on its way")


def _token_ids(prompt: Prompt) -> TokenIds | None:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
        return None
    return TokenIds(ids=[item for item in prompt if isinstance(item, int)])


def _messages(prompt: Prompt) -> Messages | None:
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return None
    return _chat([item for item in prompt if isinstance(item, Mapping)])


def _chat(turns: Sequence[Mapping[str, str]]) -> Messages:
    return Messages(messages=[Message(role=turn["role"], content=turn["content"]) for turn in turns])
