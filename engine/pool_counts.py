"""What happened to those who wanted blocks of a pool, counted since its worker's loop began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PoolCounts:
    """`prefix_queries`: prompt tokens that were looked up in the prefix cache, `prefix_hits` those that were there.
    `preemptions`: sequences that gave their blocks back to be computed anew. `lease_expiries`: prompts and requests
    whose time was up."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    lease_expiries: int = 0

    def looked_up(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Call when a prompt has got its blocks: who finds too few asks again, and again."""
        self.prefix_queries += prompt_tokens
        self.prefix_hits += cached_tokens
