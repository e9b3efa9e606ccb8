"""Words shared by all who handle a request: why it finished, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended. `stop`: a stop condition; `length`: a limit; `abort`: cancelled or failed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where one request's time went, in seconds, and what its KV cost. Phases follow one another without overlap.

    gateway_queue    arrival at the gateway → handed to the decode worker (tokenizing and routing included)
    prefill_queue    arrival at the prefill worker → its first chunk starts
    prefill          first chunk starts → first token sampled
    kv_exposed       first token at the decode worker → all KV there (0 when KV came first)
    decode_queue     all KV there → first decode step that includes the sequence starts
    decode           that start → last token

    Where attempts failed, these are of the last one, and `retry` is what the others took: from the first hand-over to a
    decode worker to the last.
    `predicted_*`: what the router expected when it chose, 0 where it expected nothing.
    """

    gateway_queue_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    kv_exposed_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    kv_bytes: int = 0
    kv_bytes_before_first_token: int = 0
    preemptions: int = 0
    retries: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    retry_s: float = 0.0

    @property
    def early_share(self) -> float:
        """Share of the KV bytes that had left the prefill worker before the first token was sampled."""
        return self.kv_bytes_before_first_token / self.kv_bytes if self.kv_bytes else 0.0
