"""What one worker can do alone: model, weights, tokenizer, block pool, KV cache, batch, sampler, runner."""
