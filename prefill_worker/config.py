"""Configuration of the prefill loop."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PrefillConfig(BaseModel):
    """Limits of one prefill worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_budget: int = Field(512, ge=1, description="Most prompt tokens in one step; longer prompts run in chunks.")
    max_batch_prompts: int = Field(
        1,
        ge=0,
        description="Most prompts in one step; 0 for as many as fit below the length that saturates the device, by the "
        "cost model. 1 suits a CPU: a second prompt only makes both slower.",
    )
    max_queued: int = Field(256, ge=1, description="Most prompts waiting; one more is refused as overloaded.")
    max_frame_bytes: int = Field(2 << 20, ge=4096, description="Largest KV payload of one frame.")
