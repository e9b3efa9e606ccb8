"""Configuration of the decode loop."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    max_steps: int = Field(
        1,
        ge=1,
        description="Most decode steps that the runner takes in one go while nothing changes its batch. Only a runner "
        "that offers it does (the emulated one); tokens then come when the run ends. Excludes schedule_ahead.",
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> DecodeConfig:
        if self.schedule_ahead is True and self.max_steps > 1:
            raise ValueError(f"max_steps: got {self.max_steps}, expected 1 with schedule_ahead, or schedule_ahead off")
        return self
