"""What people's own programs call Triton with, tritonclient, against a service of ours: `python triton_program.py
ADDRESS MODEL`. Prints what it saw, as one line of JSON.

A process of its own: tritonclient brings stubs of the same protocol, and one process cannot have two.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main(address: str, model: str) -> None:
    with triton.InferenceServerClient(address) as client:
        seen: dict[str, Any] = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model ready": client.is_model_ready(model),
            "server": client.get_server_metadata().name,
            "inputs": [each.name for each in client.get_model_metadata(model).inputs],
            "whole": whole(client, model),
            "ids": ids(client, model),
            "streamed": streamed(client, model),
            "errors": errors(client, model),
        }
    print(json.dumps(seen))


def text_input(text: str, *, size: int = 1) -> triton.InferInput:
    tensor = triton.InferInput("text_input", [size], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()] * size, dtype=np.object_))
    return tensor


def whole(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    temperature = triton.InferInput("temperature", [1], "FP32")
    temperature.set_data_from_numpy(np.zeros(1, np.float32))
    parameters = {"max_tokens": 6, "top_p": 0.9, "ignore_eos": True}
    answer = client.infer(model, [text_input("One, two,"), temperature], request_id="7", parameters=parameters)
    names = ("output_ids", "num_input_tokens", "num_output_tokens", "sequence_index")
    counts = {name: answer.as_numpy(name).tolist() for name in names}
    texts = {name: answer.as_numpy(name).astype(str).tolist() for name in ("text_output", "finish_reason")}
    return {"id": answer.get_response().id, **texts, **counts}


def ids(client: triton.InferenceServerClient, model: str) -> list[str]:
    tensor = triton.InferInput("input_ids", [1, 3], "INT64")
    tensor.set_data_from_numpy(np.array([[5, 6, 7]], np.int64))
    outputs = [triton.InferRequestedOutput("finish_reason")]
    answer = client.infer(model, [tensor], outputs=outputs, parameters={"max_tokens": 2, "ignore_eos": True})
    return [output.name for output in answer.get_response().outputs]


def streamed(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    """As the clients of Triton's vLLM backend do it."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    options = {"temperature": "0", "max_tokens": 6, "ignore_eos": True}
    sampling.set_data_from_numpy(np.array([json.dumps(options).encode()], dtype=np.object_))
    stream = triton.InferInput("stream", [1], "BOOL")
    stream.set_data_from_numpy(np.array([True]))
    for request_id, text in (("a", "One, two,"), ("b", "")):
        client.async_stream_infer(
            model, [text_input(text), stream, sampling], request_id=request_id, enable_empty_final_response=True
        )
    text, error_of_b, finals = "", "", 0
    while finals < 2:
        result, error = answers.get(timeout=60)
        if error is not None:
            error_of_b, finals = error.message(), finals + 1
            continue
        text += "".join(result.as_numpy("text_output").astype(str))
        finals += result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    return {"text": text, "error of b": error_of_b}


def errors(client: triton.InferenceServerClient, model: str) -> list[list[str]]:
    found = []
    for name, tensor, parameters in (
        (model, text_input("a"), {"temperature": -1.0}),
        (model, text_input("a", size=2), {}),
        ("huge", text_input("a"), {}),
    ):
        try:
            client.infer(name, [tensor], parameters=parameters)
        except InferenceServerException as error:
            found.append([error.status(), error.message()])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
