"""What fits into a worker's memory, and how its ranks share the model: plain arithmetic for cost model and planner."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planning.model_shape import ModelShape
from engine.errors import ConfigError

# Part of a device's memory that weights, KV and activations may fill; the rest is the runtime's, and fragmentation.
USABLE_MEMORY = 0.9
# The largest step whose activations must find room, and the rows that draw from float32 logits in it.
STEP_TOKENS = 8192
STEP_SAMPLES = 256
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankShare:
    """The largest share that any of a worker's ranks has; what they wait for, and what must fit. Where KV heads are
    fewer than tensor ranks, several ranks hold the same."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    def kv_token_bytes(self, head_dim: int, element_bytes: int) -> int:
        return self.num_layers * 2 * self.num_kv_heads * head_dim * element_bytes


def rank_share(model: ModelShape, tp: int, pp: int) -> RankShare:
    """Also where shares are unequal: then the largest, which the others wait for."""
    return RankShare(
        num_layers=-(-model.num_layers // pp),
        num_heads=-(-model.num_heads // tp),
        num_kv_heads=-(-model.num_kv_heads // tp),
        intermediate_size=-(-model.intermediate_size // tp),
        vocab_size=-(-model.vocab_size // tp),
    )


def check_split(model: ModelShape, tp: int, pp: int) -> None:
    """Raises ConfigError for a split that no planner should choose: heads that do not divide, stages without layers."""
    if tp < 1 or model.num_heads % tp:
        fits = ", ".join(str(ranks) for ranks in range(1, model.num_heads + 1) if model.num_heads % ranks == 0)
        raise ConfigError(f"tp: got {tp}, expected a divisor of {model.name}'s {model.num_heads} heads: {fits}")
    if not 1 <= pp <= model.num_layers:
        raise ConfigError(f"pp: got {pp}, expected 1 to {model.num_layers}, the layers of {model.name}")


def activation_bytes(model: ModelShape, share: RankShare, element_bytes: int) -> int:
    """Memory of one rank during the largest step: a few vectors per token, and logits."""
    ffn = (model.ffn_matrices - 1) * share.intermediate_size
    attention = (2 * share.num_heads + 2 * share.num_kv_heads) * model.head_dim
    per_token = (4 * model.hidden_size + max(ffn, attention)) * element_bytes
    return STEP_TOKENS * per_token + STEP_SAMPLES * model.vocab_size * LOGIT_BYTES


def kv_capacity_tokens(model: ModelShape, memory_bytes: float, tp: int = 1, pp: int = 1, element_bytes: int = 2) -> int:
    """Tokens of KV that a worker of tp · pp devices of `memory_bytes` each can hold beside weights and activations;
    0 when not even those fit."""
    share = rank_share(model, tp, pp)
    weights = model.weight_bytes(element_bytes) / (tp * pp)
    free = memory_bytes * USABLE_MEMORY - weights - activation_bytes(model, share, element_bytes)
    return max(0, int(free // share.kv_token_bytes(model.head_dim, element_bytes)))
