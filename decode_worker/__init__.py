"""The decode loop: receiving KV, continuous batching, streaming tokens."""
