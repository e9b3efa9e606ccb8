from tandem.v1 import inference_pb2 as _inference_pb2
from tandem.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling_params", "seed", "have_tokens", "layout", "salt", "ttft_due_s", "prompt_tokens", "lease", "wanted", "ticket", "proof")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    HAVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TTFT_DUE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling_params: _inference_pb2.SamplingParams
    seed: int
    have_tokens: int
    layout: _kv_pb2.KVLayout
    salt: bytes
    ttft_due_s: float
    prompt_tokens: int
    lease: int
    wanted: _containers.RepeatedCompositeFieldContainer[KVRange]
    ticket: bytes
    proof: bytes
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling_params: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., have_tokens: _Optional[int] = ..., layout: _Optional[_Union[_kv_pb2.KVLayout, _Mapping]] = ..., salt: _Optional[bytes] = ..., ttft_due_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., lease: _Optional[int] = ..., wanted: _Optional[_Iterable[_Union[KVRange, _Mapping]]] = ..., ticket: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class KVRange(_message.Message):
    __slots__ = ("first_token", "end_token", "first_layer", "end_layer")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    end_token: int
    first_layer: int
    end_layer: int
    def __init__(self, first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ...) -> None: ...
