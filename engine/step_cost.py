"""What a forward pass takes: the question, in plain numbers, and who answers it.

Schedulers, router, emulator and planner ask the same object (DESIGN §6). Its real form is
cluster/planning/cost_model.py; this file is what packages below `cluster` know of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.batch import Batch


@dataclass(frozen=True, slots=True)
class StepWork:
    """One forward pass. `prompts`: (new tokens, tokens already in the cache before them) of each row longer than one
    token. `decode_rows` rows of one token read `decode_context` tokens of KV together, their own included."""

    prompts: tuple[tuple[int, int], ...] = ()
    decode_rows: int = 0
    decode_context: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(new for new, _ in self.prompts)

    @property
    def token_count(self) -> int:
        return self.prompt_tokens + self.decode_rows


class StepCost(Protocol):
    """Predicts steps of one worker, and learns from those that it has run."""

    @property
    def saturation_tokens(self) -> int:
        """Prompt tokens in one step beyond which a larger step is no more efficient, only longer (DistServe's L_m)."""
        ...

    def step_s(self, work: StepWork) -> float:
        """Seconds of one forward pass, as corrected by what was observed. Cheap: microseconds."""
        ...

    def observe(self, work: StepWork, seconds: float) -> None:
        """Takes a step that was really run."""
        ...


def work_of(batch: Batch) -> StepWork:
    """A batch's work: its rows without what they hold."""
    prompts: list[tuple[int, int]] = []
    decode_rows = decode_context = 0
    for row in batch.rows:
        if len(row.token_ids) == 1:
            decode_rows += 1
            decode_context += row.end
        else:
            prompts.append((len(row.token_ids), row.start))
    return StepWork(tuple(prompts), decode_rows, decode_context)
