"""transformers as an arm of bench/engine.py: its `generate`, and for decoding at a given context its forward pass in a
loop, which waits for nothing between steps."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.model_configs import MODELS
from engine.model_config import ModelConfig

WARM_UP_STEPS = 4


class TransformersEngine:
    """Attention by SDPA, weights as they come: what `from_pretrained` gives without further words."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        config: Any = model.config
        self.vocab_size = int(config.vocab_size)
        self._model: Any = model.to(device).eval()
        self._device = device

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        self._wait()

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` steps of `batch` sequences, `context` tokens long in the middle of them."""
        from transformers import DynamicCache

        config, dtype = self._model.config, self._model.dtype
        length = max(1, context - steps // 2 - WARM_UP_STEPS)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, length, head_dim)
            k, v = (torch.randn(shape, dtype=dtype, device=self._device) for _ in range(2))
            cache.update(k, v, layer)
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        began = 0.0
        with torch.inference_mode():
            for step in range(WARM_UP_STEPS + steps):
                if step == WARM_UP_STEPS:
                    self._wait()
                    began = time.perf_counter()
                output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = output.logits[:, -1:].argmax(-1)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def load(random: str, model: str, *, dtype: str, device: torch.device, threads: int) -> TransformersEngine:
    """`random` and `model` as for ours."""
    if threads:
        torch.set_num_threads(threads)
    if random:
        return TransformersEngine(_random(MODELS[random], getattr(torch, dtype), device), device)
    from transformers import AutoModelForCausalLM

    from engine.config import DEFAULT_MODEL
    from engine.model_source import resolve

    files = resolve(model or DEFAULT_MODEL)
    read: Any = AutoModelForCausalLM.from_pretrained
    if files.kind == "gguf":
        found = read(files.path.parent, gguf_file=files.path.name, dtype=getattr(torch, dtype))
    else:
        found = read(files.path, dtype=getattr(torch, dtype))
    return TransformersEngine(found, device)


def _random(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.kind == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(theirs)
    finally:
        torch.set_default_dtype(before)
