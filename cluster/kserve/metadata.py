"""`ModelMetadata`: the tensors that a model takes and gives."""

from __future__ import annotations

from tandem.kserve import open_inference_pb2 as pb

from cluster.kserve.infer_answer import OUTPUTS
from cluster.kserve.infer_request import IDS, OPTIONS, TEXT, VERSION
from cluster.kserve.tensors import BYTES

PLATFORM = "tandem"
# Either of the first two, and any of the others: those that clients send as tensors. All can be parameters as well.
INPUTS = {
    TEXT: (BYTES, 1),
    IDS: ("INT64", -1),
    OPTIONS: (BYTES, 1),
    "stream": ("BOOL", 1),
    "exclude_input_in_output": ("BOOL", 1),
    "max_tokens": ("INT32", 1),
    "min_tokens": ("INT32", 1),
    "temperature": ("FP32", 1),
    "top_p": ("FP32", 1),
    "top_k": ("INT32", 1),
    "min_p": ("FP32", 1),
    "repetition_penalty": ("FP32", 1),
    "presence_penalty": ("FP32", 1),
    "frequency_penalty": ("FP32", 1),
    "seed": ("INT64", 1),
    "n": ("INT32", 1),
    "stop": (BYTES, -1),
    "stop_token_ids": ("INT64", -1),
    "ignore_eos": ("BOOL", 1),
}


def model_metadata(model_name: str) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model_name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=datatype, shape=[size]) for name, (datatype, size) in INPUTS.items()],
        outputs=[tensor(name=name, datatype=datatype, shape=[-1]) for name, datatype in OUTPUTS.items()],
    )
