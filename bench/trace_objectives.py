"""What requests of each trace are to achieve, for studies of Llama-3.1-8B on H200.

Chosen before any router was tuned on them. The pairs are presets that people know (MLPerf inference, server scenarios):
interactive chat and code as for Llama-3.1-8B, reasoning as for DeepSeek-R1. The Mooncake traces have prompts of 12,900
tokens on average and 91,000 at the 99th percentile, for which no preset exists: 3 s to the first token, 50 ms a token.
"""

from __future__ import annotations

from engine.objectives import Objectives

INTERACTIVE = Objectives(0.5, 0.03)
REASONING = Objectives(1.5, 0.015)
LONG_CONTEXT = Objectives(3.0, 0.05)

TRACE_OBJECTIVES = {
    "azure2023_conv": INTERACTIVE,
    "azure2023_code": INTERACTIVE,
    "mooncake_conversation": LONG_CONTEXT,
    "mooncake_synthetic": LONG_CONTEXT,
    "servegen_deepseek_r1.sampled": REASONING,
}
