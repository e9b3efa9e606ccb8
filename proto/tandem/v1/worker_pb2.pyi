from tandem.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Command(_message.Message):
    __slots__ = ("submit", "cancel")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling_params", "seed", "prefill_address", "deadline_s", "salt", "ttft_due_s", "tpot_s", "prompt_tokens", "resumed", "traceparent", "tracestate", "ticket")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TTFT_DUE_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling_params: _inference_pb2.SamplingParams
    seed: int
    prefill_address: str
    deadline_s: float
    salt: bytes
    ttft_due_s: float
    tpot_s: float
    prompt_tokens: int
    resumed: _containers.RepeatedCompositeFieldContainer[ChoiceSoFar]
    traceparent: str
    tracestate: str
    ticket: bytes
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling_params: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., prefill_address: _Optional[str] = ..., deadline_s: _Optional[float] = ..., salt: _Optional[bytes] = ..., ttft_due_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., resumed: _Optional[_Iterable[_Union[ChoiceSoFar, _Mapping]]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class ChoiceSoFar(_message.Message):
    __slots__ = ("token_ids", "is_finished")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    is_finished: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., is_finished: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class TokenFrame(_message.Message):
    __slots__ = ("step", "events")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, step: _Optional[int] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("request_id", "delta", "done", "failed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    delta: Delta
    done: Done
    failed: Failed
    def __init__(self, request_id: _Optional[str] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("choice", "tokens", "finish_reason", "matched_token_id")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    choice: int
    tokens: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    finish_reason: str
    matched_token_id: int
    def __init__(self, choice: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., matched_token_id: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("cached_tokens", "receipt")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    receipt: _inference_pb2.Receipt
    def __init__(self, cached_tokens: _Optional[int] = ..., receipt: _Optional[_Union[_inference_pb2.Receipt, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("status_code", "message", "details")
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    status_code: int
    message: str
    details: bytes
    def __init__(self, status_code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[bytes] = ...) -> None: ...

class WorkerStats(_message.Message):
    __slots__ = ("worker_id", "role", "address", "incarnation", "model", "running", "waiting", "queued_tokens", "blocks_total", "blocks_free", "blocks_cached", "block_size", "prefill_tokens_per_s", "decode_step_s", "steps", "draining", "queued_s", "context_tokens", "prefill_scale", "decode_scale", "cost_error_median", "cost_error_p90", "local_only", "links", "kv_events", "kv_faults", "prefix_queries", "prefix_hits", "preemptions", "kv_bytes", "kv_streams_broken", "kv_orphan_bytes", "lease_expiries", "public_key")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SCALE_FIELD_NUMBER: _ClassVar[int]
    DECODE_SCALE_FIELD_NUMBER: _ClassVar[int]
    COST_ERROR_MEDIAN_FIELD_NUMBER: _ClassVar[int]
    COST_ERROR_P90_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    KV_FAULTS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_STREAMS_BROKEN_FIELD_NUMBER: _ClassVar[int]
    KV_ORPHAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_EXPIRIES_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    address: str
    incarnation: int
    model: str
    running: int
    waiting: int
    queued_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    block_size: int
    prefill_tokens_per_s: float
    decode_step_s: float
    steps: int
    draining: bool
    queued_s: float
    context_tokens: int
    prefill_scale: float
    decode_scale: float
    cost_error_median: float
    cost_error_p90: float
    local_only: bool
    links: _containers.RepeatedCompositeFieldContainer[LinkRate]
    kv_events: KVEvents
    kv_faults: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    kv_bytes: int
    kv_streams_broken: int
    kv_orphan_bytes: int
    lease_expiries: int
    public_key: bytes
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., block_size: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., steps: _Optional[int] = ..., draining: _Optional[bool] = ..., queued_s: _Optional[float] = ..., context_tokens: _Optional[int] = ..., prefill_scale: _Optional[float] = ..., decode_scale: _Optional[float] = ..., cost_error_median: _Optional[float] = ..., cost_error_p90: _Optional[float] = ..., local_only: _Optional[bool] = ..., links: _Optional[_Iterable[_Union[LinkRate, _Mapping]]] = ..., kv_events: _Optional[_Union[KVEvents, _Mapping]] = ..., kv_faults: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., preemptions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_streams_broken: _Optional[int] = ..., kv_orphan_bytes: _Optional[int] = ..., lease_expiries: _Optional[int] = ..., public_key: _Optional[bytes] = ...) -> None: ...

class LinkRate(_message.Message):
    __slots__ = ("prefill_address", "bytes_per_s")
    PREFILL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    prefill_address: str
    bytes_per_s: float
    def __init__(self, prefill_address: _Optional[str] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class KVEvents(_message.Message):
    __slots__ = ("sequence", "is_snapshot", "stored", "evicted")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    is_snapshot: bool
    stored: _containers.RepeatedScalarFieldContainer[int]
    evicted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., is_snapshot: _Optional[bool] = ..., stored: _Optional[_Iterable[int]] = ..., evicted: _Optional[_Iterable[int]] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("interval_s", "role", "kv_resync", "on_its_way", "ticket_key", "now_s")
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    KV_RESYNC_FIELD_NUMBER: _ClassVar[int]
    ON_ITS_WAY_FIELD_NUMBER: _ClassVar[int]
    TICKET_KEY_FIELD_NUMBER: _ClassVar[int]
    NOW_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    role: str
    kv_resync: bool
    on_its_way: int
    ticket_key: bytes
    now_s: float
    def __init__(self, interval_s: _Optional[float] = ..., role: _Optional[str] = ..., kv_resync: _Optional[bool] = ..., on_its_way: _Optional[int] = ..., ticket_key: _Optional[bytes] = ..., now_s: _Optional[float] = ...) -> None: ...
