"""Configuration of logs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoggingConfig(BaseModel):
    """What every process of the service writes to stderr."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["text", "json"] = Field("text", description="json: one object a line.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="What is said at least. TANDEM_LOG_LEVEL overrides it."
    )
    access: bool = Field(True, description="At level info, a line for each request that has ended at the gateway.")
