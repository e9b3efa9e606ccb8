"""Configuration of who may do what."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CERTS = "A folder with ca.crt, tls.crt and tls.key, which are read again when they change."


class SecurityConfig(BaseModel):
    """Certificates. Without any, whoever reaches a port may use it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gateway_certs: Path | None = Field(
        None, description=f"{CERTS} What the gateway shows to workers. With worker_certs: they trust nobody else."
    )
    worker_certs: Path | None = Field(None, description=f"{CERTS} What workers show to the gateway and to each other.")
    client_certs: Path | None = Field(
        None, description=f"{CERTS} What the gateway shows to clients, who need none themselves. null: plain text."
    )

    @field_validator("gateway_certs", "worker_certs", "client_certs")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Workers of a Ray cluster run in other folders.
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _both_ends(self) -> SecurityConfig:
        if (self.gateway_certs is None) != (self.worker_certs is None):
            one, other = (
                ("worker_certs", "gateway_certs") if self.gateway_certs is None else ("gateway_certs", "worker_certs")
            )
            raise ValueError(f"{other}: got null, expected a folder where {one} is given: both ends, or neither")
        return self
