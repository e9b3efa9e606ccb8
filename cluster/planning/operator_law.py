"""Step times as a sum of operator terms: any model, any device profile, any parallel split.

    layers · ( GEMMs of all the step's tokens: qkv, o, gate and up, down
             + prefill attention of each prompt row + decode attention of all decode rows
             + norms, rotation, activation, KV writes: their bytes
             + 2 all-reduces when tp > 1 )
    + embedding + output head and drawing, of the rows that are drawn from + hand-over between stages + fixed

A stage waits for the one before it, and one batch is under way at a time: with pp stages a step is as long as with one,
and pp − 1 hand-overs longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planning.capacity import LOGIT_BYTES, rank_share
from cluster.planning.device_profile import DeviceProfile
from cluster.planning.model_shape import ModelShape
from cluster.planning.step_law import Interpolated
from engine.step_cost import StepWork

# What a step costs besides its kernels. On a GPU: packing the batch, replaying a graph or launching, reading the tokens
# back; on a CPU: packing, the hop to the computing thread, framework calls. An assumption until steps are observed.
FIXED_GPU_S = 3e-4
FIXED_CPU_S = 5e-4
# Ranks that share the fast link; beyond, stages hand over by the network. And what one hand-over costs at least.
RANKS_PER_NODE = 8
HAND_OVER_S = 2e-5
# Passes over a row of logits while drawing: conversion, maximum or sort, probabilities.
SAMPLING_PASSES = 3


class OperatorLaw:
    """Implements StepLaw. Weights, activations and KV have the profile's element size.

    Every prompt row counts as drawn from: a step does not say which chunk is a prompt's last. For the others that is
    too much by one reading of the output head.
    """

    def __init__(self, device: DeviceProfile, model: ModelShape, tp: int = 1, pp: int = 1) -> None:
        self._device, self._model, self._tp, self._pp = device, model, tp, pp
        self._share = rank_share(model, tp, pp)
        self._fixed_s = FIXED_CPU_S if device.name == "cpu" else FIXED_GPU_S
        self._tokens_s = Interpolated(self._token_terms_s)
        self._drawn_s = Interpolated(self._drawn_terms_s)
        # By the number of rows: seconds of decode attention over all layers, by context.
        self._attention_s: dict[int, Interpolated] = {}

    def decode_s(self, rows: int, context_tokens: int) -> float:
        attention_s = self._attention_s.get(rows)
        if attention_s is None:
            attention_s = self._attention_s[rows] = self._decode_attention(rows)
        return self._tokens_s(rows) + self._drawn_s(rows) + attention_s(max(context_tokens, rows))

    def prompt_s(self, work: StepWork) -> float:
        rows, share = work.decode_rows, self._share
        seconds = self._tokens_s(work.token_count) + self._drawn_s(len(work.prompts) + rows)
        new, context, batch = equal_prompts(work.prompts)
        seconds += self._model.num_layers * self._device.prefill_attention_s(
            new, context, share.num_heads, share.num_kv_heads, self._model.head_dim, batch
        )
        if rows:
            if rows not in self._attention_s:
                self._attention_s[rows] = self._decode_attention(rows)
            seconds += self._attention_s[rows](max(work.decode_context, rows))
        return seconds

    def _decode_attention(self, rows: int) -> Interpolated:
        device, share, head_dim, layers = self._device, self._share, self._model.head_dim, self._model.num_layers
        return Interpolated(
            lambda context: (
                layers * device.decode_attention_s(rows, context, share.num_heads, share.num_kv_heads, head_dim)
            )
        )

    def _token_terms_s(self, tokens: int) -> float:
        """All that depends on the number of tokens alone, the fixed part included."""
        layer_s = self._gemms_s(tokens) + self._vectors_s(tokens)
        hidden_bytes = tokens * self._model.hidden_size * self._device.element_bytes
        if self._tp > 1:
            layer_s += 2 * self._device.all_reduce_s(hidden_bytes, self._tp)
        seconds = self._fixed_s + self._model.num_layers * layer_s + self._device.memory_copy_s(hidden_bytes)
        if self._pp > 1:
            is_near = self._tp * self._pp <= RANKS_PER_NODE
            bytes_s = self._device.nvlink_bytes_s if is_near else self._device.network_bytes_s
            seconds += (self._pp - 1) * (HAND_OVER_S + hidden_bytes / bytes_s)
        return seconds

    def _gemms_s(self, tokens: int) -> float:
        """Of one layer's matrices, one rank's share."""
        device, share, model = self._device, self._share, self._model
        hidden, q_size = model.hidden_size, share.num_heads * model.head_dim
        up_matrices = model.ffn_matrices - 1
        return (
            device.gemm_s(tokens, q_size + 2 * share.num_kv_heads * model.head_dim, hidden)
            + device.gemm_s(tokens, hidden, q_size)
            + device.gemm_s(tokens, up_matrices * share.intermediate_size, hidden)
            + device.gemm_s(tokens, hidden, share.intermediate_size)
        )

    def _vectors_s(self, tokens: int) -> float:
        """Of one layer's operators that only move bytes: five kernels."""
        share, model, element_bytes = self._share, self._model, self._device.element_bytes
        kv_size = share.num_kv_heads * model.head_dim
        # Elements read and written per token. A norm that adds the residual reads two vectors and writes two.
        norm, rotation = 4 * model.hidden_size, 2 * (share.num_heads * model.head_dim + kv_size)
        activation, kv_write = model.ffn_matrices * share.intermediate_size, 4 * kv_size
        return sum(
            self._moved_s(tokens * each * element_bytes) for each in (norm, norm, rotation, activation, kv_write)
        )

    def _moved_s(self, moved_bytes: int) -> float:
        """Of an operator that reads and writes so many bytes together."""
        return self._device.memory_copy_s(moved_bytes / 2)

    def _drawn_terms_s(self, rows: int) -> float:
        """The output head's GEMM, and drawing one token from each row's logits."""
        vocab_size, device = self._model.vocab_size, self._device
        seconds = device.gemm_s(rows, self._share.vocab_size, self._model.hidden_size)
        if self._tp > 1:
            # Gathering the ranks' logits moves half of what an all-reduce of them would.
            seconds += device.all_reduce_s(rows * vocab_size * device.element_bytes, self._tp) / 2
        return seconds + self._moved_s(SAMPLING_PASSES * rows * vocab_size * LOGIT_BYTES)


def equal_prompts(prompts: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """(new tokens, context, how many): equal prompts with the same tokens and the same pairs of tokens in all.

    One kernel computes a step's prompts together, so their times are not simply added.
    """
    if len(prompts) == 1:
        return *prompts[0], 1
    pairs = sum(new * (context + new / 2) for new, context in prompts)
    mean = sum(new for new, _ in prompts) / len(prompts)
    # Squares of unequal lengths add up to more than those of equal ones, so this is never negative.
    context = pairs / (len(prompts) * mean) - mean / 2
    return max(1, round(mean)), max(0, round(context)), len(prompts)
