"""Configuration of the decode loop."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DecodeConfig(BaseModel):
    """Limits of one decode worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch: int = Field(64, ge=1, description="Most sequences in one decode step.")
    local_token_budget: int = Field(
        256, ge=1, description="Most prompt tokens computed here in one step (local routes and preempted sequences)."
    )
    max_queued: int = Field(512, ge=1, description="Most requests accepted and unfinished; one more is refused.")
    max_transfers: int = Field(32, ge=1, description="Most KV streams open at once.")
    schedule_ahead: bool | Literal["auto"] = Field(
        "auto", description="Schedule the next step while one runs. auto: where a GPU computes, and Python does not."
    )
