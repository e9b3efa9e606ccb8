"""Configuration of the controller: when workers change their role, and how many there may be."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ControllerConfig(BaseModel):
    """Limits of flips and scaling. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=False, description="Let workers change their role, and their number, by themselves.")
    min_prefill: int = Field(
        default=1, ge=0, description="Fewest prefill workers. 0: decode workers may be left to compute the prompts."
    )
    min_decode: int = Field(default=1, ge=1, description="Fewest decode workers.")
    min_workers: int | None = Field(
        default=None, ge=1, description="Fewest prefill and decode workers together; null: those configured."
    )
    max_workers: int | None = Field(
        default=None, ge=1, description="Most prefill and decode workers together; null: those configured."
    )
    interval_s: float = Field(default=5.0, gt=0, allow_inf_nan=False, description="How often it decides.")
    window_s: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="How long an arrival counts as recent demand."
    )
    min_requests: int = Field(default=20, ge=1, description="Fewer recent requests say nothing about demand.")
    min_gain: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="A better split is gone for when the load on the bottleneck falls by this part of itself.",
    )
    min_shift: float = Field(
        default=0.3,
        gt=0,
        allow_inf_nan=False,
        description="A flip is undone only after demand has moved from one role to the other by this part.",
    )
    confirmations: int = Field(default=3, ge=1, description="Decisions in a row that must agree to be acted on.")
    cooldown_s: float = Field(
        default=10.0, ge=0, allow_inf_nan=False, description="Rest after an action, before the next."
    )
    busy: float = Field(
        default=0.7, gt=0, le=1, description="Load on the bottleneck, as a part of what it bears, from which to act."
    )
    grow_above: float = Field(
        default=0.95, gt=0, allow_inf_nan=False, description="Load of the best split from which a worker is added."
    )
    shrink_below: float = Field(
        default=0.6, ge=0, allow_inf_nan=False, description="Load that one worker fewer would have, to remove one."
    )
    target: float = Field(default=0.9, gt=0, le=1, description="Share of requests that are to meet their objectives.")
    flip_limit_s: float = Field(
        default=120.0,
        gt=0,
        allow_inf_nan=False,
        description="A worker that is not free to change by then keeps its role. More than the longest answers take.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.shrink_below < self.grow_above:
            raise ValueError(
                f"shrink_below: got {self.shrink_below}, expected less than grow_above, which is {self.grow_above}"
            )
        fewest, most = self.min_workers, self.max_workers
        if fewest is not None and most is not None and fewest > most:
            raise ValueError(f"min_workers: got {fewest}, expected at most max_workers, which is {most}")
        return self
