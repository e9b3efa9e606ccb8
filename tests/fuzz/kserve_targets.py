"""What clients of KServe's protocol ask of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

from google.protobuf.message import DecodeError
from tandem.kserve import open_inference_pb2 as pb

from cluster.kserve.infer_answer import InferAnswer
from cluster.kserve.infer_request import InferRequest
from cluster.messages import Chunk, Complete
from decode_worker.stream import Delta, Done, TokenFrame
from engine.batch import Sampled
from engine.errors import TandemError
from engine.request import FinishReason, Receipt
from tests.fuzz.call_targets import LONG_S, scripted_gateway
from tests.fuzz.kv_targets import on_virtual_time
from tests.fuzz.target import Target
from tests.kserve.service import request, tensor


def infer(data: bytes) -> None:
    on_virtual_time(_inferred, pb.ModelInferRequest.FromString(data))


async def _inferred(message: pb.ModelInferRequest) -> None:
    asked = InferRequest(message)
    answer = InferAnswer(message, "tiny", as_raw=asked.is_raw, before=asked.before)
    done = [TokenFrame(1, (Delta("r#1", 0, (Sampled(1),), FinishReason.LENGTH), Done("r#1", 0, Receipt())))]
    async with scripted_gateway(done) as gateway:
        stream = gateway.generate(asked.generate_request("r", None, ""))
        async with asyncio.timeout(LONG_S), aclosing(cast("AsyncGenerator[Any, None]", stream)) as parts:
            async for part in parts:
                for response in _said(answer, part):
                    response.SerializeToString()


def _said(answer: InferAnswer, part: Chunk | Complete) -> Sequence[pb.ModelInferResponse]:
    return [answer.chunk(part)] if isinstance(part, Chunk) else [answer.whole(part), answer.last(part)]


def _requests() -> Sequence[bytes]:
    raw = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[b"\x01\0\0\0a", b"\x05\0\0\0"])
    raw.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    raw.inputs.add(name="max_tokens", datatype="INT32", shape=[1, 1])
    messages = [
        request(max_tokens=4, temperature=0.5, top_k="3", stop="x", timeout=1_000_000),
        request(tensor("input_ids", "INT64", 1, 2, 3, shape=[1, 3]), tensor("stop_words", "BYTES", b"x"), text=None),
        request(tensor("sampling_parameters", "BYTES", b'{"seed": 1, "logit_bias": {"1": 0.5}, "min_p": 0.1}')),
        request(exclude_input_in_output=False, ttft_ms=50.0, guided_regex="[ab]+"),
        raw,
    ]
    messages[0].outputs.add(name="text_output")
    return [message.SerializeToString() for message in messages]


TARGETS = (Target("infer", infer, _requests, (DecodeError, TandemError)),)
