"""The prefill loop: queue, chunked batches, publishing KV."""
