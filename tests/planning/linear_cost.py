"""A cost model that can be worked out by hand: linear in everything."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.step_cost import StepWork


@dataclass
class LinearCost:
    """Implements engine.step_cost.StepCost, and the rest of what cluster/planning/cost_model.py offers."""

    fixed_s: float = 2e-3
    token_s: float = 5e-5
    pair_s: float = 0.0
    row_s: float = 1e-4
    context_s: float = 2e-7
    token_bytes: int = 1024
    saturation_tokens: int = 512
    kv_capacity_tokens: int = 1 << 20
    gpus: int = 1
    seen: list[tuple[StepWork, float]] = field(default_factory=list)

    def step_s(self, work: StepWork) -> float:
        pairs = sum(new * start + new * (new + 1) / 2 for new, start in work.prompts)
        rows_s = self.row_s * work.decode_rows + self.context_s * work.decode_context
        return self.fixed_s + self.token_s * work.prompt_tokens + self.pair_s * pairs + rows_s

    def observe(self, work: StepWork, seconds: float) -> None:
        self.seen.append((work, seconds))

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float:
        size = chunk_tokens or new_tokens
        chunks = [(min(size, new_tokens - start), context + start) for start in range(0, new_tokens, size)]
        return sum(self.step_s(StepWork((chunk,))) for chunk in chunks)

    def decode_s(self, rows: int, context_tokens: int) -> float:
        return self.step_s(StepWork((), rows, context_tokens))

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.token_bytes

    def transfer_s(self, tokens: int, bytes_per_s: float) -> float:
        return self.kv_bytes(tokens) / bytes_per_s
