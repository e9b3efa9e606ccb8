"""The tokens that come to a gateway, counted as they come."""

from __future__ import annotations

from cluster.tally import Tally

# Upper ends of the classes of times, in seconds: vLLM's, and smaller ones for gaps.
TTFT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_BOUNDS_S = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


class TokenFlow:
    """Since the gateway's start. `prompt_tokens` counts prompts whose first token has come, `generation_tokens` what
    clients were given. A gap is the time between two arrivals of one choice's tokens: those that come together, after
    several steps of a worker, arrive once."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ttfts = Tally(TTFT_BOUNDS_S)
        self.gaps = Tally(GAP_BOUNDS_S)

    def first_token(self, prompt_tokens: int, ttft_s: float) -> None:
        """Call once for each request, when its first token comes."""
        self.prompt_tokens += prompt_tokens
        self.ttfts.add(ttft_s)
