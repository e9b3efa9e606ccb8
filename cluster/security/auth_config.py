"""Configuration of who may call a gateway, and of how much each tenant may ask for. Secrets are in files of their own:
this is handed to workers, and may be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class JwtConfig(BaseModel):
    """JSON Web Tokens of an identity provider."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_file: Path | None = Field(
        default=None,
        description="The provider's public keys, PEM or a JWKS; read again when it changes. null: no token counts.",
    )
    issuer: str | None = Field(default=None, description="What `iss` must be; null: not looked at.")
    audience: str | None = Field(
        default=None, description="What `aud` must contain; null: only tokens without an audience count."
    )
    tenant_claim: str = Field(default="sub", min_length=1, description="The claim that names the tenant.")


class AuthConfig(BaseModel):
    """Who may call. Without keys and tokens everybody may, and all are one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_file: Path | None = Field(
        default=None, description="Hashes of API keys, written by `tandem keys new`; read again when it changes."
    )
    jwt: JwtConfig = JwtConfig()
    salt_file: Path | None = Field(
        default=None,
        description="A secret of at least 32 bytes that keeps the tenants' prefixes apart. null: a new one for each "
        "start of the gateway, which then finds none of the prefixes that workers cached before.",
    )
    operators: tuple[str, ...] = Field(
        default=(),
        description="Tenants that may ask for the cluster's status, and see everybody's requests on the page.",
    )

    @property
    def is_required(self) -> bool:
        """Whether callers have to say who they are."""
        return self.keys_file is not None or self.jwt.keys_file is not None


class QuotaConfig(BaseModel):
    """What one tenant may ask for; null: no limit. Each limit over time is a bucket of that size, which fills up again
    evenly over that time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="Calls of any method.")
    burst: int | None = Field(
        default=None, ge=1, description="Calls that may come at once; null: those of a second, and at least one."
    )
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Tokens of prompts and answers together.")
    tokens_per_day: int | None = Field(default=None, ge=1, description="The same over a day.")
    max_concurrent: int | None = Field(default=None, ge=1, description="Requests at once, those that wait included.")

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_s is None:
            raise ValueError("burst goes with requests_per_s")
        return self
