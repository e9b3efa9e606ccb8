"""Configuration of traces: where they go, and of which requests there are any."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator


class TracingConfig(BaseModel):
    """What is null is taken from OpenTelemetry's own environment variables, where they are set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str | None = Field(
        None,
        description="The collector's port for OTLP over gRPC, http://HOST:PORT or https://HOST:PORT. Empty: no traces. "
        "null: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT, none without them.",
    )
    sample_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the requests that are traced, of those whose clients do not say. null: what "
        "OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say, all without them.",
    )
    max_queued_spans: int = Field(
        4096, ge=512, le=1 << 20, description="Spans of a process that wait for the collector; more are dropped."
    )

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value and not is_endpoint(value):
            raise ValueError("http://HOST:PORT or https://HOST:PORT")
        return value


def is_endpoint(value: str) -> bool:
    """Whether it names where a collector listens."""
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        return False
